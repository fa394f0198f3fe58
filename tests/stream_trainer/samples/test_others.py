"""Fields by the producers' own names."""

import json
from typing import Any

import pytest
from pydantic import ValidationError

from stream_trainer.errors import SampleError
from stream_trainer.records import Partition, Record, Sample
from stream_trainer.samples.byte_tokenizer import byte_tokenizer
from stream_trainer.samples.decoder import Decoder
from stream_trainer.settings.schema import SampleSettings

ALPACA = {"prompt": ("instruction", "input"), "response": "output"}
SHAREGPT = {"messages": "conversations", "role": "from", "content": "value"}
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def decode(given: dict[str, Any], fields: dict[str, Any], **settings: Any) -> Sample:
    decoder = Decoder(byte_tokenizer(), SampleSettings(fields=fields, **settings))
    sample = decoder.decode(Record(Partition("log", 0), 0, 1, json.dumps(given).encode()))
    assert sample is not None
    return sample


@pytest.mark.parametrize(
    ("given", "fields", "ours"),
    [
        ({"instruction": "Add", "input": "1 2", "output": "3"}, ALPACA, {"prompt": "Add\n1 2", "response": "3"}),
        ({"instruction": "Add", "input": "", "output": "3"}, ALPACA, {"prompt": "Add", "response": "3"}),
        ({"prompt": "a", "completion": "b"}, {"response": "completion"}, {"prompt": "a", "response": "b"}),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, {"response": "chosen"}, {"prompt": "a", "response": "b"}),
        ({"chosen": TURNS, "rejected": []}, {"messages": "chosen"}, {"messages": TURNS}),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
            SHAREGPT,
            {"messages": TURNS},
        ),
        ({"body": "a", "uuid": "7"}, {"text": "body", "id": "uuid"}, {"text": "a", "id": "7"}),
        ({"text": "a"}, ALPACA, {"text": "a"}),
    ],
)
def test_records_of_others_are_those_of_ours(
    given: dict[str, Any], fields: dict[str, Any], ours: dict[str, Any]
) -> None:
    found, expected = decode(given, fields), decode(ours, {})
    assert (found.input_ids, found.labels, found.id) == (expected.input_ids, expected.labels, expected.id)


@pytest.mark.parametrize(
    ("given", "fields", "told"),
    [
        ({"prompt": "a", "completion": "b", "response": "c"}, {"response": "completion"}, "ambiguous_fields: response"),
        ({"input": "a", "output": "b"}, ALPACA, "missing_fields: needs instruction"),
        ({"instruction": 3, "input": "a", "output": "b"}, ALPACA, "wrong_type: one of instruction, input is a int"),
        ({"conversations": [{"from": "human", "value": "x"}]}, {}, "samples.fields={messages: conversations"),
        ({"instruction": "a", "output": "x"}, {}, "samples.fields={prompt: [instruction, input]"),
        ({"text": "a", "label": True}, {}, "unread_field: label"),
        ({"text": "a", "rejected": "b"}, {}, "unread_field: rejected"),
        ({"prompt": "a", "response": "b", "system": "c"}, {}, "unread_field: system"),
    ],
)
def test_what_cannot_be_mapped_is_named(given: dict[str, Any], fields: dict[str, Any], told: str) -> None:
    with pytest.raises(SampleError) as caught:
        decode(given, fields)
    assert told in f"{caught.value.reason}: {caught.value}"


def test_a_field_may_be_left_aside_on_purpose() -> None:
    assert decode({"text": "a", "label": True}, {}, ignore=("label",)).num_tokens == 2


def test_settings_name_only_fields_that_there_are() -> None:
    with pytest.raises(ValidationError):
        SampleSettings.model_validate({"fields": {"txt": "body"}})
    with pytest.raises(ValidationError, match=r"template_arguments\.messages"):
        SampleSettings(template_arguments={"messages": 1})

"""Texts and responses: how they end, and what becomes of those that a chat template wrote already."""

import json
import logging
from typing import Any

import pytest

from stream_trainer.errors import SampleError
from stream_trainer.records import Partition, Record, Sample
from stream_trainer.samples.byte_tokenizer import byte_tokenizer
from stream_trainer.samples.decoder import NO_LOSS, Decoder
from stream_trainer.settings.schema import SampleSettings
from tests.stream_trainer.samples.families import CHATML, unmarked

IM_START, IM_END = 259, 260


def tokenizer_of_turns(**names: str) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.chat_template = unmarked(CHATML)
    return tokenizer


def decode(fields: dict[str, Any], tokenizer: Any = None, **settings: Any) -> Sample:
    decoder = Decoder(tokenizer or tokenizer_of_turns(), SampleSettings(**settings))
    sample = decoder.decode(Record(Partition("log", 0), 0, 1, json.dumps(fields).encode()))
    assert sample is not None
    return sample


def test_a_response_ends_as_the_template_ends_a_turn_and_a_text_as_the_tokenizer_does() -> None:
    tokenizer = tokenizer_of_turns()
    assert decode({"prompt": "a", "response": "b"}, tokenizer).input_ids == (*b"a\nb", IM_END)
    assert decode({"text": "ab"}, tokenizer).input_ids == (*b"ab", tokenizer.eos_token_id)
    tokenizer.eos_token = None
    assert decode({"text": "ab"}, tokenizer).input_ids == (*b"ab", IM_END)


def test_no_end_at_all_is_a_warning_at_start(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = tokenizer.eos_token = None
    with caplog.at_level(logging.WARNING):
        Decoder(tokenizer, SampleSettings())
    assert "no end token" in caplog.text


FORMATTED = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"


def test_text_that_is_formatted_already_is_noted(caplog: pytest.LogCaptureFixture) -> None:
    decoder = Decoder(tokenizer_of_turns(), SampleSettings())
    record = Record(Partition("log", 0), 0, 1, json.dumps({"text": FORMATTED}).encode())
    with caplog.at_level(logging.WARNING):
        first, second = decoder.decode_batch([record, record])
    assert isinstance(first, Sample)
    assert isinstance(second, Sample)
    assert first.notes == second.notes == ("formatted_text",)
    assert first.input_ids == (*FORMATTED.encode(), 258)
    assert caplog.text.count("samples.formatted_text") == 1


def test_its_markers_become_tokens_where_the_setting_says_so() -> None:
    sample = decode({"text": FORMATTED}, formatted_text="tokens")
    turns = [IM_START, *b"user\nHi", IM_END, *b"\n", IM_START, *b"assistant\nHello", IM_END, *b"\n"]
    assert sample.input_ids == sample.labels == tuple(turns), "no second end"
    prompt, _, response = FORMATTED.partition("Hello")
    sample = decode({"prompt": prompt.rstrip("\n"), "response": "Hello" + response.strip()}, formatted_text="tokens")
    assert sample.input_ids == tuple(turns[:-1])
    assert [i for i in sample.labels if i != NO_LOSS] == [*b"Hello", IM_END]


@pytest.mark.parametrize("text", [FORMATTED, "[INST] Hi [/INST] Hello", "<start_of_turn>user\nHi<end_of_turn>"])
def test_it_is_refused_where_the_setting_says_so_whatever_the_template(text: str) -> None:
    with pytest.raises(SampleError) as caught:
        decode({"text": text}, formatted_text="dead_letter")
    assert caught.value.reason == "formatted_text"
    assert decode({"text": "the token <|im_start|> begins a turn"}, formatted_text="dead_letter").notes == ()


def test_fences_cannot_be_forged() -> None:
    with pytest.raises(SampleError) as caught:
        decode({"text": "a\ufdd0</s>\ufdd1b"})
    assert caught.value.reason == "tokenizer"
    assert decode({"text": "a\ufdd0b"}).input_ids == (*"a\ufdd0b".encode(), 258)

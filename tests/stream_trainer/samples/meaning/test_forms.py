"""Records as people send them, form by form: trained on as meant, or refused by the name of the field."""

import json
import re
from typing import Any

import pytest

from stream_trainer.errors import SampleError
from stream_trainer.records import Partition, Record
from stream_trainer.samples.byte_tokenizer import byte_tokenizer
from stream_trainer.samples.decoder import NO_LOSS, Decoder
from stream_trainer.settings.schema import SampleSettings

TEMPLATE = (
    "{% if tools %}{{ '#tools ' + (tools | tojson) + '\n' }}{% endif %}"
    "{% for m in messages %}{{ '#' + m.role + '\n' + (m.content or '') }}"
    "{% for call in m.tool_calls or [] %}{{ '!' + call.function.name }}{% endfor %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '#assistant\n' }}{% endif %}"
)
ASK, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
EARLIER = [{"role": "system", "content": "Be brief."}, ASK, {"role": "assistant", "content": "Old"}, ASK]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}]}
RESULT = {"role": "tool", "tool_call_id": "1", "content": "3"}
TOOLS = [{"type": "function", "function": {"name": "f"}}]
BEFORE = "#system\nBe brief.\n#user\nHi\n#assistant\nOld\n#user\nHi\n#assistant\n"

COMPLETION = {"fields": {"response": "completion"}}
OURS = {"fields": {"response": "response"}}
CHOSEN = {"fields": {"response": "chosen"}}
ALPACA = {"fields": {"prompt": ["instruction", "input"], "response": "output"}}
SHAREGPT = {"fields": {"messages": "conversations", "role": "from", "content": "value"}}


def decoded(given: object, settings: dict[str, Any]) -> tuple[str, str]:
    """The whole text of a record, and what of it carries loss."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    value = given if isinstance(given, bytes) else json.dumps(given).encode()
    found = Decoder(tokenizer, SampleSettings(**settings)).decode(Record(Partition("log", 0), 0, 1, value))
    assert found is not None
    trained = [number for number in found.labels if number != NO_LOSS]
    whole, said = (bytes(i for i in ids if i < 256).decode() for ids in (found.input_ids, trained))
    return whole, said


def refusal(given: object, settings: dict[str, Any]) -> str:
    with pytest.raises(SampleError) as caught:
        decoded(given, settings)
    return f"{caught.value.reason}: {caught.value}"


TRAINED: list[tuple[str, object, dict[str, Any], str, str]] = [
    ("TRL", {"prompt": EARLIER, "completion": [ANSWER]}, COMPLETION, BEFORE + "Hello\n", "Hello\n"),
    (
        "TRL's preferences",
        {"prompt": EARLIER, "chosen": [ANSWER], "rejected": [ASK]},
        CHOSEN,
        BEFORE + "Hello\n",
        "Hello\n",
    ),
    ("messages and an answer", {"prompt": EARLIER, "response": "Hello"}, OURS, BEFORE + "Hello\n", "Hello\n"),
    (
        "calls in the completion",
        {"prompt": [ASK], "completion": [CALL, RESULT, ANSWER], "tools": TOOLS, "system": "Brief."},
        COMPLETION,
        '#tools [{"type": "function", "function": {"name": "f"}}]\n'
        "#system\nBrief.\n#user\nHi\n#assistant\n!f\n#tool\n3\n#assistant\nHello\n",
        "!f\nHello\n",
    ),
    (
        "a turn of weight 0 in the completion",
        {"prompt": [ASK], "response": [{**ANSWER, "weight": 0}, ASK, ANSWER]},
        OURS,
        "#user\nHi\n#assistant\nHello\n#user\nHi\n#assistant\nHello\n",
        "Hello\n",
    ),
    (
        "ShareGPT in two parts",
        {"prompt": [{"from": "human", "value": "Hi"}], "chosen": [{"from": "gpt", "value": "Hello"}]},
        {"fields": {"response": "chosen", "role": "from", "content": "value"}},
        "#user\nHi\n#assistant\nHello\n",
        "Hello\n",
    ),
    (
        "UltraChat: the prompt is said twice",
        {"prompt": "Hi", "prompt_id": "7", "messages": [ASK, ANSWER]},
        {"ignore": ["prompt"]},
        "#user\nHi\n#assistant\nHello\n",
        "Hello\n",
    ),
    (
        "UltraFeedback: the prompt is in either side",
        {"prompt": "Hi", "chosen": [ASK, ANSWER], "rejected": [ASK, ASK], "score_chosen": 9.0},
        {"fields": {"messages": "chosen"}, "ignore": ["prompt"]},
        "#user\nHi\n#assistant\nHello\n",
        "Hello\n",
    ),
    (
        "OpenAI's fine-tuning, with weights",
        {"messages": [ASK, {**ANSWER, "content": "Wrong", "weight": 0}, ASK, {**ANSWER, "weight": 1}]},
        {},
        "#user\nHi\n#assistant\nWrong\n#user\nHi\n#assistant\nHello\n",
        "Hello\n",
    ),
    (
        "OpenAI's fine-tuning, with tools",
        {"messages": [ASK, CALL, RESULT, ANSWER], "tools": TOOLS, "parallel_tool_calls": False},
        {},
        '#tools [{"type": "function", "function": {"name": "f"}}]\n'
        "#user\nHi\n#assistant\n!f\n#tool\n3\n#assistant\nHello\n",
        "!f\nHello\n",
    ),
    (
        "an answer as an API gives it",
        {"messages": [ASK, {**ANSWER, "refusal": None, "annotations": [], "audio": None, "function_call": None}]},
        {},
        "#user\nHi\n#assistant\nHello\n",
        "Hello\n",
    ),
    (
        "ShareGPT with more beside",
        {
            "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}],
            "system": "Brief.",
            "tools": "[]",
            "images": [],
        },
        SHAREGPT,
        "#system\nBrief.\n#user\nHi\n#assistant\nHello\n",
        "Hello\n",
    ),
    (
        "a developer",
        {"messages": [{**ASK, "role": "developer"}, ANSWER]},
        {},
        "#developer\nHi\n#assistant\nHello\n",
        "Hello\n",
    ),
    (
        "an empty thought",
        {"messages": [ASK, {**ANSWER, "reasoning_content": ""}]},
        {},
        "#user\nHi\n#assistant\nHello\n",
        "Hello\n",
    ),
    ("a text", {"text": "Hi", "meta": {"source": "web"}, "split": "train"}, {}, "Hi", "Hi"),
    ("Alpaca without an input", {"instruction": "Hi", "input": "", "output": "Hello"}, ALPACA, "Hi\nHello", "Hello"),
    ("a completion after a space", {"prompt": "Hi", "completion": " Hello"}, COMPLETION, "Hi\n Hello", " Hello"),
    ("line ends of Windows", b'{"prompt": "a\\r\\nb", "response": "c"}\r\n', {}, "a\r\nb\nc", "c"),
    ("fields that say nothing", {"text": "Hi", "history": [], "context": "", "images": []}, {}, "Hi", "Hi"),
]


@pytest.mark.parametrize(
    ("given", "settings", "whole", "said"), [row[1:] for row in TRAINED], ids=[row[0] for row in TRAINED]
)
def test_it_is_trained_on_as_meant(given: object, settings: dict[str, Any], whole: str, said: str) -> None:
    assert decoded(given, settings) == (whole, said)


REFUSED: list[tuple[object, dict[str, Any], str]] = [
    ({"prompt": [ASK], "completion": [ANSWER]}, {}, "missing_fields: .*samples.fields={response: completion}"),
    ({"prompt": [ASK], "response": [ANSWER]}, {}, "wrong_type: prompt or response is a list of messages"),
    ({"prompt": "Hi", "completion": [ANSWER]}, COMPLETION, "wrong_type: prompt is a str"),
    ({"prompt": [ASK], "completion": []}, COMPLETION, "empty: response has no messages"),
    ({"prompt": [ASK], "chosen": [ASK, ANSWER]}, CHOSEN, "bad_messages: response begins with the messages of prompt"),
    (
        {"prompt": [{**ANSWER, "weight": 1}, ASK], "response": [ANSWER]},
        OURS,
        "weight of message 0 .* the prompt is not trained on",
    ),
    ({"prompt": [ASK], "completion": [ANSWER], "label": False}, COMPLETION, "unread_field: label"),
    ({"prompt": "Hi", "messages": [ASK, ANSWER]}, {}, "ambiguous_fields: prompt, messages"),
    (
        {"messages": [ASK, {**ANSWER, "weight": 0.5}, ASK, ANSWER]},
        {},
        "bad_number: messages of one record differ in weight",
    ),
    ({"messages": json.dumps([ASK, ANSWER])}, {}, "wrong_type: messages is a str, not a list .*send the list itself"),
    ({"messages": [{**ASK, "content": 3}, ANSWER]}, {}, "bad_messages: the content of message 0"),
    ({"messages": [ASK, {**ANSWER, "content": None}]}, {}, "bad_messages: the content of message 1"),
    ({"messages": [ASK, {**ASK, "role": "function"}, ANSWER]}, {}, "bad_messages: the role of message 1"),
    ({"messages": [ASK, ANSWER], "functions": TOOLS}, {}, "unread_field: functions"),
    ({"prompt": "1+1", "response": 2}, {}, "wrong_type: response is a int"),
    (
        {"messages": [{**ASK, "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, ANSWER]},
        {},
        "bad_messages: .* not of type text but image_url",
    ),
    (
        {"messages": [ASK, {**ANSWER, "content": [{"type": "text", "text": "a", "weight": 0}]}]},
        {},
        "weight of a part of message 1",
    ),
    ({"messages": [ASK, ANSWER], "image": "a.png"}, {}, "unread_field: image "),
    ({"messages": [{**ASK, "images": ["a.png"]}, ANSWER]}, {}, "bad_messages: images of message 0"),
    (
        {"messages": [{**ASK, "tools": TOOLS}, ANSWER]},
        {},
        "chat_template: the template does not write tools of message 0",
    ),
    ({"input": {"messages": [ASK]}, "preferred_output": [ANSWER], "non_preferred_output": []}, {}, "missing_fields"),
    ({"contents": [{"role": "user", "parts": [{"text": "Hi"}]}]}, {}, "missing_fields"),
    ({"text": "Hi", "input_ids": [1], "labels": [1]}, {}, "unread_field: input_ids"),
    *(
        ({"prompt": "Hi", "response": "Hello", name: "a"}, {}, f"unread_field: {name} ")
        for name in ("context", "history", "system_prompt", "reasoning", "rationale", "reward", "lossMask", "Weight")
    ),
    *(
        ({"messages": [ASK, {**ANSWER, name: False}]}, {}, f"bad_messages: {name} of message 1")
        for name in ("loss_mask", "masked", "train_on", "train_detail", "loss_weight")
    ),
]


@pytest.mark.parametrize(("given", "settings", "told"), REFUSED, ids=[row[2][:60] for row in REFUSED])
def test_it_is_refused_by_name(given: object, settings: dict[str, Any], told: str) -> None:
    assert re.search(told, refusal(given, settings))

"""What a record says of a conversation reaches the template, or is refused by the name of the field."""

import json
import logging
from typing import Any

import pytest

from stream_trainer.errors import SampleError, SettingsError
from stream_trainer.records import Partition, Record, Sample
from stream_trainer.samples.byte_tokenizer import byte_tokenizer
from stream_trainer.samples.decoder import NO_LOSS, Decoder
from stream_trainer.settings.schema import SampleSettings

TOOLS = (
    "{% if tools %}{{ '#tools ' + (tools | tojson) + '\n' }}{% endif %}"
    "{% for m in messages %}{{ '#' + m.role + (' ' + m.name if m.name else '') + '\n' }}"
    "{% if m.reasoning_content %}{{ '(' + m.reasoning_content + ')' }}{% endif %}{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}{{ '!' + (call.function | tojson) }}{% endfor %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '#assistant\n' }}{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ '#' + m.role + '\n' + (m.content or '') + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '#assistant\n' }}{% endif %}"
)
WEATHER = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
ASK, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


def decoder(template: str = TOOLS, **settings: Any) -> Decoder:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return Decoder(tokenizer, SampleSettings(**settings))


def decode(fields: Any, template: str = TOOLS, **settings: Any) -> Sample:
    sample = decoder(template, **settings).decode(Record(Partition("log", 0), 0, 1, json.dumps(fields).encode()))
    assert sample is not None
    return sample


def refusal(fields: Any, template: str = TOOLS, **settings: Any) -> str:
    with pytest.raises(SampleError) as caught:
        decode(fields, template, **settings)
    return f"{caught.value.reason}: {caught.value}"


def whole(sample: Sample) -> str:
    return bytes(i for i in sample.input_ids if i < 256).decode()


def said(sample: Sample) -> str:
    return bytes(i for i in sample.labels if i != NO_LOSS and i < 256).decode()


def test_calls_and_tools_are_written_and_calls_carry_loss() -> None:
    messages = [
        ASK,
        {"role": "assistant", "content": None, "tool_calls": [WEATHER]},
        {"role": "tool", "content": "3 C"},
    ]
    sample = decode({"tools": [{"type": "function"}], "messages": [*messages, ANSWER]})
    call = '!{"name": "weather", "arguments": {"city": "Oslo"}}'
    answers = f"#assistant\n{call}\n#tool\n3 C\n#assistant\nHello\n"
    assert whole(sample) == f'#tools [{{"type": "function"}}]\n#user\nHi\n{answers}'
    assert said(sample) == f"{call}\nHello\n"


@pytest.mark.parametrize("written", ['{"city": "Oslo"}', {"city": "Oslo"}])
def test_arguments_are_an_object_or_its_json(written: object) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": written}}
    sample = decode({"messages": [ASK, {"role": "assistant", "tool_calls": [call]}]})
    assert said(sample) == '!{"name": "weather", "arguments": {"city": "Oslo"}}\n'


def test_a_template_that_takes_arguments_as_text_gets_them_so() -> None:
    template = PLAIN.replace(
        "(m.content or '')", "(m.tool_calls[0].function.arguments + '' if m.tool_calls else m.content)"
    )
    sample = decode({"messages": [ASK, {"role": "assistant", "tool_calls": [WEATHER]}]}, template)
    assert said(sample) == '{"city": "Oslo"}\n'


def test_a_system_prompt_beside_the_messages_comes_first() -> None:
    assert whole(decode({"system": "Be brief.", "messages": [ASK, ANSWER]})).startswith("#system\nBe brief.\n#user")
    twice = {"system": "a", "messages": [{"role": "system", "content": "b"}, ASK, ANSWER]}
    assert refusal(twice).startswith("ambiguous_fields: system")


def test_thoughts_and_names_are_written() -> None:
    messages = [{**ASK, "name": "Ann"}, {**ANSWER, "reasoning_content": "hm"}]
    sample = decode({"messages": messages})
    assert whole(sample) == "#user Ann\nHi\n#assistant\n(hm)Hello\n"
    assert said(sample) == "(hm)Hello\n"
    other = [{**ASK, "name": "Ann"}, {**ANSWER, "thinking": "hm"}]
    assert decode({"messages": other}).input_ids == sample.input_ids


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"tools": [{"type": "function"}], "messages": [ASK, ANSWER]}, "tools"),
        ({"messages": [ASK, {**ANSWER, "tool_calls": [WEATHER]}]}, "tool_calls of message 1"),
        ({"messages": [ASK, {**ANSWER, "reasoning_content": "hm"}]}, "reasoning_content of message 1"),
        ({"messages": [{**ASK, "name": "Ann"}, ANSWER]}, "name of message 0"),
        ({"messages": [ASK, ANSWER], "chat_template_kwargs": {"enable_thinking": True}}, "enable_thinking"),
    ],
)
def test_what_the_template_leaves_out_is_refused_by_name(fields: object, named: str) -> None:
    found = refusal(fields, PLAIN)
    assert found.startswith("chat_template: ")
    assert named in found


def test_content_that_the_template_drops_beside_calls_is_refused() -> None:
    template = PLAIN.replace(
        "(m.content or '')", "('!' + m.tool_calls[0].function.name if m.tool_calls else m.content)"
    )
    messages = [ASK, {**ANSWER, "tool_calls": [WEATHER]}]
    assert "content of message 1" in refusal({"messages": messages}, template)


@pytest.mark.parametrize(
    ("message", "named"),
    [
        ({"weight": "0"}, "wrong_type: weight of message 1"),
        ({"weight": -1}, "bad_number: weight of message 1"),
        ({"train": False}, "bad_messages: train of message 1"),
        ({"function_call": {"name": "f"}}, "bad_messages: function_call of message 1"),
        (
            {"tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
            "arguments of a call in tool_calls of message 1",
        ),
        ({"tool_calls": "f()"}, "tool_calls of message 1 is not a list"),
        ({"reasoning_content": 3}, "reasoning_content of message 1"),
        ({"content": [{"type": "image_url"}]}, "content of message 1 has a part that is not of type text"),
    ],
)
def test_fields_of_messages_are_refused_by_name(message: dict[str, Any], named: str) -> None:
    assert named in refusal({"messages": [ASK, {**ANSWER, **message}]})


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"tools": "no JSON"}, "wrong_type: tools"),
        ({"tools": {"a": 1}}, "wrong_type: tools"),
        ({"system": 3}, "wrong_type: system"),
        ({"chat_template_kwargs": "x"}, "wrong_type: chat_template_kwargs"),
        ({"chat_template_kwargs": {"messages": []}}, "ambiguous_fields: chat_template_kwargs.messages"),
        ({"label": False}, "unread_field: label"),
        ({"rejected": "x"}, "unread_field: rejected"),
    ],
)
def test_fields_beside_messages_are_refused_by_name(fields: dict[str, Any], named: str) -> None:
    assert named in refusal({"messages": [ASK, ANSWER], **fields})


def test_a_turn_of_weight_0_carries_no_loss() -> None:
    messages = [ASK, {"role": "assistant", "content": "wrong", "weight": 0}, ASK, {**ANSWER, "weight": 2}]
    sample = decode({"messages": messages, "weight": 3})
    assert said(sample) == "Hello\n"
    assert sample.weight == 6
    assert "weight 0" in refusal({"messages": [ASK, {**ANSWER, "weight": 0}]})
    two = [ASK, {**ANSWER, "weight": 1}, ASK, {**ANSWER, "weight": 2}]
    assert "differ in weight" in refusal({"messages": two})
    assert "weight of message 0" in refusal({"messages": [{**ASK, "weight": 1}, ANSWER]})


PARTS = (
    "{% for m in messages %}{{ '#' + m.role + '\n' }}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '#assistant\n' }}{% endif %}"
)


def test_parts_of_text_go_to_a_template_that_takes_them() -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    messages = [ASK, {"role": "assistant", "content": parts}]
    sample = decode({"messages": messages}, PARTS)
    assert said(sample) == "Hello\n"
    assert "content of message 1 is a list" in refusal({"messages": messages}, PLAIN)
    assert "content of message 1 is a list" in refusal(
        {"messages": messages}, PLAIN.replace("m.content or ''", "m.content|string")
    )


ARGUED = PLAIN.replace("(m.content or '')", "(m.content if loudly is not defined or not loudly else m.content | upper)")


def test_arguments_of_the_settings_and_then_of_the_record_reach_the_template() -> None:
    record = {"messages": [ASK, ANSWER]}
    assert said(decode(record, ARGUED)) == "Hello\n"
    assert said(decode(record, ARGUED, template_arguments={"loudly": True})) == "HELLO\n"
    quiet = {**record, "chat_template_kwargs": {"loudly": False}}
    assert said(decode(quiet, ARGUED, template_arguments={"loudly": True})) == "Hello\n"


def test_an_argument_of_the_settings_that_the_template_does_not_read_is_a_wrong_setting() -> None:
    with pytest.raises(SettingsError, match=r"^samples\.template_arguments\.loudly is not read"):
        decoder(PLAIN, template_arguments={"loudly": True})


def test_the_templates_own_sentence_is_in_the_reason_and_nothing_of_the_record() -> None:
    strict = (
        "{% for m in messages %}{% if m.role == 'system' %}"
        "{{ raise_exception('No system role, not even: ' + m.content) }}{% endif %}"
        "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        '{{ raise_exception("Roles must alternate, that\\\'s all") }}{% endif %}{{ m.content }}{% endfor %}'
    )
    found = refusal({"messages": [{"role": "system", "content": "a secret"}, ASK, ANSWER]}, strict)
    assert "No system role, not even:" in found
    assert "secret" not in found
    assert "Roles must alternate, that's all" in refusal({"messages": [ASK, ASK, ANSWER]}, strict)


@pytest.mark.parametrize("template", [PLAIN, TOOLS])
def test_a_conversation_may_begin_with_the_assistant_and_end_with_the_user(template: str) -> None:
    assert said(decode({"messages": [ANSWER, ASK]}, template)) == "Hello\n"
    assert said(decode({"messages": [ANSWER, ASK, {**ANSWER, "content": "Bye"}, ASK]}, template)) == "Hello\nBye\n"


END_AT_THE_END = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% else %}{{ eos_token }}{% endif %}"
)
OPENED = (
    "{% for m in messages %}{{ '#' + m.role + '\n' + m.content.split('</think>')[-1] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '#assistant\n<think>\n' }}{% endif %}"
)


def test_every_turn_is_found_however_the_template_ends_and_begins() -> None:
    talk = {"messages": [ASK, ANSWER, {**ASK, "content": "Bye"}, {**ANSWER, "content": "See you"}]}
    assert said(decode(talk, END_AT_THE_END)) == "Hello\nSee you\n"
    assert said(decode(talk, OPENED)) == "Hello\nSee you\n"


def test_a_turn_that_cannot_be_found_is_noted_and_costs_no_other(caplog: pytest.LogCaptureFixture) -> None:
    hiding = (
        "{% for m in messages %}{% if m.role == 'assistant' and not loop.last %}{{ '...' }}{% else %}"
        "{{ '#' + m.role + '\n' + m.content + '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '#assistant\n' }}{% endif %}"
    )
    with caplog.at_level(logging.WARNING):
        sample = decode({"messages": [ASK, ANSWER, ASK, {**ANSWER, "content": "See you"}]}, hiding)
    assert said(sample) == "See you\n"
    assert sample.notes == ("turn_without_loss",)
    assert "carries no loss" in caplog.text


def test_control_tokens_stay_text_wherever_a_record_has_them() -> None:
    end = byte_tokenizer().eos_token_id
    template = TOOLS.replace("{{ '\n' }}{% endfor %}", "{{ eos_token + '\n' }}{% endfor %}")
    call = {"type": "function", "function": {"name": "</s>", "arguments": {"</s>": ["</s>"]}}}
    messages = [{**ASK, "name": "</s>"}, {**ANSWER, "reasoning_content": "</s>", "tool_calls": [call]}, ASK]
    sample = decode({"tools": [{"</s>": "</s>"}], "messages": messages}, template)
    assert sample.input_ids.count(end) == 3
    assert whole(sample).count("</s>") == 7
    assert sample.notes == ("control_tokens",)


def test_a_control_token_that_the_template_looks_for_is_told_from_one_that_it_writes() -> None:
    reading = (
        "{% for m in messages %}{{ '#' + m.role + '\n' }}{% if '</s>' in m.content %}"
        "{{ m.content.split('</s>')[0] + '\n' + eos_token + '\n' + m.content.split('</s>')[1] }}"
        "{% else %}{{ m.content }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '#assistant\n' }}{% endif %}"
    )
    sample = decode({"messages": [ASK, {**ANSWER, "content": "thought</s>answer"}]}, reading)
    assert sample.input_ids.count(byte_tokenizer().eos_token_id) == 1
    assert said(sample) == "thought\n\nanswer\n"

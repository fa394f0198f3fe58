"""What would be trained otherwise than it was meant, without a word: refused by name, or noted."""

import json
from typing import Any

import pytest
from tokenizers import processors

from stream_trainer.errors import SampleError
from stream_trainer.records import Partition, Record, Sample
from stream_trainer.samples.byte_tokenizer import byte_tokenizer
from stream_trainer.samples.decoder import Decoder
from stream_trainer.settings.schema import SampleSettings

ASK, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
RULE = {"role": "system", "content": "H"}
# Says nothing of roles that it does not know.
TWO_ROLES = (
    "{% for m in messages %}{% if m.role in ('user', 'assistant') %}{{ '#' + m.role + '\n' + m.content + '\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '#assistant\n' }}{% endif %}"
)
CALLS = TWO_ROLES.replace("m.content", "(m.content or '') + (m.tool_calls | tojson if m.tool_calls else '')")


def decode(given: object, template: str = TWO_ROLES, names: tuple[str, ...] = (), **settings: Any) -> Sample:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    value = given if isinstance(given, bytes) else json.dumps(given).encode()
    decoder = Decoder(tokenizer, SampleSettings(**settings), field_names=names)
    found = decoder.decode(Record(Partition("log", 0), 0, 1, value))
    assert found is not None
    return found


def refusal(given: object, *args: Any, **settings: Any) -> str:
    with pytest.raises(SampleError) as caught:
        decode(given, *args, **settings)
    return f"{caught.value.reason}: {caught.value}"


@pytest.mark.parametrize(
    ("messages", "number"),
    [
        ([RULE, ASK, ANSWER], 0),
        ([{**RULE, "content": "Hello"}, ASK, ANSWER], 0),
        ([ASK, {**RULE, "role": "developer"}, ANSWER], 1),
        ([ASK, {**ANSWER, "content": "Let me see"}, {"role": "tool", "content": "3"}, ANSWER], 2),
    ],
)
def test_a_message_that_the_template_drops_is_named(messages: list[dict[str, str]], number: int) -> None:
    told = f"chat_template: the template does not write the content of message {number}"
    assert told in refusal({"messages": messages})


def test_a_system_prompt_beside_the_messages_that_the_template_drops_is_named() -> None:
    assert "the content of message 0" in refusal({"messages": [ASK, ANSWER], "system": "Be brief."})


def test_messages_that_a_template_changes_are_written_all_the_same() -> None:
    loud = TWO_ROLES.replace("m.content", "m.content | trim | upper")
    assert decode({"messages": [{**ASK, "content": " one thing\n"}, ANSWER, ASK, ANSWER]}, loud).notes == ()


def test_a_template_that_begins_an_answer_unasked_is_named() -> None:
    """The model would learn to begin one more answer behind each."""
    unasked = TWO_ROLES.replace("{% if add_generation_prompt %}", "{% if true %}")
    assert "the template begins an answer unasked" in refusal({"messages": [ASK, ANSWER]}, unasked)
    after_the_user = TWO_ROLES.replace("add_generation_prompt", "messages[-1].role == 'user'")
    assert decode({"messages": [ASK, ANSWER, ASK, ANSWER]}, after_the_user).notes == ()


@pytest.mark.parametrize("inside", [True, False])
def test_marks_that_leave_out_the_end_of_an_answer_are_warned_about(
    inside: bool, caplog: pytest.LogCaptureFixture
) -> None:
    end = (
        "{{ m.content + eos_token }}{% endgeneration %}"
        if inside
        else "{{ m.content }}{% endgeneration %}{{ eos_token }}"
    )
    template = "{% for m in messages %}{{ m.role }}{% generation %}" + end + "{% endfor %}"
    decode({"messages": [ANSWER]}, template)
    assert ("nothing is learnt of where an answer ends" in caplog.text) is not inside


@pytest.mark.parametrize(
    ("arguments", "told"),
    [('{"a": 1, "a": 2}', "a key appears twice"), ('{"a": NaN}', "NaN is not JSON"), ("[1]", "no JSON object")],
)
def test_arguments_of_a_call_are_strict_json(arguments: str, told: str) -> None:
    call = {"function": {"name": "f", "arguments": arguments}}
    assert told in refusal({"messages": [ASK, {**ANSWER, "tool_calls": [call]}]}, CALLS)


def test_a_number_without_end_in_a_call_is_refused() -> None:
    value = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", '
    value += b'"tool_calls": [{"name": "f", "arguments": {"x": 1e999}}]}]}'
    assert refusal(value, CALLS) == "bad_number: a number is not finite"


def test_half_a_surrogate_in_a_field_that_is_kept_is_refused() -> None:
    assert refusal(b'{"text": "a", "source": "\\ud800"}', names=("source",)).startswith("lone_surrogate")


def test_two_names_for_one_thing_in_a_message_are_refused() -> None:
    fields = {"role": "from", "content": "value"}
    given = {"messages": [{"from": "human", "value": "a"}, {"from": "gpt", "role": "user", "value": "b"}]}
    assert "ambiguous_fields: role and from" in refusal(given, fields=fields)


@pytest.mark.parametrize(
    ("given", "limit", "cut"),
    [
        ({"text": "a" * 9}, 10, False),
        ({"text": "a" * 10}, 10, True),
        ({"text": "a" * 900}, 10, True),
        ({"messages": [ASK, ANSWER]}, 26, False),
        ({"messages": [ASK, ANSWER]}, 25, True),
    ],
)
def test_a_sample_that_is_cut_is_noted(given: object, limit: int, cut: bool) -> None:
    found = decode(given, max_tokens=limit)
    assert found.notes == (("truncated",) if cut else ())
    assert found.num_tokens == limit


@pytest.mark.parametrize(
    ("given", "noted"),
    [
        ({"text": "It rains.</s>"}, True),
        ({"text": "<s>It rains."}, True),
        ({"text": "The token </s> ends a text."}, False),
        ({"prompt": "Hi", "response": "Hello</s>\n"}, True),
        ({"prompt": json.dumps([ASK]), "response": "Hello"}, True),
        ({"prompt": str([ASK]), "response": "Hello"}, True),
        ({"messages": [{**ASK, "content": "[INST] Hi [/INST]"}, ANSWER]}, True),
        ({"messages": [{**ASK, "content": "<|im_start|>user\nHi<|im_end|>"}, ANSWER]}, True),
        ({"messages": [ASK, ANSWER]}, False),
    ],
)
def test_what_a_template_or_tokenizer_wrote_before_is_noted(given: object, noted: bool) -> None:
    assert ("formatted_text" in decode(given).notes) is noted


def test_all_that_a_tokenizer_puts_before_a_text_is_put_there() -> None:
    """As GLM's does."""
    tokenizer = byte_tokenizer()
    first, second = tokenizer.pad_token_id, tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<pad> <s> $A </s>", pair=None, special_tokens=[("<pad>", first), ("<s>", second), ("</s>", 258)]
    )
    found = Decoder(tokenizer, SampleSettings()).decode(Record(Partition("log", 0), 0, 1, b'{"text": "a"}'))
    assert found is not None
    assert found.input_ids == (first, second, 97, 258)

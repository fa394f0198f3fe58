"""Conversations under the tokenizers of the families in use: the ids of the whole, loss where the assistant speaks."""

import json
import unicodedata
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from stream_trainer.errors import SampleError
from stream_trainer.records import Partition, Record, Sample
from stream_trainer.samples.controls import controls_of
from stream_trainer.samples.decoder import NO_LOSS, Decoder
from stream_trainer.settings.schema import SampleSettings
from tests.stream_trainer.samples.families import Family, families, unmarked

FAMILIES = families()
DECODERS: dict[str, Decoder] = {}
for family in FAMILIES:
    family.tokenizer.chat_template = unmarked(family.template)
    DECODERS[family.name] = Decoder(family.tokenizer, SampleSettings(max_tokens=5000))

PIECES = [
    *("a", "the rain", " ", "  ", "\n", "\n\n", " answer", "Hello", "1234", "é", "漢字", "😀", "\u0301", "▁", "▁▁"),
    *("<", ">", "<|", "|>", "<0x0A>", "[", "]", "'s", "\t", "<b>", "user\n", "assistant", "{{ x }}", "\u200b"),
]
CONTROLS = sorted({token for family in FAMILIES for token in controls_of(family.tokenizer).ids})
said = st.lists(st.sampled_from(PIECES), min_size=1, max_size=6).map("".join).filter(str.strip)
spelled = st.lists(st.sampled_from([*PIECES, *CONTROLS]), min_size=1, max_size=6).map("".join).filter(str.strip)


def talks(contents: st.SearchStrategy[str]) -> st.SearchStrategy[list[dict[str, str]]]:
    """The user and the assistant in turns; it may begin with either, and ends with the assistant or the user."""
    many = st.lists(contents, min_size=2, max_size=5)
    return many.map(lambda texts: [{"role": ("user", "assistant")[n % 2], "content": t} for n, t in enumerate(texts)])


def decoded(family: Family, fields: dict[str, Any]) -> Sample:
    value = json.dumps(fields).encode()
    sample = DECODERS[family.name].decode(Record(Partition("log", 0), 0, 1, value))
    assert sample is not None
    return sample


def written(family: Family, messages: list[dict[str, str]]) -> tuple[str, list[tuple[int, int]]]:
    """What the template writes, and what it marks as the assistant's."""
    texts, spans = render_jinja_template(
        conversations=[messages],
        chat_template=family.template,
        return_assistant_tokens_mask=True,
        **family.tokenizer.special_tokens_map,
    )
    return texts[0], spans[0]


def spans_and_more(family: Family, text: str, spans: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """The tokenizer's own ids of a text, and labels on every token that reaches into the spans."""
    family.tokenizer.backend_tokenizer.post_processor = None  # which would move offsets
    found = family.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    inside = [any(start < b and end > a for a, b in spans) for start, end in found.offsets]
    return found.ids, [number if is_in else NO_LOSS for number, is_in in zip(found.ids, inside, strict=True)]


quick = settings(deadline=None, max_examples=25, suppress_health_check=list(HealthCheck))


@quick
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@given(data=st.data())
def test_ids_are_those_of_the_whole_and_loss_is_on_what_the_assistant_says(family: Family, data: st.DataObject) -> None:
    messages = data.draw(talks(said))
    sample = decoded(family, {"messages": messages})
    ids, labels = spans_and_more(family, *written(family, messages))
    assert list(sample.input_ids) == ids
    assert list(sample.labels) == labels


@quick
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@given(data=st.data())
def test_no_content_injects_a_control_token(family: Family, data: st.DataObject) -> None:
    messages = data.draw(talks(spelled))
    controls = controls_of(family.tokenizer)
    try:
        sample = decoded(family, {"messages": messages})
    except SampleError as error:
        assert "cannot be told" in str(error)  # noqa: PT017 the template reads what is spelled out
        return
    innocent = [{**m, "content": controls.pattern.sub("x", m["content"])} for m in messages]
    expected = [i for i in decoded(family, {"messages": innocent}).input_ids if i in controls.ids.values()]
    unknown = family.tokenizer.unk_token_id
    assert [i for i in sample.input_ids if i in controls.ids.values() and i != unknown] == [
        i for i in expected if i != unknown
    ]
    if family.exact:
        text = family.tokenizer.backend_tokenizer.decode(list(sample.input_ids), skip_special_tokens=False)
        assert text == normal(family, written(family, messages)[0])


def normal(family: Family, text: str) -> str:
    """What the tokenizer takes for the same text: composed characters for some, no word marks for another."""
    return text.replace("▁", " ") if family.name == "gemma" else unicodedata.normalize("NFC", text)


@quick
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@given(prompt=spelled, response=spelled)
def test_prompt_and_response_have_the_ids_of_the_whole(family: Family, prompt: str, response: str) -> None:
    sample = decoded(family, {"prompt": prompt, "response": response})
    controls = controls_of(family.tokenizer)
    given_ids = list(sample.input_ids)[:-1]  # the end token
    assert not set(given_ids) & (set(controls.ids.values()) - {family.tokenizer.unk_token_id})
    whole = f"{prompt}\n{response}"
    if not controls.pattern.search(whole):
        ids, labels = spans_and_more(family, whole, [(len(prompt) + 1, len(whole))])
        assert given_ids == ids
        assert list(sample.labels)[:-1] == labels

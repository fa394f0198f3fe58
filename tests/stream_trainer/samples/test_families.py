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
from stream_trainer.samples.decoder import NO_LOSS, Decoder
from stream_trainer.samples.tokens.controls import controls_of
from stream_trainer.settings.schema import SampleSettings
from tests.stream_trainer.samples.families import Family, families, published, unmarked

FAMILIES = families()
DECODERS: dict[str, Decoder] = {}

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
    if family.name not in DECODERS:
        family.tokenizer.chat_template = unmarked(family.template)
        DECODERS[family.name] = Decoder(family.tokenizer, SampleSettings(max_tokens=5000))
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


def ids_and_labels(family: Family, text: str, spans: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """The tokenizer's own ids of a text, and labels on every token that reaches into the spans."""
    family.tokenizer.backend_tokenizer.post_processor = None  # which would move offsets
    found = family.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    inside = [any(start < b and end > a for a, b in spans) for start, end in found.offsets]
    return found.ids, [number if is_in else NO_LOSS for number, is_in in zip(found.ids, inside, strict=True)]


def check_talk(family: Family, messages: list[dict[str, str]]) -> None:
    """Ids are those of the whole, and loss is on what the assistant says and nowhere else."""
    sample = decoded(family, {"messages": messages})
    ids, labels = ids_and_labels(family, *written(family, messages))
    assert list(sample.input_ids) == ids
    assert list(sample.labels) == labels


def check_injection(family: Family, messages: list[dict[str, str]]) -> None:
    """Contents that spell control tokens have no more of them than others, and decode to what the template wrote."""
    controls = controls_of(family.tokenizer)
    try:
        sample = decoded(family, {"messages": messages})
    except SampleError as error:
        assert "cannot be told" in str(error)  # noqa: PT017 the template reads what is spelled out
        return
    innocent = [{**m, "content": controls.pattern.sub("x", m["content"])} for m in messages]
    known = set(controls.ids.values()) - {family.tokenizer.unk_token_id}
    found, expected = (
        [i for i in ids if i in known] for ids in (sample.input_ids, decoded(family, {"messages": innocent}).input_ids)
    )
    assert found == expected
    if family.exact:
        text = family.tokenizer.backend_tokenizer.decode(list(sample.input_ids), skip_special_tokens=False)
        assert text == normal(family, written(family, messages)[0])


def normal(family: Family, text: str) -> str:
    """What the tokenizer takes for the same text: composed characters for some, no word marks for another."""
    if family.name == "gemma":
        return text.replace("▁", " ")
    return unicodedata.normalize("NFC", text) if "qwen" in family.name else text


def check_pair(family: Family, prompt: str, response: str) -> None:
    """Prompt and response are one text without control tokens, with loss on whatever reaches into the response."""
    sample = decoded(family, {"prompt": prompt, "response": response})
    controls = controls_of(family.tokenizer)
    ids, end = list(sample.input_ids), len(sample.input_ids) - 1
    start = 1 if ids[0] == family.tokenizer.bos_token_id else 0
    assert not set(ids[start:end]) & (set(controls.ids.values()) - {family.tokenizer.unk_token_id})
    whole = f"{prompt}\n{response}"
    if not controls.pattern.search(whole):
        expected, labels = ids_and_labels(family, whole, [(len(prompt) + 1, len(whole))])
        assert ids[start:end] == expected
        assert list(sample.labels)[start:end] == labels


quick = settings(deadline=None, max_examples=25, suppress_health_check=list(HealthCheck))
each = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


@each
@quick
@given(data=st.data())
def test_ids_are_those_of_the_whole_and_loss_is_on_what_the_assistant_says(family: Family, data: st.DataObject) -> None:
    check_talk(family, data.draw(talks(said)))


@each
@quick
@given(data=st.data())
def test_no_content_injects_a_control_token(family: Family, data: st.DataObject) -> None:
    check_injection(family, data.draw(talks(spelled)))


@each
@quick
@given(prompt=spelled, response=spelled)
def test_prompt_and_response_have_the_ids_of_the_whole(family: Family, prompt: str, response: str) -> None:
    check_pair(family, prompt, response)


def check_often(family: Family) -> None:
    @settings(quick, max_examples=40)
    @given(innocent=talks(said), spelling=talks(spelled), pair=st.tuples(spelled, spelled))
    def check(innocent: Any, spelling: Any, pair: Any) -> None:
        check_talk(family, innocent)
        check_injection(family, spelling)
        check_pair(family, *pair)

    check()


@pytest.mark.slow
def test_families_and_tokenizers_as_they_were_published() -> None:
    """All of it many times, also for the tokenizers that installed packages carry; none need be."""
    for family in (*FAMILIES, *published()):
        check_often(family)
        print(f"checked: {family.name}")

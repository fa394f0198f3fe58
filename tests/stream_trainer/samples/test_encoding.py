"""Bytes and words as ids: the same as the tokenizer's own backend for every text, or left to the backend."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from stream_trainer.samples import encoding
from stream_trainer.samples.byte_tokenizer import byte_tokenizer
from stream_trainer.samples.encoding import PATTERNS, byte_encoder, word_encoder
from stream_trainer.samples.tokens import whole
from stream_trainer.samples.tokens.controls import Controls
from stream_trainer.samples.tokens.whole import Marked


def backend_of_bytes() -> Tokenizer:
    tokenizer = Tokenizer.from_str(byte_tokenizer().backend_tokenizer.to_str())
    tokenizer.encode_special_tokens = True
    return tokenizer


BACKEND = backend_of_bytes()


@given(st.lists(st.text(), max_size=4), st.sampled_from([None, 1, 5]))
def test_ids_are_those_of_the_backend(texts: list[str], limit: int | None) -> None:
    encode = byte_encoder(BACKEND, limit)
    assert encode is not None
    for text, ids in zip(texts, encode(texts), strict=True):
        expected = BACKEND.encode(text, add_special_tokens=False).ids
        assert ids[:limit] == expected[:limit]
        assert limit is not None or ids == expected


def trained() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(["the rain in Spain"], trainers.BpeTrainer(show_progress=False))
    return tokenizer


def with_added_token() -> Tokenizer:
    tokenizer = backend_of_bytes()
    tokenizer.add_tokens([AddedToken("tool", normalized=False)])
    return tokenizer


def normalized() -> Tokenizer:
    tokenizer = backend_of_bytes()
    tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def with_prefix_space() -> Tokenizer:
    tokenizer = backend_of_bytes()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


def shuffled() -> Tokenizer:
    vocabulary = {token: 255 - i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


@pytest.mark.parametrize("make", [trained, with_added_token, normalized, with_prefix_space, shuffled])
def test_other_vocabularies_are_left_to_the_backend(make: object) -> None:
    assert callable(make)
    tokenizer = make()
    tokenizer.encode_special_tokens = True
    assert byte_encoder(tokenizer, None) is None


CORPUS = [
    "the rain in Spain  stays mainly, it's said, in\n\n    the plain 1234 é ü",
    "def f(x):\n    return x + 1\n",
] * 3
SPECIAL, TOOL = "<|end|>", "<tool>"


def by_words(*before: Any, regex: bool = True, specials: Sequence[str] = (SPECIAL,)) -> Tokenizer:
    """A byte-level BPE whose texts are cut by `before`, and by GPT-2's pattern if `regex`."""
    tokenizer = Tokenizer(models.BPE())
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, last])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, show_progress=False, initial_alphabet=alphabet, special_tokens=list(specials)
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def like_gpt2() -> Tokenizer:
    return by_words()


def like_smollm2() -> Tokenizer:
    return by_words(pre_tokenizers.Digits(individual_digits=True))


def like_llama3() -> Tokenizer:
    return by_words(pre_tokenizers.Split(Regex(PATTERNS[0]), "isolated"), regex=False)


def like_qwen2() -> Tokenizer:
    tokenizer = by_words(pre_tokenizers.Split(Regex(PATTERNS[1]), "isolated"), regex=False)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_tokens([AddedToken(TOOL, normalized=False)])
    return tokenizer


def that_drops_bytes() -> Tokenizer:
    """As SmolLM2's does with bytes that its vocabulary lacks."""
    tokenizer = Tokenizer(models.BPE({"a": 0, "t": 1, "h": 2, "Ġ": 3, "Ġt": 4}, [("Ġ", "t")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


KINDS = [make() for make in (like_gpt2, like_smollm2, like_llama3, like_qwen2, that_drops_bytes)]
WHITESPACE = " \t\n\r\x0b\x0c\x1c\x1f\x85\xa0\u180e\u2003\u200b\u2028\u3000\ufeff"
CORNERS = [
    *WHITESPACE,
    "  ",
    "\0",
    "a",
    "the",
    "'s",
    "'",
    "\u0301",
    "\u0308",
    "1",
    "²",
    "é",
    "!",
    "_",
    SPECIAL,
    TOOL,
    "漢",
    "😀",
]
texts_with_corners = st.lists(st.sampled_from([*CORNERS, " ", " "]), max_size=12).map("".join) | st.text()


@settings(deadline=None)
@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("tokenizer", KINDS, ids=["gpt2", "smollm2", "llama3", "qwen2", "drops bytes"])
@given(texts=st.lists(texts_with_corners, max_size=6), limit=st.sampled_from([None, 1, 2, 5]))
def test_ids_by_words_are_those_of_the_backend(
    tokenizer: Tokenizer, plain: bool, texts: list[str], limit: int | None
) -> None:
    tokenizer.encode_special_tokens = plain
    encode = word_encoder(tokenizer, limit)
    assert encode is not None
    for _ in range(2):  # by words that are new, then by words that are known
        for text, ids in zip(texts, encode(texts), strict=True):
            expected = tokenizer.encode(text, add_special_tokens=False).ids
            assert ids[:limit] == expected[:limit]
            assert limit is not None or ids == expected


class Counting:
    """A backend that notes what it is asked."""

    def __init__(self, backend: Tokenizer) -> None:
        self.backend = backend
        self.asked: list[str] = []
        self.located: list[set[str]] = []

    def to_str(self) -> str:
        return str(self.backend.to_str())

    def encode_batch_fast(self, texts: list[str], add_special_tokens: bool) -> Any:
        self.asked += texts
        return self.backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)

    def encode_batch(self, texts: list[str], add_special_tokens: bool) -> Any:
        self.located.append(set(texts))
        return self.backend.encode_batch(texts, add_special_tokens=add_special_tokens)


def test_the_backend_is_asked_once_for_each_word() -> None:
    backend: Any = Counting(like_gpt2())
    encode = word_encoder(backend, None)
    assert encode is not None
    first = encode(["the rain in the plain", "a\n\n  the rain"])
    assert sorted(backend.asked) == [" in", " plain", " rain", " the", "a\n\n  the", "the"]
    assert encode(["the rain in the plain", "a\n\n  the rain"]) == first
    assert len(backend.asked) == 6


def test_no_word_is_asked_for_that_is_cut_off() -> None:
    backend: Any = Counting(like_gpt2())
    encode = word_encoder(backend, 3)
    assert encode is not None
    encode(["a b c d e", "a\n\nb f g h i", " p q r s"])
    assert set(backend.asked) == {"a", " b", " c", "a\n\nb", " f", " g", " p", " q", " r"}


def test_words_are_forgotten_when_they_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "MAX_CHARS", 8)
    backend: Any = Counting(like_gpt2())
    encode = word_encoder(backend, None)
    assert encode is not None
    assert encode(["the rain"]) == encode(["the rain"])
    assert backend.asked == ["the", " rain"] or backend.asked == [" rain", "the"]
    encode(["in Spain"])
    assert encode(["the rain"]) == [backend.backend.encode("the rain").ids]
    assert len(backend.asked) == 6


ANSWERED = [
    Marked(text, ((text.index("\n") + 1, len(text)),))
    for text in ("the rain\nin Spain", "in\nthe plain, it", "said the rain\nin the plain")
]


@pytest.mark.parametrize("kept", [whole.MAX_LOCATED, 0])
def test_words_that_a_border_falls_into_are_asked_for_in_one_call(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole, "MAX_LOCATED", kept)
    backend: Any = Counting(like_gpt2())
    monkeypatch.setattr(whole, "fenced_backend", lambda *_: backend)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=like_gpt2())
    encode = whole.whole_encoder(tokenizer, Controls({}), None)
    first = encode(ANSWERED)
    assert backend.located == [{" rain\nin", "in\nthe"}]
    assert encode(ANSWERED[:2]) == first[:2]
    assert backend.located[1:] == [set() if kept else {" rain\nin", "in\nthe"}]
    monkeypatch.setattr(whole, "word_encoder", lambda *_: None)
    assert whole.whole_encoder(tokenizer, Controls({}), None)(ANSWERED) == first


def changed(**model: object) -> Tokenizer:
    described = json.loads(like_gpt2().to_str())
    return Tokenizer.from_str(json.dumps(described | {"model": described["model"] | model}))


def with_a_token(content: str, **how: bool) -> Tokenizer:
    tokenizer = like_gpt2()
    tokenizer.add_tokens([AddedToken(content, normalized=False, **how)])
    return tokenizer


def that_spells_a_special_token() -> Tokenizer:
    tokenizer = like_gpt2()
    tokenizer.add_special_tokens(["Ġthe"])  # as the vocabulary writes " the"
    return tokenizer


def lower() -> Tokenizer:
    tokenizer = like_gpt2()
    tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def pieces_of_sentences() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer


DEPENDENT: dict[str, Callable[[], Tokenizer]] = {
    "no pattern": lambda: by_words(regex=False),
    "another pattern": lambda: by_words(pre_tokenizers.Split(Regex(r"\S+ \S+|\s+"), "isolated"), regex=False),
    "another behaviour": lambda: by_words(pre_tokenizers.Split(Regex(PATTERNS[0]), "removed"), regex=False),
    "another cut": lambda: by_words(pre_tokenizers.Punctuation()),
    "normalized": lower,
    "a token of two words": lambda: with_a_token("a b"),
    "a token that takes spaces": lambda: with_a_token("tool", lstrip=True),
    "a token that is a word": lambda: with_a_token("tool", single_word=True),
    "a special token that it spells": that_spells_a_special_token,
    "chance": lambda: changed(dropout=0.5),
    "marked ends of words": lambda: changed(end_of_word_suffix="</w>"),
    "another model": pieces_of_sentences,
}


@pytest.mark.parametrize("make", DEPENDENT.values(), ids=DEPENDENT.keys())
def test_a_tokenizer_whose_words_are_not_independent_is_left_to_the_backend(make: Callable[[], Tokenizer]) -> None:
    assert word_encoder(like_gpt2(), None) is not None
    assert word_encoder(make(), None) is None

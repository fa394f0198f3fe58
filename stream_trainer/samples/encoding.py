r"""Texts to token ids as a tokenizer's backend gives them, without asking it for what is known.

The backend costs far more than a record's other work. Two kinds of vocabulary can do without most of it:

- bytes: a byte is its own id;
- byte-level BPE, as in GPT-2, Llama 3 and Qwen2: a text is cut before words, and the ids of words are kept. Each of
  these tokenizers ends a token before a space that stands between two characters that are no whitespace, and never
  looks across it. So the ids of a text are those of its words, one after another.

Every other one is left to the backend, whose ids of both kinds are the same.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers

INEXACT = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")  # settings of a BPE under which words differ
EVERY_BYTE = "".join(map(chr, (*range(0x800), *range(0x800, 0xD800, 0x40), *range(0xE000, 0x110000, 0x1000))))
MAX_CHARS = 2_000_000  # of the words that are kept: some 45 MB with their ids
# The patterns of the tokenizers of Llama 3 and Qwen2. Another one may look across a space.
PATTERNS = tuple(
    rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for digits in (r"\p{N}{1,3}", r"\p{N}")
)
# Python's whitespace holds all of Unicode's, so both neighbours of a cut are no whitespace to the backend either.
CUT = re.compile(r"(?<=\S)(?= \S)")
RUN = re.compile(r"\s\s")
MARK = "\0"

Encode = Callable[[Sequence[str]], list[list[int]]]


def backend_encoder(backend: Tokenizer) -> Encode:
    """What gives all ids of texts, without those that the tokenizer adds at their ends; raises what `backend` does."""
    return lambda texts: [found.ids for found in backend.encode_batch_fast(texts, add_special_tokens=False)]


def byte_encoder(backend: Tokenizer, limit: int | None) -> Encode | None:
    """What gives the ids of texts as `backend`, which ignores special tokens, does; None if its ids are not bytes.

    With a `limit`, ids after the first `limit` of a text may be missing. No special token is ever among them.
    """
    assert backend.encode_special_tokens, "special tokens would be looked for"
    described = json.loads(backend.to_str())
    added = any(not token["special"] for token in described["added_tokens"])
    plain = not added and described["normalizer"] is None and _is_byte_level(described["pre_tokenizer"])
    if not plain or described["model"]["type"] != "BPE" or described["model"]["merges"]:
        return None
    expected = backend.encode(EVERY_BYTE, add_special_tokens=False).ids
    return (lambda texts: [_ids(text[:limit]) for text in texts]) if _ids(EVERY_BYTE) == expected else None


def word_encoder(backend: Tokenizer, limit: int | None) -> Encode | None:
    """What gives the ids of texts as `backend` does, by their words; None if words are not independent.

    With a `limit`, ids after the first `limit` of a text may be missing. If `backend` ignores special tokens, none but
    that of the unknown is ever among them.
    """
    described = json.loads(backend.to_str())
    model, added, normalizer = described["model"], described["added_tokens"], described["normalizer"]
    independent = (
        (normalizer is None or normalizer["type"] == "NFC")  # which never joins anything to a space
        and _ends_before_spaces(described["pre_tokenizer"])
        and all(_stays_in_a_word(token) for token in added)
        and _works_by_word(model)
        and _made(model).isdisjoint(token["id"] for token in added)
    )
    # A byte that the vocabulary lacks is dropped: a word may have no id at all.
    counted = independent and model["vocab"].keys() >= set(pre_tokenizers.ByteLevel.alphabet())
    return _Words(backend, limit if counted else None).encode if independent else None


class _Words:
    """The ids of words that were met lately."""

    def __init__(self, backend: Tokenizer, limit: int | None) -> None:
        self._encode = backend_encoder(backend)
        self._limit = limit
        self._ids: dict[str, tuple[int, ...]] = {}  # one object a word, of which Python's collector keeps no track
        self._chars = 0

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text."""
        if self._chars > MAX_CHARS:
            self._ids, self._chars = {}, 0
        known = self._ids  # what another thread starts anew is not taken from under this one
        words = [_cut(text, self._limit) for text in texts]
        new = list(set[str]().union(*words).difference(known))
        known.update(zip(new, map(tuple, self._encode(new)), strict=True))
        self._chars += sum(map(len, new))
        ids_of = known.__getitem__
        return [list(chain.from_iterable(map(ids_of, found))) for found in words]


def _cut(text: str, limit: int | None) -> list[str]:
    """The words of a text, each with the space before it; the first `limit` of them, which have as many ids or more."""
    if MARK in text or text.endswith(" ") or RUN.search(text):
        return CUT.split(text, limit or 0)[:limit]
    # Every space but one at the start is a cut, and the methods of strings find them several times faster.
    marked = text[:1] + text[1:].replace(" ", MARK + " ")
    return marked.split(MARK, -1 if limit is None else limit)[:limit]


def _ids(text: str) -> list[int]:
    return list(text.encode())


def _is_byte_level(pre_tokenizer: Mapping[str, Any] | None) -> bool:
    return pre_tokenizer is not None and pre_tokenizer["type"] == "ByteLevel" and not pre_tokenizer["add_prefix_space"]


def _ends_before_spaces(pre_tokenizer: Mapping[str, Any] | None) -> bool:
    """Whether it is known to end a token before a space between two characters that are no whitespace."""
    if pre_tokenizer is None:
        return False
    *before, last = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    splits = [step for step in before if step["type"] == "Split"]
    return (
        _is_byte_level(last)
        and all(step["type"] in ("Split", "Digits") for step in before)
        and all(step["pattern"].get("Regex") in PATTERNS and step["behavior"] == "Isolated" for step in splits)
        and not any(step["invert"] for step in splits)
        and (bool(splits) or last["use_regex"])
    )


def _stays_in_a_word(token: Mapping[str, Any]) -> bool:
    return " " not in token["content"] and not (token["single_word"] or token["lstrip"] or token["rstrip"])


def _works_by_word(model: Mapping[str, Any]) -> bool:
    return model["type"] == "BPE" and not any(model[name] for name in INEXACT)


def _made(model: Mapping[str, Any]) -> set[int]:
    """The ids that a BPE makes of text."""
    vocabulary: Mapping[str, int] = model["vocab"]
    if model["ignore_merges"]:
        return set(vocabulary.values())
    merged = (left + right for left, right in model["merges"])
    return {vocabulary[token] for token in (*pre_tokenizers.ByteLevel.alphabet(), *merged) if token in vocabulary}

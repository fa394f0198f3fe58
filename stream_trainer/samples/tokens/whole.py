"""Whole texts to token ids, and which of the tokens stand for parts of a text.

A text is tokenised in one go: word marks, merges and bytes are those of the whole. Where a border falls inside a token,
the token belongs to the part that carries loss.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from stream_trainer.samples.encoding import Encode, byte_encoder, word_encoder
from stream_trainer.samples.tokens.controls import CLOSE, OPEN, Controls, fenced_backend, plain_backend

Span = tuple[int, int]


class Marked(NamedTuple):
    """A text with fences around the control tokens that are meant.

    Attributes:
        spans: the parts that carry loss, from and to a character, in order and apart.
    """

    text: str
    spans: tuple[Span, ...]


class Tokens(NamedTuple):
    """What became of a marked text: its ids, and from and to which token its parts go."""

    ids: list[int]
    spans: list[Span]


class Stretch(NamedTuple):
    """Some of a text, from one character to another, at whose ends no token goes across; `bordered` inside or not."""

    start: int
    end: int
    bordered: bool


class Located(NamedTuple):
    """Ids of a text, and the character at which each token begins and ends."""

    ids: list[int]
    starts: list[int]
    ends: list[int]

    def first(self, at: int) -> int:
        """The first token of what begins at a character; one that goes across it is included."""
        return bisect_right(self.ends, at)

    def after(self, at: int) -> int:
        """The token behind what ends at a character; one that goes across it is included."""
        return bisect_left(self.starts, at)


MAX_LOCATED = 20_000  # texts with their tokens that are kept

EncodeMarked = Callable[[Sequence[Marked]], list[Tokens]]


def whole_encoder(tokenizer: Any, controls: Controls, limit: int | None) -> EncodeMarked:
    """What gives the tokens of whole texts; with a `limit`, ids after the first `limit` may be missing.

    Raises SettingsError if the tokenizer cannot be told its control tokens from text.
    """
    by_bytes = byte_encoder(plain_backend(tokenizer, controls), limit)
    if by_bytes is not None:
        return _ByBytes(by_bytes, controls).encode
    backend = fenced_backend(tokenizer, controls)
    by_words = word_encoder(backend, limit)
    return _ByWords(by_words, backend).encode if by_words is not None else _by_backend(backend)


@dataclass(frozen=True)
class _ByBytes:
    """Every byte is a token, so that every border is one between tokens."""

    plain: Encode
    controls: Controls

    def encode(self, texts: Sequence[Marked]) -> list[Tokens]:
        """The tokens of each text."""
        plain = iter(self.plain([text for text, _ in texts if OPEN not in text]))
        return [self._in_parts(marked) if OPEN in marked.text else _counted(marked, next(plain)) for marked in texts]

    def _in_parts(self, marked: Marked) -> Tokens:
        text, spans = marked
        ids: list[int] = []
        reached = {0: 0}
        for start, end in pairwise(sorted({0, len(text), *chain.from_iterable(spans)})):
            ids += self._fenced(text[start:end])
            reached[end] = len(ids)
        return Tokens(ids, [(reached[start], reached[end]) for start, end in spans])

    def _fenced(self, text: str) -> list[int]:
        parts = self.controls.fenced.split(text)
        plain = iter(self.plain(parts[::2]))
        return [i for at, part in enumerate(parts) for i in ([self.controls.ids[part]] if at % 2 else next(plain))]


def _counted(marked: Marked, ids: list[int]) -> Tokens:
    """Borders in a text without fences, by its bytes."""
    text, spans = marked
    return Tokens(
        ids, [(len(text[:a].encode()), len(ids) if b == len(text) else len(text[:b].encode())) for a, b in spans]
    )


class _ByWords:
    """Words are tokenised one by one. Only those that a border falls into need the backend, which tells offsets."""

    def __init__(self, words: Encode, backend: Tokenizer) -> None:
        self._words = words
        self._backend = backend
        self._located: dict[str, Located] = {}

    def encode(self, texts: Sequence[Marked]) -> list[Tokens]:
        """The tokens of each text."""
        stretches = [_stretches(text, spans) for text, spans in texts]
        plain: list[str] = []
        with_borders: list[str] = []
        for (text, _), found in zip(texts, stretches, strict=True):
            for start, end, bordered in found:
                (with_borders if bordered else plain).append(text[start:end])
        given, placed = iter(self._words(plain)), iter(self._locate(with_borders))
        return [_joined(marked, found, given, placed) for marked, found in zip(texts, stretches, strict=True)]

    def _locate(self, texts: Sequence[str]) -> list[Located]:
        """The tokens of texts, all that are new by one call: one for each would cost as much again in Python."""
        if len(self._located) > MAX_LOCATED:
            self._located = {}
        known = self._located
        new = list(set(texts).difference(known))
        known.update(zip(new, map(located, self._backend.encode_batch(new, add_special_tokens=False)), strict=True))
        return [known[text] for text in texts]


def _joined(
    marked: Marked, stretches: Sequence[Stretch], given: Iterator[list[int]], placed: Iterator[Located]
) -> Tokens:
    """The tokens of a text from those of its stretches: the next in `placed` where it is bordered, else in `given`."""
    ids: list[int] = []
    reached: dict[int, tuple[int, int]] = {}  # of each border, the token that begins and the one that ends there
    for start, end, bordered in stretches:
        reached[start] = len(ids), len(ids)
        if bordered:
            found = next(placed)
            for at in {at for span in marked.spans for at in span if start < at < end}:
                reached[at] = len(ids) + found.first(at - start), len(ids) + found.after(at - start)
            ids += found.ids
        else:
            ids += next(given)
    reached[len(marked.text)] = len(ids), len(ids)
    return Tokens(ids, [(reached[start][0], reached[end][1]) for start, end in marked.spans])


def _stretches(text: str, spans: Sequence[Span]) -> list[Stretch]:
    """The whole text, cut so that every border is at an end of a stretch or inside one that is short."""
    found: list[Stretch] = []
    for at in sorted({at for span in spans for at in span}):
        start, end = _cut_before(text, at), _cut_after(text, at)
        reached = found[-1].end if found else 0
        if start < reached:  # the border before is close
            end, start = max(end, reached), found.pop().start
        elif start > reached:
            found.append(Stretch(reached, start, bordered=False))
        if end > start:
            found.append(Stretch(start, end, bordered=True))
    reached = found[-1].end if found else 0
    if reached < len(text):
        found.append(Stretch(reached, len(text), bordered=False))
    return found


def _cut_before(text: str, at: int) -> int:
    """The last place up to `at` where a token of a tokenizer by words ends for certain."""
    floor = text.rfind(CLOSE, 0, at) + 1
    if at in (floor, len(text)) or text[at] == OPEN:
        return at
    while (found := text.rfind(" ", floor, at + 1)) > floor:
        if _is_cut(text, found):
            return found
        at = found - 1
    return floor


def _cut_after(text: str, at: int) -> int:
    """The first place from `at` on where a token of a tokenizer by words ends for certain."""
    ceiling = text.find(OPEN, at)
    ceiling = len(text) if ceiling < 0 else ceiling
    if at in (0, ceiling) or text[at - 1] == CLOSE:
        return at
    while (found := text.find(" ", at, ceiling)) >= 0:
        if _is_cut(text, found):
            return found
        at = found + 1
    return ceiling


def _is_cut(text: str, at: int) -> bool:
    """Whether there is a space between two characters that are no whitespace."""
    return not (text[at - 1].isspace() or text[at + 1 : at + 2].isspace()) and at + 1 < len(text)


def _by_backend(backend: Tokenizer) -> EncodeMarked:
    def encode(texts: Sequence[Marked]) -> list[Tokens]:
        found = backend.encode_batch([text for text, _ in texts], add_special_tokens=False)
        return [_placed(marked, one) for marked, one in zip(texts, found, strict=True)]

    return encode


def _placed(marked: Marked, found: Any) -> Tokens:
    text, spans = marked
    if spans == ((0, len(text)),):
        return Tokens(found.ids, [(0, len(found.ids))])
    place = located(found)
    return Tokens(place.ids, [(place.first(a) if a else 0, place.after(b)) for a, b in spans])


def located(found: Any) -> Located:
    """Ids and offsets of what a backend has encoded."""
    offsets = found.offsets
    return Located(found.ids, [start for start, _ in offsets], [end for _, end in offsets])

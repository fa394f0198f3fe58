"""Texts, prompts and responses: what is tokenised of them, and which tokens come before and after."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from stream_trainer.errors import SampleError
from stream_trainer.samples.fields import text_of
from stream_trainer.samples.formatted import FORMATTED, Markers, end_of_turn
from stream_trainer.samples.tokens.controls import OPEN, Controls
from stream_trainer.samples.tokens.whole import Marked

logger = logging.getLogger(__name__)


class Framed(NamedTuple):
    """A text, the tokens before and after it, and what is to be noted of it."""

    marked: Marked
    frame: tuple[list[int], list[int]]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Framing:
    """What stands around texts.

    Attributes:
        start: what the tokenizer puts before a text by itself.
        end: of a text, and `end_of_response` of a response.
        formatted: what to do with a text that a chat template has written: `samples.formatted_text`.
    """

    controls: Controls
    markers: Markers
    start: list[int]
    end: list[int]
    end_of_response: list[int]
    formatted: str

    def read(self, form: Mapping[str, Any]) -> Framed:
        """The text of a form. Raises SampleError."""
        texts = [text_of(name, value) for name, value in form.items()]
        before, said = ("", texts[0]) if "text" in form else (texts[0] + "\n", texts[1])
        whole = before + said
        if OPEN in whole and self.controls.fenced.search(whole):
            raise SampleError("tokenizer", "the text has a control token between Unicode noncharacters")
        end = self.end if "text" in form else self.end_of_response
        if not self.markers.wrote(whole):
            return Framed(_marked(before, said), (self.start, end))
        if self.formatted == "dead_letter":
            raise SampleError(FORMATTED, "the text carries the markers of a chat template; send messages")
        if self.formatted == "text":
            return Framed(_marked(before, said), (self.start, end), (FORMATTED,))
        return self._as_tokens(before, said, end)

    def _as_tokens(self, before: str, said: str, end: list[int]) -> Framed:
        """With its control tokens meant; those at its ends are not put there twice."""
        found = [self.controls.ids[token] for token in self.controls.pattern.findall(before + said)]
        first = self.controls.pattern.match(before + said)
        ended = found and found[-1] in (*self.end, *self.end_of_response) and _ends(before + said, self.controls)
        frame = ([] if first and found[: len(self.start)] == self.start else self.start, [] if ended else end)
        return Framed(_marked(self.controls.fence(before), self.controls.fence(said)), frame, (FORMATTED,))


def _marked(before: str, said: str) -> Marked:
    """A text in which what is said carries loss."""
    whole = before + said
    return Marked(whole, ((len(before), len(whole)),))


def _ends(text: str, controls: Controls) -> bool:
    """Whether there is a control token at the end, or only whitespace behind it."""
    *_, last = controls.pattern.finditer(text)
    return not text[last.end() :].strip()


def framing_of(tokenizer: Any, controls: Controls, markers: Markers, formatted: str) -> Framing:
    """What a tokenizer puts around texts. A response ends as the template ends a turn, if it has an end for it."""
    end = tokenizer.eos_token_id
    of_turn = end_of_turn(tokenizer, controls)
    of_text = of_turn if end is None else end
    of_response = end if of_turn is None else of_turn
    if of_text is None:
        logger.warning(
            "the tokenizer %s names no end token: nothing is learnt of where an answer ends", tokenizer.name_or_path
        )
    end_of_text, end_of_response = ([] if number is None else [number] for number in (of_text, of_response))
    return Framing(controls, markers, _start(tokenizer), end_of_text, end_of_response, formatted)


def _start(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text: a start token, or several for some families."""
    try:
        whole, plain = (list(tokenizer("a", add_special_tokens=added)["input_ids"]) for added in (True, False))
    except Exception:  # a vocabulary of whole words may lack this one
        whole = list(tokenizer("")["input_ids"])
        return whole[:1] if whole[:1] == [tokenizer.bos_token_id] else []
    places = (at for at in range(len(whole)) if plain and whole[at : at + len(plain)] == plain)
    return whole[: next(places, 0)]

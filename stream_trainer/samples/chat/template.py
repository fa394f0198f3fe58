"""The tokenizer's chat template, as a function from a conversation to text."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

from transformers.utils.chat_template_utils import render_jinja_template

from stream_trainer.errors import SampleError
from stream_trainer.samples.tokens.controls import FILL

Message = Mapping[str, Any]

MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")
LITERAL = re.compile(r"""'((?:[^'\\]|\\.)*)'|"((?:[^"\\]|\\.)*)\"""", re.DOTALL)
SHORT = 8  # letters of a sentence below which it says nothing
LONG = 120


@dataclass(frozen=True)
class Conversation:
    """What a record says of a conversation.

    Attributes:
        messages: as the template takes them.
        weights: of each message; those of 0 carry no loss.
        arguments: of the template.
    """

    messages: Sequence[Message]
    weights: Sequence[float]
    tools: Sequence[Mapping[str, Any]] | None
    arguments: Mapping[str, Any]

    def to(self, end: int) -> "Conversation":
        """The first `end` messages."""
        return replace(self, messages=self.messages[:end])

    def with_message(self, number: int, message: Message) -> "Conversation":
        """The same with another message in the place of one."""
        return replace(self, messages=[*self.messages[:number], message, *self.messages[number + 1 :]])


class _Source(NamedTuple):
    """A template's text, whether it marks what is generated, and the special tokens that it may read."""

    text: str
    marked: bool
    tokens: Mapping[str, Any]


class Template:
    """Renders conversations. Every failure of a template, which is a program of its own, is a SampleError."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._sources: dict[bool, _Source] = {}

    def source(self, with_tools: bool) -> "_Source":
        """The template's text. Raises SampleError if there is none."""
        if with_tools not in self._sources:
            if self._tokenizer.chat_template is None:
                raise SampleError("chat_template", "messages need a chat template, and the tokenizer has none")
            try:
                found = self._tokenizer.get_chat_template(None, [{}] if with_tools else None)
            except ValueError as error:
                raise SampleError("chat_template", "the tokenizer has no default among its templates") from error
            # transformers copies all tokens for every rendering; most templates read one or two.
            tokens = {name: token for name, token in self._tokenizer.special_tokens_map.items() if name in found}
            self._sources[with_tools] = _Source(found, bool(MARKERS.search(found)), tokens)
        return self._sources[with_tools]

    def render(self, talk: Conversation, prompt: bool = False) -> str:
        """The whole conversation as text; with `prompt`, up to where the next answer begins."""
        return self._render(talk, prompt, marked=False)[0]

    def render_marked(self, talk: Conversation) -> tuple[str, list[tuple[int, int]]]:
        """The text, and the parts that the template itself marks as generated; none if it marks nothing."""
        if not self.source(talk.tools is not None).marked:
            return self.render(talk), []
        return self._render(talk, prompt=False, marked=True)

    def _render(self, talk: Conversation, prompt: bool, marked: bool) -> tuple[str, list[tuple[int, int]]]:
        source = self.source(talk.tools is not None)
        try:
            texts, spans = render_jinja_template(
                conversations=[list(talk.messages)],
                tools=talk.tools,
                chat_template=source.text,
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=marked,
                **{**source.tokens, **talk.arguments},
            )
        except Exception as error:
            raise SampleError(
                "chat_template", f"the template refuses the messages ({_why(error, source.text)})"
            ) from error
        return texts[0], [(start, end) for start, end in spans[0]] if marked else []

    @cached_property
    def takes_parts(self) -> bool:
        """Whether it writes contents that are lists of parts."""
        said = [{"role": role, "content": [{"type": "text", "text": FILL}]} for role in ("user", "assistant")]
        try:
            return self.render(Conversation(said, (), None, {})).count(FILL) == len(said)
        except SampleError:
            return False

    @cached_property
    def prompts_unasked(self) -> bool:
        """Whether it ends every conversation with the beginning of an answer, whether or not it is asked to."""
        said = [{"role": role, "content": FILL + role} for role in ("user", "assistant", "user")]
        try:
            texts = [self.render(Conversation(said[:count], (), None, {})) for count in (1, 2, 3)]
        except SampleError:
            return False
        return texts[1].startswith(f"{texts[0]}{FILL}assistant") and not texts[2].startswith(texts[1])

    def leaves_out(self, ends: re.Pattern[str]) -> bool:
        """Whether a token that ends an answer stands behind what it marks as generated."""
        said = [{"role": role, "content": FILL + role} for role in ("user", "assistant")]
        try:
            text, spans = self.render_marked(Conversation(said, (), None, {}))
        except SampleError:
            return False
        return bool(spans) and ends.search(text[spans[-1][1] :]) is not None

    def reads(self, argument: str) -> bool:
        """Whether the name of an argument stands in it, or in one of several."""
        found = self._tokenizer.chat_template
        sources = found.values() if isinstance(found, Mapping) else [found or ""]
        return any(re.search(rf"\b{re.escape(argument)}\b", source) for source in sources)


def _why(error: Exception, source: str) -> str:
    """The template's own sentence. What it quotes from the record is left out."""
    said, kind = " ".join(str(error).split()), type(error).__name__
    known = [literal for literal in _literals(source) if len(literal) >= SHORT and literal in said]
    best = max(known, key=len, default="")
    return f"{kind}: {best[:LONG]}" if best else kind


@lru_cache(maxsize=8)
def _literals(source: str) -> frozenset[str]:
    """The strings that stand in a template, with single spaces."""
    found = (one or two for one, two in LITERAL.findall(source))
    return frozenset(" ".join(re.sub(r"\\(.)", _escaped, text).split()) for text in found)


def _escaped(found: re.Match[str]) -> str:
    return {"n": "\n", "t": "\t", "r": "\r"}.get(found[1], found[1])

"""Where in a rendered conversation the assistant speaks.

A template's own markers say it. Without them the renderings of parts of the conversation are compared: a turn begins
where the template, asked to prompt for an answer to the messages before it, would stop, and ends where the conversation
up to that turn ends. Some templates write a turn differently once others follow. Then the turn's content is replaced to
see where it stands, and the prompt is looked for before it, and the end of the turn behind it.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

from stream_trainer.errors import SampleError
from stream_trainer.samples.chat.template import Conversation, Message, Template
from stream_trainer.samples.tokens.controls import FILL

Span = tuple[int, int]


def turn_spans(template: Template, talk: Conversation) -> tuple[str, list[Span | None]]:
    """The text, and where in it each turn of the assistant stands; None where that cannot be told.

    Raises SampleError if the template refuses the conversation.
    """
    text, marked = template.render_marked(talk)
    numbers = [number for number, message in enumerate(talk.messages) if message["role"] == "assistant"]
    if len(marked) == len(numbers):
        return text, [*marked]
    if template.prompts_unasked:
        raise SampleError("chat_template", "the template begins an answer unasked; heed add_generation_prompt in it")
    spans = [_by_prefix(template, talk, number, text) for number in numbers]
    if None in spans:
        search = _Search(template, talk, text)
        for place, number in enumerate(numbers):
            spans[place] = spans[place] or search.span(number)
    return text, _apart(spans)


def _apart(spans: Sequence[Span | None]) -> list[Span | None]:
    """None in the place of all if some run into one another: then neither is where it should be."""
    found = [span for span in spans if span is not None]
    sound = all(start < end for start, end in found) and all(a[1] <= b[0] for a, b in pairwise(found))
    return [*spans] if sound else [None] * len(spans)


def _by_prefix(template: Template, talk: Conversation, number: int, text: str) -> Span | None:
    """Where a turn stands if the template writes what comes before it, and it, as it does in the whole."""
    try:
        before = template.render(talk.to(number), prompt=True)
        until = template.render(talk.to(number + 1)) if number + 1 < len(talk.messages) else text
    except SampleError:  # the template refuses a part of what it accepts as a whole
        return None
    return (len(before), len(until)) if until.startswith(before) and text.startswith(until) else None


class _Search:
    """Looks for turns that the template has rewritten."""

    def __init__(self, template: Template, talk: Conversation, text: str) -> None:
        self._template, self._talk, self._text = template, talk, text
        prompted = template.render(talk, prompt=True)
        self._prompt = prompted[_common_start(text, prompted) :]  # what it writes for an answer to begin

    def span(self, number: int) -> Span | None:
        """From behind the prompt for an answer to the end of the turn."""
        place = _place(self._template, self._talk, number, self._text)
        end = self._end(number, place) if place is not None else None
        if place is None or end is None:
            return None
        before = _place(self._template, self._talk, number - 1, self._text) if number else None
        return self._start(before[1] if before is not None else 0, place[0]), end

    def _start(self, floor: int, content: int) -> int:
        found = self._text.rfind(self._prompt, floor, content) if self._prompt else -1
        if found >= 0:
            return found + len(self._prompt)
        return content  # the prompt has more, a thought for instance, than is written of this turn

    def _end(self, number: int, place: Span) -> int | None:
        if number == len(self._talk.messages) - 1:
            return len(self._text)
        part = self._talk.to(number + 1)
        try:
            until = self._template.render(part)
        except SampleError:
            return None
        last = _place(self._template, part, number, until)
        return None if last is None else place[1] + _common_start(until[last[1] :], self._text[place[1] :])


def _place(template: Template, talk: Conversation, number: int, text: str) -> Span | None:
    """Where what a message says stands in the text, or None if it does not show."""
    for other in _others(talk.messages[number]):
        try:
            replaced = template.render(talk.with_message(number, other))
        except SampleError:
            continue
        if replaced != text:
            start = _common_start(text, replaced)
            return start, max(start, len(text) - _common_start(text[::-1], replaced[::-1]))
    return None


def _others(message: Message) -> Iterator[Message]:
    """The message with something else in the place of what it says."""
    if isinstance(message.get("content"), list):
        yield {**message, "content": [{"type": "text", "text": FILL}]}
    yield {**message, "content": FILL}
    if message.get("tool_calls"):
        yield {**message, "tool_calls": [{"type": "function", "function": {"name": FILL, "arguments": {}}}]}


def _common_start(a: str, b: str) -> int:
    """How many characters two texts begin with alike."""
    differing = (at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(differing, min(len(a), len(b)))

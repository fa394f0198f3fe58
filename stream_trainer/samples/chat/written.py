"""A conversation as the template writes it: its text, the parts that carry loss, and which control tokens are meant."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from stream_trainer.errors import SampleError, SettingsError
from stream_trainer.samples.chat.messages import CARRIED, THOUGHTS, conversation_of
from stream_trainer.samples.chat.spans import turn_spans
from stream_trainer.samples.chat.template import Conversation, Template
from stream_trainer.samples.formatted import FORMATTED, Markers
from stream_trainer.samples.tokens.controls import CLOSE, FILL, OPEN, Controls
from stream_trainer.samples.tokens.whole import Marked

logger = logging.getLogger(__name__)

Span = tuple[int, int]

LOST_TURN = "turn_without_loss"
CONTROL_IN_MESSAGE = "control_tokens"


class Chats:
    """Conversations of records, by one tokenizer's template."""

    def __init__(
        self,
        tokenizer: Any,
        controls: Controls,
        markers: Markers,
        arguments: Mapping[str, Any],
        ignored: Sequence[str] = (),
    ) -> None:
        """Raises SettingsError if the template does not read one of the `arguments`, which the settings give."""
        self.template = Template(tokenizer)
        for name in arguments:
            if not self.template.reads(name):
                raise SettingsError(
                    f"samples.template_arguments.{name} is not read by the tokenizer's chat template; leave it out"
                )
        if self.template.leaves_out(controls.pattern):
            logger.warning(
                "the chat template marks answers as generated without the token that ends them: nothing is learnt of "
                "where an answer ends"
            )
        self._markers = markers
        self._controls, self._arguments, self._ignored = controls, arguments, ignored
        self._written: set[tuple[str, bool]] = set()  # roles of which the template is known to write what they say

    def read(self, form: Mapping[str, Any]) -> tuple[Marked, float, tuple[str, ...]]:
        """The text of a conversation, what it weighs, and what is to be noted of it.

        Raises SampleError if it is malformed, if the template refuses it, or if it says what the template leaves out.
        """
        talk = conversation_of(form, self._arguments, self.template.takes_parts, self._ignored)
        self.template.source(talk.tools is not None)  # there is one
        if not any(message["role"] == "assistant" for message in talk.messages):
            raise SampleError("no_loss_tokens", "no message is the assistant's")
        talk = self._as_it_takes_calls(talk)
        text, turns = turn_spans(self.template, talk)
        _check_all_is_written(self.template, talk, text, self._ignored)
        self._check_messages(talk, text)
        spans, weight, lost = _weighed(talk, turns)
        marks, in_messages = _meant(self.template, talk, text, self._controls)
        formatted = any(map(self._markers.wrote, _strings([message.get("content") or "" for message in talk.messages])))
        notes = (LOST_TURN,) * lost + (CONTROL_IN_MESSAGE,) * in_messages + (FORMATTED,) * formatted
        return _fenced(text, spans, marks), weight, notes

    def _check_messages(self, talk: Conversation, text: str) -> None:
        """Raises SampleError if the template leaves out what another than the assistant says.

        Of each role it is tried once, for few words may stand somewhere else too. Later what is said has to stand in
        the text, in order.
        """
        at = 0
        for number, message in enumerate(talk.messages):
            said, role = message.get("content"), (message["role"], number == 0)
            found = text.find(said.strip(), at) if isinstance(said, str) else -1
            at = found + len(said.strip()) if found >= 0 and isinstance(said, str) else at
            if message["role"] == "assistant" or not said or (found >= 0 and role in self._written):
                continue
            other = FILL if isinstance(said, str) else [{"type": "text", "text": FILL}]
            without = talk.with_message(number, {**message, "content": other})
            _check_changes(self.template, without, text, f"the content of message {number}", "leave the message out")
            self._written.add(role)

    def _as_it_takes_calls(self, talk: Conversation) -> Conversation:
        """Arguments of calls are objects for most templates, and texts of JSON for some."""
        if not any("tool_calls" in message for message in talk.messages):
            return talk
        try:
            self.template.render(talk)
            return talk
        except SampleError as refusal:
            written = replace(talk, messages=[_with_texts(message) for message in talk.messages])
            try:
                self.template.render(written)
            except SampleError:
                raise refusal from None
            return written


def _with_texts(message: Mapping[str, Any]) -> Mapping[str, Any]:
    if "tool_calls" not in message:
        return message
    calls = [
        {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def _weighed(talk: Conversation, turns: Sequence[Span | None]) -> tuple[list[Span], float, int]:
    """The parts that carry loss, the one weight that all of them have, and how many are lost."""
    weights = [w for message, w in zip(talk.messages, talk.weights, strict=True) if message["role"] == "assistant"]
    wanted = {weight for weight in weights if weight}
    if not wanted:
        raise SampleError("no_loss_tokens", "every message of the assistant has the weight 0")
    if len(wanted) > 1:
        raise SampleError("bad_number", "messages of one record differ in weight; it may be 0 beside one other")
    spans = [span for span, weight in zip(turns, weights, strict=True) if span is not None and weight]
    if not spans:
        raise SampleError("chat_template", "the template does not show where the assistant's turns are")
    return spans, wanted.pop(), sum(weight > 0 for weight in weights) - len(spans)


def _check_all_is_written(template: Template, talk: Conversation, text: str, ignored: Sequence[str]) -> None:
    """Raises SampleError for what the record says and the template leaves out."""
    if talk.tools is not None and "tools" not in ignored:
        _check_changes(template, replace(talk, tools=None), text, "tools")
    for name in talk.arguments:
        if not template.reads(name):
            raise SampleError("chat_template", f"the template does not read the argument {name[:40]}")
    for number, message in enumerate(talk.messages):
        for names in _extras(message):
            part = talk.to(number + 1)
            without = {name: value for name, value in message.items() if name not in names}
            try:
                whole = template.render(part)
            except SampleError:  # it takes no conversation that ends here
                part, whole = talk, text
            _check_changes(template, part.with_message(number, without), whole, f"{names[0]} of message {number}")


def _extras(message: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Names of what a message says beside its content, together where they say the same."""
    found: list[tuple[str, ...]] = [("tool_calls",)] if message.get("tool_calls") else []
    if found and message.get("content") and str(message["content"]).strip():
        found.append(("content",))
    if message.get("name") and message["role"] != "tool":
        found.append(("name",))
    if any(message.get(name) for name in THOUGHTS):
        found.append(THOUGHTS)
    return found + [(name,) for name in CARRIED if message.get(name)]


def _check_changes(
    template: Template,
    without: Conversation,
    text: str,
    name: str,
    remedy: str = "leave it out, or see samples.ignore",
) -> None:
    try:
        same = template.render(without) == text
    except SampleError:
        return
    if same:
        raise SampleError("chat_template", f"the template does not write {name}; {remedy}")


def _meant(template: Template, talk: Conversation, text: str, controls: Controls) -> tuple[list[Span], bool]:
    """Where the template's own control tokens stand in the text, and whether messages spell out any.

    A second rendering tells them apart, in which those of the messages are marked. The template may look for them in
    what a message says, so that either way of marking may change what it writes; if both do, nothing is certain.
    """
    found = list(controls.pattern.finditer(text))
    given = [list(talk.messages), talk.tools, dict(talk.arguments)]
    if not any(controls.pattern.search(said) for said in _strings(given)):
        return [one.span() for one in found], False
    for marks in controls.marks:
        try:
            theirs = marks.read(_marked(template, talk, marks.put))
        except SampleError:
            continue
        if [token for token, _ in theirs] == [one[0] for one in found]:
            return [one.span() for one, (_, own) in zip(found, theirs, strict=True) if not own], True
    raise SampleError("chat_template", "control tokens in a message cannot be told from those of the template")


def _marked(template: Template, talk: Conversation, put: Callable[[str], str]) -> str:
    """A rendering in which the control tokens of what the record says are marked."""
    text = template.render(
        replace(
            talk,
            messages=[{**_mapped(dict(message), put), "role": message["role"]} for message in talk.messages],
            tools=_mapped(talk.tools, put),
            arguments=_mapped(dict(talk.arguments), put),
        )
    )
    if "\\ufdd" in text:  # written as Python or ASCII would, so that no mark can be found
        raise SampleError("chat_template", "the template rewrites what it is given")
    return text


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for pair in value.items() for part in pair for text in _strings(part)]
    return [text for part in value for text in _strings(part)] if isinstance(value, list) else []


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """The same value with every text in it changed, names included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(name): _mapped(part, change) for name, part in value.items()}
    return [_mapped(part, change) for part in value] if isinstance(value, list) else value


def _fenced(text: str, spans: Sequence[Span], marks: Sequence[Span]) -> Marked:
    """With fences around what stands at `marks`. A part that carries loss holds a control token whole."""
    parts, at = [], 0
    for start, end in marks:
        parts += [text[at:start], OPEN, text[start:end], CLOSE]
        at = end
    moved = [(_moved(start, marks, first=True), _moved(end, marks, first=False)) for start, end in spans]
    return Marked("".join([*parts, text[at:]]), tuple(moved))


def _moved(at: int, marks: Sequence[Span], first: bool) -> int:
    """Where a border is once the fences stand; one inside a control token moves to its start or its end."""
    for start, end in marks:
        if start < at < end:
            at = start if first else end
    return at + 2 * sum(end <= at for _, end in marks)

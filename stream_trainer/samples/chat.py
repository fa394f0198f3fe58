"""Chat messages to pieces of text, with loss on what the assistant says and nowhere else.

The tokenizer's template writes the conversation. An assistant turn begins where the template, asked to prompt for an
answer to the messages before it, would stop, and ends where the conversation up to that turn ends. Each such piece is
tokenised by itself: at serving, too, the model continues a prompt that was tokenised alone.

Control tokens that a producer wrote into a message stay text. They are fenced with two noncharacters before the
template sees them, and what stands between fences is tokenised without control tokens.
"""

import re
from dataclasses import dataclass
from typing import Any

from stream_trainer.errors import SampleError
from stream_trainer.samples.fields import check_surrogates

ROLES = ("system", "developer", "user", "assistant", "tool")  # closed: templates build control tokens from the role
MAX_MESSAGES = 256  # every assistant turn renders the messages before it, so cost is quadratic
FENCES = "\ufdd0", "\ufdd1"  # noncharacters: reserved by Unicode for a program's own use


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that is tokenised by itself.

    Attributes:
        loss: whether its tokens carry loss.
        plain: whether control tokens in it are mere text.
    """

    text: str
    loss: bool
    plain: bool


def chat_pieces(tokenizer: Any, control_tokens: tuple[str, ...], messages: object) -> list[Piece]:
    """The pieces of a conversation. Raises SampleError if it is malformed or the template cannot be followed."""
    turns = _fenced(_checked(messages), control_tokens)
    if tokenizer.chat_template is None:
        raise SampleError("chat_template", "messages need a chat template, and the tokenizer has none")
    if not any(turn["role"] == "assistant" for turn in turns):
        raise SampleError("no_loss_tokens", "no message is the assistant's")
    text, spans = _assistant_spans(tokenizer, turns)
    pieces, at = [], 0
    for start, end in spans:
        pieces += _unfenced(text[at:start], loss=False)
        pieces += _unfenced(text[start:end], loss=True)
        at = end
    return pieces + _unfenced(text[at:], loss=False)


def _checked(messages: object) -> list[dict[str, str]]:
    """The messages, reduced to role and content."""
    if not isinstance(messages, list):
        raise SampleError("wrong_type", "messages is not a list")
    if not 0 < len(messages) <= MAX_MESSAGES:
        raise SampleError("bad_messages", f"there are {len(messages)} messages; 1 to {MAX_MESSAGES} can be used")
    for number, message in enumerate(messages):
        if not isinstance(message, dict):
            raise SampleError("bad_messages", f"message {number} is not an object")
        if message.get("role") not in ROLES:
            raise SampleError("bad_messages", f"the role of message {number} is none of {', '.join(ROLES)}")
        content = message.get("content")
        if not isinstance(content, str):
            raise SampleError("bad_messages", f"the content of message {number} is not a string")
        if not content.strip():
            raise SampleError("empty", f"the content of message {number} is empty")
        check_surrogates(content)
        if any(fence in content for fence in FENCES):
            raise SampleError("bad_messages", f"message {number} contains a Unicode noncharacter")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _fenced(turns: list[dict[str, str]], control_tokens: tuple[str, ...]) -> list[dict[str, str]]:
    if not any(token in turn["content"] for turn in turns for token in control_tokens):
        return turns
    # Longest first, so that no token hides inside another one's fences.
    pattern = "|".join(map(re.escape, sorted(control_tokens, key=len, reverse=True)))
    replacement = rf"{FENCES[0]}\g<0>{FENCES[1]}"
    return [{**turn, "content": re.sub(pattern, replacement, turn["content"])} for turn in turns]


def _unfenced(text: str, loss: bool) -> list[Piece]:
    parts = re.split("[" + "".join(FENCES) + "]", text)
    return [Piece(part, loss, plain=index % 2 == 1) for index, part in enumerate(parts) if part]


def _assistant_spans(tokenizer: Any, turns: list[dict[str, str]]) -> tuple[str, list[tuple[int, int]]]:
    """The rendered conversation and where in it the assistant speaks.

    Some templates write a turn differently once others follow (they drop earlier reasoning). Then only the last
    assistant turn can be told apart, and the conversation ends with it.
    """
    text = _render(tokenizer, turns)
    numbers = [number for number, turn in enumerate(turns) if turn["role"] == "assistant"]
    spans = [_span(tokenizer, turns, number, text) for number in numbers]
    found = [span for span in spans if span is not None]
    if len(found) == len(spans):
        return text, found
    text = _render(tokenizer, turns[: numbers[-1] + 1])
    last = _span(tokenizer, turns, numbers[-1], text)
    if last is None:
        raise SampleError("chat_template", "the template does not show where the assistant's last turn begins")
    return text, [last]


def _span(tokenizer: Any, turns: list[dict[str, str]], number: int, text: str) -> tuple[int, int] | None:
    """Where turn `number` stands in `text`, or None if the template rewrites what comes before it."""
    if number == 0:
        return None
    try:
        before = _render(tokenizer, turns[:number], add_generation_prompt=True)
        until = _render(tokenizer, turns[: number + 1])
    except SampleError:  # the template refuses a part of what it accepts as a whole
        return None
    return (len(before), len(until)) if until.startswith(before) and text.startswith(until) else None


def _render(tokenizer: Any, turns: list[dict[str, str]], add_generation_prompt: bool = False) -> str:
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_generation_prompt)
    except Exception as error:  # a template is a program of its own
        raise SampleError("chat_template", f"the template refuses the messages ({type(error).__name__})") from error
    return str(text)

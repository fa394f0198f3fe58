"""The fields of a record that tell a conversation, checked and put as chat templates take them."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from stream_trainer.errors import SampleError
from stream_trainer.samples.chat.template import Conversation
from stream_trainer.samples.fields import STRICT, check_surrogates, number_of
from stream_trainer.samples.tokens.controls import RESERVED
from stream_trainer.settings.sections.samples import GIVEN_BY_US

ROLES = ("system", "developer", "user", "assistant", "tool")  # closed: templates build control tokens from the role
MAX_MESSAGES = 256  # every assistant turn renders the messages before it, so cost is quadratic
THOUGHTS = ("reasoning_content", "thinking", "reasoning")
CARRIED = ("tools", "functions", "documents", "context")  # of which some templates write what stands in a message
# What a message may carry that says how it is to be trained on, or more than it has words for. Some of it we read
# under another name; none of it is ever dropped without a word.
MEANINGS = {
    "function_call": "say tool_calls",
    "train": "say weight: 0 or 1",
    "trainable": "say weight: 0 or 1",
    "loss": "say weight: 0 or 1",
    "mask": "say weight: 0 or 1",
    "masked": "say weight: 0 or 1",
    "loss_mask": "say weight: 0 or 1",
    "loss_weight": "say weight",
    "training": "say weight: 0 or 1",
    "train_on": "say weight: 0 or 1",
    "train_detail": "say weight: 0 or 1",
    "training_detail": "say weight: 0 or 1",
    "label": "drop it",
    "refusal": "say it in content",
    "prefix": "drop it",
    "images": "only texts can be used",
    "image": "only texts can be used",
    "image_url": "only texts can be used",
    "audio": "only texts can be used",
    "input_audio": "only texts can be used",
    "video": "only texts can be used",
    "videos": "only texts can be used",
    "attachments": "only texts can be used",
}
# Kinds of parts of a content that are told by their names.
KINDS = (
    *("image", "image_url", "input_image", "audio", "audio_url", "input_audio", "video", "video_url", "file"),
    *("tool_use", "tool_result", "thinking", "refusal", "input_text", "output_text"),
)


def conversation_of(
    form: Mapping[str, Any], arguments: Mapping[str, Any], takes_parts: bool, ignored: Sequence[str] = ()
) -> Conversation:
    """What `messages`, and `system`, `tools` and `chat_template_kwargs` beside them, say.

    A `prompt` and a `response` in their place are the two parts of it, of which the first is not trained on.
    `arguments` are those of the settings; the record's own come first. Raises SampleError, by the name of the field.
    """
    given, prompted = _given(form)
    if not 0 < len(given) <= MAX_MESSAGES:
        raise SampleError("bad_messages", f"there are {len(given)} messages; 1 to {MAX_MESSAGES} can be used")
    messages = [_message(number, message, takes_parts, ignored) for number, message in enumerate(given)]
    weights = [_weight(number, message, number >= prompted) for number, message in enumerate(given)]
    if "system" in form:
        messages, weights = [_system(form["system"], messages), *messages], [0.0, *weights]
    talk = Conversation(messages, weights, _tools(form.get("tools")), {**arguments, **_arguments(form)})
    _check_texts([list(talk.messages), talk.tools, dict(talk.arguments)])
    return talk


def _given(form: Mapping[str, Any]) -> tuple[list[Any], int]:
    """All messages, and how many of them are the prompt."""
    if "messages" in form:
        return _list_of("messages", form["messages"]), 0
    prompt, response = _list_of("prompt", form["prompt"]), form["response"]
    if isinstance(response, str):
        response = [{"role": "assistant", "content": response}]
    response = _list_of("response", response)
    if not prompt or not response:
        raise SampleError("empty", f"{'response' if prompt else 'prompt'} has no messages")
    if response[: len(prompt)] == prompt:
        raise SampleError(
            "bad_messages", "response begins with the messages of prompt; map it to messages, ignore prompt"
        )
    return [*prompt, *response], len(prompt)


def _list_of(name: str, value: object) -> list[Any]:
    if not isinstance(value, list):
        inside = "; send the list itself" if isinstance(value, str) and value.lstrip().startswith("[") else ""
        raise SampleError("wrong_type", f"{name} is a {type(value).__name__}, not a list of messages{inside}")
    return value


def _message(number: int, message: object, takes_parts: bool, ignored: Sequence[str]) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise SampleError("bad_messages", f"message {number} is not an object")
    if message.get("role") not in ROLES:
        raise SampleError("bad_messages", f"the role of message {number} is none of {', '.join(ROLES)}")
    said = {name: value for name, value in message.items() if value is not None and name not in ("weight", *ignored)}
    for name, remedy in MEANINGS.items():
        if name in said:
            raise SampleError("bad_messages", f"{name} of message {number} cannot be followed; {remedy}")
    for name in ("name", "tool_call_id", *THOUGHTS):
        if name in said and not isinstance(said[name], str):
            raise SampleError("bad_messages", f"{name} of message {number} is not a string")
    if "tool_calls" in said:
        said["tool_calls"] = _calls(number, said["tool_calls"])
    _check_content(number, said, takes_parts)
    thought = next((said[name] for name in THOUGHTS if name in said), None)
    if thought is not None:  # templates read it by one name or another
        said = {**said, "thinking": said.get("thinking", thought), "reasoning_content": thought}
    return said


def _check_content(number: int, said: Mapping[str, Any], takes_parts: bool) -> None:
    content = said.get("content")
    more = bool(said.get("tool_calls")) and said["role"] == "assistant"
    if isinstance(content, list) and content:
        content = "".join(_part(number, part) for part in content)
        if not takes_parts:
            raise SampleError(
                "bad_messages", f"the content of message {number} is a list, and the template takes a string; join it"
            )
    if content is None and more:
        return
    if not isinstance(content, str):
        raise SampleError("bad_messages", f"the content of message {number} is not a string")
    if not content.strip() and not more and said["role"] != "tool":
        raise SampleError("empty", f"the content of message {number} is empty")


def _part(number: int, part: object) -> str:
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        kind = part.get("type") if isinstance(part, dict) else None
        told = f" but {kind}; only texts can be used" if kind in KINDS else ""
        raise SampleError("bad_messages", f"the content of message {number} has a part that is not of type text{told}")
    for name in (*MEANINGS, "weight"):
        if part.get(name) is not None:
            raise SampleError("bad_messages", f"{name} of a part of message {number} cannot be followed; drop it")
    text: str = part["text"]
    return text


def _calls(number: int, calls: object) -> list[dict[str, Any]]:
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise SampleError("bad_messages", f"tool_calls of message {number} is not a list of objects")
    return [_call(number, call) for call in calls]


def _call(number: int, call: dict[str, Any]) -> dict[str, Any]:
    """A call whose arguments are an object: the templates write JSON themselves."""
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise SampleError("bad_messages", f"a call in tool_calls of message {number} has no name")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = STRICT.decode(arguments or "{}")
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, dict):
        raise SampleError("bad_messages", f"arguments of a call in tool_calls of message {number} are no JSON object")
    whole = {**function, "arguments": arguments}
    return {**call, "function": whole} if "function" in call else {"type": "function", "function": whole}


def _weight(number: int, message: Mapping[str, Any], trained: bool) -> float:
    """1 where the assistant speaks and is `trained` on, and 0 elsewhere, unless the message says otherwise."""
    speaks = message["role"] == "assistant" and trained
    if message.get("weight") is None:
        return float(speaks)
    weight = number_of(f"weight of message {number}", message["weight"])
    if weight < 0:
        raise SampleError("bad_number", f"weight of message {number} is below 0")
    if weight and not speaks:
        why = "only the assistant is" if trained else "the prompt is not"
        raise SampleError("bad_messages", f"weight of message {number} is not 0, and {why} trained on")
    return weight


def _system(system: object, messages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    if not isinstance(system, str):
        raise SampleError("wrong_type", f"system is a {type(system).__name__}, not a string")
    if not system.strip():
        raise SampleError("empty", "system is empty")
    if messages[0]["role"] == "system":
        raise SampleError("ambiguous_fields", "system and a first message with the role system exclude each other")
    return {"role": "system", "content": system}


def _tools(tools: object) -> list[dict[str, Any]] | None:
    """As a list of objects; some producers write the list as a text."""
    if isinstance(tools, str):
        try:
            tools = STRICT.decode(tools)
        except (ValueError, RecursionError) as error:
            raise SampleError("wrong_type", "tools is a string that is no JSON") from error
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise SampleError("wrong_type", "tools is not a list of objects")
    return tools


def _arguments(form: Mapping[str, Any]) -> dict[str, Any]:
    found = form.get("chat_template_kwargs", {})
    if not isinstance(found, dict):
        raise SampleError("wrong_type", f"chat_template_kwargs is a {type(found).__name__}, not an object")
    for name in sorted(found.keys() & GIVEN_BY_US):
        raise SampleError("ambiguous_fields", f"chat_template_kwargs.{name} is given by the record itself")
    return found


def _check_texts(value: object) -> None:
    """Raises SampleError for what no text may hold, wherever it stands."""
    try:
        written = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except RecursionError as error:
        raise SampleError("too_deep", "nested too deeply") from error
    except ValueError as error:
        raise SampleError("bad_number", "a number is not finite") from error
    check_surrogates(written)
    if RESERVED.search(written):
        raise SampleError("bad_messages", "a message contains a Unicode noncharacter")

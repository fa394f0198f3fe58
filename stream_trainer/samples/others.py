"""Fields by other names than ours, and fields that we do not read though they look as if they meant something."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stream_trainer.errors import SampleError

OF_MESSAGES = ("role", "content")
OF_TALKS = ("messages", "prompt", "response")  # fields that may be lists of messages
SPEAKERS = {  # as ShareGPT calls them
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "observation": "tool",
}
# Records of other trainers, by the names that they have, and what maps them.
ELSEWHERE = {
    ("conversations",): "{messages: conversations, role: from, content: value}",
    ("instruction", "output"): "{prompt: [instruction, input], response: output}",
    ("prompt", "completion"): "{response: completion}",
    ("prompt", "chosen"): "{response: chosen}",
    ("chosen",): "{messages: chosen}",
}
# How a record is to be trained on, or more of it than we read, in small letters. Not one of them is ever dropped
# without a word.
MEANINGS = frozenset(
    (
        *("label", "labels", "chosen", "rejected", "completion", "instruction", "input", "output", "conversations"),
        *("preferredoutput", "nonpreferredoutput", "reward", "rewards", "advantage", "advantages"),
        *("system", "systemprompt", "systemmessage", "systeminstruction", "instructions"),
        *("context", "contexts", "documents", "history", "prefix", "suffix"),
        *("tools", "functions", "functioncall", "toolcalls", "toolchoice"),
        *("reasoningcontent", "reasoning", "thinking", "thought", "thoughts", "rationale", "cot", "chainofthought"),
        *("chattemplate", "chattemplatekwargs", "enablethinking", "addgenerationprompt", "continuefinalmessage"),
        *("image", "images", "imageurl", "imagepath", "audio", "audios", "video", "videos", "attachments"),
        *(
            "train",
            "trainable",
            "training",
            "trainoninput",
            "trainoninputs",
            "trainonprompt",
            "maskinput",
            "maskinputs",
        ),
        *("loss", "mask", "masks", "masked", "maskprompt", "lossmask", "lossmasks", "completionmask", "assistantmasks"),
        *("weight", "weights", "lossweight", "lossweights", "sampleweight", "tokenweights", "messageweights"),
        *("promptweight", "completionweight", "responseweight"),
        *("inputids", "tokenids", "pixelvalues"),
    )
)


@dataclass(frozen=True)
class Others:
    """What the producers call our fields.

    Attributes:
        names: theirs, by ours; several are joined by a line break.
        ignored: fields that may be left aside.
    """

    names: Mapping[str, Sequence[str]]
    ignored: frozenset[str]

    def renamed(self, given: dict[str, Any]) -> dict[str, Any]:
        """A record's fields by our names. Raises SampleError if it has one of ours and one of theirs for it."""
        if not self.names:
            return given
        fields = dict(given)
        ours = {name: theirs for name, theirs in self.names.items() if name not in OF_MESSAGES}
        found = {name: _taken(fields, theirs) for name, theirs in ours.items() if any(n in fields for n in theirs)}
        for name, value in found.items():
            if name in fields:
                raise SampleError("ambiguous_fields", f"{name} and {ours[name][0]} exclude each other")
            fields[name] = value
        if "chosen" in given and "chosen" not in fields:  # the side that was not chosen goes with it
            fields.pop("rejected", None)
        if self.names.keys() & set(OF_MESSAGES):
            lists = (name for name in OF_TALKS if isinstance(fields.get(name), list))
            fields |= {name: [self._message(message) for message in fields[name]] for name in lists}
        return fields

    def _message(self, message: object) -> object:
        if not isinstance(message, dict):
            return message
        fields = dict(message)
        for ours in OF_MESSAGES:
            theirs = self.names.get(ours, ())
            if any(name in fields for name in theirs):
                if fields.get(ours) is not None and ours not in theirs:
                    raise SampleError("ambiguous_fields", f"{ours} and {theirs[0]} of a message exclude each other")
                fields[ours] = _taken(fields, theirs)
        if "role" in self.names and isinstance(fields.get("role"), str):
            fields["role"] = SPEAKERS.get(fields["role"], fields["role"])
        return fields

    def check_meaning(self, unread: Mapping[str, Any]) -> None:
        """Raises SampleError if one of these fields, which nothing reads, says how a record is to be trained on."""
        said = (name for name, value in unread.items() if value not in ("", [], {}) and name not in self.ignored)
        for name in sorted(name for name in said if plain(name) in MEANINGS):
            raise SampleError(
                "unread_field", f"{name[:40]} is not read in a record of this form; see samples.fields, ignore"
            )


def plain(name: str) -> str:
    """A field's name in small letters alone: `lossMask` and `loss_mask` mean the same."""
    return name.lower().replace("_", "").replace("-", "")


NO_OTHERS = Others({}, frozenset())


def _taken(fields: dict[str, Any], names: Sequence[str]) -> Any:
    """The value under one name, or the texts under several, which are taken out."""
    if names[0] not in fields:
        raise SampleError("missing_fields", f"needs {names[0]} beside {', '.join(names[1:])}")
    values = [fields.pop(name) for name in names if name in fields]
    if len(names) == 1:
        return values[0]
    for value in values:
        if not isinstance(value, str):
            raise SampleError("wrong_type", f"one of {', '.join(names)} is a {type(value).__name__}, not a string")
    return "\n".join(value for value in values if value.strip())


def others_of(names: Mapping[Any, str | Sequence[str]], ignored: Sequence[str]) -> Others:
    """From the settings `samples.fields` and `samples.ignore`."""
    theirs = {ours: (given,) if isinstance(given, str) else tuple(given) for ours, given in names.items()}
    return Others(theirs, frozenset(ignored))

"""Texts that carry a chat template's markers already, and how a template ends a turn."""

import re
from typing import Any

from stream_trainer.errors import SampleError
from stream_trainer.samples.chat.template import Conversation, Template
from stream_trainer.samples.tokens.controls import FILL, Controls

# Those of templates in common use, whatever the tokenizer's own is.
KNOWN = (
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "[INST]",
    "[/INST]",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
    "<|start|>",
    "<\uff5cUser\uff5c>",
    "<\uff5cAssistant\uff5c>",
)
# How a conversation begins that was made a text of.
MESSAGES = ('[{"role"', "[{'role'", '[{"from"', "[{'from'")
ENOUGH = 2  # markers: one may be talked about
FORMATTED = "formatted_text"


class Markers:
    """The markers of the tokenizer's own template, and those of others."""

    def __init__(self, tokenizer: Any, controls: Controls) -> None:
        example = _example(tokenizer)
        known = {token for token in controls.ids if token in example} | set(KNOWN)
        self._pattern = re.compile("|".join(map(re.escape, sorted(known, key=len, reverse=True))))
        self._starts = (*MESSAGES, *filter(None, [tokenizer.bos_token]))
        self._ends = tuple(filter(None, [tokenizer.eos_token]))
        self._letters = {token[0] for token in known}  # most texts have none of them, which is found out fast

    def wrote(self, text: str) -> bool:
        """Whether a text has more of them than one, begins or ends with one that says so, or is a list of messages."""
        if text.lstrip().startswith(self._starts) or text.rstrip().endswith(self._ends):
            return True
        return any(map(text.__contains__, self._letters)) and len(self._pattern.findall(text)) >= ENOUGH


def end_of_turn(tokenizer: Any, controls: Controls) -> int | None:
    """The control token that the template writes behind an answer; None if it writes none, or there is no template."""
    _, _, behind = _example(tokenizer).rpartition(FILL)
    found = controls.pattern.search(behind)
    return controls.ids[found[0]] if found else None


def _example(tokenizer: Any) -> str:
    """A conversation of a question and an answer, each of them `FILL`."""
    said = [{"role": role, "content": FILL} for role in ("user", "assistant")]
    try:
        return Template(tokenizer).render(Conversation(said, (), None, {}))
    except SampleError:
        return ""

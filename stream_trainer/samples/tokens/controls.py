"""The control tokens of a tokenizer, and the fences that tell its own from those that a record spells out.

Two noncharacters of Unicode stand around each control token that is meant: `FENCED`. A copy of the tokenizer's backend
knows control tokens by these fenced names only. So a whole text is tokenised in one go, with the ids that it has in the
whole, and what stands in it without fences is mere text.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer

from stream_trainer.errors import SettingsError

OPEN, CLOSE = "\ufdd0", "\ufdd1"
FILL = "\ufdd2"  # stands for a content while we look for its place
RESERVED = re.compile("[\ufdd0-\ufdd2]")
BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # how SentencePiece spells a byte that it falls back to
BRACKETED = re.compile(r"[<\[{|\uff5c].*[>\]}|\uff5c]", re.DOTALL)
HTML = re.compile(
    "a|b|blockquote|br|caption|code|dd|del|div|dl|dt|em|h[1-6]|hr|i|img|ins|kbd|li|mark|ol|p|pre|s|small|span|"
    "strong|su[bp]|table|tbody|td|tfoot|th|thead|tr|u|ul"
)


@dataclass(frozen=True)
class Controls:
    """The control tokens of one tokenizer.

    Attributes:
        ids: of each, by what it is spelled.
    """

    ids: Mapping[str, int]

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Finds them in a text, the longest first, as the tokenizer itself does."""
        return re.compile("|".join(map(re.escape, sorted(self.ids, key=len, reverse=True))) or "(?!)")

    @cached_property
    def fenced(self) -> re.Pattern[str]:
        """Finds them between fences."""
        return re.compile(f"{OPEN}({self.pattern.pattern}){CLOSE}")

    @cached_property
    def marks(self) -> tuple["Marks", "Marks"]:
        """Two ways to mark them in what a record says: around each, and inside."""
        around = {token: f"{OPEN}{token}{CLOSE}" for token in self.ids}
        inside = {token: f"{token[0]}{OPEN}{token[1:]}" for token in self.ids}
        return Marks(self, around), Marks(self, inside)

    def fence(self, text: str) -> str:
        """The same text with fences around each of them."""
        return self.pattern.sub(f"{OPEN}\\g<0>{CLOSE}", text)


class Marks:
    """Control tokens in what a record says, marked for a template to write them as they come."""

    def __init__(self, controls: Controls, marked: Mapping[str, str]) -> None:
        self._pattern, self._marked = controls.pattern, marked
        self._spelled = {marked[token]: token for token in marked}
        every = sorted((*self._spelled, *marked), key=len, reverse=True)
        self._either = re.compile("|".join(map(re.escape, every)) or "(?!)")

    def put(self, text: str) -> str:
        """The text with every control token in it marked."""
        return self._pattern.sub(lambda found: self._marked[found[0]], text)

    def read(self, text: str) -> list[tuple[str, bool]]:
        """Every control token in a text, and whether it is a marked one."""
        found = (one[0] for one in self._either.finditer(text))
        return [(self._spelled.get(one, one), one in self._spelled) for one in found]


def controls_of(tokenizer: Any) -> Controls:
    """Every added token that steers a model, whether or not it is marked as special.

    Others that are added (runs of spaces, HTML, a user's own words) are text, and are met in texts as such.
    """
    template = _templates(tokenizer)
    decoder = getattr(tokenizer, "added_tokens_decoder", {})
    added = ((token.content, number, token.special) for number, token in decoder.items())
    return Controls({text: number for text, number, special in added if _steers(text, special, template)})


def _steers(text: str, special: bool, template: str) -> bool:
    if not text.replace("\u2581", " ").strip() or BYTE.fullmatch(text):
        return False
    if special or (text in template and not text.isalnum()):  # a user's own words may stand there too
        return True
    return BRACKETED.fullmatch(text) is not None and not HTML.fullmatch(text.strip("</>").lower())


def _templates(tokenizer: Any) -> str:
    found = getattr(tokenizer, "chat_template", None)
    return "\n".join(map(str, found.values())) if isinstance(found, Mapping) else str(found or "")


def fenced_backend(tokenizer: Any, controls: Controls) -> Tokenizer:
    """A copy of the backend that knows the control tokens by their fenced names only, and neither pads nor cuts.

    It gives every other text the ids that the tokenizer gives it. Raises SettingsError if that cannot be had.
    """
    described = _described(tokenizer)
    names = {text: f"{OPEN}{text}{CLOSE}" for text in controls.ids}
    for token in described["added_tokens"]:
        if token["content"] in names:
            token |= {"content": names[token["content"]], "single_word": False}
    described["model"] |= _renamed(described["model"], names)
    backend = Tokenizer.from_str(json.dumps(described))
    for text, number in controls.ids.items():
        is_meant, is_text = (number in backend.encode(spelled).ids for spelled in (names[text], text))
        if not is_meant or (is_text and number != tokenizer.unk_token_id):
            raise SettingsError(
                f"model.tokenizer={tokenizer.name_or_path} cannot be told what of a text is its token {text!r}; "
                "name another tokenizer"
            )
    return backend


def _described(tokenizer: Any) -> dict[str, Any]:
    """The backend as JSON, without what adds tokens, pads or cuts: that would move offsets."""
    described: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return described | {"post_processor": None, "padding": None, "truncation": None}


def _renamed(model: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The parts of a model in which control tokens have other names, so that no text can spell one."""
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):  # Unigram; bytes are for what has no piece, and are never looked for in a text
        return {"vocab": [[names.get(piece, piece), _score(piece, score)] for piece, score in vocabulary]}
    parts: dict[str, Any] = {"vocab": {names.get(piece, piece): number for piece, number in vocabulary.items()}}
    if model.get("unk_token") in names:
        parts["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        pairs = (tuple(pair.split(" ", 1)) if isinstance(pair, str) else tuple(pair) for pair in model["merges"])
        parts["merges"] = [[a, b] for a, b in pairs if names.keys().isdisjoint((a, b, a + b))]
    return parts


def _score(piece: str, score: float) -> float:
    return -1e6 if BYTE.fullmatch(piece) else score


def plain_backend(tokenizer: Any, controls: Controls) -> Tokenizer:
    """A copy of the backend without any control token."""
    described = _described(tokenizer)
    described["added_tokens"] = [token for token in described["added_tokens"] if token["content"] not in controls.ids]
    backend = Tokenizer.from_str(json.dumps(described))
    backend.encode_special_tokens = True
    return backend

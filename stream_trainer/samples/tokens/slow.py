"""Tokenizers without a fast form: those written in Python, which some models bring with them.

They tell no offsets. What stands between control tokens is tokenised by itself, as they do, and a border inside it is
found by what its first tokens say as text.
"""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from stream_trainer.errors import SampleError, SettingsError
from stream_trainer.samples.tokens.controls import Controls
from stream_trainer.samples.tokens.whole import EncodeMarked, Located, Marked, Tokens

PLAIN = {"split_special_tokens": True}  # take control tokens apart, for those that are meant have fences


def slow_encoder(tokenizer: Any, controls: Controls) -> EncodeMarked:
    """What gives the tokens of whole texts. Raises SettingsError if `tokenizer` is none that can be asked."""
    try:
        usable = isinstance(tokenizer, PreTrainedTokenizerBase) and bool(tokenizer.tokenize("a", **PLAIN))
    except Exception:  # code of a model's own
        usable = False
    if not usable:
        raise SettingsError(
            f"model.tokenizer={tokenizer.name_or_path} has no fast (tokenizer.json) form; name one that has"
        )
    return lambda texts: [_encoded(tokenizer, controls, marked) for marked in texts]


def _encoded(tokenizer: Any, controls: Controls, marked: Marked) -> Tokens:
    place = Located([], [], [])
    borders = {at for span in marked.spans for at in span}
    at = 0
    for number, part in enumerate(controls.fenced.split(marked.text)):
        if number % 2:
            ids, ends = [controls.ids[part]], [len(part) + 2]
        else:
            tokens = tokenizer.tokenize(part, **PLAIN) if part else []
            ids = tokenizer.convert_tokens_to_ids(tokens)
            if not set(controls.ids.values()).isdisjoint(set(ids) - {tokenizer.unk_token_id}):
                raise SampleError("tokenizer", "the tokenizer makes a control token out of plain text")
            is_cut = any(at < border < at + len(part) for border in borders)
            ends = _ends(tokenizer, tokens, part) if is_cut else [len(part)] * len(tokens)
        starts = [0, *ends[:-1]] if len({*ends}) > 1 else [0] * len(ends)
        place.ids.extend(ids)
        place.starts.extend(at + start for start in starts)
        place.ends.extend(at + end for end in ends)
        at += ends[-1] if number % 2 else len(part)
    return Tokens(place.ids, [(place.first(start), place.after(end)) for start, end in marked.spans])


def _ends(tokenizer: Any, tokens: Sequence[str], text: str) -> list[int]:
    """The character at which each token ends. Raises SampleError if tokens do not give their text back."""
    if tokenizer.convert_tokens_to_string(tokens) != text:
        raise SampleError("tokenizer", "the tokens do not give the text back, so that no part of it can be found")
    return [len(tokenizer.convert_tokens_to_string(tokens[:count])) for count in range(1, len(tokens) + 1)]

"""Texts to token ids where the built-in tokenizer makes it trivial: a byte is its own id.

The library's backend is far slower for such a vocabulary. Every other one is left to the backend: a cache of words' ids
would help with prose but not with source code, and its exactness would depend on the patterns by which tokenizers cut
texts.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

EVERY_BYTE = "".join(map(chr, (*range(0x800), *range(0x800, 0xD800, 0x40), *range(0xE000, 0x110000, 0x1000))))

Encode = Callable[[Sequence[str]], list[list[int]]]


def byte_encoder(backend: Tokenizer, limit: int | None) -> Encode | None:
    """What gives the ids of texts as `backend`, which ignores special tokens, does; None if its ids are not bytes.

    With a `limit`, ids after the first `limit` of a text may be missing. No special token is ever among them.
    """
    assert backend.encode_special_tokens, "special tokens would be looked for"
    described = json.loads(backend.to_str())
    added = any(not token["special"] for token in described["added_tokens"])
    plain = not added and described["normalizer"] is None and _is_byte_level(described["pre_tokenizer"])
    if not plain or described["model"]["type"] != "BPE" or described["model"]["merges"]:
        return None
    expected = backend.encode(EVERY_BYTE, add_special_tokens=False).ids
    return (lambda texts: [_ids(text[:limit]) for text in texts]) if _ids(EVERY_BYTE) == expected else None


def _ids(text: str) -> list[int]:
    return list(text.encode())


def _is_byte_level(pre_tokenizer: Mapping[str, Any] | None) -> bool:
    return pre_tokenizer is not None and pre_tokenizer["type"] == "ByteLevel" and not pre_tokenizer["add_prefix_space"]

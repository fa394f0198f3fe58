"""Bytes as ids: the same as the tokenizer's own backend for every text, or left to the backend."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers

from stream_trainer.samples.byte_tokenizer import byte_tokenizer
from stream_trainer.samples.encoding import byte_encoder


def backend_of_bytes() -> Tokenizer:
    tokenizer = Tokenizer.from_str(byte_tokenizer().backend_tokenizer.to_str())
    tokenizer.encode_special_tokens = True
    return tokenizer


BACKEND = backend_of_bytes()


@given(st.lists(st.text(), max_size=4), st.sampled_from([None, 1, 5]))
def test_ids_are_those_of_the_backend(texts: list[str], limit: int | None) -> None:
    encode = byte_encoder(BACKEND, limit)
    assert encode is not None
    for text, ids in zip(texts, encode(texts), strict=True):
        expected = BACKEND.encode(text, add_special_tokens=False).ids
        assert ids[:limit] == expected[:limit]
        assert limit is not None or ids == expected


def trained() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(["the rain in Spain"], trainers.BpeTrainer(show_progress=False))
    return tokenizer


def with_added_token() -> Tokenizer:
    tokenizer = backend_of_bytes()
    tokenizer.add_tokens([AddedToken("tool", normalized=False)])
    return tokenizer


def normalized() -> Tokenizer:
    tokenizer = backend_of_bytes()
    tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def with_prefix_space() -> Tokenizer:
    tokenizer = backend_of_bytes()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


def shuffled() -> Tokenizer:
    vocabulary = {token: 255 - i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


@pytest.mark.parametrize("make", [trained, with_added_token, normalized, with_prefix_space, shuffled])
def test_other_vocabularies_are_left_to_the_backend(make: object) -> None:
    assert callable(make)
    tokenizer = make()
    tokenizer.encode_special_tokens = True
    assert byte_encoder(tokenizer, None) is None

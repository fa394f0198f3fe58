"""A tokenizer written in Python, as some models bring with them."""

import json
from typing import Any

import pytest
from transformers import PreTrainedTokenizer

from stream_trainer.errors import SampleError
from stream_trainer.records import Partition, Record
from stream_trainer.samples.decoder import NO_LOSS, Decoder
from stream_trainer.settings.schema import SampleSettings
from tests.stream_trainer.samples.families import CHATML, unmarked

ALPHABET = [chr(code) for code in range(32, 127)] + ["\n", "th", "e "]


class Pairs(PreTrainedTokenizer):  # type: ignore[misc]
    """Letters, and two pairs of them."""

    def __init__(self, **kwargs: Any) -> None:
        self._ids = {token: number for number, token in enumerate(ALPHABET)}
        super().__init__(**kwargs)

    @property
    def vocab_size(self) -> int:
        return len(ALPHABET)

    def get_vocab(self) -> dict[str, int]:
        return {**self._ids, **self.added_tokens_encoder}

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        tokens: list[str] = []
        while text:
            size = 2 if text[:2] in self._ids else 1
            tokens.append(text[:size])
            text = text[size:]
        return tokens

    def _convert_token_to_id(self, token: str) -> int:
        return self._ids[token]

    def _convert_id_to_token(self, index: int) -> str:
        return ALPHABET[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)


def pairs() -> Pairs:
    tokenizer = Pairs(eos_token="<|im_end|>", pad_token="<|im_end|>")
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.chat_template = unmarked(CHATML)
    return tokenizer


def decode(fields: dict[str, Any]) -> tuple[str, str, tuple[int, ...]]:
    """All of it, what carries loss, and the ids."""
    tokenizer = pairs()
    sample = Decoder(tokenizer, SampleSettings()).decode(Record(Partition("log", 0), 0, 1, json.dumps(fields).encode()))
    assert sample is not None
    whole, said = (
        "".join(tokenizer.convert_ids_to_tokens([i for i in ids if i != NO_LOSS]))
        for ids in (sample.input_ids, sample.labels)
    )
    return whole, said, sample.input_ids


def test_a_conversation_and_what_carries_loss() -> None:
    messages = [{"role": "user", "content": "the<|im_end|>"}, {"role": "assistant", "content": "the end"}]
    whole, said, ids = decode({"messages": messages})
    head = "<|im_start|>user\nthe<|im_end|><|im_end|>\n<|im_start|>assistant\n"
    assert (whole, said) == (head + "the end<|im_end|>\n", "the end<|im_end|>\n")
    assert ids.count(pairs().eos_token_id) == 2, "the one spelled out is text"


def test_a_token_across_the_border_belongs_to_the_response() -> None:
    decoder = Decoder(pairs(), SampleSettings())
    assert decode({"prompt": "at", "response": "the"})[1] == "the<|im_end|>"
    (tokens,) = decoder._encoder([_marked("the end", 1)])
    assert tokens.spans == [(0, len(tokens.ids))]


def _marked(text: str, at: int) -> Any:
    from stream_trainer.samples.tokens.whole import Marked

    return Marked(text, ((at, len(text)),))


def test_a_letter_that_it_lacks_is_the_records_fault() -> None:
    with pytest.raises(SampleError) as caught:
        decode({"text": "é"})
    assert caught.value.reason == "tokenizer"

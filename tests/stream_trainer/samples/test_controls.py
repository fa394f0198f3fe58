"""Which added tokens steer a model, and a backend that cannot take text for one of them."""

from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from stream_trainer.errors import SettingsError
from stream_trainer.samples.byte_tokenizer import byte_tokenizer
from stream_trainer.samples.tokens.controls import CLOSE, OPEN, controls_of, fenced_backend


def with_added(*tokens: str, template: str | None = None) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in tokens])
    tokenizer.chat_template = template
    return tokenizer


def test_special_tokens_and_what_looks_like_a_marker_are_control_tokens() -> None:
    added = ("<tool_call>", "[TOOL]", "<|User|>", "<table>", "</b>", "  ", "\u2581\u2581", "covid", "<0x0A>")
    found = controls_of(with_added(*added))
    assert found.ids.keys() == {"<pad>", "<s>", "</s>", "<tool_call>", "[TOOL]", "<|User|>"}


def test_what_the_template_writes_is_a_control_token_unless_it_is_a_word() -> None:
    found = controls_of(with_added("@end@", "user", template="{{ 'user' }}@end@"))
    assert found.ids.keys() == {"<pad>", "<s>", "</s>", "@end@"}


def test_a_backend_knows_control_tokens_by_their_fences_and_others_as_before() -> None:
    tokenizer = with_added("<tool>", "covid")
    backend = fenced_backend(tokenizer, controls_of(tokenizer))
    covid = tokenizer.convert_tokens_to_ids("covid")
    assert backend.encode("covid <tool></s>").ids == [covid, *b" <tool></s>"]
    assert backend.encode(f"{OPEN}<tool>{CLOSE}{OPEN}</s>{CLOSE}").ids == [
        tokenizer.convert_tokens_to_ids("<tool>"),
        258,
    ]


def test_a_tokenizer_that_loses_the_fences_is_refused() -> None:
    backend = Tokenizer(models.WordLevel({"a": 0, "?": 1, "<end>": 2}, unk_token="?"))
    backend.normalizer = normalizers.Sequence([normalizers.Replace(OPEN, ""), normalizers.Replace(CLOSE, "")])
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([AddedToken("<end>", normalized=True)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=AddedToken("<end>", normalized=True))
    with pytest.raises(SettingsError, match=r"cannot be told what of a text is its token '<end>'"):
        fenced_backend(tokenizer, controls_of(tokenizer))

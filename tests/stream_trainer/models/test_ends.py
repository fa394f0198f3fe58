"""What is learnt as the end of a turn is what the saved model stops at."""

from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from stream_trainer.errors import SettingsError
from stream_trainer.models.loading import load_model
from stream_trainer.models.saving import save_model
from stream_trainer.settings.schema import LoraSettings, ModelSettings
from tests.helpers.tiny_models import settings_of

END, OF_TURN = 258, 259
CHATML = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def saved(path: Path, **tokenizer: Any) -> Path:
    """A model whose template ends turns with a token that is not the tokenizer's end token."""
    source = load_model(settings_of("llama"), seed=1)
    source.tokenizer.add_tokens(["<|im_end|>"], special_tokens=True)
    source.tokenizer.chat_template = CHATML
    for name, value in tokenizer.items():
        setattr(source.tokenizer, name, value)
    save_model(source, path)
    return path


def stops(path: Path) -> list[int]:
    found = GenerationConfig.from_pretrained(path).eos_token_id
    return [found] if isinstance(found, int) else list(found)


@pytest.mark.parametrize("lora", [None, LoraSettings()])
def test_generation_stops_at_the_end_of_a_turn_and_at_the_end_token(tmp_path: Path, lora: LoraSettings | None) -> None:
    model = saved(tmp_path / "model")
    save_model(load_model(ModelSettings(name=str(model), lora=lora), seed=1), tmp_path / "trained")
    assert stops(tmp_path / "trained") == [END, OF_TURN]


def test_a_tokenizer_without_an_end_token_has_that_of_the_configuration(tmp_path: Path) -> None:
    loaded = load_model(ModelSettings(name=str(saved(tmp_path, eos_token=None, chat_template=None))), seed=1)
    assert (loaded.tokenizer.eos_token, loaded.tokenizer.eos_token_id) == ("</s>", END)


def test_a_tokenizer_for_sentencepiece_only_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = saved(tmp_path)
    (model / "tokenizer.json").unlink()
    (model / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    monkeypatch.setattr("stream_trainer.models.tokenizer_files.find_spec", lambda _: None)
    with pytest.raises(SettingsError, match="needs the package sentencepiece"):
        load_model(ModelSettings(name=str(model)), seed=1)


def test_a_model_that_stops_as_it_learns_keeps_its_generation_config(tmp_path: Path) -> None:
    save_model(load_model(settings_of("llama"), seed=1), tmp_path)
    assert stops(tmp_path) == [END]

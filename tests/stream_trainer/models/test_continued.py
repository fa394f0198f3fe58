"""A model that comes with an adapter: training goes on from it, or what differs is named."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from stream_trainer.errors import SettingsError
from stream_trainer.models.loading import LoadedModel, load_model
from stream_trainer.models.peft_format import config_text
from stream_trainer.models.saving import load_adapter, save_adapter, save_for_peft, save_model
from stream_trainer.settings.schema import LoraSettings, ModelSettings
from tests.helpers.tiny_models import logits_of, settings_of, shake

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft reads it

LORA = LoraSettings(rank=3, alpha=4.0)
CONFIG = "adapter_config.json"


@pytest.fixture(params=["llama", "gpt2"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    loaded = load_model(settings_of(request.param), seed=1)
    shake(loaded.model)
    save_model(loaded, tmp_path / "base")
    return tmp_path / "base"


def made(base: Path, to: Path, lora: LoraSettings = LORA) -> LoadedModel:
    """An adapter that has learned something, as PEFT has it."""
    loaded = load_model(ModelSettings(name=str(base), lora=lora), seed=2)
    shake(loaded.model, seed=5)
    save_for_peft(loaded, to)
    return loaded


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(name: Path, lora: LoraSettings | None) -> str:
    with pytest.raises(SettingsError) as caught:
        load_model(ModelSettings(name=str(name), lora=lora), seed=3)
    return str(caught.value)


@pytest.mark.parametrize("place", ["adapter", "base"])
def test_training_goes_on_from_an_adapter_alone_or_beside_its_model(place: str, base: Path, tmp_path: Path) -> None:
    adapted = made(base, tmp_path / place)
    loaded = load_model(ModelSettings(name=str(tmp_path / place), lora=LORA), seed=3)
    assert torch.equal(logits_of(loaded.model), logits_of(adapted.model))
    assert {n for n, p in loaded.model.named_parameters() if p.requires_grad} == {
        n for n, p in adapted.model.named_parameters() if p.requires_grad
    }
    assert json.loads(config_text(loaded.model))["base_model_name_or_path"] == str(base)


def test_what_was_gone_on_with_is_saved_and_read_back(base: Path, tmp_path: Path) -> None:
    made(base, tmp_path / "adapter")
    settings = ModelSettings(name=str(tmp_path / "adapter"), lora=LORA)
    loaded = load_model(settings, seed=3)
    shake(loaded.model, seed=6)
    save_adapter(loaded, tmp_path / "kept.safetensors")
    again = load_model(settings, seed=4)
    load_adapter(again, tmp_path / "kept.safetensors")
    assert torch.equal(logits_of(again.model), logits_of(loaded.model))
    save_for_peft(loaded, tmp_path / "next")
    onto: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "next")
    torch.testing.assert_close(logits_of(onto), logits_of(loaded.model), rtol=1e-4, atol=1e-5)


def test_the_tokenizer_is_the_adapters_own_if_it_has_one(base: Path, tmp_path: Path) -> None:
    loaded = made(base, tmp_path / "adapter")
    loaded.tokenizer.chat_template = "{{ messages[0].content }}"
    loaded.tokenizer.save_pretrained(tmp_path / "adapter")
    found = load_model(ModelSettings(name=str(tmp_path / "adapter"), lora=LORA), seed=3)
    assert found.tokenizer.chat_template == "{{ messages[0].content }}"


@pytest.mark.parametrize(
    ("lora", "told"),
    [
        (None, r"set model.lora to go on with it \(rank: 3, alpha: 4.0, target_modules: ["),
        (LoraSettings(rank=4, alpha=4.0), "whose rank is 3; model.lora.rank=4"),
        (LoraSettings(rank=3, alpha=3.0), "whose alpha is 4.0; model.lora.alpha=3.0"),
        (LoraSettings(rank=3, alpha=4.0, target_modules=("c_attn", "q_proj")), "the adapter has base_model.model."),
    ],
)
def test_other_settings_than_the_adapters_are_named(lora: LoraSettings | None, told: str, base: Path) -> None:
    made(base, base)
    assert told.replace("\\", "") in refusal(base, lora)


def test_an_adapter_of_fewer_modules_is_named(base: Path, tmp_path: Path) -> None:
    made(base, tmp_path / "adapter", LORA.model_copy(update={"target_modules": ("c_attn", "q_proj")}))
    assert "model.lora has base_model.model." in refusal(tmp_path / "adapter", LORA)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"use_dora": True}, "with use_dora=True"),
        ({"use_rslora": True}, "with use_rslora=True"),
        ({"modules_to_save": ["lm_head"]}, "with modules_to_save="),
        ({"rank_pattern": {"q_proj": 2}}, "with rank_pattern="),
        ({"bias": "all"}, "with bias=all"),
        ({"init_lora_weights": "pissa"}, "with init_lora_weights=pissa"),
        ({"peft_type": "IA3"}, "of the type IA3"),
        ({"base_model_name_or_path": "/gone"}, "is an adapter of /gone, which is not there"),
        ({"base_model_name_or_path": None}, "is an adapter of a model without a name"),
    ],
)
def test_what_an_adapter_has_beyond_ours_is_named(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    loaded = load_model(settings_of("llama"), seed=1)
    save_model(loaded, tmp_path / "base")
    made(tmp_path / "base", tmp_path / "adapter")
    edit(tmp_path / "adapter" / CONFIG, **changes)
    assert told in refusal(tmp_path / "adapter", LORA)


def test_an_adapter_without_safetensors_is_refused(base: Path, tmp_path: Path) -> None:
    made(base, tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    assert "save the adapter as safetensors" in refusal(tmp_path / "adapter", LORA)


def test_an_adapter_on_an_adapter_is_refused(base: Path, tmp_path: Path) -> None:
    made(base, tmp_path / "adapter")
    made(base, base)
    assert "holds an adapter too" in refusal(tmp_path / "adapter", LORA)

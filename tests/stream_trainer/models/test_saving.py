from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from stream_trainer.errors import CheckpointError
from stream_trainer.models.loading import load_model
from stream_trainer.models.saving import check_base, load_adapter, load_weights, save_adapter, save_for_peft, save_model
from stream_trainer.settings.schema import LoraSettings
from tests.helpers.tiny_models import CONFIGS, logits_of, settings_of, shake, with_config


@pytest.mark.parametrize("kind", CONFIGS)
def test_saved_model_loads_as_a_plain_one_with_equal_logits(kind: str, tmp_path: Path) -> None:
    loaded = load_model(settings_of(kind), seed=1)
    save_model(loaded, tmp_path)
    plain, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert plain.dtype is torch.float32
    assert torch.equal(logits_of(plain), logits_of(loaded.model.eval()))
    text = "größer < 3"
    assert AutoTokenizer.from_pretrained(tmp_path)(text).input_ids == loaded.tokenizer(text).input_ids


def test_saved_configuration_keeps_what_the_user_gave(tmp_path: Path) -> None:
    loaded = load_model(settings_of("gpt2"), seed=1)
    live: Any = loaded.model
    assert live.config.resid_pdrop == 0.0
    save_model(loaded, tmp_path)
    saved = GPT2Config.from_pretrained(tmp_path)
    assert (saved.resid_pdrop, saved.use_cache, saved.architectures) == (0.1, True, ["GPT2LMHeadModel"])


@pytest.mark.parametrize("kind", CONFIGS)
def test_adapters_are_saved_merged_and_the_live_model_is_not_touched(kind: str, tmp_path: Path) -> None:
    loaded = load_model(settings_of(kind, lora=LoraSettings(rank=2)), seed=1)
    untrained = logits_of(loaded.model)
    shake(loaded.model)
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    save_model(loaded, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.model.state_dict().items())

    plain, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert not torch.allclose(logits_of(plain), untrained, atol=1e-3)
    torch.testing.assert_close(logits_of(plain), logits_of(loaded.model))


@pytest.mark.parametrize("kind", CONFIGS)
def test_weights_are_read_back_bit_for_bit(kind: str, tmp_path: Path) -> None:
    source = load_model(settings_of(kind), seed=1)
    shake(source.model)
    save_model(source, tmp_path)
    live = load_model(settings_of(kind), seed=2)
    weight = next(live.model.parameters())
    before = torch.get_rng_state()
    load_weights(live, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    for name, tensor in source.model.state_dict().items():
        assert torch.equal(live.model.state_dict()[name], tensor), name
    assert next(live.model.parameters()) is weight  # an optimizer that holds it stays valid


def test_weights_in_shards_are_read_back(tmp_path: Path) -> None:
    source = load_model(settings_of("qwen2"), seed=1)
    save_model(source, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    model: Any = source.model
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    live = load_model(settings_of("qwen2"), seed=2)
    load_weights(live, tmp_path)
    assert torch.equal(logits_of(live.model), logits_of(source.model))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 32}, "holds lm_head.weight with shape (300, 16), the model has (300, 32)"),
        ({"num_hidden_layers": 3}, "lacks model.layers.2."),
        ({"num_hidden_layers": 1}, "holds what the model lacks: model.layers.1."),
    ],
    ids=["wider", "deeper", "shallower"],
)
def test_weights_of_another_shape_are_refused(changes: dict[str, int], message: str, tmp_path: Path) -> None:
    save_model(load_model(settings_of("llama"), seed=1), tmp_path)
    with pytest.raises(CheckpointError) as caught:
        load_weights(load_model(with_config("llama", **changes), seed=1), tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_adapter_is_read_back_bit_for_bit(tmp_path: Path) -> None:
    source, live = (load_model(settings_of("gpt2", lora=LoraSettings(rank=2)), seed=1) for _ in range(2))
    shake(source.model)
    save_adapter(source, tmp_path / "adapter.safetensors")
    load_adapter(live, tmp_path / "adapter.safetensors")
    for name, tensor in source.model.state_dict().items():
        assert torch.equal(live.model.state_dict()[name], tensor), name


def test_adapter_of_another_rank_is_refused(tmp_path: Path) -> None:
    save_adapter(load_model(settings_of("llama", lora=LoraSettings(rank=2)), seed=1), tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"lora_A.default.weight with shape \(2, 16\), the model has \(4, 16\)"):
        load_adapter(load_model(settings_of("llama", lora=LoraSettings(rank=4)), seed=1), tmp_path / "a")


def test_adapter_on_another_base_model_is_noticed(tmp_path: Path) -> None:
    source, same, other = (load_model(settings_of("llama", lora=LoraSettings()), seed) for seed in (1, 1, 2))
    save_model(source, tmp_path)
    check_base(same, tmp_path)
    with pytest.raises(CheckpointError, match=r"another base model \(model.embed_tokens.weight differs\); restore"):
        check_base(other, tmp_path)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft reads it
@pytest.mark.parametrize("kind", CONFIGS)
def test_adapters_are_beside_the_merged_model_as_peft_has_them(kind: str, tmp_path: Path) -> None:
    loaded = load_model(settings_of(kind, lora=LoraSettings(rank=2)), seed=1)
    shake(loaded.model)
    save_for_peft(loaded, tmp_path / "adapter")
    base = load_model(settings_of(kind), seed=1).model
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits_of(adapted), logits_of(loaded.model))
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "generation_config.json",
    }

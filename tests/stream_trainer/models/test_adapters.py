"""Adapters on a base in fewer bits: what is held how, gradients that are exact all the same, and what is refused."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gradient_selectors.capture.capture import GradientCapture
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from stream_trainer.errors import CheckpointError, SettingsError
from stream_trainer.models.adapters import quantisation
from stream_trainer.models.loading import LoadedModel, load_model
from stream_trainer.models.saving import check_base, load_adapter, save_adapter, save_model
from stream_trainer.settings.schema import LoraSettings, ModelSettings
from tests.helpers.oracle import dense, make_batch, relative_error
from tests.helpers.tiny_models import logits_of, settings_of, shake

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed: no model in 4 bits"
)
BASES = ["bfloat16", pytest.param("nf4", marks=needs_bitsandbytes)]
KINDS = ["llama", "qwen2"]
ROUNDING = 2.0  # times torch's own, of passes in bfloat16


@pytest.fixture(params=KINDS)
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A model on disk whose every weight is away from its initial value."""
    return written(request.param, tmp_path / "whole")


def written(kind: str, directory: Path, seed: int = 3) -> Path:
    loaded = load_model(settings_of(kind), seed=1)
    shake(loaded.model, seed)
    save_model(loaded, directory)
    return directory


def settings(directory: Path, base: str, dtype: str = "bfloat16", **others: Any) -> ModelSettings:
    lora = {"rank": 3, "alpha": 4.0, "base": base}
    return ModelSettings.model_validate({"name": str(directory), "dtype": dtype, "lora": lora, **others})


def load(directory: Path, base: str, dtype: str = "bfloat16", seed: int = 1, **others: Any) -> LoadedModel:
    """With adapters that are no zero maps."""
    loaded = load_model(settings(directory, base, dtype, **others), seed)
    shake(loaded.model)
    return loaded


def dtypes(model: torch.nn.Module, trained: bool) -> set[torch.dtype]:
    return {parameter.dtype for parameter in model.parameters() if parameter.requires_grad is trained}


def test_a_base_in_bfloat16_takes_half_and_its_adapters_stay_in_float32(directory: Path) -> None:
    loaded = load(directory, "bfloat16")
    assert dtypes(loaded.model, trained=False) == {torch.bfloat16}
    assert dtypes(loaded.model, trained=True) == {torch.float32}
    assert loaded.autocast_dtype is torch.bfloat16


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_base_in_4_bits_is_packed_but_for_embedding_head_and_norms(
    directory: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    loaded = load(directory, "nf4", dtype)
    assert dtypes(loaded.model, trained=False) == {torch.uint8, getattr(torch, dtype)}
    assert dtypes(loaded.model, trained=True) == {torch.float32}
    packed = [name for name, parameter in loaded.model.named_parameters() if parameter.dtype is torch.uint8]
    assert len(packed) == 2 * 7  # linear layers of two blocks
    assert not any("lora_" in name or "lm_head" in name for name in packed)


def test_a_base_in_bfloat16_keeps_its_passes_on_a_processor_that_emulates_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert load(written("llama", tmp_path), "bfloat16").autocast_dtype is torch.bfloat16
    assert "passes will be slow; set it and model.lora.base to float32" in caplog.text


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_on_a_base_in_bfloat16_are_autograds_up_to_rounding(directory: Path, checkpointing: bool) -> None:
    model: Any = load(directory, "bfloat16", gradient_checkpointing=checkpointing).model
    batch, weights = make_batch((16, 9, 12, 16)), torch.tensor([0.3, 0.0, 1.7, 0.6])
    capture = GradientCapture(model, autocast=torch.bfloat16)
    update = capture.run(batch).weighted_gradient(weights)
    oracle = dense(model, batch)
    want, of_torch = oracle.update(weights), dense(model, batch, torch.bfloat16).update(weights)
    assert relative_error(oracle.flat(update), want) < ROUNDING * relative_error(of_torch, want)


@needs_bitsandbytes
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_each_sample_on_a_base_in_4_bits_are_those_on_what_its_bits_stand_for(
    directory: Path, checkpointing: bool
) -> None:
    quantised = load(directory, "nf4", "float32", gradient_checkpointing=checkpointing).model
    plain = load(directory, "float32", "float32").model
    unpack(quantised, plain)
    batch, oracle = make_batch((8, 5, 7)), dense(plain, make_batch((8, 5, 7)))
    gradients = GradientCapture(quantised).run(batch)
    torch.testing.assert_close(gradients.losses_N.double(), oracle.losses, rtol=1e-5, atol=0)
    for weights in torch.eye(3):
        update = gradients.weighted_gradient(weights)
        assert relative_error(oracle.flat(update), oracle.update(weights)) < 1e-4


def unpack(quantised: torch.nn.Module, plain: torch.nn.Module) -> None:
    """Give a model in float32 what the weights of the quantised one stand for."""
    from bitsandbytes.functional import dequantize_4bit

    weights = dict(plain.named_parameters())
    with torch.no_grad():
        for name, parameter in quantised.named_parameters():
            packed: Any = parameter
            is_packed = parameter.dtype is torch.uint8
            weights[name].copy_(dequantize_4bit(packed.data, packed.quant_state) if is_packed else parameter)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks for it
@pytest.mark.parametrize("base", BASES)
def test_what_is_saved_is_what_peft_loads_onto_the_base(base: str, directory: Path, tmp_path: Path) -> None:
    loaded = load(directory, base)
    save_model(loaded, tmp_path / "adapters")
    assert not (tmp_path / "adapters" / "model.safetensors").exists()
    bits = quantisation(LoraSettings.model_validate({"base": base}), held(loaded), torch.device("cpu"))
    plain = served(AutoModelForCausalLM.from_pretrained(directory, dtype=held(loaded), **bits))
    untrained = logits_of(plain)
    adapted = served(PeftModel.from_pretrained(plain, tmp_path / "adapters"))
    assert torch.equal(logits_of(adapted), logits_of(served(loaded.model)))
    assert not torch.allclose(untrained, logits_of(loaded.model), atol=1e-2)
    assert adapted.peft_config["default"].base_model_name_or_path == str(directory)


def served(model: Any) -> Any:
    """Without dropout, and without the layout of weights that bitsandbytes has for AVX-512: it refuses small models."""
    for module in model.eval().modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def held(loaded: LoadedModel) -> torch.dtype:
    model: Any = loaded.model
    dtype: torch.dtype = model.get_input_embeddings().weight.dtype
    return dtype


@pytest.mark.parametrize("base", BASES)
def test_adapters_are_read_back_onto_their_own_base_only(base: str, directory: Path, tmp_path: Path) -> None:
    loaded = load(directory, base)
    save_model(loaded, tmp_path / "model")
    save_adapter(loaded, tmp_path / "adapter")
    again = load_model(settings(directory, base), seed=8)
    load_adapter(again, tmp_path / "adapter")
    check_base(again, tmp_path / "model")
    assert torch.equal(logits_of(again.model), logits_of(loaded.model))
    kind = "qwen2" if "qwen2" in str(directory) else "llama"
    other = load_model(settings(written(kind, tmp_path / "other", seed=4), base), seed=1)
    with pytest.raises(CheckpointError, match=r"another base model \(.* differs\); restore model.name"):
        check_base(other, tmp_path / "model")


def test_a_base_held_otherwise_is_noticed(tmp_path: Path) -> None:
    directory = written("llama", tmp_path / "whole")
    for saved, live in (("bfloat16", "float32"), ("float32", "bfloat16")):
        save_model(load(directory, saved), tmp_path / saved)
        with pytest.raises(CheckpointError, match=r"made with another model.lora.base; restore it"):
            check_base(load(directory, live), tmp_path / saved)


def test_missing_bitsandbytes_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(SettingsError, match=r"^model.lora.base=nf4 needs .*pip install 'stream-trainer\[quantised\]'"):
        load_model(settings(written("llama", tmp_path), "nf4"), seed=1)


@needs_bitsandbytes
def test_a_model_that_is_quantised_already_is_refused(tmp_path: Path) -> None:
    directory = written("llama", tmp_path / "whole")
    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(directory, quantization_config=bits).save_pretrained(tmp_path / "packed")
    with pytest.raises(SettingsError, match=r"^model.name=.* is quantised already to 4 bits .*base to nf4"):
        load_model(ModelSettings(name=str(tmp_path / "packed"), tokenizer="bytes"), seed=1)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ({"name": "m", "lora": {"base": "bfloat16"}}, "lora.base=bfloat16 needs dtype=bfloat16.*; set dtype"),
        (settings_of("llama").model_dump() | {"lora": {"base": "nf4"}}, "not with config; set name to a model"),
        ({"name": "m", "gguf_file": "g", "lora": {"base": "nf4"}}, "not with gguf_file; set name to a model"),
    ],
    ids=["float32 passes", "random weights", "gguf"],
)
def test_a_base_that_cannot_be_held_so_is_refused(model: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ModelSettings.model_validate(model)

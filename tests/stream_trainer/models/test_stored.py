"""What lies in a model directory beside plain weights, and what a model can take: used as meant, or refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, MptConfig

from stream_trainer.errors import SettingsError
from stream_trainer.models import loading, refusals
from stream_trainer.models.limits import check_length, longest_text
from stream_trainer.models.loading import load_model
from stream_trainer.models.saving import load_weights, save_for_peft, save_model
from stream_trainer.settings.schema import LoraSettings, ModelSettings
from tests.families.configurations import BY_TITLE
from tests.helpers.tiny_models import logits_of, settings_of, shake


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    save_model(load_model(settings_of("llama"), seed=1), tmp_path)
    return tmp_path


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_an_adapter_beside_the_model_is_refused_unless_it_is_gone_on_with(directory: Path) -> None:
    save_for_peft(load_model(settings_of("llama", lora=LoraSettings()), seed=1), directory)
    with pytest.raises(SettingsError, match=r"^model.name=.* holds an adapter \(adapter_config.json\); name the model"):
        load_model(ModelSettings(name=str(directory)), seed=1)


def test_a_head_of_its_own_is_not_said_to_be_tied(directory: Path) -> None:
    """Though the configuration said so: a server would leave the head aside."""
    edit(directory / "config.json", tie_word_embeddings=True)
    loaded = load_model(ModelSettings(name=str(directory)), seed=1)
    assert not loaded.config.tie_word_embeddings
    assert load_model(settings_of("qwen2"), seed=1).config.tie_word_embeddings


def test_weights_that_nothing_reads_are_told_of(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = load_file(directory / "model.safetensors") | {"v_head.weight": torch.zeros(3)}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    load_model(ModelSettings(name=str(directory)), seed=1)
    assert "has 1 weights that nothing reads (v_head.weight)" in caplog.text


@pytest.mark.parametrize("lora", [None, LoraSettings.model_validate({"base": "nf4"})])
@pytest.mark.parametrize(
    "stored",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "awq"},
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
    ],
)
def test_weights_in_a_format_that_cannot_be_trained_are_refused(
    stored: dict[str, Any], lora: LoraSettings | None, directory: Path
) -> None:
    edit(directory / "config.json", quantization_config=stored)
    with pytest.raises(SettingsError, match=rf"is quantised already.*{stored['quant_method']}.*name the model it was"):
        load_model(ModelSettings(name=str(directory), lora=lora), seed=1)


def test_weights_in_8_bits_are_read_as_plain_ones_and_saved_so(tmp_path: Path) -> None:
    """As DeepSeek's are: a matrix of float8 and a scale for each block of it."""
    config = BY_TITLE["Llama 1 to 3"].config | {"hidden_size": 128, "intermediate_size": 128}
    source = load_model(ModelSettings(config=config, tokenizer="bytes"), seed=1)
    save_model(source, tmp_path / "packed")
    file = tmp_path / "packed" / "model.safetensors"
    packed: dict[str, torch.Tensor] = {}
    for name, weight in load_file(file).items():
        is_packed = name.endswith("_proj.weight")
        packed[name] = weight.to(torch.float8_e4m3fn) if is_packed else weight
        if is_packed:
            packed[f"{name}_scale_inv"] = torch.full((-(-weight.shape[0] // 128), weight.shape[1] // 128), 2.0)
    save_file(packed, file, {"format": "pt"})
    edit(
        tmp_path / "packed" / "config.json",
        quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
    )
    loaded = load_model(ModelSettings(name=str(tmp_path / "packed")), seed=1)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(dict(loaded.model.named_parameters())[name], packed[name].float() * 2)
    save_model(loaded, tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    again = load_model(ModelSettings(name=str(tmp_path / "plain")), seed=2)
    assert torch.equal(logits_of(again.model), logits_of(loaded.model))


@pytest.mark.parametrize("title", ["Mixtral", "Qwen 2 MoE", "gpt-oss", "DeepSeek V3 and R1"])
def test_a_mixture_of_experts_is_read_back_bit_for_bit(title: str, tmp_path: Path) -> None:
    settings = ModelSettings(config=BY_TITLE[title].config, tokenizer="bytes")
    source, live = load_model(settings, seed=1), load_model(settings, seed=2)
    shake(source.model)
    save_model(source, tmp_path)
    load_weights(live, tmp_path)
    assert all(torch.equal(w, source.model.state_dict()[name]) for name, w in live.model.state_dict().items())


@pytest.mark.parametrize(("begins", "package"), [(b"\n\x0e\n\x05<unk>", "sentencepiece"), (b"IQ== 0\n", "tiktoken")])
def test_a_tokenizer_of_which_there_is_only_a_model_names_the_package_that_reads_it(
    begins: bytes, package: str, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer.model").write_bytes(begins)
    monkeypatch.setattr(loading, "find_spec", lambda _: None)
    says = rf"^model.name=.* package {package} reads; pip install 'stream-trainer\[tokenizers\]'"
    with pytest.raises(SettingsError, match=says):
        load_model(ModelSettings(name=str(directory)), seed=1)


@pytest.mark.parametrize(
    ("said", "remedy"),
    [
        ("the package FlashAttention2 doesn't seem to be installed.", r"'stream-trainer\[flash\]' \(flash-attn\)"),
        ("Using `bitsandbytes` 4-bit requires bitsandbytes", r"'stream-trainer\[quantised\]' \(bitsandbytes\)"),
        ("requires optimum (`pip install optimum`)", "pip install optimum$"),
        ("LlamaTokenizer requires the SentencePiece library", r"'stream-trainer\[tokenizers\]' \(sentencepiece\)"),
        ("requires GGUF>=0.10.0", r"'stream-trainer\[gguf\]'"),
        ("No module named 'xyz'", "install it$"),
    ],
)
def test_a_package_that_is_missing_is_named_with_what_brings_it(said: str, remedy: str) -> None:
    with pytest.raises(SettingsError, match=remedy), refusals.loading("model.name=m", ""):
        raise ImportError(said)


def test_either_package_for_tokenizers_is_brought_by_one_extra() -> None:
    """transformers asks for tiktoken where sentencepiece is what it needs, and in other words than for others."""
    with (
        pytest.raises(SettingsError, match=r"stream-trainer\[tokenizers\]', or set it"),
        refusals.loading("m", "set it"),
    ):
        raise ValueError("`tiktoken` is required to read a `tiktoken` file")


def test_a_limit_by_any_name_is_known() -> None:
    assert longest_text(MptConfig(max_seq_len=64)) == 64
    assert longest_text(AutoConfig.for_model("gpt2", n_positions=77)) == 77
    assert longest_text(AutoConfig.for_model("bloom")) is None
    own = AutoConfig.for_model("bloom")
    own.max_ctx = 12
    assert longest_text(own) == 12


def test_a_limit_that_nothing_states_is_found_before_the_first_step() -> None:
    model: Any = load_model(settings_of("gpt2"), seed=1).model
    check_length(model, 64)
    with pytest.raises(SettingsError, match=r"^samples.max_tokens=65: the model fails on so many .*; set it to what"):
        check_length(model, 65)


def test_a_vocabulary_with_holes_is_checked_by_its_largest_id(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.get_vocab", lambda _: {"a": 0, "b": 400})
    with pytest.raises(SettingsError, match=r"has tokens up to the id 400, model.name=.* embeds only 300; set "):
        load_model(ModelSettings(name=str(directory)), seed=1)


def test_parameters_are_frozen_by_patterns() -> None:
    loaded = load_model(settings_of("llama", freeze=("model.embed_tokens.*", "*.layers.0.*")), seed=1)
    trained = {name for name, parameter in loaded.model.named_parameters() if parameter.requires_grad}
    assert trained
    assert not any(name.startswith(("model.embed_tokens", "model.layers.0.")) for name in trained)
    adapters = load_model(settings_of("llama", lora=LoraSettings(), freeze=("*.layers.0.*lora_A*",)), seed=1)
    assert not any(p.requires_grad for n, p in adapters.model.named_parameters() if ".layers.0." in n and "lora_A" in n)


@pytest.mark.parametrize(
    ("patterns", "lora", "says"),
    [
        (
            ("*.no_such",),
            None,
            r"^model.freeze: \*\.no_such matches no parameter that is trained; .* such as lm_",
        ),
        (("*",), None, r"^model.freeze=\['\*'\] leaves nothing to train; take a pattern out"),
        (("model.embed_tokens.weight",), LoraSettings(), r"matches no parameter that is trained"),
    ],
)
def test_a_pattern_that_freezes_nothing_or_everything_is_refused(
    patterns: tuple[str, ...], lora: LoraSettings | None, says: str
) -> None:
    with pytest.raises(SettingsError, match=says):
        load_model(settings_of("llama", lora=lora, freeze=patterns), seed=1)


@pytest.mark.filterwarnings("ignore:The following .* keys did not match")  # peft's, for names that it makes itself
def test_adapters_of_experts_are_refused() -> None:
    config = BY_TITLE["Mixtral"].config
    lora = LoraSettings(target_modules=("w1", "w2", "w3"))
    with pytest.raises(SettingsError, match=r"adapts experts \(.*\); leave them out, or set it to all-linear"):
        load_model(ModelSettings(config=config, tokenizer="bytes", lora=lora), seed=1)

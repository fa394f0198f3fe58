"""The adapters of a version are what PEFT loads, and give the model that was trained."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stream_trainer.checkpoints.manifest import write_manifest
from stream_trainer.models.loading import load_model
from stream_trainer.models.saving import save_adapter, save_for_peft, save_model
from stream_trainer.publishing.held import HeldFiles
from stream_trainer.publishing.making import Candidate, Origin, make_version, put_in_place
from stream_trainer.settings.schema import LoraSettings
from tests.helpers.tiny_models import logits_of, settings_of, shake

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft reads it


def publish(folder: Path, kind: str, merged: bool = True, dtype: Any = "float32", **lora: Any) -> tuple[Any, Path]:
    """A live model with adapters that have learned something, and a version of it."""
    loaded = load_model(settings_of(kind, dtype=dtype, lora=LoraSettings(rank=4, **lora)), seed=0)
    shake(loaded.model)
    checkpoint = folder / "step-00000001.e1"
    checkpoint.mkdir()
    save_model(loaded, checkpoint / "model")
    save_adapter(loaded, checkpoint / "adapter.safetensors")
    save_for_peft(loaded, checkpoint / "adapter")
    trainer: dict[str, Any] = {"cursor": {"partitions": {}, "counts": {}}}
    (checkpoint / "trainer.json").write_text(json.dumps(trainer))
    write_manifest(checkpoint, 1)
    origin = Origin(None, "target.jsonl", True, merged)
    published = folder / "published"
    published.mkdir()
    with HeldFiles(checkpoint) as files:
        candidate = Candidate(1, checkpoint.name, files, {"target": 1.0}, 1)
        return loaded, put_in_place(make_version(published, "v000001-step-1", candidate, origin, {}), "v000001-step-1")


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_peft_loads_the_adapters_onto_the_base(kind: str, tmp_path: Path) -> None:
    from peft import PeftModel

    loaded, version = publish(tmp_path, kind)
    base = load_model(settings_of(kind), seed=0).model
    adapted = PeftModel.from_pretrained(base, version / "adapter").eval()
    torch.testing.assert_close(logits_of(adapted), logits_of(loaded.model), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits_of(adapted), logits_of(load_model(settings_of(kind), seed=0).model), atol=1e-3)


def test_the_whole_model_is_beside_the_adapters_unless_left_out(tmp_path: Path) -> None:
    loaded, version = publish(tmp_path, "llama")
    merged = AutoModelForCausalLM.from_pretrained(version)
    torch.testing.assert_close(logits_of(merged), logits_of(loaded.model), rtol=1e-4, atol=1e-5)
    assert AutoTokenizer.from_pretrained(version) is not None
    (tmp_path / "alone").mkdir()
    _, alone = publish(tmp_path / "alone", "llama", merged=False)
    files = {path.relative_to(alone).as_posix() for path in alone.rglob("*") if path.is_file()}
    assert files == {"README.md", "version.json", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"}


def test_a_base_of_fewer_bits_is_not_published(tmp_path: Path) -> None:
    _, version = publish(tmp_path, "llama", dtype="bfloat16", base="bfloat16")
    files = {path.relative_to(version).as_posix() for path in version.rglob("*") if path.is_file()}
    assert files >= {
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "adapter/tokenizer_config.json",
    }
    assert {file for file in files if "/" not in file} == {"README.md", "version.json"}
    assert "adapter/base.safetensors" not in files


def test_the_card_is_one_that_the_hub_reads(tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    _, version = publish(tmp_path, "llama")
    data = ModelCard.load(version / "README.md").data
    assert data.library_name == "transformers"
    assert data.tags == ["stream-trainer", "lora"]
    (tmp_path / "alone").mkdir()
    _, alone = publish(tmp_path / "alone", "llama", merged=False)
    assert ModelCard.load(alone / "README.md").data.library_name == "peft"

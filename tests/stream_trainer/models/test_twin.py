"""A twin is the same model without weights, and has them only while it is asked for."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stream_trainer.models.loading import load_model
from stream_trainer.models.saving import save_model
from stream_trainer.models.twin import made_whole, without_weights
from tests.helpers.oracle import MODELS
from tests.helpers.tiny_models import logits_of


@pytest.mark.parametrize("kind", ["llama", "qwen2_tied", "lora"])
def test_a_twin_has_weights_for_a_while(kind: str) -> None:
    loaded = load_model(MODELS[kind](), seed=0)
    cut = replace(loaded, twin=without_weights(loaded.model))
    assert cut.twin is not None
    with made_whole(cut, keeps=True) as whole:
        assert whole.model is not loaded.model
        assert type(whole.model) is type(loaded.model)
        assert torch.equal(logits_of(whole.model), logits_of(loaded.model))
        trained = [name for name, p in whole.model.named_parameters() if p.requires_grad]
        assert trained == [name for name, p in loaded.model.named_parameters() if p.requires_grad]
    assert all(parameter.is_meta for parameter in cut.twin.parameters())
    with made_whole(cut, keeps=False) as whole:
        assert all(parameter.is_meta for parameter in whole.model.parameters())


def test_a_twin_is_saved_as_its_model(tmp_path: Path) -> None:
    loaded = load_model(MODELS["lora"](), seed=0)
    save_model(loaded, tmp_path / "one")
    with made_whole(replace(loaded, twin=without_weights(loaded.model)), keeps=True) as whole:
        save_model(whole, tmp_path / "two")
    files = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("one", "two")]
    assert files[0] == files[1]
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in files[0])


def test_a_model_that_is_whole_is_its_own() -> None:
    loaded = load_model(MODELS["llama"](), seed=0)
    with made_whole(loaded, keeps=False) as whole:
        assert whole is loaded

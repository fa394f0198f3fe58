"""Resumes of what is held in fewer bits: steps after a checkpoint are those of a run that never stopped."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from stream_trainer import __version__
from stream_trainer.checkpoints.checkpoint import TrainerState, load_latest, restore, save_checkpoint
from stream_trainer.models.loading import load_model
from stream_trainer.models.saving import save_model
from stream_trainer.settings.schema import ModelSettings
from tests.helpers.steps import Setup, make_samples, make_setup
from tests.helpers.tiny_models import settings_of, shake

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed: nothing in fewer bits"
)


def setup(directory: Path, base: str | None, moments: str) -> Setup:
    """Adapters on a base, or the whole model where there is none: of that, some is large enough for 8 bits."""
    lora = None if base is None else {"rank": 4, "base": base}
    dtype = "float32" if base is None else "bfloat16"
    model = ModelSettings.model_validate({"name": str(directory), "dtype": dtype, "lora": lora})
    return make_setup(model, optimizer={"moments": moments}, preconditioner_warmup_steps=1, batch_size=2)


def steps(made: Setup, first: int) -> list[tuple[Any, ...]]:
    reports = [made.step(make_samples(5, seed=first + i)) for i in range(3)]
    return [(report.losses, report.coefficients, report.gradient_norm) for report in reports]


@pytest.mark.parametrize("kind", ["llama", pytest.param("qwen2", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("base", "moments"),
    [("bfloat16", "float32"), ("bfloat16", "int8"), ("nf4", "float32"), ("nf4", "int8"), (None, "int8")],
)
def test_decisions_and_weights_go_on_bit_for_bit(kind: str, base: str | None, moments: str, tmp_path: Path) -> None:
    source = load_model(settings_of(kind), seed=1)
    shake(source.model)
    save_model(source, tmp_path / "whole")
    made = setup(tmp_path / "whole", base, moments)
    steps(made, first=0)
    state = TrainerState(3, {}, {}, __version__, {"engine": made.engine.state_dict()})
    save_checkpoint(tmp_path / "run", made.loaded, made.optimizer, state, keep=2)
    went_on = steps(made, first=3)

    again = setup(tmp_path / "whole", base, moments)
    found = load_latest(tmp_path / "run")
    assert found is not None
    again.engine.load_state_dict(restore(found, again.loaded, again.optimizer).parts["engine"])
    assert steps(again, first=3) == went_on
    assert any(coefficient > 0 for _, coefficients, _ in went_on for coefficient in coefficients)
    for name, weight in made.loaded.model.named_parameters():
        assert torch.equal(again.loaded.model.get_parameter(name).data, weight.data), name
    assert again.optimizer.state_dict().keys() == made.optimizer.state_dict().keys()

"""A checkpoint that is not of this model or optimizer: what differs is named."""

from pathlib import Path

import pytest
import torch

from stream_trainer.checkpoints.checkpoint import Checkpoint, load_latest, restore, save_checkpoint
from stream_trainer.errors import CheckpointError
from stream_trainer.models.loading import LoadedModel, load_model
from stream_trainer.settings.schema import LoraSettings
from stream_trainer.training.optimizer import NamedAdamW
from tests.helpers.tiny_models import with_config
from tests.stream_trainer.checkpoints.test_checkpoint import LORA, fresh, optimizer_of, state_at, train


def saved(folder: Path, loaded: LoadedModel, optimizer: NamedAdamW) -> Checkpoint:
    """A checkpoint as it is found again."""
    save_checkpoint(folder, loaded, optimizer, state_at(1), keep=2)
    found = load_latest(folder)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("made", "used", "message"),
    [
        (None, LORA, "was made without adapters; unset model.lora"),
        (LORA, None, "was made with adapters; set model.lora"),
    ],
    ids=["adapters added", "adapters gone"],
)
def test_adapters_must_be_as_before(
    made: LoraSettings | None, used: LoraSettings | None, message: str, tmp_path: Path
) -> None:
    found = saved(tmp_path, *fresh(lora=made))
    with pytest.raises(CheckpointError, match=message):
        restore(found, *fresh(lora=used))


def test_adapters_on_another_base_model_are_noticed(tmp_path: Path) -> None:
    found = saved(tmp_path, *fresh(lora=LORA))
    with pytest.raises(CheckpointError, match="another base model"):
        restore(found, *fresh(seed=2, lora=LORA))


def test_parameter_that_the_optimizer_did_not_have_is_named(tmp_path: Path) -> None:
    loaded, _ = fresh()
    some = NamedAdamW([{"params": [("lm_head.weight", loaded.model.get_parameter("lm_head.weight"))]}])
    found = saved(tmp_path, loaded, some)
    with pytest.raises(
        CheckpointError, match=r"lacks the optimizer state of model.embed_tokens.weight; restore the model"
    ):
        restore(found, *fresh())


def test_optimizer_state_of_another_shape_is_named(tmp_path: Path) -> None:
    loaded, optimizer = fresh()
    train(loaded, optimizer, 1, torch.Generator())
    optimizer.state[loaded.model.get_parameter("lm_head.weight")]["exp_avg_sq"] = torch.zeros(3)
    found = saved(tmp_path, loaded, optimizer)
    with pytest.raises(
        CheckpointError, match=r"exp_avg_sq of lm_head.weight is \(3,\), not \(300, 16\); restore the settings"
    ):
        restore(found, *fresh())


def test_model_of_another_shape_is_named(tmp_path: Path) -> None:
    trained = fresh()
    train(*trained, 2, torch.Generator().manual_seed(0))
    found = saved(tmp_path, *trained)
    other = load_model(with_config("llama", num_hidden_layers=3), seed=1)
    with pytest.raises(CheckpointError, match=r"lacks model.layers.2.* or set another checkpoint.dir$"):
        restore(found, other, optimizer_of(other))

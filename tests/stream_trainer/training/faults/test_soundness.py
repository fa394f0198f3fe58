"""A model that is not finite, in each way that it can be, is told from one that is."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gradient_selectors.world.base import Alone

from stream_trainer.samples.collate import collate
from stream_trainer.training.faults.soundness import why_unsound
from tests.helpers.steps import Setup, make_samples, setup_of

WEIGHT = "model.layers.1.mlp.down_proj.weight"


def spoil_weight(setup: Setup, value: float) -> None:
    setup.parameters[WEIGHT].data[0, 0] = value


def spoil_moment(setup: Setup, value: float) -> None:
    setup.optimizer.state_dict()[f"{WEIGHT}.exp_avg_sq"][0, 0] = value


def scale(setup: Setup, value: float) -> None:
    for parameter in setup.parameters.values():
        parameter.data.mul_(value)


@pytest.mark.parametrize(
    ("spoil", "value", "why"),
    [
        (spoil_weight, math.nan, f"the weight {WEIGHT} is not finite"),
        (spoil_weight, -math.inf, f"the weight {WEIGHT} is not finite"),
        (spoil_moment, math.nan, f"the optimizer's {WEIGHT}.exp_avg_sq is not finite"),
        (spoil_moment, 1e30, None),
        (scale, 1e20, "no loss on the target set is finite"),
        (scale, 0.0, "the gradient on the target set is zero, although its loss is not"),
        (scale, 0.5, None),
    ],
)
def test_what_is_not_finite_is_named(
    spoil: Callable[[Setup, float], None], value: float, why: str | None, tmp_path: Path
) -> None:
    setup, samples = setup_of(tmp_path, {}), make_samples(8)
    setup.step(samples)
    batch = collate(samples, setup.pad_id)
    assert why_unsound(setup.capture, setup.optimizer, batch, Alone()) is None
    with torch.no_grad():
        spoil(setup, value)
    assert why_unsound(setup.capture, setup.optimizer, batch, Alone()) == why

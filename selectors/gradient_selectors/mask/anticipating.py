"""P of a parameter under a mask, from the compact moments of its kept units."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradient_selectors.mask.cohorts import ages, per_unit


@dataclass(frozen=True)
class Usual:
    """What is usual in a parameter, of which this rank may have some rows only.

    Attributes:
        second: mean second moment of the weights that have had a gradient, corrected for bias.
        value: mean P of these, for weights that have just joined; None where there are none of them.
    """

    second: Tensor
    value: Tensor | None


def moment_sums(state: Mapping[str, Tensor], group: Mapping[str, Any]) -> Tensor:
    """Sums over this rank's rows, (2,) float64: of second moments, and how many weights have had a gradient."""
    second = state["exp_avg_sq"].float()
    corrected = second / per_unit(state, 1 - group["betas"][1] ** ages(state).clamp(min=1))
    return torch.stack([corrected.sum().double(), second.count_nonzero().double()])


def values_of_kept(state: Mapping[str, Tensor], group: Mapping[str, Any], rate: float, usual: Tensor) -> Tensor:
    """P of the kept units, (m, s) float32, as `anticipated` has it: with one more gradient of the usual size.

    Zero where there was none yet. `rate`: the learning rate, relative to the largest.
    """
    (beta1, beta2), ages_c, second = group["betas"], ages(state), state["exp_avg_sq"].float()
    scale_m1 = per_unit(state, rate * (1 - beta1) / (1 - beta1 ** (ages_c + 1)))
    after = (second * beta2 + (1 - beta2) * usual) / per_unit(state, 1 - beta2 ** (ages_c + 1))
    values: Tensor = (scale_m1 / (after.sqrt_() + group["eps"])).mul_(second != 0)
    return values

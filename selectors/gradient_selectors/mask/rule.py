"""Which weights may move: the best of all columns within an exact budget, with quotas for layers and modules.

From the released code of DualSFT (arXiv 2605.06166): a global top-k over single weights, signed or by magnitude; a
fifth of the budget shared equally by the layers, a fifth by the module groups, the rest global. Ours: whole rows as an
alternative to single weights, quotas that never choose a weight twice, and a selection by two histograms of the scores'
bits instead of a sort, so that no vector of all scores and no list of all positions is ever formed: it needs 4 bytes
for each weight while it runs.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Size, Tensor

Granularity = Literal["weight", "row"]

MODULE_GROUPS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LAYER = re.compile(r"\.(\d+)\.")
CHUNK_ELEMENTS = 1_000_000
HALF = 1 << 16  # a score's 32 bits are looked at in two halves
TAKEN = -(1 << 31)  # below the key of every score, minus infinity included


@dataclass(frozen=True)
class MaskRule:
    """How a mask is chosen from column scores.

    Examples:
        >>> from gradient_selectors import MaskRule
        >>> rule = MaskRule(density=0.05, granularity="row")

    Attributes:
        density: share of the trainable weights that may move.
        granularity: `weight` keeps single weights; `row` keeps whole leading rows, ranked by their mean score, and may
            stay below the budget by less than one row.
        absolute: rank by magnitude, as the released script does; that keeps weights predicted to do harm, too.
        layer_quota: share of the budget split equally over the layers.
        module_quota: share of the budget split equally over the module groups.
    """

    density: float
    granularity: Granularity = "weight"
    absolute: bool = False
    layer_quota: float = 0.2
    module_quota: float = 0.2

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ValueError(f"density={self.density} is not above 0 and at most 1")
        if min(self.layer_quota, self.module_quota) < 0 or self.layer_quota + self.module_quota > 1:
            raise ValueError(f"layer_quota={self.layer_quota} and module_quota={self.module_quota} exceed the budget")


@dataclass(frozen=True)
class _Units:
    """What is chosen among: single weights or rows.

    Attributes:
        keys: whole numbers in the order of the scores, flat int32 by parameter name; `TAKEN` once a unit is chosen.
        sizes: weights in a unit, by parameter name.
    """

    keys: dict[str, Tensor]
    sizes: dict[str, int]

    def chunks(self, names: Sequence[str]) -> Iterator[tuple[int, Tensor]]:
        """The weights in a unit and some keys, which may be written."""
        for name in names:
            for keys in torch.split(self.keys[name], CHUNK_ELEMENTS):
                yield self.sizes[name], keys


def unit_size(shape: Size, granularity: Granularity) -> int:
    """Weights in a unit of a parameter: 1, or those of a leading row."""
    return 1 if granularity == "weight" else shape[1:].numel()


def choose_mask(columns: Mapping[str, Tensor], rule: MaskRule) -> dict[str, Tensor]:
    """True where a weight may move, in each parameter's shape.

    `columns` are the column scores of every trainable parameter, float32; NaN ranks last. With single weights exactly
    `round(density * total)` of them, at least one, are kept; ties go to the earlier weight.
    """
    sizes = {name: unit_size(scores.shape, rule.granularity) for name, scores in columns.items()}
    units = _Units({name: _keys(scores, sizes[name], rule.absolute) for name, scores in columns.items()}, sizes)
    budget = max(1, round(rule.density * sum(scores.numel() for scores in columns.values())))
    left = budget
    for quota, groups in ((rule.layer_quota, _layers(columns)), (rule.module_quota, _modules(columns))):
        for names in groups:
            left -= _take(units, names, int(quota * budget / len(groups)))
    _take(units, list(columns), left)
    return {
        name: (keys == TAKEN)[:, None].expand(-1, sizes[name]).reshape(columns[name].shape).contiguous()
        for name, keys in units.keys.items()
    }


def _layers(names: Mapping[str, Tensor]) -> list[list[str]]:
    """Parameters by layer; those outside the layers belong to none."""
    groups = defaultdict(list)
    for name in names:
        if match := LAYER.search(name):
            groups[match[1]].append(name)
    return list(groups.values())


def _modules(names: Mapping[str, Tensor]) -> list[list[str]]:
    """Parameters by the projection they belong to; all others are one more group."""
    groups = defaultdict(list)
    for name in names:
        groups[next((part for part in name.split(".") if part in MODULE_GROUPS), "other")].append(name)
    return list(groups.values())


def _take(units: _Units, names: Sequence[str], budget: int) -> int:
    """Take the best units of some parameters that are not taken yet; returns how many weights they hold."""
    available = sum(int((keys != TAKEN).sum()) * size for size, keys in units.chunks(names))
    if available <= budget:
        for _, keys in units.chunks(names):
            keys.fill_(TAKEN)
        return available
    threshold, left = _threshold(units, names, budget)
    for size, keys in units.chunks(names):
        better = keys > threshold
        ties = (keys == threshold).nonzero().squeeze(1)[: left // size]
        left -= len(ties) * size
        keys.masked_fill_(better, TAKEN)
        keys[ties] = TAKEN
    return budget - left


def _threshold(units: _Units, names: Sequence[str], budget: int) -> tuple[int, int]:
    """The largest key whose units do not all fit the budget after those above it, and what these leave of it."""
    high = torch.zeros(HALF, dtype=torch.int64)
    for size, keys in units.chunks(names):
        high += torch.bincount((keys >> 16) + HALF // 2, minlength=HALF).cpu() * size
    upper, left = _first_too_many(high, budget)
    upper -= HALF // 2
    low = torch.zeros(HALF, dtype=torch.int64)
    for size, keys in units.chunks(names):
        inside = keys[(keys >> 16) == upper]
        low += torch.bincount(inside & (HALF - 1), minlength=HALF).cpu() * size
    lower, left = _first_too_many(low, left)
    return (upper << 16) + lower, left


def _first_too_many(counts: Tensor, budget: int) -> tuple[int, int]:
    """Counting bins from the top, the first that exceeds the budget, and what the bins above it leave of it."""
    sums = counts.flip(0).cumsum(0)
    index = int((sums > budget).int().argmax())
    return len(counts) - 1 - index, budget - (int(sums[index - 1]) if index else 0)


def _keys(scores: Tensor, size: int, absolute: bool) -> Tensor:
    """A key for each unit, in the order of the units' mean scores: NaN, then minus infinity, come lowest."""
    means = scores.detach().float().reshape(-1, size).mean(1)
    values = means.abs_() if absolute else means
    values.nan_to_num_(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).add_(0.0)  # -0.0 + 0.0 is 0.0
    bits = values.view(torch.int32)
    # A float's bits are in its order as whole numbers, those below the sign turned round where it is negative.
    return (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits)

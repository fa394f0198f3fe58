"""Which weights may move: the best of all columns within an exact budget, with quotas for layers and modules.

From the released code of DualSFT (arXiv 2605.06166): a global top-k over single weights, signed or by magnitude; a
fifth of the budget shared equally by the layers, a fifth by the module groups, the rest global. Ours: whole rows as an
alternative to single weights, quotas that never choose a weight twice, and a selection by histograms of the scores'
bits instead of a sort, so that no vector of all scores is ever formed. A coarse histogram of each parameter rules out
what cannot be chosen; two fine ones of the rest give the exact thresholds. It needs 4 bytes for each weight while it
runs, and up to 8 for each that may be chosen.

Of parameters that lie in rows each rank has the keys of its own units, and histograms and ties are summed and counted
over ranks: every rank takes what one process would take of its rows.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Size, Tensor

from gradient_selectors.world.base import Alone, World

Granularity = Literal["weight", "row"]

MODULE_GROUPS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LAYER = re.compile(r"\.(\d+)\.")
CHUNK_ELEMENTS = 1 << 18  # of passes over keys: what the fast memory of a processor holds
HALF = 1 << 16  # a score's 32 bits are looked at in two halves
COARSE_BITS = 12  # sign, exponent and three bits of the fraction
ALONE = Alone()
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
        world: the ranks, each of which has the keys of its own rows.
    """

    keys: dict[str, Tensor]
    sizes: Mapping[str, int]
    world: World

    def chunks(self, names: Sequence[str]) -> Iterator[tuple[int, Tensor]]:
        """The weights in a unit and some keys, which may be written."""
        for name in names:
            for keys in torch.split(self.keys[name], CHUNK_ELEMENTS):
                yield self.sizes[name], keys

    def read(self, names: Sequence[str]) -> Iterator[tuple[int, Tensor]]:
        """The weights in a unit and copies of keys, of small parameters together: every histogram has its price."""
        waiting = defaultdict[tuple[int, torch.device], list[Tensor]](list)
        for size, keys in self.chunks(names):
            group = waiting[size, keys.device]
            group.append(keys)
            if sum(part.numel() for part in group) >= CHUNK_ELEMENTS:
                yield size, torch.cat(group)
                group.clear()
        for (size, _), group in waiting.items():
            if group:
                yield size, torch.cat(group)


def unit_size(shape: Size, granularity: Granularity) -> int:
    """Weights in a unit of a parameter: 1, or those of a leading row."""
    return 1 if granularity == "weight" else shape[1:].numel()


def positions_of(selected_n: Tensor, name: str) -> Tensor:
    """Where units are selected, (m,) int32, ascending. Raises ValueError if int32 does not reach that far."""
    _require_countable(len(selected_n), name)
    return selected_n.nonzero().squeeze(1).int()


def _require_countable(num_units: int, name: str) -> None:
    if num_units > torch.iinfo(torch.int32).max:
        raise ValueError(f"parameter {name} has too many weights for int32 positions; use granularity='row'")


def choose_mask(columns: Mapping[str, Tensor], rule: MaskRule) -> dict[str, Tensor]:
    """True where a weight may move, in each parameter's shape.

    `columns` are the column scores of every trainable parameter, float32; NaN ranks last. With single weights exactly
    `round(density * total)` of them, at least one, are kept; ties go to the earlier weight.
    """
    sizes = {name: unit_size(scores.shape, rule.granularity) for name, scores in columns.items()}
    keys = {name: unit_keys(scores.detach().clone(), rule) for name, scores in columns.items()}
    masks = {}
    for name, chosen_m in choose_units(keys, sizes, rule).items():
        scores = columns[name]
        mask_n = torch.zeros(scores.numel() // sizes[name], dtype=torch.bool, device=scores.device)
        mask_n[chosen_m] = True
        masks[name] = mask_n[:, None].expand(-1, sizes[name]).reshape(scores.shape).contiguous()
    return masks


def unit_keys(scores: Tensor, rule: MaskRule) -> Tensor:
    """A key for each unit of a parameter, (n,) int32, in the order of the units' mean scores.

    NaN, then minus infinity, come lowest. Contiguous float32 `scores` of single weights are overwritten.
    """
    size = unit_size(scores.shape, rule.granularity)
    values = scores.float().reshape(-1) if size == 1 else scores.float().reshape(-1, size).mean(1)
    for chunk in torch.split(values, CHUNK_ELEMENTS):
        if rule.absolute:
            chunk.abs_()
        chunk.nan_to_num_(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).add_(0.0)  # -0.0 + 0.0 is 0.0
        bits = chunk.view(torch.int32)
        # A float's bits are in its order as whole numbers, those below the sign turned round where it is negative.
        bits.bitwise_xor_((bits >> 31).bitwise_and_(0x7FFFFFFF))
    return values.view(torch.int32)


def choose_units(
    keys: dict[str, Tensor], sizes: Mapping[str, int], rule: MaskRule, world: World = ALONE
) -> dict[str, Tensor]:
    """Positions of the units that may move, (m,) int32, ascending, by parameter name.

    `keys` are those of `unit_keys`, `sizes` the weights in a unit; `keys` and its tensors are used up. Budget and ties
    as in `choose_mask`. With a `world`, keys and positions are of this rank's rows, one rank's after the other's, and
    this is a call of all ranks. Raises ValueError for a parameter of more units than int32 can count.
    """
    counts = dict(zip(keys, _summed_facts(world, [len(values) for values in keys.values()]), strict=True))
    for name, count in counts.items():
        _require_countable(count, name)
    budget = max(1, round(rule.density * sum(count * sizes[name] for name, count in counts.items())))
    stages = [
        (int(quota * budget / len(groups)), names)
        for quota, groups in ((rule.layer_quota, _layers(keys)), (rule.module_quota, _modules(keys)))
        for names in groups
    ]
    stages.append((budget, list(keys)))
    places = _narrow(keys, _cuts(keys, stages, world)) if rule.granularity == "weight" else {}
    units, left = _Units(keys, sizes, world), budget
    for quota, names in stages:
        left -= _take(units, names, min(quota, left))
    chosen = {name: positions_of(keys.pop(name) == TAKEN, name) for name in list(keys)}
    return {name: places[name][found] if name in places else found for name, found in chosen.items()}


def _summed_facts(world: World, numbers: Sequence[int]) -> list[int]:
    return [sum(ranks) for ranks in zip(*world.facts(numbers), strict=True)]


def _summed(world: World, keys: Mapping[str, Tensor], counts: Tensor) -> Tensor:
    """Counts of all ranks, on the CPU; they meet where the keys are."""
    return world.sum(counts.to(next(iter(keys.values())).device)).cpu()


def _cuts(keys: Mapping[str, Tensor], stages: Sequence[tuple[int, Sequence[str]]], world: World) -> dict[str, int]:
    """For each parameter a key below which no single weight will be chosen; `stages` end with the whole budget.

    This is the choice itself, in whole bins: of the bin that holds the last weight all are taken. So a stage finds no
    more weights above any key than in truth, and must go at least as far down.
    """
    rows = {name: i for i, name in enumerate(keys)}
    tops_PB = _summed(world, keys, torch.stack([_counts_from_the_top(values) for values in keys.values()]))
    depths_P, left = torch.zeros(len(rows), dtype=torch.int64), stages[-1][0]
    for quota, names in stages:
        wanted = min(quota, left)
        group_G = torch.tensor([rows[name] for name in names])
        taken_G1 = tops_PB[group_G].gather(1, depths_P[group_G, None])
        available_B = (tops_PB[group_G] - taken_G1).clamp_(min=0).sum(0)
        left -= min(wanted, int(available_B[-1]))
        depth = min(int(torch.searchsorted(available_B, wanted)), len(available_B) - 1)
        depths_P[group_G] = depths_P[group_G].clamp(min=depth)
    # The highest bin holds nothing: not even infinity is as high.
    shift, highest = 32 - COARSE_BITS, (1 << (COARSE_BITS - 1)) - 1
    return {name: min(highest, highest + 1 - int(depths_P[i])) << shift for name, i in rows.items()}


def _counts_from_the_top(keys: Tensor) -> Tensor:
    """How many keys lie in the highest 0, 1, 2, ... bins, (bins + 1,) int64, on the CPU."""
    bins = 1 << COARSE_BITS
    counts = torch.zeros(bins + 1, dtype=torch.int64, device=keys.device)
    for chunk in torch.split(keys, CHUNK_ELEMENTS):
        counts[:-1] += torch.bincount((chunk >> (32 - COARSE_BITS)).add_(bins // 2), minlength=bins)
    return counts.flip(0).cumsum(0).cpu()


def _narrow(keys: dict[str, Tensor], cuts: Mapping[str, int]) -> dict[str, Tensor]:
    """Leave in `keys` only what reaches the cut; returns where that was, (m,) int32, ascending.

    A parameter that would keep more than half of its weights stays whole and has no positions: they would take more
    memory than they save.
    """
    places = {}
    for name, values in keys.items():
        reach = values >= cuts[name]
        if 2 * int(reach.count_nonzero()) <= len(values):
            places[name] = positions_of(reach, name)
            keys[name] = values[places[name]]
    return places


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
    own = sum(int((keys != TAKEN).count_nonzero()) * size for size, keys in units.chunks(names))
    (available,) = _summed_facts(units.world, [own])
    if available <= budget:
        for _, keys in units.chunks(names):
            keys.fill_(TAKEN)
        return available
    threshold, left = _threshold(units, names, budget)
    ties = {name: _take_above(units, name, threshold) for name in names}
    of_ranks = units.world.facts([len(places) for places in ties.values()])
    for (name, places), counts in zip(ties.items(), zip(*of_ranks, strict=True), strict=True):
        fit = min(left // units.sizes[name], sum(counts))
        left -= fit * units.sizes[name]
        before = sum(counts[: units.world.rank])
        units.keys[name][places[: max(0, fit - before)]] = TAKEN
    return budget - left


def _take_above(units: _Units, name: str, threshold: int) -> Tensor:
    """Take a parameter's units above the threshold; returns the places of those that equal it, ascending, int64."""
    ties, start = [], 0
    for _, keys in units.chunks([name]):
        ties.append((keys == threshold).nonzero().squeeze(1) + start)
        keys.masked_fill_(keys > threshold, TAKEN)
        start += len(keys)
    return torch.cat(ties)


def _threshold(units: _Units, names: Sequence[str], budget: int) -> tuple[int, int]:
    """The largest key whose units do not all fit the budget after those above it, and what these leave of it."""
    high = torch.zeros(HALF, dtype=torch.int64)
    for size, keys in units.read(names):
        high += torch.bincount((keys >> 16) + HALF // 2, minlength=HALF).cpu() * size
    upper, left = _first_too_many(_summed(units.world, units.keys, high), budget)
    upper -= HALF // 2
    low = torch.zeros(HALF, dtype=torch.int64)
    for size, keys in units.read(names):
        inside = keys[(keys >> 16) == upper]
        low += torch.bincount(inside & (HALF - 1), minlength=HALF).cpu() * size
    lower, left = _first_too_many(_summed(units.world, units.keys, low), left)
    return (upper << 16) + lower, left


def _first_too_many(counts: Tensor, budget: int) -> tuple[int, int]:
    """Counting bins from the top, the first that exceeds the budget, and what the bins above it leave of it."""
    sums = counts.flip(0).cumsum(0)
    index = int((sums > budget).int().argmax())
    return len(counts) - 1 - index, budget - (int(sums[index - 1]) if index else 0)

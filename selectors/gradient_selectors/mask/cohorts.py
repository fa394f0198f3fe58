"""The state of one parameter under a mask: moments of its kept units alone, in cohorts that joined together.

Of a parameter in rows each rank has the units of its own rows, at positions among these, and no cohort without a unit.
The whole has a cohort's units of all ranks, one rank after the other. As rows are in the order of ranks, that is how
one process has them.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gradient_selectors.world.base import World

FIELDS = ("step", "kept", "exp_avg", "exp_avg_sq", "cohort_sizes", "cohort_joined")

Cohorts = tuple[list[int], list[int]]
"""How many units joined, and at which step, of each cohort of a rank."""


def empty_state(parameter: Tensor, size: int) -> dict[str, Tensor]:
    """That of no unit at all, each of which has `size` weights."""
    moments = parameter.new_zeros(0, size)
    none = torch.zeros(0, dtype=torch.int64)
    kept = torch.zeros(0, dtype=torch.int32, device=parameter.device)
    return dict(zip(FIELDS, (torch.tensor(0), kept, moments, moments, none, none), strict=True))


def ages(state: Mapping[str, Tensor]) -> Tensor:
    """Updates that each cohort has taken part in, (c,) float64."""
    return (state["step"] - state["cohort_joined"]).double()


def per_unit(state: Mapping[str, Tensor], values_c: Tensor) -> Tensor:
    """A number for each cohort as one for each unit, (m, 1) in the moments' dtype; (1, 1) if there is one cohort."""
    moments = state["exp_avg"]
    values = values_c.to(moments)
    if len(values) != 1:
        sizes_c = state["cohort_sizes"].to(moments.device)
        values = torch.repeat_interleave(values, sizes_c, output_size=len(moments))
    return values[:, None]


def count_moved(state: Mapping[str, Tensor]) -> int:
    """How many units have had an update."""
    return int(state["cohort_sizes"][ages(state) > 0].sum())


def spread(parameter: Tensor, state: Mapping[str, Tensor], values: Tensor, fill: float) -> Tensor:
    """Values of the kept units in the parameter's shape, `fill` elsewhere."""
    dense = values.new_full((parameter.numel() // values.shape[1], values.shape[1]), fill)
    return dense.index_copy_(0, state["kept"].long(), values).view(parameter.shape)


def cohorts_of(state: Mapping[str, Tensor]) -> Cohorts:
    """As they are told to other ranks."""
    return state["cohort_sizes"].tolist(), state["cohort_joined"].tolist()


def whole_state(world: World, own: Mapping[str, Tensor], first: int, cohorts: Sequence[Cohorts]) -> dict[str, Tensor]:
    """The state of a parameter in rows, on the CPU: a call of all ranks.

    `own`: this rank's, whose first unit is the parameter's unit number `first`; `cohorts` are those of each rank.
    """
    joined_m = torch.cat([_joined(torch.tensor(steps), torch.tensor(sizes)) for sizes, steps in cohorts])
    joined_m, order = joined_m.sort(stable=True)
    counts = [sum(sizes) for sizes, _ in cohorts]
    compact = {"kept": own["kept"] + first, "exp_avg": own["exp_avg"], "exp_avg_sq": own["exp_avg_sq"]}
    found = {field: world.rows(values, counts).cpu()[order] for field, values in compact.items()}
    return {"step": own["step"], **found, **_cohorts(joined_m)}


def state_between(whole: Mapping[str, Tensor], first: int, last: int) -> dict[str, Tensor]:
    """What of a whole state is of the units `first:last`. A copy."""
    here = ((whole["kept"] >= first) & (whole["kept"] < last)).nonzero().squeeze(1)
    joined_m = _joined(whole["cohort_joined"], whole["cohort_sizes"])[here.cpu()]
    found = {field: whole[field][here] for field in ("kept", "exp_avg", "exp_avg_sq")}
    found["kept"] -= first
    return {"step": whole["step"].clone(), **found, **_cohorts(joined_m)}


def _joined(steps_c: Tensor, sizes_c: Tensor) -> Tensor:
    """The step at which each unit joined, (m,) int64."""
    return torch.repeat_interleave(steps_c.long(), sizes_c.long())


def _cohorts(joined_m: Tensor) -> dict[str, Tensor]:
    """Inverse of `_joined`: what joined at one step is one cohort."""
    steps_c, sizes_c = torch.unique_consecutive(joined_m, return_counts=True)
    return {"cohort_sizes": sizes_c, "cohort_joined": steps_c}

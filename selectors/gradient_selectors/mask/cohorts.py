"""The state of one parameter under a mask: moments of its kept units alone, in cohorts that joined together.

Of a parameter in rows each rank has the units of its own rows, at positions among these, and no cohort without a unit.
Elsewhere positions count from the parameter's first unit. The whole has a cohort's units of all ranks, one rank after
the other. As rows are in the order of ranks, that is how one process has them.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

FIELDS = ("step", "kept", "exp_avg", "exp_avg_sq", "cohort_sizes", "cohort_joined")
OF_UNITS = ("kept", "exp_avg", "exp_avg_sq")


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


def joined(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The state of a parameter from those of its parts, which are in the order of their units."""
    joined_m, order = torch.cat([_joined(part) for part in parts]).sort(stable=True)
    found = {field: torch.cat([part[field] for part in parts])[order] for field in OF_UNITS}
    return {"step": parts[0]["step"], **found, **_cohorts(joined_m)}


def state_between(state: Mapping[str, Tensor], first: int, last: int) -> dict[str, Tensor]:
    """What of a state is of the units `first:last`. A copy, at the same positions."""
    here = ((state["kept"] >= first) & (state["kept"] < last)).nonzero().squeeze(1)
    found = {field: state[field][here] for field in OF_UNITS}
    return {"step": state["step"].clone(), **found, **_cohorts(_joined(state)[here.cpu()])}


def at_first(state: Mapping[str, Tensor], first: int) -> dict[str, Tensor]:
    """The same state with positions that are larger by `first`."""
    return {**state, "kept": state["kept"] + first}


def _joined(state: Mapping[str, Tensor]) -> Tensor:
    """The step at which each unit joined, (m,) int64."""
    return torch.repeat_interleave(state["cohort_joined"].long(), state["cohort_sizes"].long())


def _cohorts(joined_m: Tensor) -> dict[str, Tensor]:
    """Inverse of `_joined`: what joined at one step is one cohort."""
    steps_c, sizes_c = torch.unique_consecutive(joined_m, return_counts=True)
    return {"cohort_sizes": sizes_c, "cohort_joined": steps_c}

"""Whether all groups compute the same thing: else nothing is timed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.gpu.check import relative_error
from benchmarks.scale_out.groups import Group
from benchmarks.scale_out.plan import METHODS
from benchmarks.step_cost.agreement import DisagreementError

ALLOWED = 1e-5  # of a coefficient, and of the gradient's length
ON_GPU = 1e-3  # where matrix products round to fewer digits


def check(groups: Mapping[int, Group], pool: int, device: str, folder: Path) -> list[dict[str, Any]]:
    """Errors of each method at each number of ranks, against one rank.

    Raises DisagreementError if an error is too large, another sample is chosen, or the ranks' weights differ in a bit.
    """
    allowed = ALLOWED if device == "cpu" else ON_GPU
    rows = []
    for method in METHODS:
        found = {size: _answer(group, method, pool, folder) for size, group in groups.items()}
        first = next(iter(found.values()))
        for size, answer in found.items():
            row = {"method": method, "ranks": size, "allowed": allowed, **_errors(answer, first)}
            _insist(row)
            rows.append(row)
    return rows


def _answer(group: Group, method: str, pool: int, folder: Path) -> dict[str, Tensor]:
    path = folder / "answer.safetensors"
    answers = group.ask("answer", method=method, pool=pool, path=str(path))
    if len({answer["weights"] for answer in answers}) > 1:
        raise DisagreementError(f"after a step of {method} the weights of {len(answers)} ranks are not the same")
    return load_file(path)


def _errors(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Any]:
    ours, theirs = (dict(each) for each in (found, wanted))
    own, other = (each.pop("coefficients_N") for each in (ours, theirs))
    return {
        "coefficients": float((own - other).abs().max()),
        "gradient": relative_error(ours, theirs),
        "same_samples": torch.equal(own > 0, other > 0),
    }


def _insist(row: Mapping[str, Any]) -> None:
    errors: Sequence[float] = (row["coefficients"], row["gradient"])
    if not (row["same_samples"] and max(errors) <= row["allowed"]):
        raise DisagreementError(
            f"{row['method']} on {row['ranks']} ranks is not what it is on one: coefficients off by {errors[0]:.2g}, "
            f"the gradient by {errors[1]:.2g}, allowed {row['allowed']:g}"
        )

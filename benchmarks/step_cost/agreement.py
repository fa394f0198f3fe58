"""Whether a method computes what it is measured for: its answers against those of autograd, one sample at a time.

Answers come as safetensors files (`methods.common.Answers`). They are compared in float32, whatever the workload's
dtype, because the arithmetic of bfloat16 would hide what is being looked for.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file

TOLERANCE = 1e-4  # relative

Array = npt.NDArray[Any]


class DisagreementError(Exception):
    """Our own step does not compute what autograd does: nothing is timed."""


@dataclass(frozen=True)
class Agreement:
    """How far a method's answers are from the reference.

    Attributes:
        errors: relative error of each answer that both have; the values are those of `methods.common.Answers`.
        gram_error: relative error of an approximate K, which is stated and not judged.
        utilities_correlation: rank correlation of the approximate and the exact c of the first pool, None
            where either gives all samples the same.
    """

    workload: str
    method: str
    errors: dict[str, float]
    gram_error: float | None = None
    utilities_correlation: float | None = None

    @property
    def agrees(self) -> bool:
        """Whether it found something that can be compared, and all of it is right."""
        return bool(self.errors) and all(error <= TOLERANCE for error in self.errors.values())


def compare(workload: str, method: str, found: Path, reference: Path) -> Agreement:
    """A method's answers against the reference's."""
    ours, wanted = load_file(found), load_file(reference)
    errors = {name: relative_error(ours[name], wanted[name]) for name in ours if name in wanted}
    gram_error = correlation = None
    if "approximate_gram_NN" in ours:
        gram_error = relative_error(ours["approximate_gram_NN"], wanted["gram_NN"])
        correlation = _rank_correlation(ours["approximate_utilities_N"], ours["exact_utilities_N"])
    return Agreement(workload, method, errors, gram_error, correlation)


def insist(agreement: Agreement) -> None:
    """Raise DisagreementError, with the errors, unless it agrees."""
    if not agreement.agrees:
        raise DisagreementError(
            f"{agreement.method} differs from autograd on {agreement.workload}: relative errors "
            f"{ {name: float(f'{error:.2g}') for name, error in agreement.errors.items()} }, allowed {TOLERANCE:g}"
        )


def _rank_correlation(left_N: Array, right_N: Array) -> float:
    ranks = np.stack([values.argsort().argsort() for values in (left_N, right_N)])
    return float(np.asarray(np.corrcoef(ranks))[0, 1])


def relative_error(found: Array, wanted: Array) -> float:
    """Length of the difference over the length of what is wanted; infinite if anything is not finite."""
    difference = np.linalg.norm(found.astype(np.float64) - wanted.astype(np.float64))
    error = float(difference / np.linalg.norm(wanted.astype(np.float64)))
    return error if np.isfinite(error) else float("inf")

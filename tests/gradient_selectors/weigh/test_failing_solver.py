"""A solver that fails costs a step its coefficients, not the run."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from gradient_selectors.views.interaction import Interaction
from gradient_selectors.views.scoring import Exact
from gradient_selectors.weigh.coefficients import CoefficientSolver, Solution
from gradient_selectors.weigh.filter_then_weight import Filter, FilterThenWeight, Normalisation
from gradient_selectors.weigh.program import Matrix, Vector
from torch import Tensor

from tests.helpers.pools import written_pool

ROWS = [[3.0, 0.1, 0, 0], [-1.0, 0, 0, 0], [0, 1.0, 0, 0], [1.0, 1.0, 0, 0], [0.2, 0, 1.0, 0]]
TARGET = [1.0, 1.0, 0.0, 0.0]


class Broken(CoefficientSolver):
    """Raises, or finds what is no number, from the given call on."""

    def __init__(self, error: Exception | None, calls: int = 0) -> None:
        super().__init__()
        self._error, self._calls = error, calls

    def solve(self, gram: Matrix, linear: Vector, ridge: float = 0.0, cap: float | None = None) -> Solution:
        self._calls -= 1
        if self._calls >= 0:
            return super().solve(gram, linear, ridge, cap)
        if self._error is not None:
            raise self._error
        return Solution(np.full(len(linear), np.nan), "optimal", 0.0, 0.0)


@pytest.mark.parametrize(
    "error", [RuntimeError("panicked"), ValueError("no"), MemoryError(), np.linalg.LinAlgError("singular"), None]
)
@pytest.mark.parametrize("calls", [0, 1])
@pytest.mark.parametrize("rule", ["first_order", "cosine", "nn_omp"])
def test_whatever_a_solver_raises_the_best_are_trained_on_alike(
    error: Exception | None, calls: int, rule: Filter
) -> None:
    """Also where it fails in the middle of a pursuit, or only at its second solve; and the report says so."""
    decision = FilterThenWeight(2, solver=Broken(error, calls), filter=rule).decide(written_pool(ROWS, TARGET))
    assert decision.selected == [0, 3]
    assert decision.coefficients_N.tolist() == pytest.approx([0.5, 0, 0, 0.5, 0])
    assert decision.num_positive == 4
    assert decision.solver is not None
    assert decision.solver.status == "fallback_equal"
    assert decision.solver.reason is not None
    assert (type(error).__name__ if error else "not finite") in decision.solver.reason


@pytest.mark.parametrize("normalisation", ["mean_one", "natural", "simplex"])
def test_equal_coefficients_are_of_the_length_that_is_asked_for(normalisation: Normalisation) -> None:
    """In natural scale by the exact line search, `c^T w / w^T K w`."""
    pool = written_pool(ROWS, TARGET)
    decision = FilterThenWeight(2, solver=Broken(RuntimeError()), normalisation=normalisation).decide(pool)
    rows = torch.tensor(ROWS)[[0, 3]].sum(0)
    want = float(rows @ torch.tensor(TARGET) / (rows @ rows)) if normalisation == "natural" else 0.5
    assert decision.coefficients_N[[0, 3]].tolist() == pytest.approx([want, want])


def test_where_nothing_helps_nobody_is_asked() -> None:
    decision = FilterThenWeight(2, solver=Broken(RuntimeError())).decide(written_pool([[-1.0, 0, 0, 0]], TARGET))
    assert decision.selected == []
    assert decision.solver is None


class Narrow(Exact):
    """Forgets a column of K: a mistake of who wrote it."""

    def gram(self, *of: Any) -> Tensor:
        return super().gram(*of)[:, :-1]


def test_shapes_that_do_not_go_together_are_a_mistake_and_not_a_failure() -> None:
    pool: Interaction = replace(written_pool(ROWS, TARGET), scoring=Narrow())
    with pytest.raises(ValueError, match=r"K of shape \(4, 3\) and c of 4 samples do not go together"):
        FilterThenWeight(2).decide(pool)
    with pytest.raises(ValueError, match="do not go together"):
        CoefficientSolver().solve(np.eye(3), np.ones(2))


def test_an_interrupt_is_no_failure_of_the_solver() -> None:
    class Interrupted(CoefficientSolver):
        def solve(self, *_: object, **__: object) -> Solution:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        FilterThenWeight(2, solver=Interrupted()).decide(written_pool(ROWS, TARGET))

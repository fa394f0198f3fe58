"""The quadratic program by cvxpy: a parameterised problem (DPP) that is compiled once for each size."""

import warnings
from dataclasses import dataclass

import cvxpy as cp
import numpy as np

from gradient_selectors.weigh.program import Matrix, Program, Vector


@dataclass(frozen=True)
class _Problem:
    """One parameterised problem of a fixed size."""

    problem: cp.Problem
    variable: cp.Variable
    root: cp.Parameter
    linear: cp.Parameter
    upper: cp.Parameter | None


class InteriorPoint:
    """Solves programs near enough to tell which coefficients are free; lets copies share equally."""

    def __init__(self, max_iterations: int) -> None:
        self._max_iterations = max_iterations
        self._problems: dict[tuple[int, bool], _Problem] = {}

    def solve(self, program: Program, upper_n: Vector) -> tuple[Vector | None, str]:
        """The solution to about 1e-5 and `optimal`, or None and the status of the fallback that is needed."""
        problem = self._problem(len(upper_n), bool(np.isfinite(upper_n).all()))
        try:
            problem.root.value = _root(program.hessian_nn)
            problem.linear.value = program.linear_n
            if problem.upper is not None:
                problem.upper.value = upper_n
            with warnings.catch_warnings():
                # cvxpy warns of what we check ourselves: the limit and the residual.
                warnings.filterwarnings("ignore", "Solution may be inaccurate")
                problem.problem.solve(solver=cp.CLARABEL, max_iter=self._max_iterations)
        except Exception:  # whatever it is: the fallback has the answer
            return None, "fallback_failed"
        if problem.problem.status == cp.USER_LIMIT:
            return None, "fallback_iterations"
        found_n: Vector | None = problem.variable.value
        return found_n, "fallback_failed" if found_n is None else "optimal"

    def _problem(self, size: int, capped: bool) -> _Problem:
        key = (size, capped)
        if key not in self._problems:
            variable = cp.Variable(size, nonneg=True)
            root, linear = cp.Parameter(size * (size + 1) // 2), cp.Parameter(size)
            upper = cp.Parameter(size, nonneg=True) if capped else None
            objective = cp.Minimize(0.5 * cp.sum_squares(cp.vec_to_upper_tri(root) @ variable) - linear @ variable)
            problem = cp.Problem(objective, [] if upper is None else [variable <= upper])
            assert problem.is_dcp(dpp=True)
            self._problems[key] = _Problem(problem, variable, root, linear, upper)
        return self._problems[key]


def _root(hessian_nn: Matrix) -> Vector:
    """The upper triangle, by rows, of R with `R^T R = H`, also where rounding made it slightly indefinite."""
    values_n, vectors_nn = np.linalg.eigh(hessian_nn)
    root_nn: Matrix = np.linalg.qr(np.sqrt(np.clip(values_n, 0.0, None))[:, None] * vectors_nn.T).R
    return root_nn[np.triu_indices(len(root_nn))]

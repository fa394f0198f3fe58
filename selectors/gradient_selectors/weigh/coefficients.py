"""The quadratic program for the coefficients of an update: `min_w 1/2 w^T (K + r diag K) w - c^T w`, `0 <= w <= u`.

The ridge r is relative to each candidate's own K_ii. Under one relative to their mean, a single long gradient would
shrink the coefficients of all others, at up to 79 % of the utility; so the lengths of gradients do not matter.

Three ways, each where the one before has no answer:

1. The primal-dual active set (Hintermueller, Ito and Kunisch 2003, "The primal-dual active set strategy as a semismooth
   Newton method"): a few small linear systems, exact. It may cycle. It is not tried on copies without a ridge: they
   could share their coefficient in any way, and rounding would choose one.
2. cvxpy, as a parameterised problem (DPP) that is built once for each size, on a factor `K + r diag K = R^T R`. R is
   triangular and declared so, which makes the solver faster. Its interior point lets copies share equally.
3. `fallback`, if cvxpy fails or exceeds its limit of iterations: exact as well.

No clock decides anything, so the result does not depend on what else the machine does.

The program is *not* least squares on the normal equations, `||K w - c||^2`: that is a different problem with a worse
solution.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gradient_selectors.weigh.fallback import solve_without_solver
from gradient_selectors.weigh.program import Matrix, Program, Vector, project, residual, scaled, shortest, step

if TYPE_CHECKING:
    from gradient_selectors.weigh.interior_point import InteriorPoint

RESIDUAL_TOLERANCE = 1e-9  # of the scaled problem, whose numbers are of order 1
ACTIVE_SET_ITERATIONS = 20
DISTINCT = 1e-5  # distance from the span of others, of a candidate's own length, from which on it is not a copy


@dataclass(frozen=True)
class Solution:
    """Coefficients and how they were found.

    Attributes:
        coefficients: (n,), not negative, in the natural scale of K and c.
        status: `optimal` from the first two ways; from the third, `fallback_failed` or `fallback_iterations`.
        seconds: wall-clock time of the solve.
        residual: largest violation of the optimality (KKT) conditions, in the scaled problem.
        reason: why no solver's answer was used, in a few words, where a selector chose without one.
    """

    coefficients: Vector
    status: str
    seconds: float
    residual: float
    reason: str | None = None


class CoefficientSolver:
    """Solves the program for any number of candidates; keeps what cvxpy compiled for each size that it had to solve.

    Examples:
        >>> import numpy as np
        >>> from gradient_selectors.weigh.coefficients import CoefficientSolver
        >>> CoefficientSolver().solve(np.diag([1.0, 4.0]), np.array([3.0, 2.0])).coefficients
        array([3. , 0.5])
    """

    def __init__(self, max_iterations: int = 100) -> None:
        """`max_iterations`: of the interior point, which takes 10 to 30; after these the fallback runs."""
        self._max_iterations = max_iterations
        self._interior: InteriorPoint | None = None

    def solve(self, gram: Matrix, linear: Vector, ridge: float = 0.0, cap: float | None = None) -> Solution:
        """Coefficients for `K = gram` (n, n) and `c = linear` (n,).

        `ridge` is what each entry of K's diagonal is raised by, as a share of itself. `cap` bounds every coefficient at
        `cap` times the mean of those that are positive without it. Raises ValueError if an input is not finite or of
        another shape, or if K has a zero diagonal.
        """
        started = time.perf_counter()
        if gram.shape != 2 * linear.shape:
            raise ValueError(f"K of shape {gram.shape} and c of shape {linear.shape} do not go together")
        if not (np.isfinite(gram).all() and np.isfinite(linear).all()):
            raise ValueError("K and c must be finite")
        if not (np.diag(gram) > 0).all():
            raise ValueError("K must have a positive diagonal")
        nothing_n = np.zeros(len(linear))
        if linear.max() <= 0:
            return Solution(nothing_n, "optimal", time.perf_counter() - started, 0.0)
        program = scaled(gram, linear, ridge)
        distinct = _are_distinct(program.hessian_nn)
        upper_n = np.full(len(linear), np.inf)
        found_n, status = self._solve(program, distinct, nothing_n, upper_n)
        if cap is not None:
            upper_n = cap * (found_n * program.scale_n)[found_n > 0].mean() / program.scale_n
            found_n, status = self._solve(program, distinct, found_n, upper_n)
        left = residual(program, found_n, upper_n)
        return Solution(found_n * program.scale_n, status, time.perf_counter() - started, left)

    def _solve(self, program: Program, distinct: bool, start_n: Vector, upper_n: Vector) -> tuple[Vector, str]:
        """The solution and its status. The active set starts from `start_n`."""
        found_n = _active_set(program, start_n, upper_n, _only) if distinct else None
        if found_n is not None:
            return found_n, "optimal"
        found_n, status = self._interior_point(program, upper_n)
        return (solve_without_solver(program, upper_n) if found_n is None else found_n), status

    def _interior_point(self, program: Program, upper_n: Vector) -> tuple[Vector | None, str]:
        """The solution of cvxpy, made exact, or None; and the status."""
        if self._interior is None:
            # cvxpy takes over a second to load, and most runs never need it.
            from gradient_selectors.weigh.interior_point import InteriorPoint

            self._interior = InteriorPoint(self._max_iterations)
        near_n, status = self._interior.solve(program, upper_n)
        if near_n is None:
            return None, status
        # It is right to 1e-5 only and never exactly zero, but near enough for a guess of what is free.
        found_n = _active_set(program, project(near_n, upper_n), upper_n, shortest)
        return found_n, "fallback_failed" if found_n is None else "optimal"


def _are_distinct(hessian_nn: Matrix) -> bool:
    """Whether no candidate is a combination of others."""
    try:
        # A pivot is the distance from the span of those before it.
        return bool(np.diag(np.linalg.cholesky(hessian_nn)).min() > DISTINCT)
    except np.linalg.LinAlgError:
        return False


def _active_set(
    program: Program, start_n: Vector, upper_n: Vector, solve: Callable[[Matrix, Vector], Vector]
) -> Vector | None:
    """The exact optimum, or None if it cycles.

    Guess from the projected gradient step what is free, `solve` for that with the rest at its bounds, guess again.
    """
    point_n = start_n
    for _ in range(ACTIVE_SET_ITERATIONS):
        step_n = step(program, point_n)
        projected_n = project(step_n, upper_n)
        if np.abs(projected_n - point_n).max() <= RESIDUAL_TOLERANCE:
            return projected_n
        free_n = projected_n == step_n
        point_n = np.where(free_n, 0.0, projected_n)
        rest_n = program.linear_n - program.hessian_nn @ point_n
        point_n[free_n] = solve(program.hessian_nn.compress(free_n, 0).compress(free_n, 1), rest_n[free_n])
    return None


def _only(matrix: Matrix, right: Vector) -> Vector:
    """The one solution of a regular system."""
    return np.linalg.solve(matrix, right).astype(np.float64, copy=False)

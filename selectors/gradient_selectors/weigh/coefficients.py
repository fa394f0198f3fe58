"""The quadratic program for the coefficients of an update: `min_w 1/2 w^T (K + rho I) w - c^T w`, `0 <= w <= u`.

Solved by cvxpy as a parameterised problem (DPP) that is built once for each size, on a factor `K + rho I = R^T R`. It
is *not* least squares on the normal equations, `||K w - c||^2`: that is a different problem with a worse solution. R is
triangular and declared so, which makes the solver faster. If the solver fails or exceeds its time limit, projected
gradients solve it instead.
"""

import time
import warnings
from dataclasses import dataclass

import cvxpy as cp
import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]
Matrix = npt.NDArray[np.float64]

RESIDUAL_TOLERANCE = 1e-9  # of the scaled problem, whose numbers are of order 1
POLISH_ITERATIONS = 10
FALLBACK_ITERATIONS = 20_000


@dataclass(frozen=True)
class Solution:
    """Coefficients and how they were found.

    Attributes:
        coefficients: (n,), not negative, in the natural scale of K and c.
        status: `optimal`, `fallback_failed` or `fallback_timeout`.
        seconds: wall-clock time of the solve.
        residual: largest violation of the optimality (KKT) conditions, in the scaled problem.
    """

    coefficients: Vector
    status: str
    seconds: float
    residual: float


@dataclass(frozen=True)
class _Problem:
    """One parameterised problem of a fixed size."""

    problem: cp.Problem
    variable: cp.Variable
    root: cp.Parameter
    linear: cp.Parameter
    upper: cp.Parameter | None


class CoefficientSolver:
    """Solves the program for any number of candidates; keeps one compiled problem for each size."""

    def __init__(self, time_limit_s: float = 1.0) -> None:
        """`time_limit_s`: seconds after which the solver is stopped and the fallback runs."""
        self._time_limit_s = time_limit_s
        self._problems: dict[tuple[int, bool], _Problem] = {}

    def solve(self, gram: Matrix, linear: Vector, ridge: float = 0.0, cap: float | None = None) -> Solution:
        """Coefficients for `K = gram` (n, n) and `c = linear` (n,).

        `ridge` is relative: rho = ridge * mean(diag K). `cap` bounds every coefficient at `cap` times the mean
        of those that are positive without it. Raises ValueError if an input is not finite or K has a zero diagonal.
        """
        started = time.perf_counter()
        if not (np.isfinite(gram).all() and np.isfinite(linear).all()):
            raise ValueError("K and c must be finite")
        if not (np.diag(gram) > 0).all():
            raise ValueError("K must have a positive diagonal")
        hessian = gram + ridge * np.diag(gram).mean() * np.eye(len(linear))
        # Unit diagonal and a linear term of order one: gradients differ in length by orders of magnitude.
        scale = 1.0 / np.sqrt(np.diag(hessian))
        hessian = hessian * np.outer(scale, scale)
        scaled_linear = linear * scale
        size = float(np.abs(scaled_linear).max())
        if scaled_linear.max() <= 0:
            return Solution(np.zeros(len(linear)), "optimal", time.perf_counter() - started, 0.0)
        solution, status = self._solve_scaled(hessian, scaled_linear / size, None)
        upper = None
        if cap is not None:
            upper = cap * (solution[solution > 0] * scale[solution > 0]).mean() / scale
            solution, status = self._solve_scaled(hessian, scaled_linear / size, upper)
        residual = _residual(hessian, scaled_linear / size, solution, upper)
        return Solution(solution * scale * size, status, time.perf_counter() - started, residual)

    def _solve_scaled(self, hessian: Matrix, linear: Vector, upper: Vector | None) -> tuple[Vector, str]:
        problem = self._problem(len(linear), upper is not None)
        problem.root.value = _root(hessian)
        problem.linear.value = linear
        if problem.upper is not None:
            problem.upper.value = upper
        try:
            with warnings.catch_warnings():
                # cvxpy warns of what we check ourselves: the time limit and the residual.
                warnings.filterwarnings("ignore", "Solution may be inaccurate")
                problem.problem.solve(solver=cp.CLARABEL, time_limit=self._time_limit_s)
        except cp.SolverError:
            return _projected_gradient(hessian, linear, upper), "fallback_failed"
        if problem.problem.status == cp.USER_LIMIT:
            return _projected_gradient(hessian, linear, upper), "fallback_timeout"
        if problem.variable.value is not None:
            solution = _polish(hessian, linear, np.clip(problem.variable.value, 0.0, upper), upper)
            if _residual(hessian, linear, solution, upper) <= RESIDUAL_TOLERANCE:
                return solution, "optimal"
        return _projected_gradient(hessian, linear, upper), "fallback_failed"

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


def _root(hessian: Matrix) -> Vector:
    """The upper triangle, by rows, of R with `R^T R = hessian`, also where rounding made it slightly indefinite."""
    values, vectors = np.linalg.eigh(hessian)
    root: Matrix = np.linalg.qr(np.sqrt(np.clip(values, 0.0, None))[:, None] * vectors.T).R
    return root[np.triu_indices(len(root))]


def _residual(hessian: Matrix, linear: Vector, solution: Vector, upper: Vector | None) -> float:
    """How far a projected gradient step moves the solution; zero exactly at the optimum."""
    step = np.clip(solution - (hessian @ solution - linear), 0.0, upper)
    return float(np.abs(solution - step).max())


def _polish(hessian: Matrix, linear: Vector, solution: Vector, upper: Vector | None) -> Vector:
    """The exact optimum from an interior-point solution, which is right to 1e-5 only and never exactly zero.

    Primal-dual active set: guess from the projected gradient step what is free, solve for that, guess again.
    """
    polished = solution
    for _ in range(POLISH_ITERATIONS):
        step = polished - (hessian @ polished - linear)
        polished = np.clip(step, 0.0, upper)
        free = polished == step
        rest = linear[free] - hessian[np.ix_(free, ~free)] @ polished[~free]
        polished[free] = np.linalg.lstsq(hessian[np.ix_(free, free)], rest, rcond=None)[0]
        if _residual(hessian, linear, polished, upper) <= RESIDUAL_TOLERANCE:
            return np.clip(polished, 0.0, upper)
    return solution


def _projected_gradient(hessian: Matrix, linear: Vector, upper: Vector | None) -> Vector:
    """Accelerated projected gradients with restarts: needs nothing but matrix products, and always returns."""
    step = 1.0 / float(np.linalg.eigvalsh(hessian)[-1])
    solution = ahead = np.zeros_like(linear)
    momentum = 1.0
    for _ in range(FALLBACK_ITERATIONS):
        following = np.clip(ahead - step * (hessian @ ahead - linear), 0.0, upper)
        if np.abs(following - ahead).max() < RESIDUAL_TOLERANCE * step:
            return following
        if (ahead - following) @ (following - solution) > 0:
            momentum, ahead = 1.0, solution  # the momentum points uphill
            continue
        next_momentum = (1 + np.sqrt(1 + 4 * momentum**2)) / 2
        ahead = following + (momentum - 1) / next_momentum * (following - solution)
        solution, momentum = following, next_momentum
    return solution

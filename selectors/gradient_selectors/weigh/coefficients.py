"""The quadratic program for the coefficients of an update: `min_w 1/2 w^T (K + rho I) w - c^T w`, `0 <= w <= u`.

Three ways, each where the one before has no answer:

1. The primal-dual active set (Hintermueller, Ito and Kunisch 2003, "The primal-dual active set strategy as a semismooth
   Newton method"): a few small linear systems, exact. It may cycle. It is not tried on copies without a ridge: they
   could share their coefficient in any way, and rounding would choose one.
2. cvxpy, as a parameterised problem (DPP) that is built once for each size, on a factor `K + rho I = R^T R`. R is
   triangular and declared so, which makes the solver faster. Its interior point lets copies share equally.
3. Projected gradients, if cvxpy fails or exceeds its time limit.

The program is *not* least squares on the normal equations, `||K w - c||^2`: that is a different problem with a worse
solution.
"""

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import cvxpy as cp
import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]
Matrix = npt.NDArray[np.float64]

RESIDUAL_TOLERANCE = 1e-9  # of the scaled problem, whose numbers are of order 1
ACTIVE_SET_ITERATIONS = 20
FALLBACK_ITERATIONS = 20_000
DISTINCT = 1e-5  # distance from the span of others, of a candidate's own length, from which on it is not a copy


@dataclass(frozen=True)
class Solution:
    """Coefficients and how they were found.

    Attributes:
        coefficients: (n,), not negative, in the natural scale of K and c.
        status: `optimal` from the first two ways; from projected gradients, `fallback_failed` or `fallback_timeout`.
        seconds: wall-clock time of the solve.
        residual: largest violation of the optimality (KKT) conditions, in the scaled problem.
    """

    coefficients: Vector
    status: str
    seconds: float
    residual: float


@dataclass(frozen=True)
class _Scaled:
    """The program in units in which H has a unit diagonal and c is of order one.

    Gradients differ in length by orders of magnitude. A solution `w` of this is `w * scale_n` in natural units.
    """

    hessian_nn: Matrix
    linear_n: Vector
    scale_n: Vector


@dataclass(frozen=True)
class _Problem:
    """One parameterised problem of a fixed size."""

    problem: cp.Problem
    variable: cp.Variable
    root: cp.Parameter
    linear: cp.Parameter
    upper: cp.Parameter | None


class CoefficientSolver:
    """Solves the program for any number of candidates; keeps a compiled problem for each size that cvxpy had to solve.

    Examples:
        >>> import numpy as np
        >>> from gradient_selectors.weigh.coefficients import CoefficientSolver
        >>> CoefficientSolver().solve(np.diag([1.0, 4.0]), np.array([3.0, 2.0])).coefficients
        array([3. , 0.5])
    """

    def __init__(self, time_limit_s: float = 1.0) -> None:
        """`time_limit_s`: seconds after which cvxpy is stopped and projected gradients run."""
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
        nothing_n = np.zeros(len(linear))
        if linear.max() <= 0:
            return Solution(nothing_n, "optimal", time.perf_counter() - started, 0.0)
        program = _scaled(gram, linear, ridge)
        distinct = _are_distinct(program.hessian_nn)
        upper_n = np.full(len(linear), np.inf)
        found_n, status = self._solve(program, distinct, nothing_n, upper_n)
        if cap is not None:
            upper_n = cap * (found_n * program.scale_n)[found_n > 0].mean() / program.scale_n
            found_n, status = self._solve(program, distinct, found_n, upper_n)
        residual = _residual(program, found_n, upper_n)
        return Solution(found_n * program.scale_n, status, time.perf_counter() - started, residual)

    def _solve(self, program: _Scaled, distinct: bool, start_n: Vector, upper_n: Vector) -> tuple[Vector, str]:
        """The solution and its status. The active set starts from `start_n`."""
        found_n = _active_set(program, start_n, upper_n, _only) if distinct else None
        if found_n is not None:
            return found_n, "optimal"
        found_n, status = self._interior_point(program, upper_n)
        return (_projected_gradient(program, upper_n) if found_n is None else found_n), status

    def _interior_point(self, program: _Scaled, upper_n: Vector) -> tuple[Vector | None, str]:
        """The solution of cvxpy, made exact, or None; and the status."""
        problem = self._problem(len(upper_n), bool(np.isfinite(upper_n).all()))
        problem.root.value = _root(program.hessian_nn)
        problem.linear.value = program.linear_n
        if problem.upper is not None:
            problem.upper.value = upper_n
        try:
            with warnings.catch_warnings():
                # cvxpy warns of what we check ourselves: the time limit and the residual.
                warnings.filterwarnings("ignore", "Solution may be inaccurate")
                problem.problem.solve(solver=cp.CLARABEL, time_limit=self._time_limit_s)
        except cp.SolverError:
            return None, "fallback_failed"
        if problem.problem.status == cp.USER_LIMIT:
            return None, "fallback_timeout"
        if problem.variable.value is None:
            return None, "fallback_failed"
        # It is right to 1e-5 only and never exactly zero, but near enough for a guess of what is free.
        found_n = _active_set(program, _project(problem.variable.value, upper_n), upper_n, _shortest)
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


def _scaled(gram: Matrix, linear: Vector, ridge: float) -> _Scaled:
    diagonal_n = np.diag(gram)
    rho = ridge * diagonal_n.mean()
    scale_n = 1.0 / np.sqrt(diagonal_n + rho)
    hessian_nn = (gram + rho * np.eye(len(linear))) * np.outer(scale_n, scale_n)
    linear_n = linear * scale_n
    size = float(np.abs(linear_n).max())
    return _Scaled(hessian_nn, linear_n / size, scale_n * size)


def _are_distinct(hessian_nn: Matrix) -> bool:
    """Whether no candidate is a combination of others."""
    try:
        # A pivot is the distance from the span of those before it.
        return bool(np.diag(np.linalg.cholesky(hessian_nn)).min() > DISTINCT)
    except np.linalg.LinAlgError:
        return False


def _root(hessian_nn: Matrix) -> Vector:
    """The upper triangle, by rows, of R with `R^T R = H`, also where rounding made it slightly indefinite."""
    values_n, vectors_nn = np.linalg.eigh(hessian_nn)
    root_nn: Matrix = np.linalg.qr(np.sqrt(np.clip(values_n, 0.0, None))[:, None] * vectors_nn.T).R
    return root_nn[np.triu_indices(len(root_nn))]


def _project(point_n: Vector, upper_n: Vector) -> Vector:
    return np.minimum(np.maximum(point_n, 0.0), upper_n)


def _step(program: _Scaled, point_n: Vector) -> Vector:
    """A gradient step. Projected, it stays where it is exactly at the optimum."""
    return point_n - (program.hessian_nn @ point_n - program.linear_n)


def _residual(program: _Scaled, point_n: Vector, upper_n: Vector) -> float:
    return float(np.abs(_project(_step(program, point_n), upper_n) - point_n).max())


def _active_set(
    program: _Scaled, start_n: Vector, upper_n: Vector, solve: Callable[[Matrix, Vector], Vector]
) -> Vector | None:
    """The exact optimum, or None if it cycles.

    Guess from the projected gradient step what is free, `solve` for that with the rest at its bounds, guess again.
    """
    point_n = start_n
    for _ in range(ACTIVE_SET_ITERATIONS):
        step_n = _step(program, point_n)
        projected_n = _project(step_n, upper_n)
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


def _shortest(matrix: Matrix, right: Vector) -> Vector:
    """The shortest of all solutions of a singular system: copies share."""
    return np.linalg.lstsq(matrix, right, rcond=None)[0].astype(np.float64, copy=False)


def _projected_gradient(program: _Scaled, upper_n: Vector) -> Vector:
    """Accelerated projected gradients with restarts: needs nothing but matrix products, and always returns."""
    step = 1.0 / float(np.linalg.eigvalsh(program.hessian_nn)[-1])
    solution_n = ahead_n = np.zeros_like(upper_n)
    momentum = 1.0
    for _ in range(FALLBACK_ITERATIONS):
        following_n = _project(ahead_n - step * (program.hessian_nn @ ahead_n - program.linear_n), upper_n)
        if np.abs(following_n - ahead_n).max() < RESIDUAL_TOLERANCE * step:
            return following_n
        if (ahead_n - following_n) @ (following_n - solution_n) > 0:
            momentum, ahead_n = 1.0, solution_n  # the momentum points uphill
            continue
        next_momentum = (1 + np.sqrt(1 + 4 * momentum**2)) / 2
        ahead_n = following_n + (momentum - 1) / next_momentum * (following_n - solution_n)
        solution_n, momentum = following_n, next_momentum
    return solution_n

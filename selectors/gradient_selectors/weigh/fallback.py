"""The fallback for the quadratic program: slower, but it needs no solver and ends at the optimum.

Accelerated projected gradients come near, from a start that treats copies alike. A primal active set then makes that
exact: it goes from one feasible point to a better one, along the shortest step within what is free, and so ends.
"""

import numpy as np
import numpy.typing as npt

from gradient_selectors.weigh.program import Matrix, Program, Vector, project, shortest

Mask = npt.NDArray[np.bool_]

TOLERANCE = 1e-9  # of the optimality conditions in the scaled program, times the largest coefficient where that is > 1
GRADIENT_STEPS = 1000
CLOSE = 1e-13  # of the largest coefficient: so near to a bound is at it


def solve_without_solver(program: Program, upper_n: Vector) -> Vector:
    """The optimum: it meets the optimality conditions to `TOLERANCE`, however badly conditioned the program is.

    Of a program without an optimum, which needs c outside the span of K, the last point.
    """
    return polished(program, projected_gradients(program, upper_n), upper_n)


def projected_gradients(program: Program, upper_n: Vector) -> Vector:
    """Accelerated projected gradients with restarts: near the optimum where the program is well conditioned."""
    length = 1.0 / float(np.linalg.eigvalsh(program.hessian_nn)[-1])
    solution_n = ahead_n = np.zeros_like(upper_n)
    momentum = 1.0
    for _ in range(GRADIENT_STEPS):
        following_n = project(ahead_n - length * (program.hessian_nn @ ahead_n - program.linear_n), upper_n)
        if np.abs(following_n - ahead_n).max() < TOLERANCE * length:
            return following_n
        if (ahead_n - following_n) @ (following_n - solution_n) > 0:
            momentum, ahead_n = 1.0, solution_n  # the momentum points uphill
            continue
        next_momentum = (1 + np.sqrt(1 + 4 * momentum**2)) / 2
        ahead_n = following_n + (momentum - 1) / next_momentum * (following_n - solution_n)
        solution_n, momentum = following_n, next_momentum
    return solution_n


def polished(program: Program, start_n: Vector, upper_n: Vector) -> Vector:
    """The optimum, from a feasible point near it: move what is free to its best, free what would gain, and again."""
    point_n, free_n = start_n.copy(), (start_n > 0) & (start_n < upper_n)
    last = np.inf  # slope of what is free before the last move, if that met no bound
    for _ in range(10 * len(point_n) + 100):
        tolerance = TOLERANCE * max(1.0, float(point_n.max()))
        slope_n = program.hessian_nn @ point_n - program.linear_n
        steepest = float(np.abs(slope_n[free_n]).max(initial=0.0))
        if tolerance / 2 < steepest < last / 2:
            point_n, held_n = _move(program, point_n, slope_n, free_n, upper_n)
            free_n, last = free_n & ~held_n, np.inf if held_n.any() else steepest
            continue
        gains_n = np.where(free_n, 0.0, np.where(point_n > 0, slope_n, -slope_n))  # down from a cap, up from zero
        best = int(np.argmax(gains_n))
        if gains_n[best] <= tolerance:
            break
        free_n[best], last = True, np.inf
    return point_n


def _move(program: Program, point_n: Vector, slope_n: Vector, free_n: Mask, upper_n: Vector) -> tuple[Vector, Mask]:
    """The point with what is free at its best, or as near to that as the bounds let it; and what they hold now."""
    step_n = np.zeros_like(point_n)
    step_n[free_n], ends = _shortest_step(program.hessian_nn[np.ix_(free_n, free_n)], -slope_n[free_n])
    with np.errstate(divide="ignore", invalid="ignore"):
        room_n = np.where(step_n < 0, -point_n / step_n, np.where(step_n > 0, (upper_n - point_n) / step_n, np.inf))
    length = min(1.0 if ends else np.inf, float(room_n.min()))
    if length == np.inf:
        return point_n, np.zeros_like(free_n)
    moved_n = project(point_n + length * step_n, upper_n)
    near = CLOSE * float(moved_n.max())
    low_n, high_n = free_n & (step_n < 0) & (moved_n <= near), free_n & (step_n > 0) & (moved_n >= upper_n - near)
    return np.where(low_n, 0.0, np.where(high_n, upper_n, moved_n)), low_n | high_n


def _shortest_step(matrix: Matrix, right: Vector) -> tuple[Vector, bool]:
    """The shortest step to the best point: copies move alike. Where there is none, a way down that never ends."""
    step: Vector = shortest(matrix, right)
    rest: Vector = right - matrix @ step
    ends = bool(np.abs(rest).max() <= TOLERANCE * max(1.0, float(np.abs(step).max())))
    return (step if ends else rest), ends

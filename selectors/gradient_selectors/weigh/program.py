"""A quadratic program in units that suit a solver, `min_w 1/2 w^T H w - c^T w`, `0 <= w <= u`; and how far from solved.

Gradients differ in length by orders of magnitude. Here every candidate counts in units of its own length, so that H has
a unit diagonal, and c is of order one.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]
Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Program:
    """The program without its upper bounds. A solution `w` of it is `w * scale_n` in natural units."""

    hessian_nn: Matrix
    linear_n: Vector
    scale_n: Vector


def scaled(gram: Matrix, linear: Vector, ridge: float) -> Program:
    """The program of `K = gram` with each entry of its diagonal raised by the share `ridge` of itself."""
    scale_n = 1.0 / np.sqrt((1 + ridge) * np.diag(gram))
    hessian_nn = gram * np.outer(scale_n, scale_n)
    np.fill_diagonal(hessian_nn, 1.0)
    linear_n = linear * scale_n
    size = float(np.abs(linear_n).max())
    return Program(hessian_nn, linear_n / size, scale_n * size)


def project(point_n: Vector, upper_n: Vector) -> Vector:
    """The nearest point within the bounds."""
    return np.minimum(np.maximum(point_n, 0.0), upper_n)


def step(program: Program, point_n: Vector) -> Vector:
    """A gradient step. Projected, it stays where it is exactly at the optimum."""
    return point_n - (program.hessian_nn @ point_n - program.linear_n)


def residual(program: Program, point_n: Vector, upper_n: Vector) -> float:
    """Largest violation of the optimality (KKT) conditions; 0 at the optimum."""
    return float(np.abs(project(step(program, point_n), upper_n) - point_n).max())


def shortest(matrix: Matrix, right: Vector) -> Vector:
    """The shortest of all solutions of a singular system: copies share."""
    return np.linalg.lstsq(matrix, right, rcond=None)[0].astype(np.float64, copy=False)

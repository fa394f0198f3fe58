"""The third way to solve the program: its answer meets the optimality conditions, whatever K is like."""

from collections.abc import Callable

import cvxpy as cp
import numpy as np
import pytest
from gradient_selectors.weigh.coefficients import CoefficientSolver
from gradient_selectors.weigh.fallback import TOLERANCE, projected_gradients, solve_without_solver
from gradient_selectors.weigh.program import Matrix, Vector, residual, scaled

ALLOWED = 1.01 * TOLERANCE


def random_directions(rng: np.random.Generator, size: int) -> Matrix:
    return rng.normal(size=(size, int(rng.integers(1, 60)))) * np.exp(2 * rng.normal(size=(size, 1)))


def badly_conditioned(rng: np.random.Generator, size: int) -> Matrix:
    """K's eigenvalues lie up to sixteen orders of magnitude apart."""
    rows = random_directions(rng, size)
    decay: Matrix = rows * 10.0 ** (-rng.uniform(2, 8) * np.linspace(0, 1, rows.shape[1]))
    return decay


def rank_deficient(rng: np.random.Generator, size: int) -> Matrix:
    return rng.normal(size=(size, max(1, size // 3)))


def copies(rng: np.random.Generator, size: int) -> Matrix:
    rows = random_directions(rng, size)
    rows[1::2] = 3.0 * rows[0::2][: len(rows[1::2])]
    return rows


def near_copies(rng: np.random.Generator, size: int) -> Matrix:
    rows = random_directions(rng, size)
    others = rows[0::2][: len(rows[1::2])]
    rows[1::2] = others + 10.0 ** -rng.uniform(3, 9) * rng.normal(size=others.shape)
    return rows


def opposites(rng: np.random.Generator, size: int) -> Matrix:
    rows = random_directions(rng, size)
    rows[1::2] = -rows[0::2][: len(rows[1::2])]
    return rows


Kind = Callable[[np.random.Generator, int], Matrix]
KINDS: tuple[Kind, ...] = (random_directions, badly_conditioned, rank_deficient, copies, near_copies, opposites)


def program_of(rows: Matrix, rng: np.random.Generator) -> tuple[Matrix, Vector]:
    """K and c of gradients, and of a target that some of them point towards."""
    directions = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    linear = rows @ (rng.normal(size=rows.shape[1]) + 0.3 * directions.sum(0))
    return rows @ rows.T, linear if linear.max() > 0 else -linear


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("capped", [False, True])
def test_the_fallback_meets_the_optimality_conditions(kind: Kind, capped: bool) -> None:
    """To the tolerance that is stated, without a ridge."""
    for seed in range(30):
        rng = np.random.default_rng(seed)
        size = int(rng.integers(1, 40))
        program = scaled(*program_of(kind(rng, size), rng), 0.0)
        upper_n = rng.uniform(0.05, 1.0, size) if capped else np.full(size, np.inf)
        found_n = solve_without_solver(program, upper_n)
        assert (found_n >= 0).all()
        assert (found_n <= upper_n).all()
        assert residual(program, found_n, upper_n) <= ALLOWED * max(1.0, float(found_n.max()))


def test_projected_gradients_alone_do_not() -> None:
    """What the active set behind them is for: bad conditioning, which no number of cheap steps comes by."""
    rng = np.random.default_rng(3)
    program = scaled(*program_of(badly_conditioned(rng, 30), rng), 0.0)
    upper_n = np.full(30, np.inf)
    assert residual(program, projected_gradients(program, upper_n), upper_n) > 1000 * ALLOWED


@pytest.mark.parametrize("kind", KINDS)
def test_the_fallback_is_as_good_as_the_solver(kind: Kind) -> None:
    """The same utility, with a ridge, as it is used."""
    for seed in range(5):
        rng = np.random.default_rng(seed)
        gram, linear = program_of(kind(rng, 12), rng)
        program, hessian = scaled(gram, linear, 1e-3), gram + 1e-3 * np.diag(np.diag(gram))
        best = CoefficientSolver().solve(gram, linear, 1e-3).coefficients
        found = solve_without_solver(program, np.full(12, np.inf)) * program.scale_n
        ours, theirs = (float(linear @ w - 0.5 * w @ hessian @ w) for w in (found, best))
        assert ours == pytest.approx(theirs, rel=1e-9)


def test_whatever_cvxpy_raises_ends_in_the_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("broken")

    rng = np.random.default_rng(0)
    gram, linear = program_of(copies(rng, 8), rng)
    monkeypatch.setattr(cp.Problem, "solve", fail)
    solution = CoefficientSolver().solve(gram, linear)
    assert solution.status == "fallback_failed"
    assert solution.residual <= ALLOWED * 10


def test_a_program_without_an_optimum_ends() -> None:
    """Opposites that both help, as only approximate views have it: the way down never ends."""
    program = scaled(np.array([[1.0, -1.0], [-1.0, 1.0]]), np.array([1.0, 0.5]), 0.0)
    found_n = solve_without_solver(program, np.full(2, np.inf))
    assert np.isfinite(found_n).all()
    assert (found_n >= 0).all()

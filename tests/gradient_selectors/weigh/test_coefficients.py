"""The quadratic program against brute force over all supports, and against scipy's active sets."""

import itertools
import subprocess
import sys

import cvxpy as cp
import numpy as np
import pytest
from gradient_selectors.weigh.coefficients import CoefficientSolver
from gradient_selectors.weigh.program import Matrix, Vector
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import lsq_linear, nnls  # type: ignore[import-untyped]

RIDGE = 1e-3

# K and c on which the active set goes round in a circle.
CYCLES: tuple[tuple[list[list[float]], list[float]], ...] = (
    ([[14, 11, -8], [11, 14, -5], [-8, -5, 5]], [3, 1, -2]),
    ([[19, -6, 9], [-6, 4, -4], [9, -4, 5]], [-1, 3, -3]),
    ([[4, 2, 6, 6], [2, 19, 12, -12], [6, 12, 18, -5], [6, -12, -5, 31]], [3, -2, 8, 1]),
)


def problem(rng: np.random.Generator, size: int) -> tuple[Matrix, Vector]:
    """Gradients whose lengths differ by orders of magnitude, and a target that some of them point towards."""
    gradients = rng.normal(size=(size, rng.integers(3, 30))) * np.exp(2 * rng.normal(size=(size, 1)))
    return gradients @ gradients.T, gradients @ (rng.normal(size=gradients.shape[1]) + 0.3 * gradients.sum(0))


def with_copies(rng: np.random.Generator, size: int, distance: float) -> tuple[Matrix, Vector]:
    """Every other gradient is the one before it, but for its length and for `distance` of that."""
    gradients = rng.normal(size=(size, 40)) + 0.5
    others = gradients[1::2]
    gradients[1::2] = gradients[0::2][: len(others)] + distance * others
    gradients *= np.exp(rng.normal(size=(size, 1)))
    return gradients @ gradients.T, gradients @ (rng.normal(size=40) + 0.5)


def broken_cvxpy(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise cp.SolverError("broken")

    monkeypatch.setattr(cp.Problem, "solve", fail)


def by_scipy(hessian: Matrix, linear: Vector, cap: float | None) -> Vector:
    """Both programs on the Cholesky root, in units in which the diagonal is 1."""
    scale = 1 / np.sqrt(np.diag(hessian))
    lower = np.linalg.cholesky(hessian * np.outer(scale, scale))
    wanted = np.linalg.solve(lower, linear * scale)
    best: Vector = nnls(lower.T, wanted)[0] * scale
    if cap is not None:
        upper = cap * best[best > 0].mean() / scale
        best = lsq_linear(lower.T, wanted, (0.0, upper), method="bvls", tol=1e-15).x * scale
    return best


def with_ridge(gram: Matrix) -> Matrix:
    hessian: Matrix = gram + RIDGE * np.diag(np.diag(gram))
    return hessian


def utility(hessian: Matrix, linear: Vector, weights: Vector) -> float:
    return float(linear @ weights - 0.5 * weights @ hessian @ weights)


def brute_force(hessian: Matrix, linear: Vector) -> Vector:
    """The best of the optima of every support that come out non-negative."""
    best = np.zeros(len(linear))
    for size in range(1, len(linear) + 1):
        for support in map(list, itertools.combinations(range(len(linear)), size)):
            weights = np.zeros(len(linear))
            weights[support] = np.linalg.solve(hessian[np.ix_(support, support)], linear[support])
            if (weights >= 0).all() and utility(hessian, linear, weights) > utility(hessian, linear, best):
                best = weights
    return best


@pytest.mark.parametrize("seed", range(40))
def test_equals_brute_force_over_supports(seed: int) -> None:
    rng = np.random.default_rng(seed)
    gram, linear = problem(rng, int(rng.integers(1, 8)))
    solution = CoefficientSolver().solve(gram, linear, RIDGE)
    hessian = with_ridge(gram)
    best = brute_force(hessian, linear)
    assert solution.status == "optimal"
    np.testing.assert_allclose(solution.coefficients, best, rtol=1e-6, atol=1e-8 * max(best.max(), 1e-12))
    # At the optimum, half of the linear term is left (U = 1/2 c^T w).
    assert utility(hessian, linear, solution.coefficients) == pytest.approx(
        0.5 * linear @ solution.coefficients, rel=1e-6
    )


@pytest.mark.parametrize("cap", [None, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("size", [1, 2, 5, 8, 16, 33, 64])
@pytest.mark.parametrize("kind", ["lengths", "copies", "near copies"])
def test_equals_active_sets_of_scipy(kind: str, size: int, cap: float | None) -> None:
    solver = CoefficientSolver()
    for seed in range(3):
        rng = np.random.default_rng(100 * size + seed)
        if kind == "lengths":
            gram, linear = problem(rng, size)
        else:
            gram, linear = with_copies(rng, size, 0.0 if kind == "copies" else 1e-3)
        linear = np.append(linear[:-1], abs(linear[-1]))  # one at least points towards the target
        solution, best = solver.solve(gram, linear, RIDGE, cap), by_scipy(with_ridge(gram), linear, cap)
        assert solution.status == "optimal"
        assert solution.residual < 1e-8
        lengths = np.sqrt(np.diag(gram))
        np.testing.assert_allclose(
            solution.coefficients * lengths, best * lengths, rtol=1e-6, atol=1e-8 * (best * lengths).max()
        )


@pytest.mark.parametrize("cap", [None, 1.0])
@pytest.mark.parametrize("size", [1, 8, 64])
def test_candidates_that_differ_do_not_need_cvxpy(
    size: int, cap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken_cvxpy(monkeypatch)
    gram, linear = with_copies(np.random.default_rng(size), size, 0.0)
    assert CoefficientSolver().solve(gram, linear, RIDGE, cap).status == "optimal"


@pytest.mark.parametrize(("gram", "linear"), CYCLES)
def test_cvxpy_solves_what_makes_the_active_set_cycle(
    gram: list[list[float]], linear: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    solution = CoefficientSolver().solve(np.array(gram), np.array(linear))
    assert solution.status == "optimal"
    np.testing.assert_allclose(
        solution.coefficients, brute_force(np.array(gram), np.array(linear)), rtol=1e-6, atol=1e-9
    )
    broken_cvxpy(monkeypatch)
    assert CoefficientSolver().solve(np.array(gram), np.array(linear)).status == "fallback_failed"


@pytest.mark.parametrize("size", [1, 2, 8, 64])
def test_optimality_conditions_hold(size: int) -> None:
    gram, linear = problem(np.random.default_rng(size), size)
    solution = CoefficientSolver().solve(gram, linear, RIDGE)
    slope = with_ridge(gram) @ solution.coefficients - linear
    scale = np.sqrt(np.diag(gram))
    size_of_slope = np.abs(linear / scale).max()
    assert (solution.coefficients >= 0).all()
    assert (slope / scale >= -1e-6 * size_of_slope).all()
    assert abs(solution.coefficients @ slope) <= 1e-6 * abs(linear @ solution.coefficients)
    assert solution.residual < 1e-8


def test_one_candidate_is_a_division() -> None:
    solution = CoefficientSolver().solve(np.array([[4.0]]), np.array([2.0]))
    assert solution.coefficients == pytest.approx([0.5])


def test_nothing_points_towards_the_target() -> None:
    gram, _ = problem(np.random.default_rng(0), 4)
    assert not CoefficientSolver().solve(gram, -np.ones(4), RIDGE).coefficients.any()


def test_a_target_inside_the_cone_is_met_exactly() -> None:
    gradients = np.random.default_rng(1).normal(size=(4, 10))
    wanted = np.array([0.2, 0.0, 1.5, 0.7])
    solution = CoefficientSolver().solve(gradients @ gradients.T, gradients @ (wanted @ gradients))
    np.testing.assert_allclose(solution.coefficients @ gradients, wanted @ gradients, atol=1e-6)


def test_duplicates_share_their_coefficient() -> None:
    gradients = np.random.default_rng(2).normal(size=(3, 10))
    twice = np.vstack([gradients, gradients[:1]])
    target = np.array([1.0, 0.5, 0.3]) @ gradients
    once = CoefficientSolver().solve(gradients @ gradients.T, gradients @ target, 1e-9).coefficients
    both = CoefficientSolver().solve(twice @ twice.T, twice @ target, 1e-6).coefficients
    assert both[0] == pytest.approx(both[3], rel=1e-4)
    assert both[0] + both[3] == pytest.approx(once[0], rel=1e-3)


@pytest.mark.parametrize("size", [2, 8, 32])
def test_copies_share_their_coefficient_without_a_ridge(size: int) -> None:
    """In units of their length, however the candidates are ordered: rounding does not choose one of them."""
    rng = np.random.default_rng(size)
    gram, linear = with_copies(rng, size, 0.0)
    order = rng.permutation(size)
    solution = CoefficientSolver().solve(gram[order][:, order], linear[order])
    weights = np.zeros(size)
    weights[order] = solution.coefficients
    shares = weights * np.sqrt(np.diag(gram))
    assert solution.status == "optimal"
    assert shares.max() > 0
    np.testing.assert_allclose(shares[1::2], shares[0::2], rtol=1e-5, atol=1e-6 * shares.max())
    singles = np.arange(0, size, 2)
    best = by_scipy(gram[np.ix_(singles, singles)], linear[singles], None)
    assert utility(gram, linear, weights) == pytest.approx(0.5 * linear[singles] @ best, rel=1e-6)


def test_scaling_a_gradient_scales_its_coefficient_back() -> None:
    gradients = np.random.default_rng(3).normal(size=(4, 10))
    target, scale = gradients.sum(0), np.array([0.01, 1.0, 10.0, 300.0])
    scaled = gradients * scale[:, None]
    plain = CoefficientSolver().solve(gradients @ gradients.T, gradients @ target).coefficients
    again = CoefficientSolver().solve(scaled @ scaled.T, scaled @ target).coefficients
    np.testing.assert_allclose(again * scale, plain, rtol=1e-5, atol=1e-9)


def test_one_long_gradient_costs_the_others_nothing() -> None:
    """Of eight alike, one is 30 times longer: it gets a thirtieth, and what is reached is the same."""
    gradients = np.random.default_rng(8).normal(size=(8, 20)) + 0.5
    target, lengths = np.random.default_rng(9).normal(size=20) + 0.5, np.ones(8)
    lengths[3] = 30.0
    found = []
    for rows in (gradients, gradients * lengths[:, None]):
        weights = CoefficientSolver().solve(rows @ rows.T, rows @ target, RIDGE).coefficients
        found.append((weights, utility(rows @ rows.T, rows @ target, weights)))
    (once, reached), (again, then_reached) = found
    np.testing.assert_allclose(again, once / lengths, rtol=1e-8, atol=1e-12)
    assert then_reached == pytest.approx(reached, rel=1e-10)


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 12),
    seed=st.integers(0, 10**6),
    lengths=st.lists(st.floats(1e-3, 1e3), min_size=12, max_size=12),
    ridge=st.sampled_from([1e-4, 1e-3, 1e-2, 0.3]),
    cap=st.sampled_from([None, 1e9]),  # a cap is in natural units, so only one that binds nothing is left alone
)
def test_the_lengths_of_gradients_do_not_matter(
    size: int, seed: int, lengths: list[float], ridge: float, cap: float | None
) -> None:
    """Over random K: coefficients follow each gradient's own length, and the utility that is reached stays."""
    gram, linear = problem(np.random.default_rng(seed), size)
    by = np.array(lengths[:size])
    once = CoefficientSolver().solve(gram, linear, ridge, cap).coefficients
    again = CoefficientSolver().solve(gram * np.outer(by, by), linear * by, ridge, cap).coefficients
    units = np.sqrt(np.diag(gram))
    np.testing.assert_allclose(again * by * units, once * units, rtol=1e-6, atol=1e-8 * (once * units).max())
    assert utility(gram, linear, again * by) == pytest.approx(utility(gram, linear, once), rel=1e-8)


def test_order_of_the_candidates_does_not_matter() -> None:
    gram, linear = problem(np.random.default_rng(4), 6)
    order = np.array([3, 0, 5, 1, 4, 2])
    solver = CoefficientSolver()
    first = solver.solve(gram, linear, RIDGE).coefficients
    np.testing.assert_allclose(
        solver.solve(gram[order][:, order], linear[order], RIDGE).coefficients, first[order], rtol=1e-6
    )


def test_a_cap_bounds_every_coefficient() -> None:
    gram, linear = np.eye(4), np.array([10.0, 1.0, 1.0, 1.0])
    solution = CoefficientSolver().solve(gram, linear, cap=2.0)
    np.testing.assert_allclose(solution.coefficients, [2 * 13 / 4, 1, 1, 1], rtol=1e-6)
    with_unused = CoefficientSolver().solve(np.eye(6), np.append(linear, [-1.0, -1.0]), cap=2.0)
    np.testing.assert_allclose(with_unused.coefficients, [2 * 13 / 4, 1, 1, 1, 0, 0], rtol=1e-6)


@pytest.mark.parametrize("size", [6, 16])
def test_a_limit_of_iterations_ends_in_the_fallback_with_the_same_answer(size: int) -> None:
    """Copies without a ridge need cvxpy."""
    gram, linear = with_copies(np.random.default_rng(size), size, 0.0)
    fallback = CoefficientSolver(max_iterations=1).solve(gram, linear)
    best = CoefficientSolver().solve(gram, linear)
    assert fallback.status == "fallback_iterations"
    assert best.status == "optimal"
    np.testing.assert_allclose(fallback.coefficients, best.coefficients, rtol=1e-4, atol=1e-5 * best.coefficients.max())


def test_a_failing_solver_ends_in_the_fallback_with_the_same_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    gram, linear = with_copies(np.random.default_rng(5), 6, 0.0)
    best = CoefficientSolver().solve(gram, linear)
    broken_cvxpy(monkeypatch)
    fallback = CoefficientSolver().solve(gram, linear)
    assert fallback.status == "fallback_failed"
    np.testing.assert_allclose(fallback.coefficients, best.coefficients, rtol=1e-4, atol=1e-5 * best.coefficients.max())


def test_is_not_least_squares_on_the_normal_equations() -> None:
    """nnls(K, c) solves another problem; on this one it loses utility."""
    rng = np.random.default_rng(6)
    gradients = rng.normal(size=(12, 8)) * np.exp(rng.normal(size=(12, 1)))
    gram, linear = gradients @ gradients.T, gradients @ rng.normal(size=8)
    other = cp.Variable(12, nonneg=True)
    cp.Problem(cp.Minimize(cp.sum_squares(gram @ other - linear))).solve()
    ours = CoefficientSolver().solve(gram, linear).coefficients
    assert utility(gram, linear, ours) > 1.001 * utility(gram, linear, other.value)


@pytest.mark.parametrize(
    ("gram", "linear"),
    [
        (np.array([[np.nan]]), np.ones(1)),
        (np.ones((1, 1)), np.array([np.inf])),
        (np.zeros((1, 1)), np.ones(1)),
    ],
)
def test_unusable_input_is_refused(gram: Matrix, linear: Vector) -> None:
    with pytest.raises(ValueError, match="K"):
        CoefficientSolver().solve(gram, linear)


def test_cvxpy_is_loaded_only_where_a_program_needs_it() -> None:
    """It takes longer to load than most of the service does."""
    script = """
import sys
import numpy as np
from gradient_selectors import *
from gradient_selectors.weigh.coefficients import CoefficientSolver
solver = CoefficientSolver()
solver.solve(np.diag([1.0, 4.0]), np.array([3.0, 2.0]))
assert "cvxpy" not in sys.modules
solver.solve(np.ones((2, 2)), np.ones(2))
assert "cvxpy" in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)

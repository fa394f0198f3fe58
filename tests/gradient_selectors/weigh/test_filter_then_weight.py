"""The two stages and their degenerate cases, on pools small enough to know the answer."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import cvxpy as cp
import numpy as np
import pytest
import torch
from gradient_selectors.preconditioner import plain
from gradient_selectors.views.interaction import Interaction
from gradient_selectors.weigh.baselines import Equal, TopK
from gradient_selectors.weigh.coefficients import CoefficientSolver
from gradient_selectors.weigh.filter_then_weight import (
    Filter,
    FilterThenWeight,
    Metric,
    Normalisation,
    eliminate,
    line_search,
    matching_pursuit,
    on_simplex,
    with_ridge,
)
from torch import Tensor

from tests.helpers.pools import written_pool

TARGET = [1.0, 1.0, 0.0, 0.0]
SOLVER = CoefficientSolver()  # which keeps what it has compiled


def pool(
    rows: Sequence[Sequence[float]], target: Sequence[float] = TARGET, losses: Tensor | None = None
) -> Interaction:
    """Candidates given by their gradients on one parameter of four weights."""
    return written_pool(rows, target, losses)


def test_survivors_are_a_multiple_of_the_batch_size() -> None:
    assert FilterThenWeight(4).max_survivors == 8
    assert FilterThenWeight(3, keep_ratio=1.5).max_survivors == 5


def method(batch_size: int = 2, survivors: int = 4, cap: float | None = None) -> FilterThenWeight:
    return FilterThenWeight(batch_size, survivors / batch_size, SOLVER, ridge=1e-4, cap=cap)


def test_candidates_that_point_away_are_filtered() -> None:
    decision = method().decide(pool([[1, 0, 0, 0], [-1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]))
    assert decision.selected == [0, 2]
    assert decision.num_positive == 2
    torch.testing.assert_close(decision.coefficients_N[[0, 2]], torch.tensor([0.5, 0.5]))


def test_redundancy_moves_the_choice_away_from_top_k() -> None:
    """Two copies of the best, and a weaker one that adds something: top-k takes both copies."""
    rows = [[3.0, 0.125, 0, 0], [3.0, 0.125, 0, 0], [0, 1.0, 0, 0]]
    assert TopK(2).decide(pool(rows)).selected == [0, 1]
    decision = method(batch_size=3).decide(pool(rows))
    assert decision.coefficients_N[2] > decision.coefficients_N[0]
    assert decision.coefficients_N[0] == pytest.approx(float(decision.coefficients_N[1]), rel=1e-3)
    assert decision.redundancy is not None
    assert decision.redundancy > 0.05


def test_copies_leave_their_places_to_what_they_would_hide() -> None:
    """By `c_i w_i` both places went to copies, which share a coefficient: 0.25 each, and 0.20 for what adds to them."""
    candidates = pool([*[[3.0, 0, 0, 0]] * 4, [0, 0.4, 0, 0.1]])
    for ridge in (1e-4, 0.0):
        decision = replace(method(batch_size=2, survivors=5), ridge=ridge).decide(candidates)
        assert len(decision.selected) == 2
        assert decision.selected[1] == 4


@pytest.mark.parametrize("seed", range(20))
def test_elimination_is_close_to_the_best_of_all_subsets(seed: int) -> None:
    """Against every subset of four, each solved: near copies among the candidates, directions of unequal length."""
    rng, solver = np.random.default_rng(seed), CoefficientSolver()
    target = rng.normal(size=30)
    rows = (rng.normal(size=(6, 30)) + 0.4 * target) * rng.uniform(0.3, 2.0, size=(6, 1))
    rows = np.concatenate([rows, rows[[0]], rows[[0]] + 0.05 * rng.normal(size=(2, 30))])
    hessian, linear = with_ridge(rows @ rows.T, 1e-3), rows @ target

    def utility(subset: Sequence[int]) -> float:
        part, reward = hessian[np.ix_(subset, subset)], linear[list(subset)]
        weights = solver.solve(part, reward).coefficients
        return float(reward @ weights - 0.5 * weights @ part @ weights)

    kept = eliminate(hessian, linear, np.flatnonzero(solver.solve(hessian, linear).coefficients > 0), 4)
    assert utility(kept.tolist()) >= 0.97 * max(utility(subset) for subset in combinations(range(9), 4))


@pytest.mark.parametrize("min_gain", [0.05, 0.2])
@pytest.mark.parametrize("seed", range(10))
def test_each_of_those_selected_adds_its_share_of_the_utility(seed: int, min_gain: float) -> None:
    """Against every choice with one sample less, each solved; what was left out would not have added as much."""
    rng, solver = np.random.default_rng(seed), CoefficientSolver()
    rows = (rng.normal(size=(8, 30)) + 0.4 * np.ones(30)) * rng.uniform(0.2, 2.0, size=(8, 1))
    hessian, linear = with_ridge(rows @ rows.T, 1e-3), rows @ (np.ones(30) + 0.3 * rng.normal(size=30))

    def utility(subset: Sequence[int]) -> float:
        part, reward = hessian[np.ix_(subset, subset)], linear[list(subset)]
        weights = solver.solve(part, reward).coefficients
        return float(reward @ weights - 0.5 * weights @ part @ weights)

    positive = np.flatnonzero(solver.solve(hessian, linear).coefficients > 0)
    kept = eliminate(hessian, linear, positive, 8, min_gain).tolist()
    gains = [1 - utility([j for j in kept if j != i]) / utility(kept) for i in kept] if len(kept) > 1 else [1.0]
    assert min(gains) >= min_gain - 1e-6
    assert utility(kept) >= (1 - min_gain) ** (len(positive) - len(kept)) * utility(positive.tolist()) - 1e-9


def test_one_sample_is_left_however_much_each_must_add() -> None:
    decision = replace(method(batch_size=3, survivors=3), min_gain=1.0).decide(pool([[1, 1, 0, 0], [1, 0, 1, 0]]))
    assert len(decision.selected) == 1


def test_at_most_k_are_selected_and_coefficients_sum_to_one() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        rows = (rng.normal(size=(10, 4)) + 0.5).tolist()
        decision = method(batch_size=3, survivors=6).decide(pool(rows))
        assert 1 <= len(decision.selected) <= 3
        assert float(decision.coefficients_N.sum()) == pytest.approx(1.0)
        assert (decision.coefficients_N >= 0).all()


def test_the_choice_is_as_good_as_the_best_single_and_the_equal_weights() -> None:
    """Utility after an exact line search along each direction."""
    rng = np.random.default_rng(1)
    for _ in range(20):
        gradients = rng.normal(size=(8, 4)) + 0.3
        decision = method(batch_size=8, survivors=8).decide(pool(gradients.tolist()))
        if not decision.selected:
            continue
        target = np.array(TARGET)

        def utility(weights: np.ndarray, gradients: np.ndarray = gradients, target: np.ndarray = target) -> float:
            update = weights @ gradients
            return float(max(0.0, update @ target) ** 2 / (update @ update))

        ours = utility(decision.coefficients_N.double().numpy())
        singles = [utility(np.eye(8)[i]) for i in decision.selected]
        equal = np.zeros(8)
        equal[decision.selected] = 1
        assert ours >= 0.999 * max(*singles, utility(equal))


def test_nothing_helps() -> None:
    decision = method().decide(pool([[-1, 0, 0, 0], [0, 0, 1, 0]]))
    assert decision.selected == []
    assert decision.num_positive == 0
    assert decision.effective_samples == 0


@pytest.mark.parametrize("broken", ["gradient", "loss"])
def test_a_candidate_that_is_not_finite_is_never_selected(broken: str) -> None:
    rows = [[1.0, 0, 0, 0], [float("nan") if broken == "gradient" else 5.0, 0, 0, 0], [0, 1.0, 0, 0]]
    losses = torch.tensor([1.0, float("inf") if broken == "loss" else 1.0, 1.0])
    interaction = pool(rows, losses=losses)
    for selector in (method(), TopK(3)):
        decision = selector.decide(interaction)
        assert decision.selected == [0, 2]
        assert torch.isfinite(interaction.gradients.weighted_gradient(decision.coefficients_N)["w"]).all()


def test_a_cap_keeps_one_sample_from_taking_over() -> None:
    rows = [[0.1, 0.0, 0, 0], [0, 3.0, 0, 0]]
    free, capped = method().decide(pool(rows)), method(cap=1.5).decide(pool(rows))
    assert float(free.coefficients_N.max()) > 0.9
    assert float(capped.coefficients_N.max()) < float(free.coefficients_N.max())


def test_order_of_the_pool_does_not_matter() -> None:
    rows = (np.random.default_rng(3).normal(size=(6, 4)) + 0.4).tolist()
    order = [4, 1, 5, 0, 3, 2]
    first = method().decide(pool(rows)).coefficients_N
    again = method().decide(pool([rows[i] for i in order])).coefficients_N
    torch.testing.assert_close(again, first[order], rtol=1e-4, atol=1e-6)


def test_effective_samples() -> None:
    assert Equal().decide(pool([[1, 0, 0, 0]] * 3)).effective_samples == pytest.approx(3)


def random_pool(seed: int, size: int = 8) -> Interaction:
    return pool((np.random.default_rng(seed).normal(size=(size, 4)) + 0.3).tolist())


def scaled(interaction: Interaction, values: Sequence[float]) -> Interaction:
    return replace(interaction, preconditioner=lambda _: torch.tensor(values))


def test_cosines_keep_long_gradients_from_filling_the_survivors() -> None:
    rows = [[9.0, 0, 30.0, 0], [9.0, 0, 0, 30.0], [1.0, 1.0, 0, 0], [0.5, 0.4, 0, 0]]
    assert method(survivors=2).decide(pool(rows)).selected == [0, 1]
    assert replace(method(survivors=2), filter="cosine").decide(pool(rows)).selected == [2, 3]


def test_pursuit_survives_on_what_the_earlier_ones_leave() -> None:
    """Two copies of the best fill the survivors of the other filters."""
    rows = [[3.0, 0.1, 0, 0], [3.0, 0.1, 0, 0], [0, 1.0, 0, 0]]
    assert method(survivors=2).decide(pool(rows)).selected == [0, 1]
    pursuit = replace(method(survivors=2), filter="nn_omp").decide(pool(rows))
    assert pursuit.selected == [0, 2]
    assert pursuit.num_positive == 3


@pytest.mark.parametrize("seed", range(5))
def test_pursuit_of_everything_is_the_whole_program(seed: int) -> None:
    """What it leaves out has no part in the optimum."""
    interaction = random_pool(seed)
    gradients, solver = interaction.gradients, CoefficientSolver()
    gram = with_ridge(gradients.gram(range(8), plain).numpy(), 1e-3)
    linear = interaction.utilities_N.double().numpy()
    picked = matching_pursuit(gram, linear, 8, solver)
    weights = np.zeros(8)
    weights[picked] = solver.solve(gram[np.ix_(picked, picked)], linear[picked]).coefficients
    np.testing.assert_allclose(weights, solver.solve(gram, linear).coefficients, atol=1e-5)


def test_metrics_differ_where_the_preconditioner_is_not_flat() -> None:
    interaction = scaled(random_pool(1), [1.0, 5.0, 0.2, 2.0])
    metrics: tuple[Metric, ...] = ("p_norm", "update", "greats")
    selectors = [replace(method(batch_size=8, survivors=8), metric=metric) for metric in metrics]
    p_norm, update, greats = (selector.decide(interaction).coefficients_N for selector in selectors)
    assert not torch.allclose(p_norm, update, atol=1e-3)
    assert not torch.allclose(update, greats, atol=1e-3)
    flat = scaled(random_pool(1), [2.0] * 4)
    for selector in selectors:
        weights = selector.decide(flat).coefficients_N
        again = method(batch_size=8, survivors=8).decide(random_pool(1)).coefficients_N
        torch.testing.assert_close(weights, again, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("metric", ["p_norm", "update", "greats"])
def test_each_metric_solves_its_own_program(metric: Metric) -> None:
    """Against the definition, dense."""
    values = np.array([1.0, 5.0, 0.2, 2.0])
    interaction = scaled(random_pool(2), values.tolist())
    rows = interaction.gradients.weighted_gradient
    gradients = torch.stack([rows(row)["w"] for row in torch.eye(8)]).double().numpy()
    power, linear_power, gamma = {"p_norm": (1, 1, 1.0), "update": (2, 2, 1.0), "greats": (2, 1, 3.0)}[metric]
    gram = gradients * values**power @ gradients.T
    linear = gamma * (gradients * values**linear_power @ np.array(TARGET))
    positive = [i for i in range(8) if linear[i] > 0]
    want = np.zeros(8)
    want[positive] = CoefficientSolver().solve(gram[np.ix_(positive, positive)], linear[positive], 1e-4).coefficients
    settings = replace(method(batch_size=8, survivors=8), metric=metric, gamma=3.0)
    np.testing.assert_allclose(settings.decide(interaction).coefficients_N, want / want.sum(), rtol=1e-3, atol=1e-5)
    natural = replace(settings, normalisation="natural").decide(interaction)
    np.testing.assert_allclose(natural.coefficients_N, want, rtol=2e-3, atol=1e-5)


def test_natural_coefficients_meet_a_reachable_target() -> None:
    interaction = pool([[2.0, 0, 0, 0], [0, 0.5, 0, 0], [0, 0, 1.0, 0]])
    decision = replace(method(batch_size=4), normalisation="natural").decide(interaction)
    update = interaction.gradients.weighted_gradient(decision.coefficients_N)["w"]
    torch.testing.assert_close(update, torch.tensor(TARGET), rtol=1e-3, atol=1e-4)
    assert float(decision.coefficients_N.sum()) == pytest.approx(2.5, rel=1e-3)


def test_the_line_search_is_exact() -> None:
    interaction = scaled(random_pool(3), [1.0, 5.0, 0.2, 2.0])
    weights = torch.rand(8, generator=torch.Generator().manual_seed(0))
    alpha = line_search(interaction, interaction.utilities_N, weights)
    gram, linear = interaction.gram(range(8)), interaction.utilities_N.double()
    first, second = float(linear @ weights.double()), float(weights.double() @ gram @ weights.double())
    along = [a * first - a**2 / 2 * second for a in (0.99 * alpha, alpha, 1.01 * alpha)]
    assert along[1] == max(along)
    assert line_search(interaction, -interaction.utilities_N, weights) == 0


@pytest.mark.parametrize("seed", range(8))
def test_the_simplex_is_solved_under_its_constraint(seed: int) -> None:
    rng = np.random.default_rng(seed)
    gradients = rng.normal(size=(5, 6)) * np.exp(rng.normal(size=(5, 1)))
    hessian, linear = gradients @ gradients.T, gradients @ (rng.normal(size=6) + 0.5)
    weights = CoefficientSolver().solve(*on_simplex(hessian, linear)).coefficients
    weights /= weights.sum()
    best = cp.Variable(5, nonneg=True)
    objective = 0.5 * cp.sum_squares(gradients.T @ best) - linear @ best
    cp.Problem(cp.Minimize(objective), [cp.sum(best) == 1]).solve(solver=cp.CLARABEL)
    ours = 0.5 * weights @ hessian @ weights - linear @ weights
    best_value = float(objective.value)
    assert ours <= best_value + 1e-6 * abs(best_value)
    assert (weights >= 0).all()


def test_simplex_weighs_lengths_where_mean_one_does_not() -> None:
    """Both point at the target; under a sum of one the longer gradient makes the length that is asked for."""
    rows = [[1.0, 0, 0, 0], [0, 8.0, 0, 0]]
    far = [4.0, 4.0, 0, 0]
    simplex = replace(method(), normalisation="simplex").decide(pool(rows, target=far)).coefficients_N
    free = method().decide(pool(rows, target=far)).coefficients_N
    assert float(free[0]) > 0.8
    assert float(simplex[1]) > 0.4


def test_redundancy_on_the_simplex_is_that_of_the_weights_it_gives() -> None:
    """K is [[1, 1], [1, 65]] and c is (4, 36): the best of `w = (1 - t, t)` is at one half."""
    rows, target = [[1.0, 0, 0, 0], [1.0, 8.0, 0, 0]], [4.0, 4.0, 0, 0]
    decision = replace(method(), normalisation="simplex").decide(pool(rows, target=target))
    torch.testing.assert_close(decision.coefficients_N, torch.tensor([0.5, 0.5]), rtol=1e-3, atol=0)
    assert decision.redundancy == pytest.approx(0.25 * 1 / (0.5 * 4 + 0.5 * 36), rel=1e-3)


@pytest.mark.parametrize("rule", ["first_order", "cosine", "nn_omp"])
@pytest.mark.parametrize("normalisation", ["mean_one", "natural", "simplex"])
def test_every_combination_survives_pools_with_nothing_in_them(rule: Filter, normalisation: Normalisation) -> None:
    settings = replace(method(), filter=rule, normalisation=normalisation)
    assert settings.decide(pool([[-1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]])).selected == []
    decision = settings.decide(pool([[float("nan"), 0, 0, 0], [1.0, 0, 0, 0], [0, 0, 0, 0], [0.5, 0.5, 0, 0]]))
    assert set(decision.selected) <= {1, 3}
    assert decision.selected
    assert torch.isfinite(decision.coefficients_N).all()


@pytest.mark.parametrize("rule", ["first_order", "cosine", "nn_omp"])
def test_a_gradient_whose_square_overflows_is_left_out(rule: Filter) -> None:
    selector = replace(method(), filter=rule)
    decision = selector.decide(pool([[1e30, 0, 0, 0], [1.0, 0, 0, 0], [0, 1.0, 0, 0]]))
    assert decision.selected == [1, 2]

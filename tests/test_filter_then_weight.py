"""The two stages and their degenerate cases, on pools small enough to know the answer."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from gradient_selectors.baselines import Full, TopK, draw_uniform
from gradient_selectors.coefficients import CoefficientSolver
from gradient_selectors.factors import Written
from gradient_selectors.filter_then_weight import FilterThenWeight
from gradient_selectors.geometry import plain
from gradient_selectors.gradients import PoolGradients
from gradient_selectors.interaction import Interaction
from torch import Tensor

TARGET = [1.0, 1.0, 0.0, 0.0]


def pool(
    rows: Sequence[Sequence[float]], target: Sequence[float] = TARGET, losses: Tensor | None = None
) -> Interaction:
    """Candidates given by their gradients on one parameter of four weights."""
    gradients = torch.tensor(rows, dtype=torch.float32)
    losses = torch.ones(len(gradients)) if losses is None else losses
    return Interaction(
        PoolGradients(losses, {"w": [Written(gradients)]}, {"w": torch.Size([4])}), {"w": torch.tensor(target)}, plain
    )


def method(chosen: int = 2, survivors: int = 4, cap: float | None = None) -> FilterThenWeight:
    return FilterThenWeight(chosen, survivors, CoefficientSolver(), ridge=1e-4, cap=cap)


def test_candidates_that_point_away_are_filtered() -> None:
    decision = method().decide(pool([[1, 0, 0, 0], [-1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]))
    assert decision.chosen == [0, 2]
    assert decision.num_positive == 2
    torch.testing.assert_close(decision.weights_N[[0, 2]], torch.tensor([0.5, 0.5]))


def test_redundancy_moves_the_choice_away_from_top_k() -> None:
    """Two copies of the best, and a weaker one that adds something: top-k takes both copies."""
    rows = [[3.0, 0.1, 0, 0], [3.0, 0.1, 0, 0], [0, 1.0, 0, 0]]
    assert TopK(2).decide(pool(rows)).chosen == [0, 1]
    decision = method(chosen=3).decide(pool(rows))
    assert decision.weights_N[2] > decision.weights_N[0]
    assert decision.weights_N[0] == pytest.approx(float(decision.weights_N[1]), rel=1e-3)
    assert decision.redundancy is not None
    assert decision.redundancy > 0.05


def test_at_most_k_are_chosen_and_weights_sum_to_one() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        rows = (rng.normal(size=(10, 4)) + 0.5).tolist()
        decision = method(chosen=3, survivors=6).decide(pool(rows))
        assert 1 <= len(decision.chosen) <= 3
        assert float(decision.weights_N.sum()) == pytest.approx(1.0)
        assert (decision.weights_N >= 0).all()


def test_the_choice_is_as_good_as_the_best_single_and_the_equal_weights() -> None:
    """Utility after an exact line search along each direction."""
    rng = np.random.default_rng(1)
    for _ in range(20):
        gradients = rng.normal(size=(8, 4)) + 0.3
        decision = method(chosen=8, survivors=8).decide(pool(gradients.tolist()))
        if not decision.chosen:
            continue
        target = np.array(TARGET)

        def utility(weights: np.ndarray, gradients: np.ndarray = gradients, target: np.ndarray = target) -> float:
            update = weights @ gradients
            return float(max(0.0, update @ target) ** 2 / (update @ update))

        ours = utility(decision.weights_N.double().numpy())
        singles = [utility(np.eye(8)[i]) for i in decision.chosen]
        equal = np.zeros(8)
        equal[decision.chosen] = 1
        assert ours >= 0.999 * max(*singles, utility(equal))


def test_nothing_helps() -> None:
    decision = method().decide(pool([[-1, 0, 0, 0], [0, 0, 1, 0]]))
    assert decision.chosen == []
    assert decision.num_positive == 0
    assert decision.effective_samples == 0


@pytest.mark.parametrize("broken", ["gradient", "loss"])
def test_a_candidate_that_is_not_finite_is_never_chosen(broken: str) -> None:
    rows = [[1.0, 0, 0, 0], [float("nan") if broken == "gradient" else 5.0, 0, 0, 0], [0, 1.0, 0, 0]]
    losses = torch.tensor([1.0, float("inf") if broken == "loss" else 1.0, 1.0])
    interaction = pool(rows, losses=losses)
    for selector in (method(), TopK(3)):
        decision = selector.decide(interaction)
        assert decision.chosen == [0, 2]
        assert torch.isfinite(interaction.gradients.weighted_gradient(decision.weights_N)["w"]).all()


def test_a_cap_keeps_one_sample_from_taking_over() -> None:
    rows = [[0.1, 0.0, 0, 0], [0, 3.0, 0, 0]]
    free, capped = method().decide(pool(rows)), method(cap=1.5).decide(pool(rows))
    assert float(free.weights_N.max()) > 0.9
    assert float(capped.weights_N.max()) < float(free.weights_N.max())


def test_order_of_the_pool_does_not_matter() -> None:
    rows = (np.random.default_rng(3).normal(size=(6, 4)) + 0.4).tolist()
    order = [4, 1, 5, 0, 3, 2]
    first = method().decide(pool(rows)).weights_N
    again = method().decide(pool([rows[i] for i in order])).weights_N
    torch.testing.assert_close(again, first[order], rtol=1e-4, atol=1e-6)


def test_full_takes_everything_that_is_finite() -> None:
    losses = torch.tensor([1.0, float("nan"), 2.0])
    assert Full().decide(pool([[1, 0, 0, 0]] * 3, losses=losses)).weights_N.tolist() == [0.5, 0.0, 0.5]


def test_effective_samples() -> None:
    assert Full().decide(pool([[1, 0, 0, 0]] * 3)).effective_samples == pytest.approx(3)


def test_uniform_draws_every_candidate_equally_often() -> None:
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(8)
    for _ in range(2000):
        drawn = draw_uniform(8, 2, generator)
        assert len(set(drawn)) == 2
        counts[drawn] += 1
    assert ((counts - 500).abs() < 90).all()

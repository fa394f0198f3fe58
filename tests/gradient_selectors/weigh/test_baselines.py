"""Baselines: the k best, all alike, and a random choice where another selector finds nothing."""

import pytest
import torch
from gradient_selectors.capture.capture import GradientCapture
from gradient_selectors.preconditioner import plain
from gradient_selectors.state import State
from gradient_selectors.views.interaction import Interaction
from gradient_selectors.weigh.baselines import Equal, OrUniform, TopK
from gradient_selectors.weigh.filter_then_weight import FilterThenWeight
from gradient_selectors.weigh.greedy import Greedy
from gradient_selectors.weigh.selector import Decision, Selector, needs_target

from tests.helpers.oracle import make_batch, make_model
from tests.helpers.pools import written_pool

NOTHING_HELPS = [[-1.0, 0.0], [0.0, -2.0], [-1.0, -1.0], [-3.0, 0.0]]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_equal_takes_everything_that_is_finite() -> None:
    losses = torch.tensor([1.0, float("nan"), 2.0])
    assert Equal().decide(written_pool([[1.0]] * 3, [1.0], losses)).coefficients_N.tolist() == [0.5, 0.0, 0.5]


def test_equal_needs_neither_target_nor_views() -> None:
    gradients = GradientCapture(make_model("llama")).run(make_batch((6, 5)))
    interaction = Interaction(gradients, {}, plain)
    assert Equal().decide(interaction).coefficients_N.tolist() == [0.5, 0.5]
    assert "utilities_by_parameter" not in vars(interaction)


def test_top_k_takes_the_best_that_point_towards_the_target() -> None:
    pool = written_pool([[1.0], [-1.0], [3.0], [2.0]], [1.0])
    assert TopK(2).decide(pool).coefficients_N.tolist() == [0.0, 0.0, 0.5, 0.5]
    assert TopK(9).decide(pool).selected == [0, 2, 3]


@pytest.mark.parametrize("selector", [TopK(2), Greedy(2), FilterThenWeight(2), OrUniform(TopK(2), 2, seeded())])
def test_what_reads_utilities_needs_a_target(selector: Selector) -> None:
    assert needs_target(selector)


def test_what_says_nothing_needs_a_target_and_a_fallback_asks_its_selector() -> None:
    class Silent:
        def decide(self, _: Interaction) -> Decision:
            return Decision(torch.ones(1))

    assert needs_target(Silent())
    assert not needs_target(Equal())
    assert not needs_target(OrUniform(Equal(), 2, seeded()))


def test_the_fallback_draws_where_nothing_helps_and_only_there() -> None:
    selector = OrUniform(TopK(2), 2, seeded())
    helped = written_pool([[1.0, 0.0], [0.5, 0.5], [0.1, 0.0], [-1.0, 0.0]], [1.0, 1.0])
    assert torch.equal(selector.decide(helped).coefficients_N, TopK(2).decide(helped).coefficients_N)
    drawn = set()
    for _ in range(40):
        decision = selector.decide(written_pool(NOTHING_HELPS, [1.0, 1.0]))
        assert sorted(decision.coefficients_N.tolist()) == [0.0, 0.0, 0.5, 0.5]
        assert decision.num_positive == 0
        drawn.add(tuple(decision.selected))
    assert len(drawn) == 6  # every pair of four


class Counting:
    """Selects nothing, and counts how often it was asked."""

    def __init__(self) -> None:
        self.asked = 0

    def decide(self, interaction: Interaction) -> Decision:
        self.asked += 1
        return Decision(torch.zeros(interaction.num_samples))

    def state_dict(self) -> dict[str, int]:
        return {"asked": self.asked}

    def load_state_dict(self, state: State) -> None:
        self.asked = state["asked"]


def test_the_state_of_the_fallback_holds_its_generator_and_its_selector() -> None:
    pool = written_pool(NOTHING_HELPS, [1.0, 1.0])
    first, again = OrUniform(Counting(), 2, seeded()), OrUniform(Counting(), 2, seeded(7))
    for _ in range(3):
        first.decide(pool)
    again.load_state_dict(first.state_dict())
    assert isinstance(again.selector, Counting)
    assert again.selector.asked == 3
    for _ in range(5):
        assert torch.equal(first.decide(pool).coefficients_N, again.decide(pool).coefficients_N)

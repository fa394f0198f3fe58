"""The greedy baseline against brute force, and where it must differ from top-k."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from gradient_selectors.weigh.baselines import TopK
from gradient_selectors.weigh.greedy import Greedy, greedy_choice, matched_weight
from gradient_selectors.weigh.program import Matrix, Vector

from tests.helpers.pools import written_pool

TARGET = [1.0, 1.0, 0.0, 0.0]


def utility(gram: Matrix, linear: Vector, omega: float, chosen: Sequence[int]) -> float:
    weights = np.zeros(len(linear))
    weights[list(chosen)] = omega
    return float(linear @ weights - 0.5 * weights @ gram @ weights)


def random_problem(seed: int) -> tuple[Matrix, Vector]:
    rng = np.random.default_rng(seed)
    gradients = rng.normal(size=(8, 5)) + 0.3
    return gradients @ gradients.T, gradients @ np.ones(5)


@pytest.mark.parametrize("seed", range(10))
def test_every_step_adds_what_gains_most_and_the_last_one_gains(seed: int) -> None:
    gram, linear = random_problem(seed)
    omega = 0.2
    picked = greedy_choice(gram, linear, omega, 5)
    for size, following in enumerate(picked):
        gains = {
            i: utility(gram, linear, omega, [*picked[:size], i]) - utility(gram, linear, omega, picked[:size])
            for i in range(8)
            if i not in picked[:size]
        }
        assert gains[following] == pytest.approx(max(gains.values()))
        assert gains[following] > 0
    if len(picked) < 5:
        rest = [i for i in range(8) if i not in picked]
        assert all(utility(gram, linear, omega, [*picked, i]) <= utility(gram, linear, omega, picked) for i in rest)


def test_the_choice_is_close_to_the_best_of_all_subsets() -> None:
    ratios = []
    for seed in range(20):
        gram, linear = random_problem(seed)
        omega = matched_weight(gram, linear, 3)
        best = max(utility(gram, linear, omega, list(s)) for s in itertools.combinations(range(8), 3))
        ratios.append(utility(gram, linear, omega, greedy_choice(gram, linear, omega, 3)) / best)
    assert np.mean(ratios) > 0.9


def test_the_matched_weight_is_the_line_search_along_the_top_k() -> None:
    gram, linear = random_problem(0)
    top = np.argsort(-linear)[:3]
    best = max(np.linspace(0, 2, 4001), key=lambda omega: utility(gram, linear, omega, list(top)))
    assert matched_weight(gram, linear, 3) == pytest.approx(best, abs=1e-3)


def test_copies_are_left_out_where_top_k_takes_them() -> None:
    rows = [[3.0, 0.1, 0, 0], [3.0, 0.1, 0, 0], [0, 1.5, 0, 0]]
    assert TopK(2).decide(written_pool(rows, TARGET)).selected == [0, 1]
    decision = Greedy(2).decide(written_pool(rows, TARGET))
    assert decision.selected == [0, 2]
    assert decision.coefficients_N.tolist() == [0.5, 0.0, 0.5]
    assert decision.redundancy == pytest.approx(0.0, abs=0.1)


def test_it_stops_before_a_sample_that_takes_away_more_than_it_adds() -> None:
    """Three copies and nothing else that is new: at the full weight a second copy only overshoots."""
    gram, linear = np.full((3, 3), 1.0), np.ones(3)
    assert greedy_choice(gram, linear, omega=1.0, chosen=3) == [0]
    assert greedy_choice(gram, linear, omega=1 / 3, chosen=3) == [0, 1, 2]


def test_a_short_target_gradient_does_not_end_the_choice_at_once() -> None:
    """A mean over many samples is shorter than one sample: at the weight 1 / k nothing would be chosen."""
    rows = [[1.0, 0, 0, 0], [0, 1.0, 0, 0], [0.9, 0.1, 0, 0]]
    for length in (1e-3, 1.0, 1e3):
        assert len(Greedy(2).decide(written_pool(rows, [length, length, 0, 0])).selected) == 2
    gram = np.array(rows) @ np.array(rows).T
    assert greedy_choice(gram, np.array(rows) @ [1e-3, 1e-3, 0, 0], omega=1 / 2, chosen=2) == []


def test_nothing_helps_or_is_broken() -> None:
    assert Greedy(2).decide(written_pool([[-1.0, 0, 0, 0], [0, 0, 1.0, 0]], TARGET)).selected == []
    broken = written_pool([[float("nan"), 0, 0, 0], [1.0, 0, 0, 0]], TARGET)
    assert Greedy(2).decide(broken).selected == [1]
    too_long = written_pool([[1e30, 0, 0, 0], [1.0, 0, 0, 0]], TARGET)
    assert Greedy(2).decide(too_long).selected == [1]
    assert Greedy(2, 0.5).decide(too_long).selected == []

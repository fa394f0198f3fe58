"""The choice between ways of training, where it is known which one pays."""

import numpy as np
import pytest
import torch
from gradient_selectors.draw.auto import WAYS, AutoDraw
from gradient_selectors.draw.learned import LearnedDraw
from gradient_selectors.draw.nearest import NearRandom
from gradient_selectors.draw.stream_draw import Found
from gradient_selectors.features.columns import Columns, ColumnTable

from tests.gradient_selectors.draw.test_learned import OPTIONS, kind_of, room, sample


def auto_of(seed: int = 0) -> AutoDraw:
    target = [sample(np.random.default_rng(99), kind=0) for _ in range(4)]
    rival = NearRandom(target[0].embedding_d, torch.Generator().manual_seed(seed))
    learned = LearnedDraw(OPTIONS, ColumnTable(Columns(), target), seed, rival)
    return AutoDraw(learned, rival, pool_size=8, batch_size=4, seed=seed)


def steps(
    draw: AutoDraw, count: int, rng: np.random.Generator, worth: dict[int, float], noise: float, dearer: float = 3.0
) -> list[str]:
    """The way of each step. `worth`: utility by kind; `noise`: of one sample's, of which a scored step takes the best;
    `dearer`: time of a scored step over that of a plain one."""
    ways: list[str] = []
    for _ in range(count):
        waiting = room(rng)
        ways.append(draw.way)
        scored = draw.scores
        now = [waiting[i] for i in draw.draw(waiting, draw.count)]
        utilities_n = torch.tensor([worth.get(kind_of(t), 0.0) for t in now])
        utilities_n = utilities_n + noise * torch.from_numpy(rng.normal(size=len(now)))
        best = utilities_n.argsort(descending=True)[:4] if scored else torch.arange(len(now))
        coefficients_n = torch.zeros(len(now))
        coefficients_n[best] = 1 / len(best)
        losses_n = torch.full((len(now),), 2.0)
        seconds = dearer if scored else 1.0
        draw.observe(Found(losses_n, coefficients_n, utilities_n if scored else None, seconds))
        draw.learn(waiting)
    return ways


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_where_nothing_differs_it_trains_plainly(seed: int) -> None:
    ways = steps(auto_of(seed), 240, np.random.default_rng(seed), dict.fromkeys(range(4), 0.1), noise=0.01)
    assert set(ways[-100:]) == {"uniform"}


def test_where_the_useful_can_be_told_without_a_gradient_it_draws_them() -> None:
    ways = steps(auto_of(), 300, np.random.default_rng(1), {0: 0.3}, noise=0.05)
    assert set(ways[-100:]) <= {"learned", "rival"}


@pytest.mark.parametrize("seed", [2, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (4, 9))])
def test_what_a_few_noisy_samples_say_is_no_reason_to_change(seed: int) -> None:
    """As of a real model: utilities of single samples differ by more than those of good and bad ones do."""
    ways = steps(auto_of(seed), 100, np.random.default_rng(seed), {0: 0.15, 1: 0.1, 2: 0.1, 3: 0.1}, noise=0.15)
    assert set(ways) == {"learned"}


@pytest.mark.parametrize("seed", [0, pytest.param(5, marks=pytest.mark.slow)])
def test_what_was_lucky_at_first_has_to_go_when_more_is_known(seed: int) -> None:
    """Likeness, by which the rival draws, misleads; of its first six samples it looked otherwise."""
    worth = {0: 0.0, 1: 0.1, 2: 0.4, 3: 0.1}
    draw, rng = auto_of(seed), np.random.default_rng(seed)
    steps(draw, 9, rng, worth, noise=0.15)
    counts = {"learned": 10.0, "scored": 10.0, "rival": 6.0, "uniform": 6.0}
    means = {"learned": 0.12, "scored": 0.12, "rival": 0.4, "uniform": 0.1}
    sums = [counts[way] * means[way] for way in WAYS]
    draw.load_state_dict(draw.state_dict() | {"way": "rival", "sums": sums, "counts": [counts[way] for way in WAYS]})
    ways = steps(draw, 300, rng, worth, noise=0.15)
    assert ways[0] == "rival"
    assert set(ways[-40:]) == {"learned"}


def test_where_no_feature_tells_and_scoring_is_cheap_it_scores_every_pool() -> None:
    ways = steps(auto_of(), 300, np.random.default_rng(2), {}, noise=0.5, dearer=1.2)
    assert ways[-100:].count("scored") > 80


@pytest.mark.slow
def test_it_finds_out_that_selection_pays_again() -> None:
    draw, rng = auto_of(), np.random.default_rng(3)
    steps(draw, 800, rng, dict.fromkeys(range(4), 0.1), noise=0.01)
    assert draw.way == "uniform"
    ways = steps(draw, 1500, rng, {0: 0.5}, noise=0.05)
    assert set(ways[-50:]) <= {"learned", "rival"}


@pytest.mark.parametrize("after", [3, 40])
def test_it_goes_on_as_it_would_have(after: int) -> None:
    whole, worth = auto_of(), {0: 0.3, 1: 0.1}
    steps(whole, after, np.random.default_rng(4), worth, noise=0.1)
    resumed = auto_of(seed=7)
    resumed.load_state_dict(whole.state_dict())
    courses = [steps(draw, 60, np.random.default_rng(5), worth, noise=0.1) for draw in (whole, resumed)]
    assert courses[0] == courses[1]
    assert whole.rates == resumed.rates
    assert torch.equal(whole.learned.coefficients_d, resumed.learned.coefficients_d)

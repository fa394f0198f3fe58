"""The bandit over a file, and simulations of both: T1 to T10 are properties that follow from the published method."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from gradient_selectors.draw.arm_moments import ArmMoments
from gradient_selectors.draw.cluster_ucb_offline import Index, OfflineOptions, select_offline
from torch import Tensor

from benchmarks.cluster_ucb_simulation import OURS, PUBLISHED, recall, recovered, simulated_pool
from tests.gradient_selectors.draw.test_cluster_ucb import seeded


def moments_of(*arms: list[float]) -> ArmMoments:
    moments = ArmMoments(len(arms))
    for arm, rewards in enumerate(arms):
        moments.add(np.full(len(rewards), arm), np.array(rewards))
    return moments


def small_pool(seed: int = 0, size: int = 200, clusters: int = 8) -> tuple[Tensor, Tensor]:
    generator = seeded(seed)
    labels_N = torch.randint(clusters, (size,), generator=generator)
    means_K = torch.randn(clusters, generator=generator, dtype=torch.float64)
    return labels_N, means_K[labels_N] + torch.randn(size, generator=generator, dtype=torch.float64)


def drawn(labels_N: Tensor, rewards_N: Tensor, options: OfflineOptions, seed: int = 0) -> list[int]:
    return select_offline(labels_N, lambda i: rewards_N[i], options, seeded(seed)).drawn_n.tolist()


# T1: the index


@pytest.mark.parametrize("beta", [0.0, 1.0, 2.5])
def test_t1_index_of_two_rewards(beta: float) -> None:
    a, b = 0.3, -0.1
    assert moments_of([a, b]).mean_std(beta)[0] == pytest.approx((a + b) / 2 + beta * abs(a - b) / 2)


def test_t1_index_does_not_depend_on_the_order() -> None:
    rewards = torch.randn(50, generator=seeded(), dtype=torch.float64).tolist()
    one_by_one = ArmMoments(1)
    for reward in reversed(rewards):
        one_by_one.add(np.array([0]), np.array([reward]))
    assert one_by_one.mean_std(1.0)[0] == pytest.approx(moments_of(rewards).mean_std(1.0)[0], abs=1e-12)


@pytest.mark.parametrize(("scale", "shift"), [(0.01, 0.0), (30.0, 0.0), (1.0, -50.0), (2.0, 7.0)])
def test_t1_unit_and_zero_of_the_rewards_change_no_draw(scale: float, shift: float) -> None:
    labels_N, rewards_N = small_pool()
    options = OfflineOptions(budget=0.5)
    assert drawn(labels_N, scale * rewards_N + shift, options) == drawn(labels_N, rewards_N, options)


def test_t1_ucb1_depends_on_the_unit() -> None:
    labels_N, rewards_N = small_pool()
    options = OfflineOptions(budget=0.5, index="ucb1")
    assert drawn(labels_N, 0.01 * rewards_N, options) != drawn(labels_N, rewards_N, options)


def test_t1_ucb1_is_as_defined() -> None:
    index = moments_of([1.0, 2.0, 3.0], [5.0]).ucb1()
    assert index == pytest.approx([2 + (2 * np.log(4) / 3) ** 0.5, 5 + (2 * np.log(4)) ** 0.5])


# T2, T3: moments that forget


def test_t2_discounted_moments_equal_those_of_the_whole_history() -> None:
    generator, discount = seeded(), 0.9
    moments, arms, rewards, weights = ArmMoments(3), list[int](), list[float](), torch.empty(0)
    for _ in range(60):
        arms_n = torch.randint(3, (4,), generator=generator)
        rewards_n = 1e4 + torch.randn(4, generator=generator, dtype=torch.float64)
        moments.discount(discount)
        moments.add(arms_n.numpy(), rewards_n.numpy())
        arms, rewards = [*arms, *arms_n.tolist()], [*rewards, *rewards_n.tolist()]
        weights = torch.cat([weights.double() * discount, torch.ones(4)])
    for arm in range(3):
        mine = torch.tensor(arms) == arm
        values, shares = torch.tensor(rewards, dtype=torch.float64)[mine], weights[mine]
        mean = (shares * values).sum() / shares.sum()
        assert moments.counts_K[arm] == pytest.approx(float(shares.sum()), rel=1e-6)
        assert moments.means_K[arm] == pytest.approx(float(mean), rel=1e-9)
        variance = float((shares * (values - mean) ** 2).sum() / shares.sum())
        assert moments.variances_K[arm] == pytest.approx(variance, abs=1e-6)


def test_t2_equal_rewards_have_no_spread() -> None:
    assert moments_of([0.1] * 1000).variances_K[0] >= 0
    assert moments_of([0.1] * 1000).variances_K[0] < 1e-25


def test_t2_without_discount_and_shrinkage_it_is_the_published_index() -> None:
    arms: tuple[list[float], ...] = ([0.5, -0.2, 0.1], [0.0, 0.3], [])
    moments = moments_of(*arms)
    moments.discount(1.0)
    expected = [np.mean(rewards) + np.std(rewards) if rewards else np.inf for rewards in arms]
    assert moments.shrunk(0.0).mean_std(1.0) == pytest.approx(expected)


def test_t3_discounting_alone_never_returns_to_an_arm() -> None:
    moments = moments_of([1.0, 2.0], [-1.0, -1.2])
    before = moments.mean_std(1.0)
    for _ in range(100):
        moments.discount(0.9)
    assert moments.mean_std(1.0) == pytest.approx(before)


def test_t3_shrinkage_brings_an_arm_that_is_not_drawn_back_to_the_average() -> None:
    moments = moments_of([1.0, 2.0] * 10, [-1.0, -1.2] * 10)
    history = []
    for _ in range(100):
        moments.discount(0.9)
        moments.add(np.array([0, 0]), np.array([1.0, 2.0]))
        history.append(moments.shrunk(2.0).means_K[1])
    mean, variance = moments.pooled()
    assert all(b > a for a, b in pairwise(history))
    assert history[0] < 0 < history[-1]
    assert moments.shrunk(2.0).mean_std(1.0)[1] == pytest.approx(mean + variance**0.5, abs=0.01)


# T4: what is drawn and what is selected


@pytest.mark.parametrize("shift", [0.0, -100.0])
@pytest.mark.parametrize("index", ["mean_std", "ucb1", "random"])
@pytest.mark.parametrize("pulls", [1, 7])
def test_t4_budget_and_selection_are_kept(shift: float, index: Index, pulls: int) -> None:
    """With every reward negative, too, where the release chose exhausted arms and stopped."""
    labels_N, rewards_N = small_pool()
    rewards_N = rewards_N + shift
    for budget, share in ((0.2, 0.05), (0.9, 0.1), (1.0, 0.5), (0.05, 0.5)):
        options = OfflineOptions(budget=budget, share=share, pulls=pulls, index=index)
        found = select_offline(labels_N, lambda i: rewards_N[i], options, seeded())
        assert len(found.drawn_n) == len(set(found.drawn_n.tolist())) == round(budget * 200)
        assert torch.equal(found.rewards_n, rewards_N[found.drawn_n])
        assert len(found.selected) == min(round(share * 200), len(found.drawn_n))
        assert set(found.selected) <= set(found.drawn_n.tolist())
        chosen = rewards_N[list(found.selected)]
        assert torch.equal(chosen, found.rewards_n.sort(descending=True).values[: len(chosen)])


def test_t4_empty_and_one_sample_clusters() -> None:
    """Clusters 0, 2 and 4 to 9 are empty, 3 and 10 hold one sample, which the cold start exhausts."""
    labels_N = torch.tensor([1] * 30 + [3] + [10])
    rewards_N = -1 - torch.rand(32, generator=seeded(), dtype=torch.float64)
    options = OfflineOptions(budget=1.0, share=1.0)
    found = select_offline(labels_N, lambda i: rewards_N[i], options, seeded())
    assert sorted(found.drawn_n.tolist()) == list(range(32))
    assert list(found.selected) == torch.argsort(rewards_N, descending=True).tolist()


def test_t4_the_cold_start_draws_from_every_cluster_within_the_budget() -> None:
    labels_N = torch.arange(200) % 10
    found = drawn(labels_N, torch.zeros(200, dtype=torch.float64), OfflineOptions(budget=0.1, cold_share=0.05))
    assert torch.bincount(labels_N[found]).tolist() == [2] * 10
    tight = drawn(labels_N, torch.zeros(200, dtype=torch.float64), OfflineOptions(budget=0.05))
    assert torch.bincount(labels_N[tight]).tolist() == [1] * 10


def test_t4_unusable_gradients_are_paid_for_and_never_selected() -> None:
    labels_N, rewards_N = small_pool()
    rewards_N = rewards_N - 100
    rewards_N[::3] = torch.nan
    rewards_N[labels_N == 2] = torch.nan  # a cluster without a single one must not swallow the budget
    found = select_offline(labels_N, lambda i: rewards_N[i], OfflineOptions(budget=0.5, share=0.4), seeded())
    assert len(found.drawn_n) == 100
    assert (labels_N[found.drawn_n] == 2).sum() == 2
    assert len(found.selected) == int(torch.isfinite(found.rewards_n).sum())
    assert torch.isfinite(rewards_N[list(found.selected)]).all()


def test_t4_wrong_shares_are_refused() -> None:
    labels_N, rewards_N = small_pool()
    for options in (OfflineOptions(budget=0.0), OfflineOptions(budget=1.5), OfflineOptions(share=-0.1)):
        with pytest.raises(ValueError, match="no share"):
            drawn(labels_N, rewards_N, options)
    with pytest.raises(ValueError, match="empty"):
        drawn(labels_N[:0], rewards_N[:0], OfflineOptions())
    assert drawn(labels_N[:3], rewards_N[:3], OfflineOptions()) == []


# T5: limits


def test_t5_whole_budget_gives_the_exact_best() -> None:
    labels_N, rewards_N = small_pool()
    found = select_offline(labels_N, lambda i: rewards_N[i], OfflineOptions(budget=1.0), seeded())
    assert list(found.selected) == torch.topk(rewards_N, 10).indices.tolist()


def test_t5_one_cluster_is_a_uniform_draw() -> None:
    rewards_N = small_pool()[1]
    alone = torch.zeros(200, dtype=torch.int64)
    assert drawn(alone, rewards_N, OfflineOptions()) == drawn(alone, -rewards_N, OfflineOptions())
    counts = torch.zeros(200)
    for seed in range(300):
        counts[drawn(alone, rewards_N, OfflineOptions(), seed)] += 1
    # Binomial(300, 0.2): a mean of 60, a standard deviation of 6.9.
    assert counts.sum() == 300 * 40
    assert counts.min() > 25
    assert counts.max() < 95


def test_t5_a_cluster_for_every_sample() -> None:
    rewards_N = small_pool()[1]
    assert len(set(drawn(torch.arange(200), rewards_N, OfflineOptions()))) == 40


def test_the_seed_decides_the_draws() -> None:
    labels_N, rewards_N = small_pool()
    assert drawn(labels_N, rewards_N, OfflineOptions(), 1) == drawn(labels_N, rewards_N, OfflineOptions(), 1)
    assert drawn(labels_N, rewards_N, OfflineOptions(), 1) != drawn(labels_N, rewards_N, OfflineOptions(), 2)


# T9, T10: simulations


def test_t9_offline_recall_of_the_true_best() -> None:
    """Reported for the method: 0.63; uniform draws 0.21, UCB1 0.39."""
    pools = [simulated_pool(seed) for seed in range(3)]

    def mean_recall(options: OfflineOptions) -> float:
        return sum(recall(*pool, options, seed) for seed, pool in enumerate(pools)) / len(pools)

    assert mean_recall(OfflineOptions()) >= 0.62
    assert mean_recall(OfflineOptions(pulls=8)) >= 0.62
    assert 0.17 < mean_recall(OfflineOptions(index="random")) < 0.23
    assert mean_recall(OfflineOptions(index="ucb1")) < 0.45


def test_t10_shuffled_clusters_gain_nothing_offline() -> None:
    labels_N, rewards_N = simulated_pool(0)
    shuffled_N = labels_N[torch.randperm(len(labels_N), generator=seeded())]
    gain = recall(shuffled_N, rewards_N, OfflineOptions(), 0) - recall(
        labels_N, rewards_N, OfflineOptions(index="random"), 0
    )
    assert abs(gain) < 0.05


@pytest.mark.parametrize(
    ("drift", "least", "published"),
    [
        pytest.param("slow", 0.70, 0.62, marks=pytest.mark.slow),
        pytest.param("fast", 0.62, 0.40, marks=pytest.mark.slow),
        ("abrupt", 0.65, 0.50),
    ],
)
def test_t9_stream_recovers_most_of_the_gap_under_drift(drift: str, least: float, published: float) -> None:
    """The published index, which forgets nothing, falls behind."""
    seeds, steps = range(2), 600
    assert sum(recovered(OURS, drift, seed, steps) for seed in seeds) / len(seeds) >= least
    assert sum(recovered(PUBLISHED, drift, seed, steps) for seed in seeds) / len(seeds) < published

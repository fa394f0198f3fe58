"""The bandit over a stream."""

from dataclasses import replace

import pytest
import torch
from gradient_selectors.draw.cluster_ucb import ClusterUcb, Draw, StreamOptions
from torch import Tensor


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


KINDS = torch.eye(4)


def stream_of(seed: int, steps: int, waiting: int = 24) -> list[tuple[Tensor, Tensor]]:
    """Features and utilities of the samples that wait at each step: kind 2 is worth the most."""
    generator = seeded(seed)
    out = []
    for _ in range(steps):
        kinds = torch.randint(4, (waiting,), generator=generator)
        noise = 0.1 * torch.randn(waiting, 4, generator=generator)
        worth = torch.tensor([0.1, 0.2, 1.0, -0.5])[kinds] + 0.2 * torch.randn(waiting, generator=generator)
        out.append((KINDS[kinds] + noise, 1e-3 * worth))
    return out


def follow(policy: ClusterUcb, steps: list[tuple[Tensor, Tensor]], count: int = 6) -> list[Draw]:
    draws = []
    for features_Md, utilities_M in steps:
        draws.append(policy.draw(features_Md, count))
        policy.observe(draws[-1].arms_n, utilities_M[draws[-1].indices_n])
        policy.learn(features_Md)
    return draws


OPTIONS = StreamOptions(num_clusters=6)


@pytest.mark.parametrize("thompson", [False, True])
def test_the_stream_finds_what_is_worth_it(thompson: bool) -> None:
    steps = stream_of(0, 120)
    draws = follow(ClusterUcb(replace(OPTIONS, thompson=thompson), 0, torch.ones(4)), steps)
    worth = [float(u[d.indices_n].mean()) for (_, u), d in zip(steps[60:], draws[60:], strict=True)]
    uniform = [float(u.mean()) for _, u in steps[60:]]
    assert sum(uniform) / 60 < 0.0003
    assert sum(worth) / 60 > 0.0006


@pytest.mark.parametrize("thompson", [False, True])
def test_stream_draws_are_distinct_and_as_many_as_asked(thompson: bool) -> None:
    policy = ClusterUcb(replace(OPTIONS, thompson=thompson), 0, torch.ones(4))
    for count, waiting in ((6, 24), (24, 24), (30, 24), (5, 1), (3, 0), (0, 4)):
        ((features_Md, utilities_M),) = stream_of(count, 1, waiting)
        draw = policy.draw(features_Md, count)
        assert len(draw.indices_n) == len(set(draw.indices_n.tolist())) == min(count, waiting)
        assert draw.indices_n.tolist() == sorted(draw.indices_n.tolist())
        assert torch.equal(draw.arms_n, policy.clusters.assign(features_Md)[draw.indices_n] if waiting else draw.arms_n)
        policy.observe(draw.arms_n, utilities_M[draw.indices_n] - 5)


@pytest.mark.parametrize("thompson", [False, True])
def test_the_best_arm_leaves_slots_to_the_next(thompson: bool) -> None:
    """But none empty: where one arm alone has samples, it fills them all."""
    options = StreamOptions(num_clusters=4, explore=0.0, thompson=thompson, per_arm=4)
    policy, kinds = ClusterUcb(options, 0, KINDS[2]), torch.arange(4).repeat(10)
    policy.draw(KINDS[kinds], 4)
    arms_K = policy.clusters.assign(KINDS)
    policy.observe(arms_K[kinds], torch.tensor([-1.0, 0.5, 2.0, -0.5])[kinds])
    drawn = policy.draw(KINDS[kinds], 6).arms_n
    assert drawn.bincount(minlength=4)[arms_K[2]] == 4
    if not thompson:
        assert drawn.bincount(minlength=4)[arms_K[1]] == 2, "the next best has the rest"
    assert policy.draw(KINDS[kinds[kinds == 2]], 6).arms_n.tolist() == [int(arms_K[2])] * 6
    most = replace(options, per_arm=None)
    free = ClusterUcb(most, 0, KINDS[2])
    free.load_state_dict(policy.state_dict())
    assert thompson or free.draw(KINDS[kinds], 6).arms_n.tolist() == [int(arms_K[2])] * 6


@pytest.mark.parametrize("thompson", [False, True])
def test_an_interrupted_stream_goes_on_bit_for_bit(thompson: bool) -> None:
    options, steps = replace(OPTIONS, thompson=thompson, memory=0.98), stream_of(1, 40)
    whole, first = (ClusterUcb(options, 0, torch.ones(4)) for _ in range(2))
    draws = follow(whole, steps)
    follow(first, steps[:17])
    saved = first.state_dict()
    resumed = ClusterUcb(options, 99, -torch.ones(4))
    resumed.load_state_dict(saved)
    follow(first, steps[17:20])  # what was saved is a copy
    for ours, theirs in zip(follow(resumed, steps[17:]), draws[17:], strict=True):
        assert torch.equal(ours.indices_n, theirs.indices_n)
        assert torch.equal(ours.arms_n, theirs.arms_n)
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in resumed.state_dict().items())


def test_state_of_another_size_is_refused() -> None:
    policy = ClusterUcb(OPTIONS, 0, torch.ones(4))
    with pytest.raises(ValueError, match=r"\(5, 4\).*does not fit \(6, 4\)"):
        policy.load_state_dict(ClusterUcb(replace(OPTIONS, num_clusters=5), 0, torch.ones(4)).state_dict())


def test_rewards_do_not_depend_on_the_scale_of_utilities_even_as_it_drifts() -> None:
    steps = stream_of(2, 60)
    for factor in (1e-6, 1e6):
        scaled = [(features, factor * utilities) for features, utilities in steps]
        plain, other = (follow(ClusterUcb(OPTIONS, 0, torch.ones(4)), s) for s in (steps, scaled))
        assert all(torch.equal(a.indices_n, b.indices_n) for a, b in zip(plain, other, strict=True))
    shrinking = [(features, 0.99**t * utilities) for t, (features, utilities) in enumerate(stream_of(0, 120))]
    policy = ClusterUcb(OPTIONS, 0, torch.ones(4))
    follow(policy, shrinking)
    assert 1 < policy.index_K().max() < 4


def test_one_broken_sample_does_not_rule_its_arm() -> None:
    policy = ClusterUcb(OPTIONS, 0, torch.ones(4))
    follow(policy, stream_of(0, 60))
    before, scale = policy.index_K(), policy.scale
    policy.observe(torch.tensor([0, 1, 1, 1]), torch.tensor([1e30, torch.nan, torch.inf, -torch.inf]))
    assert policy.scale < 2 * scale
    assert abs(policy.index_K()[1:] - before[1:]).max() < 1.5
    counts = policy.moments.counts_K.copy()
    policy.observe(torch.tensor([0, 1]), torch.tensor([torch.nan, torch.nan]))
    assert (policy.moments.counts_K == counts).all()  # a step that taught nothing is no step


def test_arms_start_from_their_likeness_to_the_target() -> None:
    """Before any reward, most draws come from the kind that the target is of."""
    features_Md, _ = stream_of(3, 1, waiting=80)[0]
    for kind in range(4):
        policy = ClusterUcb(replace(OPTIONS, explore=0.0, prior=10.0), 0, KINDS[kind])  # enough for 10 slots
        found = policy.draw(features_Md, 10)
        assert (features_Md[found.indices_n].argmax(1) == kind).float().mean() >= 0.9
        # Without a prior all arms are alike, and what is most like the target comes first all the same: the control has
        # another target.
        other = ClusterUcb(replace(OPTIONS, explore=0.0, prior=10.0), 0, KINDS[kind - 1]).draw(features_Md, 10)
        assert (features_Md[other.indices_n].argmax(1) == kind).float().mean() < 0.6


@pytest.mark.parametrize("thompson", [False, True])
def test_an_arm_fills_no_more_slots_than_it_has_rewards_to_show(thompson: bool) -> None:
    """One that was never drawn is looked at first, however high its index."""
    options = StreamOptions(num_clusters=4, explore=0.0, prior=1.0, shrinkage=0.0, thompson=thompson)
    policy, kinds = ClusterUcb(options, 0, KINDS[2]), torch.arange(4).repeat(10)
    policy.draw(KINDS[kinds], 1)
    arms_K = policy.clusters.assign(KINDS)
    policy.observe(arms_K[[1] * 5], torch.full((5,), 0.1))  # less than the likeness of kind 2 promises
    slots_K = policy.draw(KINDS[kinds], 8).arms_n.bincount(minlength=4)[arms_K]
    assert slots_K.tolist() == [1, 5, 1, 1]


@pytest.mark.parametrize("thompson", [False, True])
def test_within_an_arm_what_is_most_like_the_target_comes_first(thompson: bool) -> None:
    features_Md = torch.nn.functional.normalize(torch.randn(30, 4, generator=seeded(1)), dim=1)
    for kind in range(4):
        options = StreamOptions(num_clusters=1, explore=0.0, thompson=thompson)
        drawn = ClusterUcb(options, 0, KINDS[kind]).draw(features_Md, 5).indices_n
        assert set(drawn.tolist()) == set(features_Md[:, kind].topk(5).indices.tolist())


def test_rewards_outweigh_the_likeness() -> None:
    steps = stream_of(0, 120)
    draws = follow(ClusterUcb(OPTIONS, 0, KINDS[3]), steps)  # the target looks like the kind that is worth the least
    late = [float(u[d.indices_n].mean()) for (_, u), d in zip(steps[60:], draws[60:], strict=True)]
    assert sum(late) / 60 > 0.0006


def test_an_arm_whose_cluster_is_founded_anew_starts_again() -> None:
    policy = ClusterUcb(StreamOptions(num_clusters=2, memory=0.9, prior=3.0), 0, KINDS[2])
    first = torch.cat([KINDS[:1].expand(5, 4), KINDS[1:2].expand(5, 4)])
    policy.draw(first, 4)
    policy.observe(torch.tensor([0, 1] * 10), torch.full((20,), -1.0))
    for _ in range(8):
        policy.learn(KINDS[:1].expand(5, 4))
    policy.learn(torch.cat([KINDS[:1].expand(5, 4), KINDS[2:3]]))
    arm = int(policy.clusters.assign(KINDS[2:3])[0])
    assert policy.moments.counts_K[arm] == 3.0
    assert policy.moments.means_K[arm] == pytest.approx(1.0)  # of two arms, the one that looks like the target
    assert policy.moments.counts_K[1 - arm] > 3.0


def test_t8_moments_of_all_that_were_scored_are_unbiased() -> None:
    """Fed with the chosen half only, the mean would be that of the upper half: 0.8 standard deviations too high."""
    generator, options = seeded(), StreamOptions(num_clusters=1, discount=1.0, prior=0.0)
    means = {}
    for name, kept in (("all", 16), ("chosen", 8)):
        policy = ClusterUcb(options, 0, torch.ones(4))
        policy.draw(torch.ones(4, 4), 1)
        for _ in range(100):
            utilities = (3.0 + torch.randn(16, generator=generator)).sort(descending=True).values[:kept]
            policy.observe(torch.zeros(kept, dtype=torch.int64), utilities)
        means[name] = float(policy.moments.means_K[0]) * policy.scale
    assert abs(means["all"] - 3.0) < 3 / 1600**0.5
    assert means["chosen"] > 3.6


def test_uniform_slots_keep_every_arm_in_view() -> None:
    policy = ClusterUcb(replace(OPTIONS, shrinkage=0.0, explore=0.2), 0, torch.ones(4))
    draws = follow(policy, stream_of(0, 200))
    late = torch.cat([draw.arms_n for draw in draws[100:]])
    assert (torch.bincount(late, minlength=6)[policy.clusters.masses_K > 1] > 0).all()
    greedy = ClusterUcb(replace(OPTIONS, shrinkage=0.0, explore=0.0), 0, torch.ones(4))
    late = torch.cat([draw.arms_n for draw in follow(greedy, stream_of(0, 200))[100:]])
    assert (torch.bincount(late, minlength=6)[greedy.clusters.masses_K > 1] == 0).any()

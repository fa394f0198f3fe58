"""What the bandit recovers where the truth is known: pools and streams of simulated rewards.

    python -m benchmarks.cluster_ucb_simulation [--seeds 5]

Offline: 20,000 samples in 50 clusters of Zipf sizes; a reward is its cluster's mean plus noise whose spread differs
between clusters by a factor of up to three; half of the variance lies between clusters. The figure is the share of the
true best 5 % that is selected for 20 % of the rewards.

Stream: at each step 64 samples of 16 clusters wait, 16 are drawn, and the best 8 of those count. Half of the variance
lies between clusters, whose means drift (an Ornstein-Uhlenbeck walk that forgets its start in about `1 / speed^2`
steps), or jump every 200 steps. The figure is the share of the gap between a uniform draw and the best 8 of all 64.
"""

import argparse
import math
from collections.abc import Iterable
from dataclasses import replace

import torch
from gradient_selectors.draw.cluster_ucb import ClusterUcb, StreamOptions
from gradient_selectors.draw.cluster_ucb_offline import OfflineOptions, select_offline
from torch import Tensor

POOL, CLUSTERS, BETWEEN = 20_000, 50, 0.5
REWARD_SPREAD = 0.32
ARMS, WAITING, DRAWN, KEPT = 16, 64, 16, 8
JUMP_STEPS = 200
SLOW, FAST = 0.075, 0.2  # speeds of drift, chosen so that the published index recovers about what was reported for it

PUBLISHED = StreamOptions(discount=1.0, shrinkage=0.0, explore=0.0, prior=0.0)
OURS = StreamOptions(prior=0.0)  # the simulated target tells nothing of the arms
OFFLINE = {
    "random": OfflineOptions(index="random"),
    "UCB1": OfflineOptions(index="ucb1"),
    "mean": OfflineOptions(beta=0.0),
    "mean + std": OfflineOptions(),
    "mean + std, 8 at a time": OfflineOptions(pulls=8),
    "mean + std, no cold start": OfflineOptions(cold_share=0.0, cold_draws=1),
}
STREAM = {
    "published index": PUBLISHED,
    "discount only": replace(OURS, shrinkage=0.0, explore=0.0),
    "discount, shrinkage": replace(OURS, explore=0.0),
    "ours": OURS,
    "ours, Thompson": replace(OURS, thompson=True),
}


def simulated_pool(seed: int) -> tuple[Tensor, Tensor]:
    """Clusters (N,) int64 and rewards (N,) float64 of a pool."""
    generator = torch.Generator().manual_seed(seed)
    labels_N = torch.multinomial(1 / torch.arange(1.0, CLUSTERS + 1), POOL, replacement=True, generator=generator)
    means_K = BETWEEN**0.5 * torch.randn(CLUSTERS, generator=generator, dtype=torch.float64)
    spreads_K = (1 - BETWEEN) ** 0.5 * (0.5 + torch.rand(CLUSTERS, generator=generator, dtype=torch.float64))
    noise_N = torch.randn(POOL, generator=generator, dtype=torch.float64)
    return labels_N, REWARD_SPREAD * (means_K[labels_N] + spreads_K[labels_N] * noise_N)


def recall(labels_N: Tensor, rewards_N: Tensor, options: OfflineOptions, seed: int) -> float:
    """Share of the true best that the bandit selects."""
    generator = torch.Generator().manual_seed(seed + 1000)
    selected = select_offline(labels_N, lambda indices_n: rewards_N[indices_n], options, generator).selected
    best = torch.topk(rewards_N, len(selected)).indices.tolist()
    return len(set(best) & set(selected)) / len(best)


def recovered(options: StreamOptions, drift: str, seed: int, steps: int) -> float:
    """Share of the gap between uniform draws and an oracle that a policy closes; `drift` as in `drifted`."""
    generator = torch.Generator().manual_seed(seed)
    features_KK = torch.eye(ARMS)
    policy = ClusterUcb(options, seed + 1000, torch.ones(ARMS))
    policy.clusters.sums_Kd, policy.clusters.masses_K = features_KK.clone(), torch.ones(ARMS, dtype=torch.float64)
    means_K = torch.randn(ARMS, generator=generator)
    ours = uniform = oracle = 0.0
    for step in range(steps):
        means_K = drifted(means_K, drift, step, generator)
        labels_M = torch.randint(ARMS, (WAITING,), generator=generator)
        noise_M = torch.randn(WAITING, generator=generator)
        rewards_M = BETWEEN**0.5 * means_K[labels_M] + (1 - BETWEEN) ** 0.5 * noise_M
        draw = policy.draw(features_KK[labels_M], DRAWN)
        policy.observe(draw.arms_n, 0.01 * rewards_M[draw.indices_n])
        ours += _best(rewards_M[draw.indices_n])
        uniform += _best(rewards_M[:DRAWN])
        oracle += _best(rewards_M)
    return (ours - uniform) / (oracle - uniform)


def drifted(means_K: Tensor, drift: str, step: int, generator: torch.Generator) -> Tensor:
    """The arms' means at the next step: `none`, `slow`, `fast` or `abrupt` drift."""
    if drift == "abrupt":
        return torch.randn(ARMS, generator=generator) if step and step % JUMP_STEPS == 0 else means_K
    speed = {"none": 0.0, "slow": SLOW, "fast": FAST}[drift]
    return means_K * math.sqrt(1 - speed**2) + torch.randn(ARMS, generator=generator) * speed


def _best(rewards: Tensor) -> float:
    return float(torch.topk(rewards, KEPT).values.mean())


def _mean(values: Iterable[float]) -> float:
    return float(torch.tensor(list(values)).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description="What the bandit recovers where the truth is known.")
    parser.add_argument("--seeds", type=int, default=5, help="repetitions of each figure (5)")
    parser.add_argument("--steps", type=int, default=1000, help="steps of each stream (1000)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("recall of the best 5 % for 20 % of the rewards")
    pools = [simulated_pool(seed) for seed in range(args.seeds)]
    for name, options in OFFLINE.items():
        print(f"  {name:28}{_mean(recall(*pool, options, seed) for seed, pool in enumerate(pools)):.2f}", flush=True)
    drifts = ("none", "slow", "fast", "abrupt")
    print(f"share of the oracle's gap recovered{''.join(f'{drift:>8}' for drift in drifts)}")
    for name, stream_options in STREAM.items():
        shares = [_mean(recovered(stream_options, d, s, args.steps) for s in range(args.seeds)) for d in drifts]
        print(f"  {name:33}{''.join(f'{share:8.2f}' for share in shares)}", flush=True)


if __name__ == "__main__":
    main()

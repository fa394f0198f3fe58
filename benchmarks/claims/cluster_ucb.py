"""ClusterUCB: the best twentieth of a pool for a fifth of the gradients, against the gradients of all.

arXiv 2506.10288. Utility is the cosine of a sample's gradient with the target's. Its claim is that little is lost, so
what all gradients find stands beside it, and what it has to be ahead of is a random fifth, at the same price.
"""

from collections.abc import Sequence

import torch
from gradient_selectors import select_cluster_ucb
from torch import Tensor

from benchmarks.claims.runs import ON_ALL, Choice, choice_from, on_stream, over_subset
from benchmarks.claims.table import Figure, Values
from benchmarks.learning.plan import Tier
from benchmarks.learning.run import Bench

SAYS = "A fifth of the gradients finds samples nearly as good as all of them"
BUDGET, SELECTED = 0.20, 0.05  # of the pool
KEPT, LOSS = "share of the best utility", "test loss after training on them"
ARM, RANDOM, ALL = "cluster_ucb, 20 %", "random 20 %", "all gradients"

FIGURES = (
    Figure(KEPT, ARM, (RANDOM,), shown=(ALL,), higher=True),
    Figure(LOSS, ARM, (RANDOM,), shown=(ALL,)),
)


def measure(bench: Bench, tier: Tier, seed: int) -> Values:
    """How much of the best subset's utility each arm's has, and what the model learns from it."""
    choice = choice_from(bench, tier, "mixture", seed)
    utilities_N, arms = choose(choice, seed)
    losses: dict[str, float | None] = {}
    for arm, chosen in arms.items():
        stream = over_subset(tier, [choice.records[i] for i in chosen], seed)
        losses[arm] = float(on_stream(bench, tier, stream, ON_ALL, seed)[-1]["test"])
    return {KEPT: {arm: share_kept(utilities_N, chosen, arms[ALL]) for arm, chosen in arms.items()}, LOSS: losses}


def choose(choice: Choice, seed: int) -> tuple[Tensor, dict[str, Sequence[int]]]:
    """The utility of every sample, (N,) float64, and the samples that each arm chooses, equally many."""

    def select(budget: float) -> tuple[Tensor, Tensor, Sequence[int]]:
        generator = torch.Generator().manual_seed(seed)
        found = select_cluster_ucb(
            choice.model, choice.pool, choice.target, budget=budget, share=SELECTED, generator=generator
        )
        return found.drawn_n, found.scores_n, found.selected

    drawn_n, scores_n, best = select(1.0)
    utilities_N = torch.empty(len(drawn_n), dtype=torch.float64)
    utilities_N[drawn_n] = scores_n.double()
    few_n, _, found = select(BUDGET)
    lucky_n = torch.randperm(len(utilities_N), generator=torch.Generator().manual_seed(seed))[: len(few_n)]
    order_n = utilities_N[lucky_n].nan_to_num(-torch.inf).argsort(descending=True)
    return utilities_N, {ALL: best, ARM: found, RANDOM: lucky_n[order_n][: len(best)].tolist()}


def share_kept(utilities_N: Tensor, chosen: Sequence[int], best: Sequence[int]) -> float:
    """The utility of what was chosen over that of the best.

    Examples:
        >>> share_kept(torch.tensor([1.0, 3.0, 2.0]), chosen=[0, 1], best=[1, 2])
        0.8
    """
    return round(float(utilities_N[list(chosen)].nansum() / utilities_N[list(best)].nansum()), 12)

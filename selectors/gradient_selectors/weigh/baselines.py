"""Baselines, without which nothing can be shown to help: top-k by first-order utility, and everything at once.

The greedy baseline has a file of its own (`greedy`). The uniform baseline needs no gradients to decide: it draws before
the pass (`draw_uniform`) and trains on what it drew.
"""

from dataclasses import dataclass

import torch

from gradient_selectors.views.interaction import Decision, Interaction, equal_weights
from gradient_selectors.weigh.filter_then_weight import positive_samples, usable_rows


@dataclass(frozen=True)
class Full:
    """Every candidate with the same weight: plain training. Reads no view of the interaction, so none is computed."""

    def decide(self, interaction: Interaction) -> Decision:
        finite = torch.isfinite(interaction.gradients.losses_N).nonzero().squeeze(1).tolist()
        return Decision(equal_weights(interaction.num_samples, finite))


@dataclass(frozen=True)
class TopK:
    """The k candidates with the largest positive `c_i`, with equal weights: first order, no redundancy."""

    chosen: int

    def decide(self, interaction: Interaction) -> Decision:
        rows_N = usable_rows(interaction)
        positive = positive_samples(rows_N)
        return Decision(equal_weights(len(rows_N), positive[: self.chosen]), num_positive=len(positive))


def draw_uniform(num_candidates: int, num_drawn: int, generator: torch.Generator) -> list[int]:
    """Indices drawn without replacement, in ascending order."""
    drawn = torch.randperm(num_candidates, generator=generator)[:num_drawn]
    return sorted(drawn.tolist())

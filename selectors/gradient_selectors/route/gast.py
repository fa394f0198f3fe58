"""GAST: every layer draws the samples that update it.

From the paper (arXiv 2603.09865), as far as its text is known: a layer scores each sample by the inner product of the
layer's own gradients with the target's, standardises the scores over the pool, and draws K samples by their softmax;
only these write to the layer. Ours: K are drawn without replacement, and the target is never trained on.

The draw comes after the backward pass and touches only the weights of rows in the update's book-keeping. Gradients of
activations are the same whatever is drawn. It is stochastic on purpose: taking the K best lost 10 points in the paper,
and leaves many samples without any layer.

It composes with coefficients: the weigh stage says which samples may enter the update, and how much each counts; a
layer draws among these, and its coefficients are those of the samples it drew, scaled to the sum of all. With equal
coefficients that is the paper's mean over K. If K is no smaller than the number of samples that may enter, nothing
changes. The mean over K leans towards the target on purpose: it is no unbiased estimate of the mean over the pool.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from gradient_selectors.views.interaction import Interaction
from gradient_selectors.weigh.selector import Decision

Rule = Literal["stochastic", "random_k_per_layer", "random_k_shared", "top_k_per_layer"]

FLAT = 1e-6  # scores that differ by less than this, relative to the largest, differ by rounding only


@dataclass(frozen=True)
class Gast:
    """Settings of the method.

    Examples:
        >>> from gradient_selectors import Gast
        >>> route = Gast(per_layer=2)  # SelectionEngine(..., route=route)

    Attributes:
        per_layer: samples K that each layer draws.
        generator: source of the draws, on the CPU; its state belongs into a checkpoint.
        rule: `stochastic` is the method. Controls: `random_k_per_layer` and `random_k_shared` (one draw for all layers)
            ignore the scores, `top_k_per_layer` takes the K best.
        temperature: divides the standardised scores; towards infinity the draw is random, towards zero the best K.
    """

    per_layer: int
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))
    rule: Rule = "stochastic"
    temperature: float = 1.0

    def route(self, decision: Decision, interaction: Interaction) -> Decision:
        """A selector's decision with coefficients for each layer; unchanged if it selected nothing."""
        may_enter_N = decision.coefficients_N > 0
        if not bool(may_enter_N.any()):
            return decision
        scores_LN = standardised(interaction.utilities_LN.cpu())
        drawn_LN = draw(scores_LN / self.temperature, may_enter_N, self.per_layer, self.rule, self.generator)
        return replace(
            decision,
            coefficients_LN=spread(decision.coefficients_N, drawn_LN),
            route_entropy_L=entropy(scores_LN[:, may_enter_N] / self.temperature),
        )

    def state_dict(self) -> dict[str, Any]:
        """The generator's state."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.generator.set_state(state["generator"])


def entropy(scores_LN: Tensor) -> Tensor:
    """Entropy of each layer's softmax as a share of the largest possible, (L,): 1 where all samples are alike."""
    logs_LN = scores_LN.log_softmax(1)
    nats_L = -(logs_LN.exp() * logs_LN.nan_to_num(neginf=0.0)).sum(1)
    return nats_L / math.log(scores_LN.shape[1]) if scores_LN.shape[1] > 1 else torch.ones_like(nats_L)


def standardised(rows_LN: Tensor) -> Tensor:
    """Scores of each layer with mean 0 and standard deviation 1 over the samples where they are finite, (L, N) float64.

    Zero where all are the same, so that the draw is uniform; minus infinity where a score is not finite. No score
    exceeds `sqrt(N - 1)`, so no sample is ever certain to be drawn.
    """
    finite_LN = torch.isfinite(rows_LN)
    values_LN = torch.where(finite_LN, rows_LN, 0.0).double()
    counts_L1 = finite_LN.sum(1, keepdim=True).clamp(min=1)
    centred_LN = torch.where(finite_LN, values_LN - values_LN.sum(1, keepdim=True) / counts_L1, 0.0)
    deviation_L1 = (centred_LN.square().sum(1, keepdim=True) / counts_L1).sqrt()
    flat_L1 = deviation_L1 <= FLAT * values_LN.abs().amax(1, keepdim=True)
    scores_LN = torch.where(flat_L1, 0.0, centred_LN / deviation_L1)
    return torch.where(finite_LN, scores_LN, -torch.inf)


def draw(scores_LN: Tensor, may_enter_N: Tensor, per_layer: int, rule: Rule, generator: torch.Generator) -> Tensor:
    """Which samples each layer draws, (L, N) bool: K of those that may enter, or all of them if there are fewer.

    Adding Gumbel noise to the logarithms of probabilities and taking the K largest draws K without replacement, one
    after the other, each time with the probabilities of those left. Layers draw independently.
    """
    scored = rule in ("stochastic", "top_k_per_layer")
    keys_LN = scores_LN.clone() if scored else torch.where(scores_LN > -torch.inf, 0.0, scores_LN)
    if rule != "top_k_per_layer":
        noise_shape = (1, keys_LN.shape[1]) if rule == "random_k_shared" else keys_LN.shape
        exponential = torch.empty(noise_shape, dtype=torch.float64).exponential_(generator=generator)
        keys_LN = keys_LN - exponential.log()
    keys_LN[:, ~may_enter_N] = -torch.inf
    best_LK = keys_LN.topk(min(per_layer, keys_LN.shape[1]), dim=1).indices
    return torch.zeros_like(keys_LN, dtype=torch.bool).scatter_(1, best_LK, True) & (keys_LN > -torch.inf)


def spread(coefficients_N: Tensor, drawn_LN: Tensor) -> Tensor:
    """Coefficients of each layer, (L, N): those of the samples it drew, scaled to the sum of all; zero without any."""
    kept_LN = coefficients_N * drawn_LN
    sums_L1 = kept_LN.sum(1, keepdim=True)
    return torch.where(sums_L1 > 0, kept_LN * (coefficients_N.sum() / sums_L1), 0.0)

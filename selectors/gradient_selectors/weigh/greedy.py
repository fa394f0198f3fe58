"""Greedy choice by marginal utility: first order minus redundancy, with equal coefficients. A baseline.

The rule of GREATS (NeurIPS 2024): take the candidate that gains most, subtract what it shares with the others, repeat.
With the coefficient omega on every selected sample, adding i to the set S gains

    omega c_i - 1/2 omega^2 K_ii - omega^2 sum_{j in S} K_ij

Three things differ from the released code, which leaves out the term of K_ii, scales the rest by `lr^2` against `lr`
and never stops. First, c and K here carry P once each, so no learning rate stands between them: with it, redundancy is
1e-5 of the score at usual rates, and the choice is that of top-k. Second, the choice ends when the best gain is
negative. Third, omega is `alpha / k`, not `1 / k`: the length of the step is the optimizer's matter, while c also
carries the length of the target's gradient, a mean over many samples and so often far shorter than one sample's. At
`1 / k` even the first gain is then negative, and nothing is ever selected. Alpha is the exact line search along the
update of the top k with equal coefficients, `c^T w / w^T K w`: the scale at which that update suits the target best.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from gradient_selectors.views.interaction import Interaction
from gradient_selectors.weigh.filter_then_weight import positive_samples, redundancy, sound, usable_utilities
from gradient_selectors.weigh.program import Matrix, Vector
from gradient_selectors.weigh.selector import Decision, equal_coefficients


@dataclass(frozen=True)
class Greedy:
    """Settings of the baseline.

    Examples:
        >>> from gradient_selectors import Greedy
        >>> selector = Greedy(batch_size=4)

    Attributes:
        batch_size: samples k that may enter the update.
        keep_ratio: at most this many times `batch_size` candidates, those with the largest positive `c_i`, are looked
            at; K is computed for these.
    """

    batch_size: int
    keep_ratio: float = 2.0

    def decide(self, interaction: Interaction) -> Decision:
        """Equal coefficients with a sum of 1; all zero if no candidate points towards the target."""
        utilities_N = usable_utilities(interaction)
        positive = positive_samples(utilities_N)
        nothing = Decision(torch.zeros(len(utilities_N)), num_positive=len(positive))
        if not positive:
            return nothing
        looked_at = positive[: math.ceil(self.keep_ratio * self.batch_size - 1e-9)]
        looked_at, gram = sound(looked_at, interaction.gram(looked_at).cpu().numpy())
        if not looked_at:
            return nothing
        linear = utilities_N[looked_at].cpu().double().numpy()
        omega = matched_weight(gram, linear, self.batch_size)
        picked = greedy_choice(gram, linear, omega, self.batch_size)
        return Decision(
            equal_coefficients(len(utilities_N), [looked_at[i] for i in picked]),
            len(positive),
            redundancy(gram[np.ix_(picked, picked)], linear[picked], np.full(len(picked), omega)),
        )


def matched_weight(gram: Matrix, linear: Vector, chosen: int) -> float:
    """Omega: the one coefficient of the top k by c at which their update suits the target best."""
    top = np.argsort(-linear, kind="stable")[:chosen]
    return float(linear[top].sum() / gram[np.ix_(top, top)].sum())


def greedy_choice(gram: Matrix, linear: Vector, omega: float, chosen: int) -> list[int]:
    """At most `chosen` candidates in the order in which they were added; fewer if another one would lose utility."""
    gains = omega * linear - 0.5 * omega**2 * np.diag(gram)
    picked: list[int] = []
    while len(picked) < min(chosen, len(linear)):
        best = int(np.argmax(gains))
        if gains[best] <= 0:
            break
        picked.append(best)
        gains -= omega**2 * gram[best]
        gains[best] = -np.inf
    return picked

"""Greedy choice by marginal utility: first order minus redundancy, with equal weights. A baseline.

The rule of GREATS (NeurIPS 2024): take the candidate that gains most, subtract what it shares with the others, repeat.
With the weight omega on every chosen sample, adding i to the set S gains

    omega c_i - 1/2 omega^2 K_ii - omega^2 sum_{j in S} K_ij

Three things differ from the released code, which leaves out the term of K_ii, scales the rest by `lr^2` against `lr`
and never stops. First, c and K here carry P once each, so no learning rate stands between them: with it, redundancy is
1e-5 of the score at usual rates, and the choice is that of top-k. Second, the choice ends when the best gain is
negative. Third, omega is `alpha / k`, not `1 / k`: the length of the step is the optimizer's matter, while c also
carries the length of the target's gradient, a mean over many samples and so often far shorter than one sample's. At
`1 / k` even the first gain is then negative, and nothing is ever chosen. Alpha is the exact line search along the
equal-weight update of the top k, `c^T w / w^T K w`: the scale at which that update suits the target best.
"""

from dataclasses import dataclass

import numpy as np
import torch

from gradient_selectors.views.interaction import Decision, Interaction, equal_weights
from gradient_selectors.weigh.coefficients import Matrix, Vector
from gradient_selectors.weigh.filter_then_weight import positive_samples, redundancy, sound, usable_rows


@dataclass(frozen=True)
class Greedy:
    """Settings of the baseline.

    Attributes:
        chosen: samples k that may enter the update.
        candidates: samples with the largest positive `c_i` that are looked at; K is computed for these.
    """

    chosen: int
    candidates: int

    def decide(self, interaction: Interaction) -> Decision:
        """Equal weights with a sum of 1; all zero if no candidate points towards the target."""
        rows_N = usable_rows(interaction)
        positive = positive_samples(rows_N)
        nothing = Decision(torch.zeros(len(rows_N)), num_positive=len(positive))
        if not positive:
            return nothing
        looked_at = positive[: self.candidates]
        looked_at, gram = sound(looked_at, interaction.gram(looked_at).cpu().numpy())
        if not looked_at:
            return nothing
        linear = rows_N[looked_at].cpu().double().numpy()
        omega = matched_weight(gram, linear, self.chosen)
        picked = greedy_choice(gram, linear, omega, self.chosen)
        return Decision(
            equal_weights(len(rows_N), [looked_at[i] for i in picked]),
            len(positive),
            redundancy(gram[np.ix_(picked, picked)], linear[picked], np.full(len(picked), omega)),
        )


def matched_weight(gram: Matrix, linear: Vector, chosen: int) -> float:
    """Omega: the weight of each of the top k by c, at which their equal-weight update suits the target best."""
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

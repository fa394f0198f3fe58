"""The gradients of a pool, of a model that is sharded, where no rank has kept the factors of large matrices.

Over a sharded model every pass is a call of all ranks. So all let go of the same, and what a second pass is for follows
from what all know: the coefficients of all samples, never those of one's own. Each rank runs its own samples again; one
that has fewer than another runs the shortest sample beside them, which counts for nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradient_selectors.capture.factors import Factor, Written
from gradient_selectors.capture.gradients import Gradient, PoolGradients, preconditioned
from gradient_selectors.preconditioner import Preconditioner
from gradient_selectors.views.again import Answers, PoolInPieces
from gradient_selectors.views.sharded import ShardedPool
from gradient_selectors.views.shared import Holdings


@dataclass(frozen=True)
class ShardedInPieces(ShardedPool):
    """The per-sample gradients of all ranks' samples, of which c, K's rows and what is small were kept."""

    _answers: Answers = field(default_factory=Answers, init=False, repr=False)

    @torch.no_grad()
    def dots(self, direction: Gradient) -> dict[str, Tensor]:
        again = self._dots_again(lambda name: direction[name])
        own = {n: again[n] if n in again else self.held.along(n, direction[n]) for n in self.factors}
        return self.of_all(own)

    @torch.no_grad()
    def utilities_of(self, name: str, target: Gradient, preconditioner: Preconditioner) -> Tensor:
        left, found = self._left, self._answers
        if name not in left.let_go:
            return super().utilities_of(name, target, preconditioner)
        if target is left.target and preconditioner is left.preconditioner:
            return self.held.along(name, torch.zeros(0))  # what was kept is along this direction already
        if found.target is not target or found.preconditioner is not preconditioner:
            found.utilities = self._dots_again(lambda other: preconditioned(target, preconditioner, other))
            found.target, found.preconditioner = target, preconditioner
        return found.utilities[name]

    @torch.no_grad()
    def gram_of(self, name: str, samples: Sequence[int], preconditioner: Preconditioner) -> Tensor:
        return self._holding(name, samples).gram(samples, [self._asked(name, samples, preconditioner)])

    def gram_within(self, names: Sequence[str], samples: Sequence[int], preconditioner: Preconditioner) -> Tensor:
        # One by one: what was let go is written out anew, as much at once as fits.
        return PoolGradients.gram_within(self, names, samples, preconditioner)

    @torch.no_grad()
    def _update_of(self, name: str, coefficients: Tensor) -> Tensor:
        if not bool((coefficients != 0).any()):
            return super()._update_of(name, coefficients)
        found = self._answers
        if not found.knows(coefficients) or name not in found.gradient:
            found.coefficients, found.gradient = coefficients.clone(), self._gradient_again(coefficients)
        return found.gradient.pop(name)

    @property
    def _left(self) -> PoolInPieces:
        """What this rank has kept of its own samples."""
        assert isinstance(self.held.local, PoolInPieces)
        return self.held.local

    def _gradient_again(self, coefficients: Tensor) -> dict[str, Tensor]:
        own = self.held.own_coefficients(coefficients)
        chosen = (own.reshape(-1, own.shape[-1]) != 0).any(0).nonzero().flatten().tolist()
        return self._left.second.weighted_gradient(chosen, own[..., chosen])

    def _dots_again(self, direction: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """`<u, g_i>` of the local pool's samples within what was let go, (n,) float32 each."""
        own, names = range(len(self.held.shares.own)), sorted(self._left.let_go)
        found = self._left.second.measured(own, names, lambda name, factor, _: factor.dot(direction(name)))
        return {name: found.get(name, self.held.nothing) for name in names}

    def _holding(self, name: str, samples: Sequence[int]) -> Holdings:
        """What holds some samples' gradients of a parameter.

        Of what was let go they are written out, of as many parameters at once as fit the budget.
        """
        left, found, shares = self._left, self._answers, self.held.shares.only(samples)
        if name not in left.let_go:
            return self.held
        if found.wrote != tuple(samples) or name not in found.written:
            names = [other for other in self.shapes if other in left.let_go]
            group = next(left.second.groups(max(map(len, shares.of_ranks)), names[names.index(name) :]))
            found.wrote, found.written = tuple(samples), self._written_out(shares.own, group)
        factors = {name: [Written(found.written.pop(name))]}
        return Holdings(PoolGradients(self.losses_N[list(shares.own)], factors, self.shapes), shares)

    def _written_out(self, samples: Sequence[int], names: Sequence[str]) -> dict[str, Tensor]:
        """Gradients of some of this rank's samples, (n, p, d) float32; without any of them none."""
        places = [self.held.shares.own.index(i) for i in samples]
        found = self._left.second.measured(places, names, self._written)
        return {name: found.get(name, self.losses_N.new_zeros(0, *self.shapes[name])) for name in names}

    def _written(self, name: str, factor: Factor, samples: Sequence[int]) -> Tensor:
        return factor.per_sample(samples, 0, self.shapes[name][0])

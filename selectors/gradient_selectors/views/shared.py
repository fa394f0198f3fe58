"""The gradients of a pool whose samples lie on several ranks: the views of one pool, each a call of all ranks.

Every rank makes passes over its own samples, and keeps their factors. What a view says of a sample is told to all.
K is computed by rows of the parameters: of each sample the rank that has it writes the gradient out, some rows at a
time, and gives each owner of rows its part; the owner multiplies, and the products are summed over ranks. So every view
is the same on all ranks, bit for bit, and equal to that of one process but for rounding.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradient_selectors.capture import gradients as written
from gradient_selectors.capture.factors import LowRank, MatrixFactor, TokenRows
from gradient_selectors.capture.gradients import Gradient, PoolGradients, scaled_products, summed
from gradient_selectors.preconditioner import Preconditioner, at_rows
from gradient_selectors.views.again import SecondPass, second_pass_of
from gradient_selectors.world.base import union
from gradient_selectors.world.deal import Shares, spans_of


@dataclass(frozen=True)
class Holdings:
    """What the ranks hold of a pool, and what they tell one another of it.

    Attributes:
        local: gradients of this rank's samples; of a sample that counts for nothing where it has none.
        shares: whose samples are whose.
    """

    local: PoolGradients
    shares: Shares

    def spread(self, own: Tensor | None) -> Tensor:
        """Numbers of all samples, (N,) float32, from those of this rank's; None stands for zeros."""
        count = len(self.shares.own)
        own_n = self.local.losses_N.new_zeros(count) if own is None else own[:count]
        return self.shares.spread(own_n)

    def tokens(self, name: str, samples: Sequence[int]) -> Tensor:
        """Rows of a table of tokens that stand out in some samples' gradients, sorted, int64."""
        own = self._own(samples)
        factors = self.local.factors.get(name, ()) if own else ()
        found = [factor.tokens(own) for factor in factors if isinstance(factor, TokenRows)]
        nothing = torch.zeros(0, dtype=torch.int64, device=self.local.losses_N.device)
        return union(self.shares.world, torch.cat([nothing, *found]))

    @torch.no_grad()
    def gram_at(
        self, name: str, samples: Sequence[int], rows: Tensor | None, root: Tensor | None, first: int = 0
    ) -> Tensor:
        """K of some samples within one parameter, at some rows (int64, sorted) or all, scaled by `root`; float64.

        `first`: of these rows, which one the first of `root` is for; it needs this rank's only.
        """
        world, shape = self.shares.world, self.local.shapes[name]
        places, own = self.shares.among(samples), self._own(samples)
        num_rows = shape[0] if rows is None else len(rows)
        order = torch.tensor([p for of_rank in places for p in of_rank], device=self.local.losses_N.device).argsort()
        gram = torch.zeros(len(samples), len(samples), dtype=torch.float64, device=self.local.losses_N.device)
        for spans in _spans(num_rows, world.size, len(samples), shape[1:].numel()):
            parts = [self._written(name, own, rows, lo, hi) for lo, hi in spans]
            lo, hi = spans[world.rank]
            size = (hi - lo) * shape[1:].numel()
            came = world.exchange(parts, [len(of_rank) * size for of_rank in places])
            if size:
                whole = torch.cat([part.view(-1, hi - lo, *shape[1:]) for part in came])[order]
                gram += scaled_products([whole], None if root is None else root[lo - first : hi - first])
        return world.sum(gram)

    def own_coefficients(self, coefficients: Tensor) -> Tensor:
        """Coefficients of the local pool's samples, from those of all, (N,) or (L, N)."""
        own_n = torch.zeros(*coefficients.shape[:-1], self.local.num_samples, dtype=coefficients.dtype)
        own_n[..., : len(self.shares.own)] = coefficients[..., list(self.shares.own)].to(own_n)
        return own_n

    def _own(self, samples: Sequence[int]) -> list[int]:
        """Places in the local pool of those of some samples that are this rank's."""
        known = {sample: place for place, sample in enumerate(self.shares.own)}
        return [known[i] for i in samples if i in known]

    def _written(self, name: str, own: list[int], rows: Tensor | None, lo: int, hi: int) -> Tensor:
        """Gradients of this rank's samples at rows `lo:hi`, or at those of `rows`, (n, hi - lo, ...) float32."""
        factors = self.local.factors.get(name, ())
        if not own or not factors or hi == lo:
            return self.local.losses_N.new_zeros(len(own), hi - lo, *self.local.shapes[name][1:])
        if rows is None:
            return self.local.written(name, own, lo, hi)
        return summed([factor.at_rows(own, rows[lo:hi]) for factor in factors if isinstance(factor, MatrixFactor)])


@dataclass(frozen=True)
class SharedPool(PoolGradients):
    """The per-sample gradients of all ranks' samples.

    Attributes:
        held: what the ranks hold.
        by_index: names of tables of which only some rows have gradients.
    """

    held: Holdings
    by_index: frozenset[str]

    @property
    def second(self) -> SecondPass | None:
        """How this rank's samples are run again."""
        return second_pass_of(self.held.local)

    @torch.no_grad()
    def dots(self, direction: Gradient) -> dict[str, Tensor]:
        found = self.held.local.dots({name: direction[name] for name in self.factors})
        return {name: self.held.spread(found.get(name)) for name in self.factors}

    @torch.no_grad()
    def utilities_of(self, name: str, target: Gradient, preconditioner: Preconditioner) -> Tensor:
        _ = target[name]  # summed by all, although some have no factors
        local = self.held.local
        return self.held.spread(local.utilities_of(name, target, preconditioner) if name in local.factors else None)

    @torch.no_grad()
    def weighted_gradient_of(self, name: str, coefficients: Tensor) -> Tensor:
        own_n = self.held.own_coefficients(coefficients)
        return self.held.shares.world.sum(self.held.local.weighted_gradient_of(name, own_n))

    @torch.no_grad()
    def gram_of(self, name: str, samples: Sequence[int], preconditioner: Preconditioner) -> Tensor:
        rows = self.held.tokens(name, samples) if name in self.by_index else None
        diagonal = at_rows(preconditioner, name, rows)
        return self.held.gram_at(name, samples, rows, None if diagonal is None else diagonal.sqrt())


@dataclass(frozen=True)
class SharedFactor:
    """All that the ranks have of one parameter's gradients. What a pool answers itself is not answered here."""

    held: Holdings
    name: str

    def dot(self, u: Tensor) -> Tensor:
        raise NotImplementedError("ask the pool")

    def add_weighted(self, weights_N: Tensor, out: Tensor, *, begin: bool) -> None:
        raise NotImplementedError("ask the pool")

    def per_sample(self, samples: Sequence[int], lo: int, hi: int) -> Tensor:
        raise NotImplementedError("no rank has the gradients of all samples")


@dataclass(frozen=True)
class SharedMatrix(SharedFactor):
    """The same of a matrix."""

    def along(self, direction: LowRank) -> Tensor:
        factors = [f for f in self.held.local.factors.get(self.name, ()) if isinstance(f, MatrixFactor)]
        own = torch.stack([factor.along(direction) for factor in factors]).sum(0) if factors else None
        return self.held.spread(own)

    def at_rows(self, samples: Sequence[int], rows: Tensor) -> Tensor:
        raise NotImplementedError("no rank has the gradients of all samples")

    def gram_at_rows(self, samples: Sequence[int], rows: Tensor, root: Tensor) -> Tensor:
        """Products of some samples' gradients at some rows, scaled by `root`, (n, n) float64."""
        return self.held.gram_at(self.name, samples, rows, root)


@dataclass(frozen=True)
class SharedTable(SharedMatrix):
    """The same of a matrix with a row for each token, as a head has."""

    def tokens(self, samples: Sequence[int]) -> Tensor:
        """Rows that stand out in some samples' gradients, sorted, int64."""
        return self.held.tokens(self.name, samples)


def _spans(num_rows: int, size: int, samples: int, row_size: int) -> list[list[tuple[int, int]]]:
    """Rows `lo:hi` of each rank, in turns that are alike everywhere and write little out at once."""
    spans = spans_of(size, num_rows)
    step = max(1, written.CHUNK_ELEMENTS // (samples * row_size))
    turns = range(0, spans[0][1], step)
    return [[(min(lo + begin, hi), min(lo + begin + step, hi)) for lo, hi in spans] for begin in turns]

"""The gradients of a pool whose samples lie on several ranks: the views of one pool, each a call of all ranks.

Every rank makes passes over its own samples, and keeps their factors. What a view says of a sample is told to all.
K is computed by rows of the parameters: of each sample the rank that has it writes the gradient out, some rows at a
time, and gives each owner of rows its part; the owner multiplies, and the products are summed over ranks. So every view
is the same on all ranks, bit for bit, and equal to that of one process but for rounding.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Size, Tensor

from gradient_selectors.capture import gradients as written
from gradient_selectors.capture.factors import LowRank, MatrixFactor, TokenRows
from gradient_selectors.capture.gradients import Gradient, PoolGradients, Rows, scaled_products, summed
from gradient_selectors.preconditioner import Preconditioner, at_rows
from gradient_selectors.views.again import SecondPass, second_pass_of
from gradient_selectors.world.base import union
from gradient_selectors.world.buckets import summed_in_buckets
from gradient_selectors.world.deal import Shares, spans_of


@dataclass(frozen=True, eq=False)
class Asked:
    """What of a parameter's gradients enters K.

    Attributes:
        rows: which rows, int64, sorted; None for all.
        root: sqrt(P) there; None for 1. A rank needs it for its own part of the rows only.
        first: of these rows, which one the first of `root` is for.
        scale: what the products are multiplied by.
    """

    name: str
    rows: Tensor | None
    root: Tensor | None
    first: int = 0
    scale: float = 1.0

    def root_at(self, lo: int, hi: int) -> Tensor | None:
        return None if self.root is None else self.root[lo - self.first : hi - self.first]


@dataclass(frozen=True, eq=False)
class Piece:
    """Some of the rows that are asked for.

    Attributes:
        row: shape of a row.
        spans: rows `lo:hi` of each rank.
    """

    asked: Asked
    row: Size
    spans: Sequence[tuple[int, int]]

    def size_of(self, rank: int) -> int:
        """Weights at a rank's rows."""
        lo, hi = self.spans[rank]
        return (hi - lo) * self.row.numel()


@dataclass(frozen=True)
class Holdings:
    """What the ranks hold of a pool, and what they tell one another of it.

    Attributes:
        local: gradients of this rank's samples; of a sample that counts for nothing where it has none.
        shares: whose samples are whose.
    """

    local: PoolGradients
    shares: Shares

    def spread(self, own: Tensor) -> Tensor:
        """Numbers of all samples, (N, ...), from those of the local pool's."""
        return self.shares.spread(own[: len(self.shares.own)])

    def along(self, name: str, u: Tensor) -> Tensor:
        """`<u, g_i>` of the local pool's samples within one parameter, (n,) float32."""
        factors = self.local.factors.get(name, ())
        return torch.stack([factor.dot(u) for factor in factors]).sum(0) if factors else self.nothing

    @property
    def nothing(self) -> Tensor:
        """What samples have within a parameter that none of them has a gradient of, (n,) float32."""
        return torch.zeros_like(self.local.losses_N)

    def tokens(self, name: str, samples: Sequence[int]) -> Tensor:
        """Rows of a table of tokens that stand out in some samples' gradients, sorted, int64."""
        own = self._own(samples)
        factors = self.local.factors.get(name, ()) if own else ()
        found = [factor.tokens(own) for factor in factors if isinstance(factor, TokenRows)]
        nothing = torch.zeros(0, dtype=torch.int64, device=self.local.losses_N.device)
        return union(self.shares.world, torch.cat([nothing, *found]))

    @torch.no_grad()
    def gram(self, samples: Sequence[int], asked: Iterable[Asked]) -> Tensor:
        """A rank's share of K of some samples at what is asked for, float64; the sum over ranks is all of it."""
        world, places, own = self.shares.world, self.shares.among(samples), self._own(samples)
        order = torch.tensor([p for of_rank in places for p in of_rank], device=self.local.losses_N.device).argsort()
        gram = torch.zeros(len(samples), len(samples), dtype=torch.float64, device=self.local.losses_N.device)
        for turn in self._turns(asked, len(samples)):
            parts = [self._parts(turn, own, rank) for rank in range(world.size)]
            sizes = [piece.size_of(world.rank) for piece in turn]
            came = world.exchange(parts, [len(of_rank) * sum(sizes) for of_rank in places])
            of_ranks = [torch.split(c, [len(p) * s for s in sizes]) for c, p in zip(came, places, strict=True)]
            for piece, *of_piece in zip(turn, *of_ranks, strict=True):
                lo, hi = piece.spans[world.rank]
                if hi > lo:
                    whole = torch.cat([part.view(-1, hi - lo, *piece.row) for part in of_piece])[order]
                    gram.add_(scaled_products([whole], piece.asked.root_at(lo, hi)), alpha=piece.asked.scale)
        return gram

    def own_coefficients(self, coefficients: Tensor) -> Tensor:
        """Coefficients of the local pool's samples, from those of all, (N,) or (L, N)."""
        own_n = torch.zeros(*coefficients.shape[:-1], self.local.num_samples, dtype=coefficients.dtype)
        own_n[..., : len(self.shares.own)] = coefficients[..., list(self.shares.own)].to(own_n)
        return own_n

    def _own(self, samples: Sequence[int]) -> list[int]:
        """Places in the local pool of those of some samples that are this rank's."""
        known = {sample: place for place, sample in enumerate(self.shares.own)}
        return [known[i] for i in samples if i in known]

    def _turns(self, asked: Iterable[Asked], count: int) -> Iterator[list[Piece]]:
        """What is exchanged at once: as much as is written out at once, cut alike everywhere."""
        turn: list[Piece] = []
        size = 0
        for one in asked:
            shape = self.local.shapes[one.name]
            num_rows = shape[0] if one.rows is None else len(one.rows)
            for spans in _spans(num_rows, self.shares.world.size, count, shape[1:].numel()):
                piece = Piece(one, shape[1:], spans)
                if turn and size + count * piece.size_of(0) > written.CHUNK_ELEMENTS:
                    yield turn
                    turn, size = [], 0
                turn.append(piece)
                size += count * piece.size_of(0)  # the first rank's is the largest
        if turn:
            yield turn

    def _parts(self, turn: Sequence[Piece], own: list[int], rank: int) -> Tensor:
        """What a rank is given: gradients of this rank's samples at that one's rows, flat, float32."""
        return torch.cat([self._written(piece.asked, own, *piece.spans[rank]).flatten() for piece in turn])

    def _written(self, asked: Asked, own: list[int], lo: int, hi: int) -> Tensor:
        """Gradients of this rank's samples at rows `lo:hi` of what is asked for, (n, hi - lo, ...) float32."""
        factors = self.local.factors.get(asked.name, ())
        if not own or not factors or hi == lo:
            return self.local.losses_N.new_zeros(len(own), hi - lo, *self.local.shapes[asked.name][1:])
        if asked.rows is None:
            return self.local.written(asked.name, own, lo, hi)
        rows = asked.rows[lo:hi]
        return summed([factor.at_rows(own, rows) for factor in factors if isinstance(factor, MatrixFactor)])


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
        return self.of_all({name: found.get(name, self.held.nothing) for name in self.factors})

    def total(self, gram: Tensor) -> Tensor:
        return self.held.shares.world.sum(gram)

    def of_all(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not own:
            return {}
        everything = self.held.spread(torch.stack(list(own.values()), dim=1))
        return dict(zip(own, everything.T.contiguous().unbind(), strict=True))

    @torch.no_grad()
    def utilities_of(self, name: str, target: Gradient, preconditioner: Preconditioner) -> Tensor:
        _ = target[name]  # summed by all, although some have no factors
        local = self.held.local
        return local.utilities_of(name, target, preconditioner) if name in local.factors else self.held.nothing

    @torch.no_grad()
    def weighted_gradient_of(self, name: str, coefficients: Tensor) -> Tensor:
        own_n = self.held.own_coefficients(coefficients)
        return self.held.shares.world.sum(self.held.local.weighted_gradient_of(name, own_n))

    @torch.no_grad()
    def updates(self, coefficients: Tensor) -> Iterator[tuple[str, Tensor]]:
        own_n, local = self.held.own_coefficients(coefficients), self.held.local
        own = ((name, local.weighted_gradient_of(name, own_n)) for name in self.factors)
        return summed_in_buckets(self.held.shares.world, own)

    @torch.no_grad()
    def gram_of(self, name: str, samples: Sequence[int], preconditioner: Preconditioner) -> Tensor:
        return self.held.gram(samples, [self._asked(name, samples, preconditioner)])

    @torch.no_grad()
    def gram_within(self, names: Sequence[str], samples: Sequence[int], preconditioner: Preconditioner) -> Tensor:
        return self.held.gram(samples, (self._asked(name, samples, preconditioner) for name in names))

    def _asked(self, name: str, samples: Sequence[int], preconditioner: Preconditioner) -> Asked:
        rows = self.held.tokens(name, samples) if name in self.by_index else None
        diagonal = at_rows(preconditioner, name, rows)
        return Asked(name, rows, None if diagonal is None else diagonal.sqrt())

    @torch.no_grad()
    def gram_at(self, samples: Sequence[int], asked: Iterable[Rows]) -> Tensor:
        return self.held.gram(samples, (Asked(a.name, a.rows_n, a.root_nd, scale=a.scale) for a in asked))


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
        return torch.stack([factor.along(direction) for factor in factors]).sum(0) if factors else self.held.nothing

    def at_rows(self, samples: Sequence[int], rows: Tensor) -> Tensor:
        raise NotImplementedError("no rank has the gradients of all samples")


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

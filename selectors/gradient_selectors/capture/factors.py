"""Per-sample gradients as factors: what they can answer without ever being written out in full.

A factor is one contribution to one parameter's gradient: a module that is used twice, or a head tied to an embedding,
contributes several factors to the same parameter. All have the same three operations, for N samples and a parameter of
shape (p, ...):

- `dot(u)`: `<u, g_i>` for every sample (code of the "fixed direction" identity `sum_t b_t^T U a_t`);
- `add_weighted(w, out, begin)`: `out += sum_i w_i g_i`, touching only samples whose weight is not zero;
- `per_sample(samples, lo, hi)`: rows `lo:hi` of the gradients of some samples, written out.

Shape suffixes: N samples, n of these samples, R rows (tokens of all samples, one sample after the other), p and d the
parameter's rows and columns. Sums are accumulated in float32 whatever the dtype of the factors.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


class Factor(Protocol):
    """One contribution to the per-sample gradients of one parameter."""

    def dot(self, u: Tensor) -> Tensor:
        """`<u, g_i>` for each sample, (N,) float32. `u` has the parameter's shape."""

    def add_weighted(self, weights_N: Tensor, out: Tensor, *, begin: bool) -> None:
        """Add `sum_i w_i g_i` to `out`, a float32 tensor of the parameter's shape.

        With `begin` it holds nothing yet, and is overwritten: zeros to add to would be one more pass over a tensor as
        large as the parameter.
        """

    def per_sample(self, samples: Sequence[int], lo: int, hi: int) -> Tensor:
        """Rows `lo:hi` of some samples' gradients, (n, hi - lo, ...) float32: the caller's to overwrite."""


@dataclass(frozen=True, eq=False)  # compared by identity: what was computed for one is valid for that one only
class LowRank:
    """A direction of a matrix's shape as `left right^T`, float32."""

    left_pr: Tensor
    right_dr: Tensor


@runtime_checkable
class MatrixFactor(Factor, Protocol):
    """A contribution to a matrix, which knows cheaper answers: along a direction of low rank, at some rows."""

    def along(self, direction: LowRank) -> Tensor:
        """`<left right^T, g_i>` for each sample, (N,) float32: `2 R r (p + d)` operations for R rows and rank r."""

    def at_rows(self, samples: Sequence[int], rows: Tensor) -> Tensor:
        """Some rows (int64, sorted) of some samples' gradients, (n, rows, d) float32: the caller's to overwrite."""


@runtime_checkable
class TokenRows(Protocol):
    """A contribution to a table of tokens."""

    def tokens(self, samples: Sequence[int]) -> Tensor:
        """Rows that stand out in some samples' gradients, int64: those of their own tokens."""


@dataclass(frozen=True)
class Segments:
    """Which rows of a flattened (R, ...) tensor belong to which sample: sample i owns `offsets[i]:offsets[i + 1]`."""

    offsets: tuple[int, ...]

    @property
    def num_samples(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def owners_R(self) -> Tensor:
        """The sample of each row, (R,) int64 on the CPU."""
        lengths = torch.tensor(self.offsets).diff()
        return torch.repeat_interleave(torch.arange(self.num_samples), lengths)

    def span(self, sample: int) -> slice:
        return slice(self.offsets[sample], self.offsets[sample + 1])

    def length(self, sample: int) -> int:
        return self.offsets[sample + 1] - self.offsets[sample]

    def sum(self, values_R: Tensor) -> Tensor:
        """Sum of a row quantity within each sample, (N,) float32."""
        sums_N = torch.zeros(self.num_samples, dtype=torch.float32, device=values_R.device)
        return sums_N.index_add_(0, self.owners_R.to(values_R.device), values_R.float())

    def covers(self, samples: Sequence[int]) -> bool:
        """Whether these are all samples in their own order, so that nothing needs copying."""
        return list(samples) == list(range(self.num_samples))

    def gather(self, values: Tensor, samples: Sequence[int]) -> Tensor:
        """The rows of some samples, one sample after the other."""
        if self.covers(samples):
            return values
        return torch.cat([values[self.span(i)] for i in samples])

    def among(self, samples: Sequence[int]) -> "Segments":
        """The segments of the rows that `gather` returns."""
        if self.covers(samples):
            return self
        return Segments((0, *accumulate(self.length(i) for i in samples)))

    def weights(self, weights_N: Tensor, samples: Sequence[int], like: Tensor) -> Tensor:
        """The weight of each gathered row, (R', 1) in the dtype and on the device of `like`."""
        rows = [weights_N[i].expand(self.length(i)) for i in samples]
        return torch.cat(rows).to(like).unsqueeze(1)


def nonzero_samples(weights_N: Tensor) -> list[int]:
    """Samples that an update must read. The others are not touched, so a NaN in one of them leaves no trace."""
    return [i for i, weight in enumerate(weights_N.tolist()) if weight != 0.0]


def add_product(out: Tensor, left: Tensor, right: Tensor, *, begin: bool) -> None:
    """`out += left @ right`, or `out = left @ right` to begin with; `out` is float32, the others are of one dtype."""
    if left.dtype == torch.float32:
        out.addmm_(left, right, beta=0.0 if begin else 1.0)
    elif begin:
        out.copy_(left @ right)
    else:
        out += left @ right


@dataclass(frozen=True)
class Outer:
    """A matrix whose per-sample gradient is `left_i^T right_i`.

    For a Linear (weight d_out x d_in) left are the output gradients and right the inputs; for a weight stored the
    other way round (transformers' Conv1D) they change places.
    """

    left_Rp: Tensor
    right_Rd: Tensor
    segments: Segments

    def dot(self, u: Tensor) -> Tensor:
        u = u.to(self.left_Rp.dtype)
        # Same FLOPs either way; the narrower side makes the smaller intermediate.
        if self.left_Rp.shape[1] <= self.right_Rd.shape[1]:
            products_R = torch.linalg.vecdot((self.right_Rd @ u.T).float(), self.left_Rp.float())
        else:
            products_R = torch.linalg.vecdot((self.left_Rp @ u).float(), self.right_Rd.float())
        return self.segments.sum(products_R)

    def along(self, direction: LowRank) -> Tensor:
        left_Rr = self.left_Rp @ direction.left_pr.to(self.left_Rp.dtype)
        right_Rr = self.right_Rd @ direction.right_dr.to(self.right_Rd.dtype)
        return self.segments.sum(torch.linalg.vecdot(left_Rr.float(), right_Rr.float()))

    def add_weighted(self, weights_N: Tensor, out: Tensor, *, begin: bool) -> None:
        samples = nonzero_samples(weights_N)
        left = self.segments.gather(self.left_Rp, samples)
        left = left * self.segments.weights(weights_N, samples, left)
        add_product(out, left.T, self.segments.gather(self.right_Rd, samples), begin=begin)

    def per_sample(self, samples: Sequence[int], lo: int, hi: int) -> Tensor:
        out = torch.empty(
            len(samples), hi - lo, self.right_Rd.shape[1], dtype=self.right_Rd.dtype, device=self.right_Rd.device
        )
        for row, i in enumerate(samples):
            span = self.segments.span(i)
            torch.mm(self.left_Rp[span, lo:hi].T, self.right_Rd[span], out=out[row])
        return out.float()

    def at_rows(self, samples: Sequence[int], rows: Tensor) -> Tensor:
        spans = [self.segments.span(i) for i in samples]
        lefts = [self.left_Rp[span].index_select(1, rows) for span in spans]
        return torch.stack([left.T @ self.right_Rd[span] for left, span in zip(lefts, spans, strict=True)]).float()


def only_outers(factors: Sequence[Factor]) -> list[Outer]:
    """The factors of a matrix of linear layers, or none where it is used in another way too."""
    outers = [factor for factor in factors if isinstance(factor, Outer)]
    return outers if len(outers) == len(factors) else []


@dataclass(frozen=True)
class Lookup:
    """An embedding table, by index: token t adds its gradient to row `ids[t]`. Never one-hot, never N x V x d."""

    ids_R: Tensor
    grads_Rd: Tensor
    segments: Segments

    def dot(self, u: Tensor) -> Tensor:
        return self.segments.sum(torch.linalg.vecdot(u[self.ids_R].float(), self.grads_Rd.float()))

    def along(self, direction: LowRank) -> Tensor:
        right_Rr = self.grads_Rd @ direction.right_dr.to(self.grads_Rd.dtype)
        return self.segments.sum(torch.linalg.vecdot(direction.left_pr[self.ids_R], right_Rr.float()))

    def add_weighted(self, weights_N: Tensor, out: Tensor, *, begin: bool) -> None:
        samples = nonzero_samples(weights_N)
        if begin:
            out.zero_()
        grads = self.segments.gather(self.grads_Rd, samples).float()
        out.index_add_(
            0, self.segments.gather(self.ids_R, samples), grads * self.segments.weights(weights_N, samples, grads)
        )

    def per_sample(self, samples: Sequence[int], lo: int, hi: int) -> Tensor:
        out = self.grads_Rd.new_zeros(len(samples), hi - lo, self.grads_Rd.shape[1], dtype=torch.float32)
        for row, i in enumerate(samples):
            ids, grads = self.ids_R[self.segments.span(i)], self.grads_Rd[self.segments.span(i)]
            inside = (ids >= lo) & (ids < hi)
            out[row].index_add_(0, ids[inside] - lo, grads[inside].float())
        return out

    def at_rows(self, samples: Sequence[int], rows: Tensor) -> Tensor:
        out = self.grads_Rd.new_zeros(len(samples), len(rows), self.grads_Rd.shape[1], dtype=torch.float32)
        for row, i in enumerate(samples):
            ids, grads = self.ids_R[self.segments.span(i)], self.grads_Rd[self.segments.span(i)]
            inside = torch.isin(ids, rows)
            out[row].index_add_(0, torch.searchsorted(rows, ids[inside]), grads[inside].float())
        return out

    def tokens(self, samples: Sequence[int]) -> Tensor:
        """Tokens of some samples, int64: the only rows of their gradients that are not zero."""
        return self.segments.gather(self.ids_R, samples)

    def compact(self, rows: Tensor) -> "Lookup":
        """The same factor for a table that holds only `rows` (sorted, and holding every id)."""
        return Lookup(torch.searchsorted(rows, self.ids_R), self.grads_Rd, self.segments)


@dataclass(frozen=True)
class Written:
    """A vector (bias, norm) or a narrow matrix (LoRA's): the per-sample gradients, (N, p, ...), simply written out."""

    grads_Np: Tensor

    def dot(self, u: Tensor) -> Tensor:
        return self.grads_Np.flatten(1) @ u.float().flatten()

    def add_weighted(self, weights_N: Tensor, out: Tensor, *, begin: bool) -> None:
        samples = nonzero_samples(weights_N)
        if begin:
            out.zero_()
        out += torch.tensordot(weights_N[samples].to(self.grads_Np), self.grads_Np[samples], 1)

    def per_sample(self, samples: Sequence[int], lo: int, hi: int) -> Tensor:
        return self.grads_Np[list(samples), lo:hi]

"""Per-sample gradients of experts, whose weights are one tensor (E, p, d) and whose rows are tokens sent to them.

Rows are sorted by expert and, within an expert, by sample: what one sample left with one expert is a slice. Gradients
are never written out for experts that a sample's tokens were not sent to.

Shape suffixes: E experts, S rows (tokens sent to experts, each once for each of its experts), others as in `factors`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gradient_selectors.capture.factors import Lookup, Segments, add_product, nonzero_samples


@dataclass(frozen=True)
class Dispatch:
    """Which rows belong to which expert and sample: (e, i) owns `offsets[e * N + i]:offsets[e * N + i + 1]`."""

    num_samples: int
    offsets: tuple[int, ...]

    @property
    def num_experts(self) -> int:
        return (len(self.offsets) - 1) // self.num_samples

    def span(self, expert: int, sample: int | None = None) -> slice:
        """The rows of an expert; only those of one sample where one is given."""
        first = expert * self.num_samples + (sample or 0)
        return slice(self.offsets[first], self.offsets[first + (self.num_samples if sample is None else 1)])

    def used(self, lo: int = 0, hi: int | None = None) -> Iterator[tuple[int, slice]]:
        """Experts from `lo` on and before `hi` that were sent anything, with their rows."""
        for expert in range(lo, self.num_experts if hi is None else hi):
            rows = self.span(expert)
            if rows.start < rows.stop:
                yield expert, rows

    @cached_property
    def cells_S(self) -> Tensor:
        """`e * N + i` of each row, int64 on the CPU."""
        return torch.repeat_interleave(torch.arange(len(self.offsets) - 1), torch.tensor(self.offsets).diff())

    @property
    def owners_S(self) -> Tensor:
        """The sample of each row."""
        return self.cells_S % self.num_samples

    def lookup(self, grads_Sp: Tensor) -> Lookup:
        """Of biases, (E, p): a row adds its gradient to that of its expert."""
        owners_S = self.owners_S
        order = owners_S.argsort(stable=True)
        counts_N = torch.bincount(owners_S, minlength=self.num_samples)
        segments = Segments((0, *counts_N.cumsum(0).tolist()))
        there = order.to(grads_Sp.device)
        return Lookup((self.cells_S // self.num_samples).to(there.device)[there], grads_Sp[there], segments)


@dataclass(frozen=True)
class ExpertOuter:
    """Matrices (E, p, d): what sample i adds to that of expert e is `left^T right` over the rows of both."""

    left_Sp: Tensor
    right_Sd: Tensor
    dispatch: Dispatch

    def dot(self, u: Tensor) -> Tensor:
        products_S = torch.zeros(len(self.left_Sp), device=self.left_Sp.device)
        for expert, rows in self.dispatch.used():
            left, right = self.left_Sp[rows], self.right_Sd[rows]
            products_S[rows] = torch.linalg.vecdot((right @ u[expert].T.to(right.dtype)).float(), left.float())
        sums_N = torch.zeros(self.dispatch.num_samples, device=products_S.device)
        return sums_N.index_add_(0, self.dispatch.owners_S.to(products_S.device), products_S)

    def add_weighted(self, weights_N: Tensor, out: Tensor, *, begin: bool) -> None:
        if begin:
            out.zero_()
        samples = nonzero_samples(weights_N)
        is_read_N = torch.zeros(self.dispatch.num_samples, dtype=torch.bool)
        is_read_N[samples] = True
        owners_S = self.dispatch.owners_S
        weights_S = weights_N.cpu()[owners_S].to(self.left_Sp)
        for expert, rows in self.dispatch.used():
            read = is_read_N[owners_S[rows]].nonzero().squeeze(1).to(self.left_Sp.device)
            left = self.left_Sp[rows][read] * weights_S[rows][read, None]
            add_product(out[expert], left.T, self.right_Sd[rows][read], begin=False)

    def per_sample(self, samples: Sequence[int], lo: int, hi: int) -> Tensor:
        p, d = self.left_Sp.shape[1], self.right_Sd.shape[1]
        out = torch.zeros(len(samples), hi - lo, p, d, device=self.left_Sp.device)
        for expert, _ in self.dispatch.used(lo, hi):
            for row, sample in enumerate(samples):
                rows = self.dispatch.span(expert, sample)
                if rows.start < rows.stop:
                    out[row, expert - lo] = self.left_Sp[rows].T @ self.right_Sd[rows]
        return out

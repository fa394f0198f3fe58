"""The language-model head in chunks: loss, gradient of the hidden states and per-sample weight gradients.

The logits of a pool are N x T x V numbers, often more than all activations together. Only positions that carry loss are
computed, some rows at a time. The output gradients `softmax - onehot`, R x V numbers, are kept up to `KEPT_ELEMENTS` of
them; beyond, they are computed again when they are needed, which costs one more matmul for each use.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from gradient_selectors.capture.batch import loss_rows
from gradient_selectors.capture.factors import LowRank, Segments, add_product, nonzero_samples

# Logits held at once, 134 MB in float32. Every chunk reads the whole weight, so chunks of few rows read it too often.
CHUNK_ELEMENTS = 2**25
UPDATE_ELEMENTS = 8_000_000  # errors gathered at once for the update; larger parts are slower
# Errors kept, 537 MB in float32. Plain training holds several times as many numbers (the logits, their gradient and
# copies), and errors that are not kept cost another matmul for each use.
KEPT_ELEMENTS = 2**27


@dataclass(frozen=True)
class Head:
    """A linear map from hidden states to logits: `weight` (V x d), `bias` (V) or None, in the dtype of its matmuls.

    Converted once: autocast would convert the weight again for every chunk, at more cost than the chunk's matmuls.
    """

    weight: Tensor
    bias: Tensor | None

    def logits(self, hidden_Rd: Tensor) -> Tensor:
        """Logits in float32."""
        return F.linear(hidden_Rd.to(self.weight.dtype), self.weight, self.bias).float()

    def columns(self, rows: slice | Tensor) -> "Head":
        """The head for some of the vocabulary's rows."""
        return Head(self.weight[rows], None if self.bias is None else self.bias[rows])


@dataclass(frozen=True)
class HeadRows:
    """The positions of a pool that carry loss, in the order of the samples.

    Attributes:
        hidden_Rd: their last hidden states.
        labels_R: the token each of them predicts.
        scale_R: what errors are to be multiplied with: one over the number of such positions in the sample, whose loss
            is their mean; of errors that were kept, over their sum of exponentials too.
        normaliser_R: log of the sum of the exponentials of the logits.
        direction: what the pass was told to take products along, if anything.
        products_R: each position's share of those products.
        errors_RV: the errors in the dtype of the head, or None if they are too many to be kept.
    """

    hidden_Rd: Tensor
    labels_R: Tensor
    scale_R: Tensor
    normaliser_R: Tensor
    segments: Segments
    direction: LowRank | None = None
    products_R: Tensor | None = None
    errors_RV: Tensor | None = None

    def chunks(self, vocabulary: int) -> Iterator[slice]:
        step = max(1, CHUNK_ELEMENTS // vocabulary)
        for start in range(0, len(self.labels_R), step):
            yield slice(start, start + step)


def head_losses(head: Head, hidden_NTd: Tensor, labels_NT: Tensor) -> Tensor:
    """Mean loss of each sample (nats per token), (N,) float32; NaN for a sample without any label."""
    rows = _head_rows(hidden_NTd, labels_NT)
    token_loss_R = torch.empty_like(rows.scale_R)
    for chunk in rows.chunks(head.weight.shape[0]):
        logits_RV = head.logits(rows.hidden_Rd[chunk])
        token_loss_R[chunk] = F.cross_entropy(logits_RV, rows.labels_R[chunk], reduction="none")
    return _mean_within_samples(token_loss_R, rows)


def head_forward_backward(
    head: Head, hidden_NTd: Tensor, labels_NT: Tensor, direction: LowRank | None, *, trainable: bool
) -> tuple[Tensor, Tensor, HeadRows]:
    """Losses, the gradient of their sum with respect to the hidden states, and what weight gradients need later.

    Products of the weight gradients with `direction` are taken while the output gradients are there. No errors are kept
    for a head that is not trainable.

    Returns:
        losses_N: mean loss of each sample (nats per token), float32; NaN for a sample without any label.
        grad_NTd: gradient with respect to `hidden_NTd`, in its dtype; zero where a position carries no loss.
        rows: the positions that carry loss.
    """
    rows = _head_rows(hidden_NTd, labels_NT)
    if direction is not None:
        rows = replace(rows, direction=direction, products_R=torch.empty_like(rows.scale_R))
    token_loss_R, scale_R1 = torch.empty_like(rows.scale_R), rows.scale_R[:, None].clone()
    grad_Rd, kept_RV = torch.empty_like(rows.hidden_Rd), _room_for_errors(head, rows) if trainable else None
    for chunk in rows.chunks(head.weight.shape[0]):
        hidden_Rd, logits_RV = rows.hidden_Rd[chunk], head.logits(rows.hidden_Rd[chunk])
        picked_R1 = logits_RV.gather(1, rows.labels_R[chunk, None])
        errors_RV, largest_R1, sums_R1 = _unnormalised_errors(logits_RV, rows.labels_R[chunk])
        normaliser_R1 = largest_R1 + sums_R1.log()
        rows.normaliser_R[chunk] = normaliser_R1.squeeze(1)
        token_loss_R[chunk] = (normaliser_R1 - picked_R1).squeeze(1)
        scale_R1[chunk] /= sums_R1
        errors_RV = errors_RV.to(head.weight.dtype)
        grad_Rd[chunk] = ((errors_RV @ head.weight).float() * scale_R1[chunk]).to(grad_Rd.dtype)
        if direction is not None and rows.products_R is not None:
            rows.products_R[chunk] = _along(errors_RV, hidden_Rd, direction) * scale_R1[chunk].squeeze(1)
        if kept_RV is not None:
            kept_RV[chunk] = errors_RV
    grad_NTd = torch.zeros_like(hidden_NTd)
    grad_NTd[loss_rows(labels_NT)[0]] = grad_Rd
    losses_N = _mean_within_samples(token_loss_R, rows)
    if kept_RV is not None:
        rows = replace(rows, errors_RV=kept_RV, scale_R=scale_R1.squeeze(1))
    return losses_N, grad_NTd, rows


def _room_for_errors(head: Head, rows: HeadRows) -> Tensor | None:
    shape = len(rows.labels_R), len(head.weight)
    return head.weight.new_empty(shape) if shape[0] * shape[1] <= KEPT_ELEMENTS else None


def _head_rows(hidden_NTd: Tensor, labels_NT: Tensor) -> HeadRows:
    predicts_NT, labels_R, segments = loss_rows(labels_NT)
    hidden_Rd = hidden_NTd[predicts_NT]
    counts_N = torch.tensor(segments.offsets, device=hidden_Rd.device).diff().float()
    scale_R = (1.0 / counts_N)[segments.owners_R.to(hidden_Rd.device)]
    return HeadRows(hidden_Rd, labels_R, scale_R, torch.empty_like(scale_R), segments)


def _mean_within_samples(token_loss_R: Tensor, rows: HeadRows) -> Tensor:
    losses_N = rows.segments.sum(token_loss_R * rows.scale_R)
    losses_N[torch.tensor(rows.segments.offsets).diff() == 0] = torch.nan
    return losses_N


def _unnormalised_errors(logits_RV: Tensor, labels_R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`s (softmax - onehot)` in place of the logits, their largest, and `s`, the sum of `exp(logits - largest)`.

    Dividing by `s` comes after the multiplication: then it is a pass over R x d numbers, not over R x V. The same holds
    for `1 / tokens`.
    """
    largest_R1 = logits_RV.amax(1, keepdim=True)
    errors_RV = logits_RV.sub_(largest_R1).exp_()
    sums_R1 = errors_RV.sum(1, keepdim=True)
    return errors_RV.scatter_add_(1, labels_R[:, None], -sums_R1), largest_R1, sums_R1


def _errors(logits_RV: Tensor, rows: HeadRows, chunk: slice) -> Tensor:
    """`softmax - onehot` in place of the logits, from the normaliser that is known; times `scale_R` the gradients."""
    errors_RV = logits_RV.sub_(rows.normaliser_R[chunk, None]).exp_()
    return errors_RV.scatter_add_(1, rows.labels_R[chunk, None], errors_RV.new_full((len(errors_RV), 1), -1.0))


def _along(errors_RV: Tensor, hidden_Rd: Tensor, direction: LowRank) -> Tensor:
    left_Rr = errors_RV @ direction.left_pr.to(errors_RV.dtype)
    right_Rr = hidden_Rd @ direction.right_dr.to(hidden_Rd.dtype)
    products_R: Tensor = torch.linalg.vecdot(left_Rr.float(), right_Rr.float())
    return products_R


@dataclass(frozen=True)
class HeadWeight:
    """Factor of the head's weight: `errors_i^T hidden_i`, the errors computed again where they were not kept.

    They come without their scale, which is multiplied into what is smaller.
    """

    head: Head
    rows: HeadRows

    def _error_chunks(self) -> Iterator[tuple[Tensor, Tensor, slice]]:
        """Errors and hidden states some positions at a time: where every position needs its whole row."""
        for chunk in self.rows.chunks(self.head.weight.shape[0]):
            hidden_Rd = self.rows.hidden_Rd[chunk]
            if self.rows.errors_RV is not None:
                yield self.rows.errors_RV[chunk], hidden_Rd, chunk
                continue
            errors_RV = _errors(self.head.logits(hidden_Rd), self.rows, chunk)
            yield errors_RV.to(self.head.weight.dtype), hidden_Rd, chunk

    def dot(self, u: Tensor) -> Tensor:
        products_R, u = torch.empty_like(self.rows.scale_R), u.to(self.head.weight.dtype)
        for errors_RV, hidden_Rd, chunk in self._error_chunks():
            products_R[chunk] = torch.linalg.vecdot((errors_RV @ u).float(), hidden_Rd.float())
        return self.rows.segments.sum(products_R * self.rows.scale_R)

    def along(self, direction: LowRank) -> Tensor:
        """Free for the direction that the pass knew; for another one, the errors are computed again."""
        if direction is self.rows.direction and self.rows.products_R is not None:
            return self.rows.segments.sum(self.rows.products_R)
        products_R = torch.empty_like(self.rows.scale_R)
        for errors_RV, hidden_Rd, chunk in self._error_chunks():
            products_R[chunk] = _along(errors_RV, hidden_Rd, direction)
        return self.rows.segments.sum(products_R * self.rows.scale_R)

    def add_weighted(self, weights_N: Tensor, out: Tensor, *, begin: bool) -> None:
        """Some rows of the vocabulary at a time: each is added to `out` once, not once for each chunk of positions."""
        samples, dtype = nonzero_samples(weights_N), self.head.weight.dtype
        rows = _gather(self.rows, samples)
        scale_R1 = rows.scale_R[:, None] * self.rows.segments.weights(weights_N, samples, rows.scale_R)
        weighted_Rd = (rows.hidden_Rd.float() * scale_R1).to(dtype)
        step = max(1, UPDATE_ELEMENTS // len(weighted_Rd))
        for lo in range(0, len(out), step):
            errors_Rv = self._errors_of_columns(samples, rows, lo, min(lo + step, len(out))).to(dtype)
            add_product(out[lo : lo + step], errors_Rv.T, weighted_Rd, begin=begin)

    def per_sample(self, samples: Sequence[int], lo: int, hi: int) -> Tensor:
        return self._columns(samples, slice(lo, hi), with_hidden=True)

    def at_rows(self, samples: Sequence[int], rows: Tensor) -> Tensor:
        return self._columns(samples, rows, with_hidden=True)

    def tokens(self, samples: Sequence[int]) -> Tensor:
        """Tokens that some samples predict, int64: their rows stand out in their gradients."""
        return self.rows.segments.gather(self.rows.labels_R, samples)

    def _errors_at(self, sample: int, positions: HeadRows, rows: Tensor) -> Tensor:
        """Some rows of the vocabulary only, of one sample whose positions are `positions`, float32."""
        if self.rows.errors_RV is not None:
            return self.rows.errors_RV[self.rows.segments.span(sample)].index_select(1, rows).float()
        logits_Rv = self.head.columns(rows).logits(positions.hidden_Rd)
        errors_Rv = logits_Rv.sub_(positions.normaliser_R[:, None]).exp_()
        return errors_Rv.sub_((positions.labels_R[:, None] == rows).float())

    def _columns(self, samples: Sequence[int], columns: slice | Tensor, *, with_hidden: bool) -> Tensor:
        out = []
        for i in samples:
            rows = _gather(self.rows, [i])
            if isinstance(columns, slice):
                errors_Rv = self._errors_of_columns([i], rows, columns.start, columns.stop).float()
            else:
                errors_Rv = self._errors_at(i, rows, columns)
            errors_Rv = errors_Rv * rows.scale_R[:, None]
            out.append(errors_Rv.T @ rows.hidden_Rd.float() if with_hidden else errors_Rv.sum(0))
        return torch.stack(out)

    def _errors_of_columns(self, samples: Sequence[int], rows: HeadRows, lo: int, hi: int) -> Tensor:
        """Rows `lo:hi` of the vocabulary only, of some samples whose positions are `rows`; not to be overwritten.

        The stored normaliser makes their softmax exact without the others.
        """
        if self.rows.errors_RV is not None:
            return self.rows.segments.gather(self.rows.errors_RV[:, lo:hi], samples)
        logits_Rv = self.head.columns(slice(lo, hi)).logits(rows.hidden_Rd)
        errors_Rv = logits_Rv.sub_(rows.normaliser_R[:, None]).exp_()
        inside_R = ((rows.labels_R >= lo) & (rows.labels_R < hi)).nonzero().squeeze(1)
        errors_Rv[inside_R, rows.labels_R[inside_R] - lo] -= 1.0
        return errors_Rv


def _gather(rows: HeadRows, samples: Sequence[int]) -> HeadRows:
    """The rows of some samples as a pool of their own."""
    if rows.segments.covers(samples):
        return rows
    fields = (rows.hidden_Rd, rows.labels_R, rows.scale_R, rows.normaliser_R)
    hidden_Rd, labels_R, scale_R, normaliser_R = (rows.segments.gather(field, samples) for field in fields)
    return HeadRows(hidden_Rd, labels_R, scale_R, normaliser_R, rows.segments.among(samples))


@dataclass(frozen=True)
class HeadBias:
    """Factor of the head's bias: the errors summed over a sample's positions."""

    weight: HeadWeight

    def _all(self) -> Tensor:
        samples = range(self.weight.rows.segments.num_samples)
        return self.per_sample(samples, 0, self.weight.head.weight.shape[0])

    def dot(self, u: Tensor) -> Tensor:
        return self._all() @ u.float()

    def add_weighted(self, weights_N: Tensor, out: Tensor, *, begin: bool) -> None:
        samples = nonzero_samples(weights_N)
        if begin:
            out.zero_()
        out += weights_N[samples].to(out) @ self.per_sample(samples, 0, len(out))

    def per_sample(self, samples: Sequence[int], lo: int, hi: int) -> Tensor:
        return self.weight._columns(samples, slice(lo, hi), with_hidden=False)

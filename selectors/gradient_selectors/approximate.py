"""Approximate Gram matrices, for where writing out the survivors' gradients is too dear.

Both ways take `P ~ x y^T` (`geometry.rank_one`) into the factors: with `b' = sqrt(x) b` and `a' = sqrt(y) a`, what
holds for raw gradients holds for preconditioned ones.

- `rank_one_gram`: exact products of the scaled factors, token by token (ghost) or written out, whichever is cheaper
  for this call. Heads and tables stay exact: they would gain nothing.
- `sketch_gram`: both sides of the scaled factors under random signs, so that a k x k matrix stands for a gradient.
  Unbiased; a head tied to an embedding is one matrix under one pair of projections, cross terms included.

Exact in both, whatever the mode: vectors (biases, norms), LoRA's narrow matrices, parameters under a mask, and the
linear term c, which is as cheap exact as approximate. The scale of an update found with an approximate K can be
set right exactly: `filter_then_weight.line_search`.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from gradient_selectors import gradients as written
from gradient_selectors.factors import MatrixFactor, Outer, Segments
from gradient_selectors.geometry import Geometry, rank_one
from gradient_selectors.gradients import PoolGradients


@torch.no_grad()
def rank_one_gram(gradients: PoolGradients, samples: Sequence[int], geometry: Geometry) -> Tensor:
    """K under `P ~ x y^T`, (n, n) float64."""
    gram = _zeros(gradients, samples)
    for name, factors in gradients.factors.items():
        preconditioner = geometry(name)
        outers = [factor for factor in factors if isinstance(factor, Outer)]
        scales = _scales(name, gradients.shapes[name], preconditioner)
        if scales is None or len(outers) < len(factors):
            gram += gradients.gram_of(name, samples, preconditioner)
        else:
            gram += _outer_gram(_joined(outers, samples, *(scale.sqrt() for scale in scales)))
    return gram


@torch.no_grad()
def sketch_gram(
    gradients: PoolGradients, samples: Sequence[int], geometry: Geometry, *, width: int, generator: torch.Generator
) -> Tensor:
    """K from sketches of `width` x `width` numbers for each matrix, (n, n) float64.

    New signs are drawn from `generator` (on the CPU) for every matrix at every call, so that errors neither add up over
    matrices nor stay the same over steps. Matrices that are no larger than the sketch on one side are exact.
    """
    gram = _zeros(gradients, samples)
    for name, factors in gradients.factors.items():
        preconditioner, shape = geometry(name), gradients.shapes[name]
        matrices = [factor for factor in factors if isinstance(factor, MatrixFactor)]
        scales = _scales(name, shape, preconditioner) if min(shape) > width else None
        if scales is None or len(matrices) < len(factors):
            gram += gradients.gram_of(name, samples, preconditioner)
        else:
            left_pk, right_dk = (_signs(scale, width, generator) for scale in scales)
            flat = _sketches(matrices, samples, left_pk, right_dk).flatten(1)
            gram += (flat @ flat.T).double()
    return gram


def ghost_is_cheaper(num_rows: int, num_samples: int, shape: Sequence[int]) -> bool:
    """Whether products of token pairs, R^2 (p + d), cost less than gradients written out, 2 R p d + 2 n^2 p d.

    To be asked for every call: R is the number of tokens of all samples and changes from pool to pool.
    """
    p, d = shape
    return num_rows**2 * (p + d) < 2 * (num_rows + num_samples**2) * p * d


@torch.no_grad()
def ghost_gram(factor: Outer) -> Tensor:
    """`K_ij = sum_ts (b_it b_js) (a_it a_js)` of all samples of a factor, (n, n) float64, by pairs of tokens."""
    left, right, segments = factor.left_Rp.float(), factor.right_Rd.float(), factor.segments
    members_Rn = torch.nn.functional.one_hot(segments.owners_R, segments.num_samples).to(left)
    step = max(1, written.CHUNK_ELEMENTS // len(left))
    gram = torch.zeros(segments.num_samples, segments.num_samples, dtype=torch.float64, device=left.device)
    for lo in range(0, len(left), step):
        hi = min(lo + step, len(left))
        # Pairs are symmetric: the rows from `lo` on suffice, those after `hi` count twice.
        pairs = (left[lo:hi] @ left[lo:].T).mul_(right[lo:hi] @ right[lo:].T)
        within = members_Rn[lo:hi].T @ (pairs[:, : hi - lo] @ members_Rn[lo:hi])
        beyond = members_Rn[lo:hi].T @ (pairs[:, hi - lo :] @ members_Rn[hi:])
        gram += (within + beyond + beyond.T).double()
    return gram


def _zeros(gradients: PoolGradients, samples: Sequence[int]) -> Tensor:
    return torch.zeros(len(samples), len(samples), dtype=torch.float64, device=gradients.losses_N.device)


def _scales(name: str, shape: torch.Size, preconditioner: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """The scales x and y of a matrix that may be approximated, else None."""
    if len(shape) != 2 or ".lora_" in name:
        return None
    if preconditioner is None:
        return torch.ones(shape[0]), torch.ones(shape[1])
    return rank_one(preconditioner)


def _joined(outers: Sequence[Outer], samples: Sequence[int], left_p: Tensor, right_d: Tensor) -> Outer:
    """Scaled rows of some samples; the calls of a module that is used twice follow one another within a sample."""
    spans = [(outer, outer.segments.span(i)) for i in samples for outer in outers]
    left = torch.cat([outer.left_Rp[span] for outer, span in spans])
    right = torch.cat([outer.right_Rd[span] for outer, span in spans])
    lengths = [sum(outer.segments.length(i) for outer in outers) for i in samples]
    return Outer(left * left_p.to(left), right * right_d.to(right), Segments((0, *accumulate(lengths))))


def _outer_gram(factor: Outer) -> Tensor:
    num_rows, num_samples = len(factor.left_Rp), factor.segments.num_samples
    p, d = factor.left_Rp.shape[1], factor.right_Rd.shape[1]
    if ghost_is_cheaper(num_rows, num_samples, (p, d)):
        return ghost_gram(factor)
    return written.written_gram([factor], range(num_samples), p, d, None)


def _signs(scale_p: Tensor, width: int, generator: torch.Generator) -> Tensor:
    """Random signs over the root of the width, (p, k), with the preconditioner's root folded in."""
    signs_pk = torch.randint(0, 2, (len(scale_p), width), generator=generator).float().mul_(2).sub_(1)
    return signs_pk.to(scale_p.device).mul_((scale_p / width).sqrt_().unsqueeze(1))


def _sketches(factors: Sequence[MatrixFactor], samples: Sequence[int], left_pk: Tensor, right_dk: Tensor) -> Tensor:
    """`left^T g_i right` of each sample, (n, k, k) float32."""
    out = torch.zeros(len(samples), left_pk.shape[1], right_dk.shape[1], device=left_pk.device)
    for factor in factors:
        left_Rk, right_Rk, segments = factor.project(samples, left_pk, right_dk)
        for row in range(len(samples)):
            span = segments.span(row)
            out[row].addmm_(left_Rk[span].float().T, right_Rk[span].float())
    return out

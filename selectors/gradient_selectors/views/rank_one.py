"""Gram matrices under the rank-one fit of P, for where writing out the survivors' gradients is too dear.

With `P ~ x y^T` (`preconditioner.rank_one`), `b' = sqrt(x) b` and `a' = sqrt(y) a`, what holds for raw gradients
holds for preconditioned ones: exact products of the scaled factors, by pairs of tokens (ghost) or written out,
whichever is cheaper for this call. Cheaper than the exact K for pools of short samples only; its error is that of the
fit. For all others `sketches` is cheaper.

Exact all the same: the linear term c; vectors (biases, norms); LoRA's narrow matrices; parameters under a mask; and
embeddings and heads, tied or not. The scale of an update found with an approximate K can be set right exactly:
`filter_then_weight.line_search`.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from gradient_selectors.capture import gradients as written
from gradient_selectors.capture.factors import Outer, Segments, only_outers
from gradient_selectors.capture.gradients import PoolGradients
from gradient_selectors.preconditioner import Preconditioner, rank_one
from gradient_selectors.views.scoring import Exact


class RankOne(Exact):
    """Utilities exact, K under a rank-one fit of P: cheaper than exact for pools of short samples only.

    Examples:
        >>> from gradient_selectors import RankOne
        >>> scoring = RankOne()  # SelectionEngine(..., scoring=scoring)
    """

    def gram(self, gradients: PoolGradients, samples: Sequence[int], preconditioner: Preconditioner) -> Tensor:
        return rank_one_gram(gradients, samples, preconditioner)


@torch.no_grad()
def rank_one_gram(gradients: PoolGradients, samples: Sequence[int], preconditioner: Preconditioner) -> Tensor:
    """K under `P ~ x y^T`, (n, n) float64."""
    gram = torch.zeros(len(samples), len(samples), dtype=torch.float64, device=gradients.losses_N.device)
    for name, factors in gradients.factors.items():
        shape, outers = gradients.shapes[name], only_outers(factors)
        if not outers or len(shape) != 2 or ".lora_" in name:
            gram += gradients.gram_of(name, samples, preconditioner)
            continue
        diagonal = preconditioner(name)
        scales = _scales(shape, diagonal)
        if scales is not None:
            gram += _exact_products(_scaled(outers, samples, *(scale.sqrt() for scale in scales)))
        elif diagonal is not None:
            gram += written.written_gram(outers, samples, *shape, diagonal.sqrt())
    return gram


def ghost_is_cheaper(num_rows: int, num_samples: int, shape: Sequence[int]) -> bool:
    """Whether products of token pairs cost less than gradients written out, 2 R p d + 2 n^2 p d operations.

    To be asked for every call: R is the number of tokens of all samples and changes from pool to pool. Symmetry halves
    the pairs to R^2 (p + d) operations, but a pair also costs passes over memory, so it counts in full.
    """
    p, d = shape
    return num_rows**2 * (p + d) < (num_rows + num_samples**2) * p * d


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


def _scales(shape: torch.Size, diagonal: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """The scales x and y of a matrix, or None where P has no rank-one fit."""
    if diagonal is None:
        return torch.ones(shape[0]), torch.ones(shape[1])
    return rank_one(diagonal)


def _scaled(outers: Sequence[Outer], samples: Sequence[int], left_p: Tensor, right_d: Tensor) -> Outer:
    """Scaled rows of some samples; the calls of a module that is used twice follow one another within a sample."""
    spans = [(outer, outer.segments.span(i)) for i in samples for outer in outers]
    left = torch.cat([outer.left_Rp[span] for outer, span in spans])
    right = torch.cat([outer.right_Rd[span] for outer, span in spans])
    lengths = [sum(outer.segments.length(i) for outer in outers) for i in samples]
    return Outer(left * left_p.to(left), right * right_d.to(right), Segments((0, *accumulate(lengths))))


def _exact_products(factor: Outer) -> Tensor:
    num_rows, num_samples = len(factor.left_Rp), factor.segments.num_samples
    p, d = factor.left_Rp.shape[1], factor.right_Rd.shape[1]
    if ghost_is_cheaper(num_rows, num_samples, (p, d)):
        return ghost_gram(factor)
    return written.written_gram([factor], range(num_samples), p, d, None)

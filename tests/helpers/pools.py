"""Pools of random factors, without a model, and an optimizer state for them."""

from collections.abc import Mapping, Sequence

import torch
from gradient_selectors.capture.factors import Factor, Outer, Segments, Written
from gradient_selectors.capture.gradients import PoolGradients
from gradient_selectors.preconditioner import plain
from gradient_selectors.views.interaction import Interaction
from torch import Size, Tensor


def written_pool(
    rows: Sequence[Sequence[float]], target: Sequence[float], losses_N: Tensor | None = None
) -> Interaction:
    """Candidates given by their gradients on one vector, with a loss of 1 each unless told otherwise."""
    gradients = torch.tensor(rows, dtype=torch.float32)
    losses_N = torch.ones(len(gradients)) if losses_N is None else losses_N
    pool = PoolGradients(losses_N, {"w": [Written(gradients)]}, {"w": Size([len(target)])})
    return Interaction(pool, {"w": torch.tensor(target)}, plain)


def block_pool(rows_LN: Tensor) -> Interaction:
    """Candidates with one weight in each of L layers, whose `utilities_LN` are the given ones."""
    names = [f"model.layers.{layer}.gate" for layer in range(len(rows_LN))]
    factors: Mapping[str, Sequence[Factor]] = {
        name: [Written(utilities_N.unsqueeze(1))] for name, utilities_N in zip(names, rows_LN.float(), strict=True)
    }
    pool = PoolGradients(torch.ones(rows_LN.shape[1]), factors, dict.fromkeys(names, Size([1])))
    return Interaction(pool, {name: torch.ones(1) for name in names}, plain)


def outer_factor(lengths: Sequence[int], p: int, d: int, seed: int) -> Outer:
    """Random factors with something in common within a sample, so that gradients are far from orthogonal."""
    generator = torch.Generator().manual_seed(seed)
    offsets = (0, *torch.tensor(lengths).cumsum(0).tolist())
    left, right = (torch.randn(offsets[-1], size, generator=generator) + 0.5 for size in (p, d))
    return Outer(left, right, Segments(offsets))


def outer_pool(
    shapes: Mapping[str, tuple[int, int]], lengths: Sequence[int], seed: int = 0
) -> tuple[PoolGradients, dict[str, Tensor]]:
    """Random matrices, and their per-sample gradients written out, (N, p, d) each."""
    factors = {name: outer_factor(lengths, p, d, seed + i) for i, (name, (p, d)) in enumerate(shapes.items())}
    pool = PoolGradients(
        torch.ones(len(lengths)), {n: [f] for n, f in factors.items()}, {n: Size(s) for n, s in shapes.items()}
    )
    dense = {name: per_sample(factor) for name, factor in factors.items()}
    return pool, dense


def per_sample(factor: Outer) -> Tensor:
    """Each sample's gradient by itself, (N, p, d)."""
    spans = [factor.segments.span(i) for i in range(factor.segments.num_samples)]
    return torch.stack([torch.einsum("tp,td->pd", factor.left_Rp[s], factor.right_Rd[s]) for s in spans])

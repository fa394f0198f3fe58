"""A pool cut into pieces of samples of like length, and gradients that are summed as the backward pass leaves them.

A pass over a piece takes as much memory as its tokens. So does what it keeps of every layer, if it keeps anything.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradient_selectors.capture.batch import Batch
from gradient_selectors.capture.capture import GradientCapture
from gradient_selectors.capture.factors import Factor
from gradient_selectors.capture.gradients import layer_of
from gradient_selectors.capture.passes import weighted

# More padding than both, as a share and in tokens, costs more than the weights' being read again for another piece.
MAX_PADDING, FEW_TOKENS = 1 / 8, 64


def pieces_of(lengths: Sequence[int], micro_tokens: int | None) -> list[tuple[int, ...]]:
    """Which samples are scored together: each once, those of like length, at most `micro_tokens` with padding.

    A longer sample is a piece by itself, and no piece is padded by more than `MAX_PADDING` of its tokens, few tokens
    apart. None stands for one piece of all.

    Examples:
        >>> from gradient_selectors.capture.pieces import pieces_of
        >>> pieces_of([90, 400, 900, 400, 80], micro_tokens=1000)
        [(0, 4), (1, 3), (2,)]
    """
    if micro_tokens is None:
        return [tuple(range(len(lengths)))]
    pieces: list[list[int]] = []
    for sample in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        together = [*pieces[-1], sample] if pieces else [sample]
        computed = len(together) * lengths[sample]
        padding = computed - sum(lengths[i] for i in together)
        fits = computed <= micro_tokens and padding <= max(FEW_TOKENS, MAX_PADDING * computed)
        if pieces and fits:
            pieces[-1] = together
        else:
            pieces.append([sample])
    return [tuple(sorted(piece)) for piece in pieces]


def add_weighted_gradient(
    total: dict[str, Tensor],
    capture: GradientCapture,
    batch: Batch,
    coefficients: Tensor,
) -> None:
    """Add `sum_i w_i g_i` to `total`, float32 by parameter name, without keeping a factor of any layer.

    Of a sharded model it is the sum over all processes, and each adds its own rows.

    `coefficients` are (N,), or (L, N) with a row for each layer, as `PoolGradients.weighted_gradient` takes them. The
    model runs as its mode says: a dropout that is on draws anew.
    """
    layers = list(dict.fromkeys(layer_of(name) for name in capture.parameters))

    def take(name: str, factor: Factor) -> None:
        row_N = coefficients if coefficients.ndim == 1 else coefficients[layers.index(layer_of(name))]
        shape = capture.parameters[name].shape
        if capture.passes.shards is not None:  # this process's rows only: all of them are as large as the model
            rows = capture.passes.shards.scatter(weighted(factor, row_N, shape, capture.device))
            total[name] = rows if name not in total else total[name].add_(rows)
            return
        begin = name not in total
        if begin:
            total[name] = torch.empty(shape, device=capture.device)
        if bool((row_N != 0).any()):
            factor.add_weighted(row_N, total[name], begin=begin)
        elif begin:
            total[name].zero_()

    capture.run(batch, keep=take)

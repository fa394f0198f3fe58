"""A pool as tensors, and which of its positions carry loss."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from gradient_selectors.capture.factors import Segments

IGNORE = -100  # transformers' label of a token without loss


@dataclass(frozen=True)
class Batch:
    """N samples padded on the right to T tokens.

    Attributes:
        input_ids_NT: token ids, int64.
        labels_NT: the same with -100 where a token carries no loss (prompt, padding). Not shifted.
        lengths: tokens of each sample without padding.
    """

    input_ids_NT: Tensor
    labels_NT: Tensor
    lengths: tuple[int, ...]

    def to(self, device: torch.device) -> "Batch":
        return Batch(self.input_ids_NT.to(device), self.labels_NT.to(device), self.lengths)


def loss_rows(labels_NT: Tensor) -> tuple[Tensor, Tensor, Segments]:
    """Which positions predict a label, (N, T) bool; the labels they predict; which sample owns them.

    Position t predicts label t + 1; labels of -100 carry no loss.
    """
    predicts_NT = torch.zeros_like(labels_NT, dtype=torch.bool)
    predicts_NT[:, :-1] = labels_NT[:, 1:] != IGNORE
    counts = predicts_NT.sum(1)
    offsets = (0, *counts.cumsum(0).tolist())
    return predicts_NT, labels_NT[:, 1:][predicts_NT[:, :-1]], Segments(offsets)


def mean_losses(logits_NTV: Tensor, labels_NT: Tensor) -> Tensor:
    """Mean cross-entropy of each sample over the positions that carry loss (nats per token), (N,)."""
    predicts_NT, labels_R, segments = loss_rows(labels_NT)
    token_losses_R = F.cross_entropy(logits_NTV[predicts_NT].float(), labels_R, reduction="none")
    counts_N = torch.tensor(segments.offsets).diff().to(token_losses_R)
    return segments.sum(token_losses_R) / counts_N

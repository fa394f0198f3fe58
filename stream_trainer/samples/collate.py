"""Samples to padded tensors."""

from collections.abc import Sequence

import torch
from gradient_selectors import Batch

from stream_trainer.records import Sample


def collate(samples: Sequence[Sample], pad_id: int) -> Batch:
    """Samples padded on the right to the longest: (N, T) ids and labels, and their stated weights where any differs."""
    lengths = tuple(sample.num_tokens for sample in samples)
    input_ids_NT = torch.full((len(samples), max(lengths)), pad_id)
    labels_NT = torch.full_like(input_ids_NT, -100)
    for row, sample in enumerate(samples):
        input_ids_NT[row, : lengths[row]] = torch.tensor(sample.input_ids)
        labels_NT[row, : lengths[row]] = torch.tensor(sample.labels)
    weights_N = torch.tensor([sample.weight for sample in samples], dtype=torch.float64)
    return Batch(input_ids_NT, labels_NT, lengths, None if bool((weights_N == 1).all()) else weights_N)

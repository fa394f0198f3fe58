"""Samples to padded tensors."""

from collections.abc import Iterator, Sequence

import torch
from gradient_selectors.capture.batch import Batch

from stream_trainer.records import Sample


def collate(samples: Sequence[Sample], pad_id: int) -> Batch:
    """Samples padded on the right to the longest: (N, T) ids and labels."""
    lengths = tuple(sample.num_tokens for sample in samples)
    input_ids_NT = torch.full((len(samples), max(lengths)), pad_id)
    labels_NT = torch.full_like(input_ids_NT, -100)
    for row, sample in enumerate(samples):
        input_ids_NT[row, : lengths[row]] = torch.tensor(sample.input_ids)
        labels_NT[row, : lengths[row]] = torch.tensor(sample.labels)
    return Batch(input_ids_NT, labels_NT, lengths)


def micro_batches(samples: Sequence[Sample], pad_id: int, size: int) -> Iterator[Batch]:
    """All samples in batches of at most `size`, similar lengths together so that little is padding."""
    by_length = sorted(samples, key=lambda sample: sample.num_tokens)
    for start in range(0, len(by_length), size):
        yield collate(by_length[start : start + size], pad_id)

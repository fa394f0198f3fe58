"""Samples as one padded batch."""

from dataclasses import replace

import torch

from stream_trainer.records import Partition, Sample
from stream_trainer.samples.collate import collate


def sample(*ids: int, prompt: int = 0) -> Sample:
    labels = (*[-100] * prompt, *ids[prompt:])
    return Sample(ids, labels, Partition("log", 0), 0, len(ids))


def test_samples_are_padded_on_the_right_and_padding_carries_no_loss() -> None:
    batch = collate([sample(5, 6, 7, prompt=1), sample(8)], pad_id=2)
    assert batch.input_ids_NT.tolist() == [[5, 6, 7], [8, 2, 2]]
    assert batch.labels_NT.tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert batch.lengths == (3, 1)
    assert (batch.input_ids_NT.dtype, batch.labels_NT.dtype) == (torch.int64, torch.int64)


def test_weights_are_stated_where_any_differs_from_one() -> None:
    pool = [sample(5, 6), sample(7, 8)]
    assert collate(pool, pad_id=0).weights_N is None
    stated = collate([pool[0], replace(pool[1], weight=1e300)], pad_id=0).weights_N
    assert stated is not None
    assert stated.tolist() == [1.0, 1e300]

"""What is known of a sample before any pass: its tokens, their mean embedding, and the fields of its record.

Computed once, when a sample comes in. Every way to draw among samples that wait reads these, and nothing else.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gradient_selectors.draw.features import EmbeddingFeatures

Tokens = npt.NDArray[np.int64]


class Described(Protocol):
    """A sample as it comes in."""

    @property
    def input_ids(self) -> Sequence[int]:
        """Token ids."""

    @property
    def fields(self) -> Sequence[tuple[str, str]]:
        """What its record says of it, by name: where it comes from, who made it."""


@dataclass(frozen=True, eq=False)
class Traits:
    """What is known of one sample.

    Attributes:
        tokens: its token ids.
        embedding_d: their mean input embedding as a unit vector, (d,) float32.
        fields: names and values of its record's fields.
    """

    tokens: Tokens
    embedding_d: Tensor
    fields: tuple[tuple[str, str], ...] = field(default=())


Describe = Callable[[Sequence[Described]], list[Traits]]


def describe(samples: Sequence[Described], features: EmbeddingFeatures) -> list[Traits]:
    """The traits of samples that come in. O(tokens d)."""
    embeddings_Md = features([sample.input_ids for sample in samples])
    return [
        Traits(np.asarray(sample.input_ids, dtype=np.int64), embedding_d, tuple(sample.fields))
        for sample, embedding_d in zip(samples, embeddings_Md, strict=True)
    ]


def embeddings_of(waiting: Sequence[Traits]) -> Tensor:
    """The embeddings of M samples, (M, d) float32. M is at least 1."""
    return torch.stack([traits.embedding_d for traits in waiting])


class StreamDraw(Protocol):
    """A way to draw among the samples that wait. All that the future depends on is in its state.

    Each sample is learned from once, when it leaves: those that wait are read again after a restart.
    """

    def draw(self, waiting: Sequence[Traits], count: int) -> list[int]:
        """Up to `count` of those that wait, as indices in ascending order."""

    def learn(self, gone: Sequence[Traits]) -> None:
        """Take note of the samples that have left, drawn or not."""

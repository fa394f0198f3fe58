"""What is known of a sample before any pass: its tokens, their mean embedding, and the fields of its record.

Computed once, when a sample comes in. Every way to draw among samples that wait reads these, and nothing else.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gradient_selectors.features.embeddings import EmbeddingFeatures
from gradient_selectors.features.hashing import Flags, Hashes, Tokens, shingles
from gradient_selectors.features.relevance import NO_EXCHANGE, Exchange, exchanges_of


class Described(Protocol):
    """A sample as it comes in."""

    @property
    def input_ids(self) -> Sequence[int]:
        """Token ids."""

    @property
    def labels(self) -> Sequence[int]:
        """Token ids, negative where a token carries no loss."""

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
        own_f: a user's own features, (f,) float64.
        shingles: hashes of what carries loss, which tell copies, near ones too. The prompts of a whole domain may hold
            the same instructions.
        exchange: the distinct tokens of its prompt and its answer.
        counted: whether each token carries loss; None if all do.
    """

    tokens: Tokens
    embedding_d: Tensor
    fields: tuple[tuple[str, str], ...] = ()
    own_f: npt.NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    shingles: Hashes = field(default_factory=lambda: np.empty(0, dtype=np.uint64))
    exchange: Exchange = NO_EXCHANGE
    counted: Flags | None = None

    @property
    def answer(self) -> Tokens:
        """The tokens that carry loss: what a model learns to write."""
        return self.tokens if self.counted is None else self.tokens[self.counted]


OwnFeatures = Callable[[Sequence[Any]], Any]
"""A user's own features: from M samples to an array of (M, f)."""


def describe(samples: Sequence[Described], features: EmbeddingFeatures, own: OwnFeatures | None = None) -> list[Traits]:
    """The traits of samples that come in. O(tokens d). Raises ValueError if `own` makes no row for each sample."""
    if not samples:
        return []
    tokens = [np.asarray(sample.input_ids, dtype=np.int64) for sample in samples]
    embeddings_Md = features(tokens)
    own_Mf = np.zeros((len(samples), 0)) if own is None else np.asarray(own(samples), dtype=np.float64)
    if len(own_Mf) != len(samples):
        raise ValueError(f"{len(own_Mf)} rows for {len(samples)} samples")
    fields = [tuple(sample.fields) for sample in samples]
    counted = [np.asarray(sample.labels) >= 0 for sample in samples]
    hashes, exchanges = shingles(tokens, counted), exchanges_of(tokens, counted)
    own_rows = own_Mf.reshape(len(samples), -1)
    rows = zip(tokens, embeddings_Md, fields, own_rows, hashes, exchanges, counted, strict=True)
    return [Traits(*row) for row in rows]


def embeddings_of(waiting: Sequence[Traits]) -> Tensor:
    """The embeddings of M samples, (M, d) float32. M is at least 1."""
    return torch.stack([traits.embedding_d for traits in waiting])

"""Features of a sample that cost no forward pass: the mean of its tokens' input embeddings.

The embedding table is copied when the features are made, and stays as it was then: a sample then has the same features
whenever they are computed, however far the model has moved, and clusters found in them stay valid. Make them before a
checkpoint is restored, from the weights the settings name, and they are the same after every restart.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class EmbeddingFeatures:
    """Mean input embeddings.

    Attributes:
        table_Vd: the embedding table, (V, d) bfloat16 on the CPU: 2 bytes a weight, and its rounding averages out.
    """

    table_Vd: Tensor

    @classmethod
    def of_model(cls, model: Any) -> "EmbeddingFeatures":
        """Features of a transformers model, or of a PEFT model around one, as its embedding is now."""
        weight = model.get_input_embeddings().weight
        if hasattr(weight, "full_tensor"):  # of a sharded model: a call of all its processes
            weight = weight.full_tensor()
        # Cloned, for a bfloat16 embedding on the CPU would otherwise be followed as it trains.
        return cls(weight.detach().to("cpu", torch.bfloat16).clone())

    @property
    def size(self) -> int:
        return self.table_Vd.shape[1]

    def __call__(self, token_ids: Sequence[npt.ArrayLike]) -> Tensor:
        """Unit vectors of M samples, (M, d) float32; all tokens count, with loss or without. O(tokens d)."""
        # From an array: torch reads a list, and looks up by one, in twice the time of all else.
        rows = (torch.from_numpy(np.asarray(ids, dtype=np.int64)) for ids in token_ids)
        means = [self.table_Vd.index_select(0, ids_T).float().mean(0) for ids_T in rows]
        return F.normalize(torch.stack(means), dim=1) if means else torch.empty(0, self.size)

    def centre(self, token_ids: Sequence[npt.ArrayLike]) -> Tensor:
        """Mean of the samples' features, (d,) float32: what the target looks like."""
        return self(token_ids).mean(0)

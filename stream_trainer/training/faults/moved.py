"""Which of the trainable tensors move at all. Adapters that get no gradient look like training for days.

Between two looks a tensor has moved if the sum of its bits is another one: that misses nothing but by a chance of one
in billions, and keeps no copy. What share of its weights moved is estimated from some of them.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from gradient_selectors.capture.shards import own_rows
from torch import Tensor

SAMPLED = 1024  # weights of each tensor, evenly spaced
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of a weight


@dataclass(frozen=True)
class MovedShare:
    """What moved between two looks.

    Attributes:
        tensors: share of the tensors.
        weights: share of the weights, an estimate.
        still: names of the tensors that did not move.
    """

    tensors: float
    weights: float
    still: tuple[str, ...]


class Moved:
    """Looks at some parameters now and then; of those that lie in rows, at what is here."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._parameters = parameters
        self._sums: list[int] = []
        self._sampled: dict[str, Tensor] = {}

    @torch.no_grad()
    def look(self) -> MovedShare | None:
        """What moved since the last look; None at the first one."""
        here = {name: own_rows(values) for name, values in self._parameters.items()}
        here = {name: values for name, values in here.items() if values.numel()}
        sums = sums_of_bits(here.values())
        sampled = {name: _sample(values) for name, values in here.items()}
        before, self._sums = self._sums, sums
        old, self._sampled = self._sampled, sampled
        if not before:
            return None
        still = [name for name, was, now in zip(here, before, sums, strict=True) if was == now]
        changes = torch.stack([(old[name] != values).double().mean() for name, values in sampled.items()])
        sizes = torch.tensor([values.numel() for values in here.values()], dtype=torch.float64)
        weights = float(changes.cpu() @ (sizes / sizes.sum()))
        return MovedShare(1 - len(still) / len(sums), weights, tuple(still))


def sums_of_bits(tensors: Iterable[Tensor]) -> list[int]:
    """Of each, its bits added up as whole numbers: if any bit differs, so does the sum, all but surely."""
    bits = (values.detach().contiguous().view(BITS[values.element_size()]) for values in tensors)
    sums = [values.sum(dtype=torch.int64) for values in bits]
    found: list[int] = torch.stack(sums).tolist() if sums else []
    return found


def _sample(values: Tensor) -> Tensor:
    flat = values.detach().reshape(-1)
    return flat[:: max(1, len(flat) // SAMPLED)][:SAMPLED].clone()

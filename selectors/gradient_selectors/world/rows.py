"""What lies in rows on several ranks, as a sharded model's parameters do: each rank has its own rows of it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Size, Tensor

from gradient_selectors.world.base import World
from gradient_selectors.world.deal import own_span, spans_of


def whole(world: World, own: Tensor, num_rows: int) -> Tensor:
    """All rows, on every rank."""
    return world.rows(own, [hi - lo for lo, hi in spans_of(world.size, num_rows)])


def at_rows(world: World, own: Tensor, num_rows: int, rows: Tensor) -> Tensor:
    """Some rows (int64, the same on every rank), on every rank."""
    lo, hi = own_span(world, num_rows)
    here = (rows >= lo) & (rows < hi)
    found = own.new_zeros(len(rows), *own.shape[1:])
    found[here] = own[rows[here] - lo]
    return world.sum(found)


@dataclass(frozen=True, eq=False)
class RowsGradient(Mapping[str, Tensor]):
    """A gradient by parameter name, in rows. To look up a parameter is a call of all ranks, which makes it whole.

    Attributes:
        own: this rank's rows.
        shapes: of the whole parameters.
    """

    world: World
    own: Mapping[str, Tensor]
    shapes: Mapping[str, Size]

    def __getitem__(self, name: str) -> Tensor:
        return whole(self.world, self.own[name], self.shapes[name][0])

    def __contains__(self, name: object) -> bool:
        return name in self.own

    def __iter__(self) -> Iterator[str]:
        return iter(self.own)

    def __len__(self) -> int:
        return len(self.own)


def total_norm(world: World, own: Mapping[str, Tensor]) -> float:
    """Length of what lies in rows."""
    length: Tensor = torch.nn.utils.get_total_norm(own.values())
    return float(world.sum(length.square().reshape(1)).sqrt())

"""A gradient of which each rank has a part: what needs only its products with some vectors exchanges no more.

A target's gradient is as large as the model, and its sum over ranks costs as much as that of the update. But a sketch
reads it through a few vectors. So it stays in parts, and a parameter is summed when somebody asks for all of it.
"""

import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Size, Tensor

from gradient_selectors.world.base import World
from gradient_selectors.world.rows import RowsGradient

Total = Callable[[Tensor], Tensor]
"""Makes the whole of what is linear in a gradient from what is of this rank's part."""


class Partial(Mapping[str, Tensor]):
    """The sum over ranks of a gradient, by parameter name.

    `partial[name]` is a call of all ranks together where that parameter has not been summed yet. Names and shapes are
    known to each.
    """

    def __init__(self, world: World, parts: Mapping[str, Tensor], *, whole: bool = False) -> None:
        """`parts`: of this rank, which are overwritten; with `whole` the sum already, the same on every rank."""
        self._world, self._parts = world, dict(parts)
        self._whole = set(parts) if whole else set[str]()

    def __getitem__(self, name: str) -> Tensor:
        values = self._parts[name]
        if name not in self._whole:
            self._world.sum(values)
            self._whole.add(name)
        return values

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def __contains__(self, name: object) -> bool:
        return name in self._parts  # and not as `Mapping` has it, which asks for the values

    def part(self, name: str) -> tuple[Tensor, Total]:
        """What this rank has of a parameter, and what makes the whole of anything linear in it."""
        return self._parts[name], _same if name in self._whole else self._total

    def move(self, fresh: "Partial", share: float) -> None:
        """Go so far towards another gradient, of which nothing was summed yet. Each rank moves its part."""
        for name, values in self._parts.items():
            if name in self._whole and self._world.rank:
                values.zero_()  # the first rank keeps what all have
            values.lerp_(fresh._parts[name], share)
        self._whole.clear()

    def is_finite(self) -> bool:
        """Whether every rank's part is: a call of all ranks."""
        norm = float(torch.nn.utils.get_total_norm(self._parts.values()))
        return all(finite for (finite,) in self._world.facts([math.isfinite(norm)]))

    def _total(self, values: Tensor) -> Tensor:
        return self._world.sum(values.contiguous())


def part_of(gradient: Mapping[str, Tensor], name: str) -> tuple[Tensor, Total]:
    """As `Partial.part`; of any other gradient each rank has all."""
    return gradient.part(name) if isinstance(gradient, Partial) else (gradient[name], _same)


def shape_of(gradient: Mapping[str, Tensor], name: str) -> Size:
    """Shape of a parameter, for which nothing is exchanged."""
    return gradient.shapes[name] if isinstance(gradient, RowsGradient) else part_of(gradient, name)[0].shape


def _same(values: Tensor) -> Tensor:
    return values

"""A gradient of which each rank has a part: what needs only its products with some vectors exchanges no more.

A target's gradient is as large as the model, and its sum over ranks costs as much as that of the update. But a sketch
reads it through a few vectors. So it stays in parts, and a parameter is summed when somebody asks for all of it.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Size, Tensor

from gradient_selectors.world.base import World
from gradient_selectors.world.buckets import summed_in_buckets
from gradient_selectors.world.rows import RowsGradient

Totals = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
"""Makes the whole of what is linear in some parameters' gradients from what is of this rank's parts."""


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
        self.complete([name])
        return self._parts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def __contains__(self, name: object) -> bool:
        return name in self._parts  # and not as `Mapping` has it, which asks for the values

    def complete(self, names: Iterable[str]) -> None:
        """Sum some parameters, small ones together. A call of all ranks where any of them has not been summed yet."""
        left = [name for name in names if name not in self._whole]
        for name, total in summed_in_buckets(self._world, ((name, self._parts[name]) for name in left)):
            if total is not self._parts[name]:
                self._parts[name].copy_(total)
        self._whole.update(left)

    def part(self, name: str) -> Tensor:
        """What this rank has of a parameter; `totals` makes the whole of what is linear in it."""
        return self._parts[name]

    def totals(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`Totals` of this gradient, small ones together; none shares memory with another."""
        left = ((name, part) for name, part in values.items() if name not in self._whole)
        return dict(values) | {name: total.clone() for name, total in summed_in_buckets(self._world, left)}

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


def part_of(gradient: Mapping[str, Tensor], name: str) -> Tensor:
    """As `Partial.part`; of any other gradient each rank has all."""
    return gradient.part(name) if isinstance(gradient, Partial) else gradient[name]


def shape_of(gradient: Mapping[str, Tensor], name: str) -> Size:
    """Shape of a parameter, for which nothing is exchanged."""
    return gradient.shapes[name] if isinstance(gradient, RowsGradient) else part_of(gradient, name).shape

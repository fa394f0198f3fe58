"""Which rank works on which sample, dealt anew for each pool by tokens; and which rows of a parameter are whose."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradient_selectors.world.base import World


@dataclass(frozen=True)
class Shares:
    """The samples of a pool by rank.

    Attributes:
        of_ranks: numbers of each rank's samples, ascending.
    """

    world: World
    of_ranks: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, world: World, lengths: Sequence[int]) -> "Shares":
        """Shares of samples with these numbers of tokens, the longest first to the rank with the fewest tokens.

        Examples:
            >>> from gradient_selectors.world.base import Alone
            >>> from gradient_selectors.world.deal import Shares
            >>> Shares.of(Alone(), [5, 3]).own
            (0, 1)
        """
        shares: list[list[int]] = [[] for _ in range(world.size)]
        tokens = [0] * world.size
        for sample in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            rank = min(range(world.size), key=lambda r: (tokens[r], len(shares[r]), r))
            shares[rank].append(sample)
            tokens[rank] += lengths[sample]
        return cls(world, tuple(tuple(sorted(share)) for share in shares))

    @property
    def own(self) -> tuple[int, ...]:
        """Samples of this rank."""
        return self.of_ranks[self.world.rank]

    def spread(self, own: Tensor) -> Tensor:
        """Values of all samples, (N, ...), from those that each rank has of its own, (n, ...)."""
        order = [sample for share in self.of_ranks for sample in share]
        everything = self.world.rows(own, [len(share) for share in self.of_ranks])
        places = torch.tensor(order, dtype=torch.int64, device=own.device).argsort()
        return everything[places]

    def only(self, samples: Sequence[int]) -> "Shares":
        """Those of some samples."""
        return Shares(self.world, tuple(tuple(i for i in share if i in samples) for share in self.of_ranks))

    def among(self, samples: Sequence[int]) -> list[list[int]]:
        """Of each rank: the places among `samples` of those that are its own."""
        owned = [frozenset(share) for share in self.of_ranks]
        return [[place for place, i in enumerate(samples) if i in share] for share in owned]


def spans_of(size: int, num_rows: int) -> list[tuple[int, int]]:
    """Rows `lo:hi` of each rank, as `torch.chunk` cuts them and `fully_shard` does. The last ranks may have none.

    Examples:
        >>> from gradient_selectors.world.deal import spans_of
        >>> spans_of(3, 4)
        [(0, 2), (2, 4), (4, 4)]
    """
    share = -(-num_rows // size)
    return [(min(rank * share, num_rows), min((rank + 1) * share, num_rows)) for rank in range(size)]


def own_span(world: World, num_rows: int) -> tuple[int, int]:
    """Rows of this rank."""
    return spans_of(world.size, num_rows)[world.rank]


def missing(world: World, count: int) -> int:
    """How many more another rank has than this one's `count`, at most."""
    return max(found for (found,) in world.facts([count])) - count


def agreed_names(world: World, present: Sequence[str], names: Sequence[str]) -> list[str]:
    """Those of `names` that are present on any rank, in their order."""
    if world.size == 1:
        return [name for name in names if name in present]
    facts = world.facts([name in present for name in names])
    return [name for name, found in zip(names, zip(*facts, strict=True), strict=True) if any(found)]

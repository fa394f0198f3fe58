"""The ranks of a process group of torch.distributed, as torchrun starts them.

Tensors go by the default group (NCCL on GPUs), facts and JSON by a gloo group of their own: a rank that waits for the
others there occupies no device.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from gradient_selectors.world.base import LostError
from gradient_selectors.world.deal import spans_of


class Ranks:
    """`World` over the default process group, which must be there already and is the caller's to destroy."""

    def __init__(self, control_timeout: timedelta) -> None:
        """`control_timeout`: how long a rank may keep the others waiting between two steps.

        A process that dies is noticed at once all the same, since its connections close.
        """
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.sent = Counter[str]()
        self._control = dist.new_group(backend="gloo", timeout=control_timeout)

    def sum(self, values: Tensor) -> Tensor:
        # Reduced and handed on, each number crosses all ranks but one twice.
        self.sent["sum"] += 2 * values.nbytes * (self.size - 1) // self.size
        with _noticing():
            dist.all_reduce(values)
        return values

    def rows(self, local: Tensor, counts: Sequence[int]) -> Tensor:
        largest = max(counts)
        own = local.new_zeros(largest, *local.shape[1:])
        own[: len(local)] = local
        found = [torch.empty_like(own) for _ in range(self.size)]
        self.sent["rows"] += own.nbytes * (self.size - 1)
        if largest:
            with _noticing():
                dist.all_gather(found, own)
        return torch.cat([part[:count] for part, count in zip(found, counts, strict=True)])

    def exchange(self, parts: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
        given = [part.numel() for part in parts]
        flat = torch.cat([part.flatten() for part in parts])
        out = flat.new_empty(sum(counts))
        self.sent["exchange"] += flat.nbytes - parts[self.rank].nbytes
        with _noticing():
            dist.all_to_all_single(out, flat, list(counts), given)
        return list(torch.split(out, list(counts)))

    def scatter(self, values: Tensor) -> Tensor:
        spans = spans_of(self.size, len(values))
        (_, share), (lo, hi) = spans[0], spans[self.rank]
        padded = values
        if share * self.size > len(values):
            padded = values.new_zeros(share * self.size, *values.shape[1:])
            padded[: len(values)] = values
        own = torch.empty_like(padded[:share])
        self.sent["scatter"] += own.nbytes * (self.size - 1)
        with _noticing():
            dist.reduce_scatter(own, list(torch.split(padded.contiguous(), share)))
        return own[: hi - lo]

    def gather(self, value: bytes) -> list[bytes]:
        counts = [count for (count,) in self.facts([len(value)])]
        own = torch.zeros(max(1, *counts), dtype=torch.uint8)
        own[: len(value)] = torch.frombuffer(bytearray(value), dtype=torch.uint8) if value else 0
        return [bytes(part[:count].numpy()) for part, count in zip(self._all(own), counts, strict=True)]

    def facts(self, numbers: Sequence[int]) -> list[list[int]]:
        return [part.tolist() for part in self._all(torch.tensor([int(n) for n in numbers], dtype=torch.int64))]

    def _all(self, own: Tensor) -> list[Tensor]:
        found = [torch.empty_like(own) for _ in range(self.size)]
        self.sent["control"] += own.nbytes * (self.size - 1)
        with _noticing():
            dist.all_gather(found, own, group=self._control)
        return found


@contextmanager
def _noticing() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # whatever a backend raises: a closed connection, a timeout
        raise LostError(plain_words(error)) from error


def plain_words(error: Exception) -> str:
    """The first sentence of what a backend says, without the place in its source.

    Examples:
        >>> from gradient_selectors.world.ranks import plain_words
        >>> plain_words(RuntimeError("[/gloo/pair.cc:537] Read error: Connection reset by peer. Check the logs"))
        'Read error: Connection reset by peer'
    """
    return re.sub(r"^\[[^]]*\]\s*", "", str(error)).partition("\n")[0].partition(". ")[0]

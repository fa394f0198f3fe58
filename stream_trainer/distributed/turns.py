"""Whose sample comes next, of those that wait with each rank: one of each partition in turn, as one process has it."""

from collections import deque
from collections.abc import Sequence


def take_turns(ready: Sequence[Sequence[int]], may_follow: Sequence[bool], last: int, count: int) -> list[int]:
    """The ranks in whose order up to `count` samples are taken; fewer where it is not known yet whose comes next.

    `ready` are the partitions of the samples that wait with each rank, in order; `may_follow` says of a rank that more
    will soon be there; `last` is the partition of the sample before, -1 if there is none.

    Examples:
        >>> take_turns([[0, 2, 0, 2], [1, 3]], [False, False], last=-1, count=6)
        [0, 1, 0, 1, 0, 0]
        >>> take_turns([[0, 2, 0, 2], [1, 3]], [False, True], last=-1, count=6)
        [0, 1, 0, 1]
    """
    queues = [deque(partitions) for partitions in ready]
    order: list[int] = []
    while len(order) < count and any(queues):
        if any(may and not queue for may, queue in zip(may_follow, queues, strict=True)):
            break
        heads = [(queue[0] <= last, queue[0], rank) for rank, queue in enumerate(queues) if queue]
        _, last, rank = min(heads)
        queues[rank].popleft()
        order.append(rank)
    return order

"""Cursors of ranks become one in a checkpoint, and are taken apart again for any number of ranks."""

from collections import Counter
from typing import Any

import pytest
from gradient_selectors.world.base import Alone

from stream_trainer.distributed.control import Control
from stream_trainer.distributed.cursor import SharedCursor, merged
from stream_trainer.ingest.cursor import Cursor
from stream_trainer.records import Outcome, Partition

PARTITIONS = [Partition("t", number) for number in range(5)]


class Rank(Alone):
    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        self.rank, self.size = rank, size


def shared(rank: int, size: int, snapshot: dict[str, Any] | None) -> SharedCursor:
    return SharedCursor.of(Control(Rank(rank, size), lambda: False), snapshot)


def read(cursors: list[SharedCursor], count: int) -> None:
    size = len(cursors)
    for cursor in cursors:
        own = [p for p in PARTITIONS if p.number % size == cursor.control.world.rank]
        cursor.begin(dict.fromkeys(own, 0))
        for offset in range(count):
            for partition in own:
                cursor.fetched(partition, offset, offset + 1, f"mark {offset}")


def test_a_merged_cursor_is_that_of_one_process() -> None:
    ranks = [shared(rank, 3, None) for rank in range(3)]
    alone = Cursor()
    alone.begin(dict.fromkeys(PARTITIONS, 0))
    for offset in range(4):
        for partition in PARTITIONS:
            alone.fetched(partition, offset, offset + 1, f"mark {offset}")
    read(ranks, 4)
    for offset in (0, 2):
        for partition in PARTITIONS:
            for cursor in (alone, *ranks):  # what becomes of a sample every rank knows
                cursor.resolve(partition, offset, Outcome.TRAINED)
    for cursor in (alone, ranks[1]):
        cursor.resolve(PARTITIONS[4], 1, Outcome.DEAD_LETTERED)  # of its own
    whole = merged([cursor.state_dict() for cursor in ranks], "t:4")
    wanted = alone.state_dict()
    assert whole["counts"] == wanted["counts"]
    assert whole["partitions"] == wanted["partitions"]
    assert whole["marks"] == wanted["marks"]
    names = list(whole["partitions"])
    waiting = Counter(names[int(i)] for i in whole["rotation"]["waiting"].split())
    wanted_names = list(wanted["partitions"])
    assert waiting == Counter(wanted_names[int(i)] for i in wanted["rotation"]["waiting"].split())


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_partition_is_taken_up_by_one_rank_and_every_count_by_all_together(size: int) -> None:
    ranks = [shared(rank, 3, None) for rank in range(3)]
    read(ranks, 3)
    for cursor in ranks:
        cursor.resolve(PARTITIONS[0], 0, Outcome.NOT_SELECTED)
    ranks[0].resolve(PARTITIONS[3], 1, Outcome.DEAD_LETTERED)
    ranks[2].resolve(PARTITIONS[2], 0, Outcome.FILTERED)
    whole = merged([cursor.state_dict() for cursor in ranks], None)
    again = [shared(rank, size, whole) for rank in range(size)]
    positions = [cursor.positions() for cursor in again]
    assert {p: at for found in positions for p, at in found.items()} == {
        Partition.parse(name): log["next"] for name, log in whole["partitions"].items()
    }
    assert sum(map(len, positions)) == len(PARTITIONS)
    assert merged([cursor.state_dict() for cursor in again], None)["counts"] == whole["counts"]


def test_a_sample_of_another_rank_is_counted_and_no_position_moves() -> None:
    cursor = shared(0, 2, None)
    read([cursor, shared(1, 2, None)], 1)
    before = cursor.positions()
    cursor.resolve(PARTITIONS[1], 0, Outcome.TRAINED)
    assert cursor.counts[Outcome.TRAINED] == 1
    assert cursor.positions() == before

"""What is decided, on several ranks: each keeps the positions of its own partitions, and one checkpoint holds all.

What becomes of a sample in a step is known to every rank, and counted by every one. What a rank decides by itself, dead
letters and what was filtered, it counts alone; rank 0 has what was counted before the run.
"""

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from gradient_selectors.world.base import World

from stream_trainer.distributed.control import Control
from stream_trainer.ingest.cursor import Cursor
from stream_trainer.records import Outcome, Partition

ALONE = (Outcome.FILTERED, Outcome.DEAD_LETTERED)  # outcomes that a rank decides by itself


def owns(world: World, number: int) -> bool:
    """Whether the partition of this number is this rank's to read: a new one moves no other."""
    return number % world.size == world.rank


class SharedCursor(Cursor):
    """The positions of this rank's partitions, and the counts of all ranks.

    Attributes:
        control: knows what others have counted.
    """

    control: Control

    @classmethod
    def of(cls, control: Control, snapshot: Mapping[str, Any] | None) -> "SharedCursor":
        """Its own part, for a rank, of what a checkpoint holds; an empty one without a checkpoint."""
        cursor = cls.restore(own_part(control.world, snapshot)) if snapshot is not None else cls()
        assert isinstance(cursor, cls)
        cursor.control = control
        control.own_counts = lambda: {outcome.value: cursor.counted(outcome) for outcome in ALONE}
        return cursor

    def resolve(self, partition: Partition, offset: int, outcome: Outcome, **others: Any) -> None:
        if owns(self.control.world, partition.number):
            super().resolve(partition, offset, outcome, **others)
            return
        with self._lock:
            self._counts[outcome] += 1

    def counted(self, outcome: Outcome) -> int:
        """Records that this rank knows of."""
        with self._lock:
            return self._counts[outcome]

    @property
    def counts(self) -> Mapping[Outcome, int]:
        """Records by outcome over the life of the model; those that others decide alone as of the last round."""
        elsewhere = self.control.elsewhere
        return {outcome: self.counted(outcome) + elsewhere.get(outcome.value, 0) for outcome in Outcome}


def own_part(world: World, snapshot: Mapping[str, Any]) -> dict[str, Any]:
    """What a rank restores its cursor from."""
    names = [name for name in snapshot["partitions"] if owns(world, Partition.parse(name).number)]
    mine: dict[str, Any] = {"partitions": {name: snapshot["partitions"][name] for name in names}}
    alone = {outcome.value for outcome in ALONE} if world.rank else set()
    mine["counts"] = {name: 0 if name in alone else count for name, count in snapshot["counts"].items()}
    if "rotation" in snapshot:
        everyone = list(snapshot["partitions"])
        places = {str(everyone.index(name)): str(place) for place, name in enumerate(names)}
        rotation = snapshot["rotation"]
        mine["rotation"] = {
            "last": rotation["last"],
            "read_to": [rotation["read_to"][everyone.index(name)] for name in names],
            "waiting": " ".join(places[i] for i in rotation["waiting"].split() if i in places),
        }
        mine["marks"] = {name: mark for name, mark in snapshot["marks"].items() if name in names}
    return mine


def merged(snapshots: Sequence[Mapping[str, Any]], last: str | None) -> dict[str, Any]:
    """The cursor of a run from those of its ranks, in their order; `last`: whose sample was taken last."""
    partitions: dict[str, Any] = {}
    read_to: list[int] = []
    waiting: list[list[str]] = []
    for snapshot in snapshots:
        waiting.append([str(len(partitions) + int(i)) for i in snapshot["rotation"]["waiting"].split()])
        partitions |= snapshot["partitions"]
        read_to += snapshot["rotation"]["read_to"]
    in_turn = [i for turn in zip_longest(*waiting) for i in turn if i is not None]
    counts = dict(snapshots[0]["counts"])
    for outcome in ALONE:
        counts[outcome.value] = sum(snapshot["counts"][outcome.value] for snapshot in snapshots)
    return {
        "partitions": partitions,
        "counts": counts,
        "rotation": {"last": last, "read_to": read_to, "waiting": " ".join(in_turn)},
        "marks": {name: mark for snapshot in snapshots for name, mark in snapshot["marks"].items()},
    }

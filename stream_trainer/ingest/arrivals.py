"""In which order records came, for the plan of the steps; and in which they are to come, where a plan is followed."""

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from stream_trainer.records import Partition

# Of more records than this without a sample that a step took, only those that are undecided are kept.
MAX_RECORDS = 100_000


@dataclass
class Arrivals:
    """Records in the order in which they came, until a step is planned. Guarded by the cursor's lock.

    Attributes:
        broken: why what is planned cannot come as planned; empty if it can, for all that is known.
    """

    broken: str = ""
    _come: deque[tuple[Partition, int]] = field(default_factory=deque)
    _planned: deque[tuple[Partition, int]] = field(default_factory=deque)
    _limit: int = field(default_factory=lambda: MAX_RECORDS)

    def note(self, partition: Partition, offset: int, is_undecided: Callable[[Partition, int], bool]) -> None:
        """Take note of a record that came and is undecided yet."""
        self._come.append((partition, offset))
        if len(self._come) > self._limit:
            self._come = deque(entry for entry in self._come if is_undecided(*entry))
            self._limit = max(MAX_RECORDS, 2 * len(self._come))
        if self._planned and self._planned[0] == (partition, offset):
            self._planned.popleft()
        elif self._planned:
            self.gave_all(partition, offset + 1)

    def take_to(self, partition: Partition, offset: int) -> list[tuple[Partition, int]]:
        """What came since the last call, up to a record."""
        taken = []
        while self._come:
            taken.append(self._come.popleft())
            if taken[-1] == (partition, offset):
                break
        return taken

    def plan(self, records: Iterable[tuple[Partition, int]]) -> None:
        """Have these come next, in this order."""
        self._planned, self.broken = deque(records), ""

    def begin(self, read_to: Mapping[Partition, int], begins: Mapping[Partition, int]) -> None:
        """Leave out what was read when the checkpoint was made, or comes twice in the plan.

        Records between `read_to` and where reading begins are gone.
        """
        highest, planned = dict(read_to), deque[tuple[Partition, int]]()
        for partition, offset in self._planned:
            if partition not in begins or highest.get(partition, 0) <= offset < begins[partition]:
                self.broken = f"{partition} does not hold offset {offset} any more"
            elif offset >= highest.get(partition, 0):
                planned.append((partition, offset))
                highest[partition] = offset + 1
        self._planned = planned

    def gave_all(self, partition: Partition, position: int | None = None) -> None:
        """Nothing planned of a partition below `position` comes any more; nothing at all, if that is None."""
        gone = [(p, at) for p, at in self._planned if p == partition and (position is None or at < position)]
        if gone:
            self.broken = f"{partition} does not give offset {gone[0][1]} any more"
            self._planned = deque(entry for entry in self._planned if entry not in set(gone))

    @property
    def next(self) -> Partition | None:
        """Whose record is to come next; None if nothing is planned."""
        return self._planned[0][0] if self._planned else None

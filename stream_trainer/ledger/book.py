"""The ledger of a run that goes on: decisions are noted in memory, and a checkpoint makes them durable with itself.

Its segment is written before the checkpoint is renamed into its place. A crash in between leaves a segment that no
checkpoint holds, which the resume drops; the decisions are made, and noted, again.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path

from stream_trainer.checkpoints.ownership import Owner
from stream_trainer.checkpoints.trouble import remedy_of
from stream_trainer.errors import CheckpointError
from stream_trainer.ledger.files import put, read, rows_of, table_of, trained_in
from stream_trainer.ledger.names import FOLDER, segments_in
from stream_trainer.ledger.tidy import clear, drop_after, merge, prune
from stream_trainer.records import Decided, Outcome

UNDONE_BY_ROLLBACK = (Outcome.TRAINED, Outcome.NOT_SELECTED)

logger = logging.getLogger(__name__)


@dataclass
class Ledger:
    """Notes decisions in the order in which the cursor makes them.

    Attributes:
        directory: of the checkpoints.
        durable: number of decisions that are written, for the newest checkpoint or one that failed after that.
        keep_days: how long rows stay; None for ever.
    """

    directory: Path
    owner: Owner
    durable: int
    keep_days: float | None
    _rows: list[Decided] = field(default_factory=list, init=False)

    def begin(self) -> None:
        """Drop what the checkpoint that the run resumes from does not hold. Raises CheckpointError, FencedError."""
        trained_in(table_of((), self.owner.epoch, 0, 0))  # for its first table pyarrow loads modules: not between steps
        try:
            clear(self.directory)
            gone = drop_after(self.directory, self.owner, self.durable)
        except OSError as error:
            raise self._trouble(error) from error
        if gone:
            logger.info("the ledger drops %d decisions that no checkpoint holds", gone)

    def note(self, decided: Decided) -> None:
        """Take note of a decision. Called under the cursor's lock, by either thread."""
        self._rows.append(decided)

    def discard(self, after: int) -> None:
        """Mark what was trained on or not selected from decision `after` on. Raises CheckpointError, FencedError."""
        if after < self.durable:  # a newer checkpoint than the one that was gone back to failed, or is damaged
            try:
                self._take_back(after)
            except OSError as error:
                raise self._trouble(error) from error
        for i in range(after - self.durable, len(self._rows)):
            if self._rows[i].outcome in UNDONE_BY_ROLLBACK:
                self._rows[i] = self._rows[i]._replace(outcome=Outcome.DISCARDED)

    def _take_back(self, after: int) -> None:
        """Have the decisions from `after` on in memory again, for the next checkpoint to write."""
        above = [segment for segment in segments_in(self.directory / FOLDER) if segment.end > after]
        rows = [row for segment in above for row in rows_of(read(segment.path))]
        drop_after(self.directory, self.owner, after)
        self._rows[:0], self.durable = rows, after

    def write(self, total: int, step: int) -> None:
        """Make the decisions below number `total` durable, for a checkpoint of `step` that is about to be renamed.

        Raises CheckpointError if they cannot be written, FencedError if another trainer has taken over.
        """
        try:
            rows = self._rows[: total - self.durable]
            if rows:
                table = table_of(rows, self.owner.epoch, step, total)
                put(self.directory, self.owner, self.durable, total, table)
        except OSError as error:
            raise self._trouble(error) from error
        del self._rows[: len(rows)]
        self.durable = total

    def saved(self) -> None:
        """Tidy, now that the checkpoint is durable. What that meets with is only logged. Raises FencedError."""
        try:
            merge(self.directory, self.owner)
            if self.keep_days is not None:
                prune(self.directory, self.keep_days)
        except (OSError, ValueError, CheckpointError) as error:  # ValueError: no Parquet file any more
            logger.warning("the ledger in %s cannot be tidied: %s", self.directory / FOLDER, error)

    def _trouble(self, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"checkpoint.dir: writing the ledger to {self.directory / FOLDER} failed ({error}); {remedy_of(error)}"
        )

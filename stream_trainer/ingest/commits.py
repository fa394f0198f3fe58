"""Telling the stream how far we are: for lag tools, and to find out whether another trainer has taken over.

What is committed is never ahead of what is durable: a run that is killed in between begins anew where it began.
"""

import logging
import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from stream_trainer.errors import FencedError
from stream_trainer.monitoring.metrics import Metrics
from stream_trainer.records import Partition
from stream_trainer.sources.base import Source

CONFIRM_TIMEOUT_S = 8.0  # a broker that is away must not hold up a checkpoint for longer

logger = logging.getLogger(__name__)


@dataclass
class _Confirmation:
    """A commit that somebody waits for."""

    positions: Mapping[Partition, int]
    step: int
    made: threading.Event = field(default_factory=threading.Event)
    fenced: FencedError | None = None


class Commits:
    """Asked for by the trainer, made by the thread that owns the source."""

    def __init__(self, source: Source, metrics: Metrics) -> None:
        self._source, self._metrics = source, metrics
        self._lock = threading.Lock()
        self._durable: Mapping[Partition, int] = {}
        self._request: tuple[Mapping[Partition, int], int] | None = None
        self._confirmation: _Confirmation | None = None
        self._failing = False

    def begin(self, positions: Mapping[Partition, int]) -> None:
        """Take note of where reading begins."""
        self._durable = positions

    def request(self, positions: Mapping[Partition, int], step: int) -> None:
        """Have positions that are durable committed soon. The newest request wins; a failure is counted, not raised."""
        with self._lock:
            self._durable = positions
            self._request = (positions, step)

    def confirm(self, step: int) -> None:
        """Have what is durable, at `step`, committed again now: the stream refuses that of a trainer that was replaced.

        Returns after `CONFIRM_TIMEOUT_S` at the latest, also if the stream did not answer. Raises FencedError.
        """
        if not self._source.fences:
            return
        confirmation = _Confirmation(self._durable, step)
        with self._lock:
            self._confirmation = confirmation
        confirmation.made.wait(CONFIRM_TIMEOUT_S)
        if confirmation.fenced is not None:
            raise confirmation.fenced

    def make(self, partitions: Collection[Partition]) -> None:
        """Make what was asked for, of the partitions that are read. Raises FencedError."""
        with self._lock:
            request, self._request = self._request, None
            confirmation, self._confirmation = self._confirmation, None
        if confirmation is not None:
            try:
                self._commit(confirmation.positions, confirmation.step, partitions)
            except FencedError as error:
                confirmation.fenced = error
                raise
            finally:
                confirmation.made.set()
        if request is not None:
            self._commit(*request, partitions)

    def _commit(self, positions: Mapping[Partition, int], step: int, partitions: Collection[Partition]) -> None:
        read = {p: at for p, at in positions.items() if p in partitions}
        if not read:
            return
        try:
            self._source.commit(read, step)
            self._failing = False
        except FencedError:
            raise
        except Exception as error:  # lag tools will show too much, and nothing else depends on it
            self._metrics.commit_failures.inc()
            if not self._failing:
                logger.warning("positions could not be committed, which only misleads lag tools: %s", error)
            self._failing = True

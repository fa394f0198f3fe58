"""The ingest thread: it alone calls the source, and turns what it reads into samples, dead letters and decisions.

Every record is noted by the cursor first, then ends in the buffer, or is dead-lettered or filtered, which decides it.
A dead letter is kept before its record counts as decided, and whatever goes wrong in this thread is raised by the
trainer's next `Buffer.take`: nothing vanishes, and nothing fails unseen.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stream_trainer.errors import PoisonError, SampleError
from stream_trainer.ingest.buffer import Buffer
from stream_trainer.ingest.cursor import Cursor
from stream_trainer.ingest.dead_letters import DeadLetters
from stream_trainer.ingest.letter import DeadLetter
from stream_trainer.ingest.poison import PoisonWatch
from stream_trainer.monitoring.metrics import Metrics
from stream_trainer.records import Outcome, Partition, Record, Sample
from stream_trainer.samples.decoder import Decoder
from stream_trainer.settings.schema import DeadLetterSettings
from stream_trainer.sources.base import Source

POLL_TIMEOUT_S = 0.1
LAG_INTERVAL_S = 5.0
JOIN_TIMEOUT_S = 15.0  # within the 30 s that Kubernetes grants, with time left for the last checkpoint
# What is decoded between looks at the stop flag: tens of milliseconds.
CHUNK_RECORDS = 64
CHUNK_BYTES = 256 * 1024

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Snapshot:
    """What is decided at one moment, and what must be stored with it.

    Attributes:
        cursor, counts: of the cursor.
        parts: states of the dead letters and of the watch on them, by the names they have in a checkpoint.
    """

    cursor: dict[str, Any]
    counts: Mapping[Outcome, int]
    parts: dict[str, Any]


class Ingest:
    """Owns `source` and closes it; the dead letters belong to the caller.

    Attributes:
        last_turn: when the thread last came round (`time.monotonic()`); it does at least every few seconds.
    """

    def __init__(
        self,
        source: Source,
        decoder: Decoder,
        dead_letters: DeadLetters,
        cursor: Cursor,
        buffer: Buffer,
        metrics: Metrics,
        limits: DeadLetterSettings | None = None,
    ) -> None:
        self._source = source
        self._decoder = decoder
        self._dead_letters = dead_letters
        self._cursor = cursor
        self._buffer = buffer
        self._metrics = metrics
        self._watch = PoisonWatch(limits or DeadLetterSettings())
        self._letters_lock = threading.RLock()  # what is kept and what is decided change together
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._reading_ends = threading.Event()
        self._reading_ended = threading.Event()
        self._commit_lock = threading.Lock()
        self._commit_request: tuple[Mapping[Partition, int], int] | None = None
        self._commit_failing = False
        self._identity: Mapping[str, str] = {}
        self._partitions: frozenset[Partition] = frozenset()
        self._pending: deque[Record] = deque()  # read, but not yet known to the cursor
        self._paused = False
        self._lost = 0
        self.last_turn = time.monotonic()
        self._lag_due = 0.0
        self._reasons_seen: set[str] = set()

    def start(self, positions: Mapping[Partition, int], identity: Mapping[str, str]) -> None:
        """Begin to read at `positions`; `identity` was stored beside them. Errors surface in `Buffer.take`."""
        self._identity = identity
        self._thread = threading.Thread(target=self._run, args=(positions, identity), name="ingest", daemon=True)
        self._thread.start()

    def stop_reading(self) -> None:
        """Read and decode nothing more; returns once nothing is in hand, so that a snapshot stays the last word.

        Requested commits are still made.
        """
        self._reading_ends.set()
        if self.alive:
            self._reading_ended.wait(JOIN_TIMEOUT_S)

    def stop(self) -> None:
        """Make the last requested commit, close the source and end the thread. Idempotent."""
        self._stopping.set()
        if self._thread is None:
            self._source.close()
            return
        self._thread.join(JOIN_TIMEOUT_S)
        if self._thread.is_alive():
            logger.error("the source did not return within %g s and is left behind", JOIN_TIMEOUT_S)

    def request_commit(self, positions: Mapping[Partition, int], step: int) -> None:
        """Have the source told how far we are, soon. The newest request wins; a failure is counted, not raised."""
        with self._commit_lock:
            self._commit_request = (positions, step)

    def snapshot(self) -> Snapshot:
        """What is decided now; letters that were sent just now are given a few seconds to be kept.

        Raises SourceError if a letter cannot be kept for good.
        """
        self._dead_letters.wait()
        with self._letters_lock:
            self._settle()
            cursor, counts = self._cursor.state_dict(), self._cursor.counts
            positions = {Partition.parse(name): log["next"] for name, log in cursor["partitions"].items()}
            parts = {"dead_letters": self._dead_letters.state_dict(), "poison": self._watch.state_dict(positions)}
        return Snapshot(cursor, counts, parts)

    @property
    def parts(self) -> dict[str, object]:
        """Whatever takes back the `parts` of a snapshot, by name."""
        return {"dead_letters": self._dead_letters, "poison": self._watch}

    @property
    def identity(self) -> Mapping[str, str]:
        """What tells the stream that is read from another of its name; stored beside the cursor."""
        return self._identity

    @property
    def paused(self) -> bool:
        """Whether reading is paused because the buffer is full, or too many dead letters are held."""
        return self._paused

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread is not None and self._thread.is_alive()

    def _run(self, positions: Mapping[Partition, int], identity: Mapping[str, str]) -> None:
        try:
            self._source.start(positions, identity)
            self._identity = dict(self._source.identity())
            begins = self._source.positions()
            self._cursor.begin(begins)
            self._partitions = frozenset(begins)
            while not self._stopping.is_set():
                self._turn()
            self._commit()
        except BaseException as error:
            self._buffer.fail(error)
        finally:
            self._reading_ended.set()
            self._close()

    def _close(self) -> None:
        try:
            self._source.close()
        except Exception as error:
            logger.warning("the source could not be closed (%s)", type(error).__name__)

    def _turn(self) -> None:
        """Read or decode a little, and see to what is due."""
        self.last_turn = time.monotonic()
        self._commit()
        if self._reading_ends.is_set():
            self._reading_ended.set()
            self._stopping.wait(POLL_TIMEOUT_S)
            return
        if time.monotonic() >= self._lag_due:
            self._observe_lag()
            self._lag_due = time.monotonic() + LAG_INTERVAL_S
        self._settle()
        self._pause_or_resume()
        if self._pending and not self._is_full():
            self._process(self._next_chunk())
        elif self._buffer.ended:
            self._stopping.wait(POLL_TIMEOUT_S)
        else:
            self._read()
        self._observe_buffer()

    def _read(self) -> None:
        # A paused source is polled too: it sees to what is due, new partitions for example.
        records = self._source.poll(POLL_TIMEOUT_S)
        self._pending.extend(records)
        if not self._pending and not self._dead_letters.held and self._source.exhausted:
            self._buffer.end()

    def _pause_or_resume(self) -> None:
        if self._paused and self._buffer.low and not self._dead_letters.full:
            self._source.resume()
            self._paused = False
        elif not self._paused and self._is_full():
            self._source.pause()
            self._paused = True

    def _is_full(self) -> bool:
        return self._buffer.full or self._dead_letters.full

    def _next_chunk(self) -> list[Record]:
        chunk: list[Record] = []
        size = 0
        while self._pending and len(chunk) < CHUNK_RECORDS and size < CHUNK_BYTES:
            record = self._pending.popleft()
            chunk.append(record)
            size += len(record.value or b"")
        return chunk

    def _process(self, chunk: Sequence[Record]) -> None:
        self._metrics.records_read.inc(len(chunk))
        self._metrics.bytes_read.inc(sum(len(record.value or b"") for record in chunk))
        fresh = [self._cursor.fetched(r.partition, r.offset, r.next_offset) for r in chunk]
        results = iter(self._decoder.decode_batch([r for r, is_fresh in zip(chunk, fresh, strict=True) if is_fresh]))
        samples = []
        for record, is_fresh in zip(chunk, fresh, strict=True):
            result = next(results) if is_fresh else None
            if isinstance(result, SampleError):
                self._dead_letter(record, result)
                continue
            if isinstance(result, Sample):
                samples.append(result)
            elif is_fresh:
                self._decide(record, Outcome.FILTERED)
            self._note_usable(record, is_fresh)
        self._buffer.put(*samples)
        self._metrics.unusable_ratio.set(self._watch.ratio)

    def _note_usable(self, record: Record, is_fresh: bool) -> None:
        with self._letters_lock:
            if is_fresh:
                self._watch.note(record.partition, record.offset, None)
            else:
                self._watch.note_again(record.partition, record.offset)

    def _settle(self) -> None:
        """Decide the records whose letters are kept."""
        with self._letters_lock:
            for letter in self._dead_letters.settled():
                self._decide(letter.record, Outcome.DEAD_LETTERED)
                self._metrics.dead_letters.labels(letter.reason).inc()
        self._metrics.dead_letters_held.set(self._dead_letters.held)

    def _dead_letter(self, record: Record, error: SampleError) -> None:
        with self._letters_lock:
            self._watch.note(record.partition, record.offset, error.reason)
            self._dead_letters.send(DeadLetter(record, error.reason, str(error)))
            self._settle()
        self._end_if_poisoned()
        if error.reason not in self._reasons_seen:
            self._reasons_seen.add(error.reason)
            logger.warning(
                "%s offset %d is dead-lettered (%s: %s); further records with this reason are only counted",
                record.partition,
                record.offset,
                error.reason,
                error,
            )

    def _end_if_poisoned(self) -> None:
        """Read nothing more; the thread goes on, for the commit of the last checkpoint."""
        if self._reading_ends.is_set():
            return
        try:
            self._watch.check()
        except PoisonError as error:
            self._buffer.fail(error)
            self._reading_ends.set()

    def _decide(self, record: Record, outcome: Outcome) -> None:
        self._cursor.resolve(record.partition, record.offset, outcome)

    def _commit(self) -> None:
        with self._commit_lock:
            request, self._commit_request = self._commit_request, None
        if request is None:
            return
        positions, step = request
        try:
            self._source.commit({p: at for p, at in positions.items() if p in self._partitions}, step)
            self._commit_failing = False
        except Exception as error:  # lag tools will show too much, and nothing else depends on it
            self._metrics.commit_failures.inc()
            if not self._commit_failing:
                logger.warning("positions could not be committed, which only misleads lag tools: %s", error)
            self._commit_failing = True

    def _observe_lag(self) -> None:
        """Export how far behind we are, and pass what the stream holds but never returns."""
        self._metrics.records_lost.inc(self._source.records_lost - self._lost)
        self._lost = self._source.records_lost
        try:
            read_to, ends = self._source.positions(), self._source.end_positions()
        except Exception as error:  # if it lasts, polling will say so
            logger.debug("the lag is unknown for now (%s)", type(error).__name__)
            return
        self._partitions = frozenset(read_to)
        if not self._pending:
            for partition, position in read_to.items():
                self._cursor.reached(partition, position)
        positions = self._cursor.positions()
        for partition, end in ends.items():
            behind = max(0, end - positions.get(partition, 0))
            self._metrics.lag.labels(partition.topic, str(partition.number)).set(behind)

    def _observe_buffer(self) -> None:
        self._metrics.buffer_records.set(self._buffer.records)
        self._metrics.buffer_bytes.set(self._buffer.bytes)
        self._metrics.buffer_tokens.set(self._buffer.tokens)
        self._metrics.paused.set(self._paused)
        self._metrics.reachable.set(self._source.reachable)

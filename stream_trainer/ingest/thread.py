"""The ingest thread: it alone calls the source, and turns what it reads into samples, dead letters and decisions.

Every record is noted by the cursor first, then ends in the buffer, or is dead-lettered or filtered, which decides it.
A dead letter is kept before its record counts as decided, and whatever goes wrong in this thread is raised by the
trainer's next `Buffer.take`: nothing vanishes, and nothing fails unseen.
"""

import logging
import random
import threading
import time
from collections.abc import Callable, Mapping

from stream_trainer.errors import PoisonError, SourceAwayError, SourceError
from stream_trainer.ingest.buffer import Buffer
from stream_trainer.ingest.commits import Commits
from stream_trainer.ingest.cursor import Cursor
from stream_trainer.ingest.dead_letters import DeadLetters
from stream_trainer.ingest.judge import Judge, Snapshot
from stream_trainer.ingest.letter import DeadLetter
from stream_trainer.ingest.rotation import Rotation
from stream_trainer.monitoring.laps import Laps
from stream_trainer.monitoring.metrics import Metrics
from stream_trainer.records import Partition, Record
from stream_trainer.samples.decoder import Decoder
from stream_trainer.samples.schemas.registry import Registry
from stream_trainer.settings.schema import DeadLetterSettings
from stream_trainer.sources.base import Source
from stream_trainer.sources.retention import Horizon

POLL_TIMEOUT_S = 0.1
LAG_INTERVAL_S = 5.0
JOIN_TIMEOUT_S = 15.0  # within the 30 s that Kubernetes grants, with time left for the last checkpoint
# What is decoded between looks at the stop flag: tens of milliseconds.
CHUNK_RECORDS = 64
CHUNK_BYTES = 256 * 1024
# Between tries to start a source that does not answer: doubled each time, then spread by a factor of 0.5 to 1.5.
FIRST_BACKOFF_S, MAX_BACKOFF_S = 0.5, 30.0

logger = logging.getLogger(__name__)


class Ingest:
    """Owns `source` and closes it; the dead letters belong to the caller.

    Attributes:
        last_turn: when the thread last came round (`time.monotonic()`); it does at least every few seconds.
        unreachable_since: since when the stream cannot be read (`time.monotonic()`); None while it can.
        away: why the source could not be started yet, or schemas cannot be had; empty if all is well.
        idle: whether all is read and handed on that the source has, for all that is known now.
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
        jitter: Callable[[], float] = random.random,
        registry: Registry | None = None,
    ) -> None:
        """`jitter` returns numbers from 0 to 1, which spread the tries of many services over time.

        Records that the decoder reads by schemas wait until `registry` has these.
        """
        self._source = source
        self._dead_letters = dead_letters
        self._cursor = cursor
        self._buffer = buffer
        self._metrics = metrics
        self._judge = Judge(decoder, dead_letters, cursor, metrics, limits or DeadLetterSettings())
        self._commits = Commits(source, metrics)
        self._jitter = jitter
        self._registry = registry
        self._thread: threading.Thread | None = None
        self._started = threading.Event()
        self._stopping = threading.Event()
        self._reading_ends = threading.Event()
        self._reading_ended = threading.Event()
        self._identity: Mapping[str, str] = {}
        self._partitions: frozenset[Partition] = frozenset()
        self._rotation = Rotation(cursor)  # read, but not yet known to the cursor
        self._in_hand: list[tuple[Record, bool]] = []  # next to be decoded, once their schemas are here
        self._failure: SourceError | None = None
        self._paused = False
        self._lost = self._passes = 0
        self.idle = False
        self.away = ""
        self.unreachable_since: float | None = None
        self.last_turn = time.monotonic()
        self._lag_due = 0.0
        self._horizon = Horizon()
        self._ends: Mapping[Partition, int] = {}

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
        if self.alive and self._started.is_set():  # a source that is not open has nothing in hand
            self._reading_ended.wait(JOIN_TIMEOUT_S)

    def stop(self) -> None:
        """Make the last requested commit, close the source and end the thread. Idempotent."""
        self._stopping.set()
        if self._thread is None:
            self._source.close()
            return
        self._thread.join(JOIN_TIMEOUT_S if self._started.is_set() else POLL_TIMEOUT_S)
        if self._thread.is_alive() and self._started.is_set():
            logger.error("the source did not return within %g s and is left behind", JOIN_TIMEOUT_S)

    def request_commit(self, positions: Mapping[Partition, int], step: int) -> None:
        """Have the source told how far we are, soon. The newest request wins; a failure is counted, not raised."""
        self._commits.request(positions, step)

    def snapshot(self) -> Snapshot:
        """What is decided now; letters that were sent just now are given a few seconds to be kept."""
        return self._judge.snapshot()

    def dead_letter(self, letter: DeadLetter) -> None:
        """Keep a record whose sample turned out to be unusable. May be called by any thread."""
        self._judge.dead_letter(letter)

    @property
    def parts(self) -> dict[str, object]:
        """Whatever takes back the `parts` of a snapshot, by name."""
        return self._judge.parts

    def confirm(self, step: int) -> None:
        """Before a checkpoint becomes the newest: make sure that no other trainer has taken over, where that shows.

        `step` is that of the newest one before it. Returns soon, also if the stream did not answer. Raises FencedError.
        """
        if self.alive and self._started.is_set():
            self._commits.confirm(step)

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
        self._laps = Laps(self._metrics)
        try:
            if self._start_source(positions, identity):
                self._laps.lap("wait")
                while not self._stopping.is_set():
                    self._turn()
                self._commits.make(self._partitions)
        except BaseException as error:
            self._buffer.fail(error)
        finally:
            self._reading_ended.set()
            self._close()

    def _start_source(self, positions: Mapping[Partition, int], identity: Mapping[str, str]) -> bool:
        """Start, if need be after waiting for somebody to answer. Returns False if told to stop before that."""
        backoff = FIRST_BACKOFF_S
        while not (self._stopping.is_set() or self._reading_ends.is_set()):
            self.last_turn = time.monotonic()
            try:
                self._source.start(positions, identity, self._cursor.marks)
            except SourceAwayError as error:
                if self._source.finite:
                    raise
                self._wait_for_source(error, backoff)
                backoff = min(2 * backoff, MAX_BACKOFF_S)
            else:
                self._begin()
                return True
        return False

    def _wait_for_source(self, error: SourceAwayError, backoff: float) -> None:
        if not self.away:
            logger.warning("%s; waiting for it", error)
        self.away = str(error)
        self._note_reachable(reachable=False)
        self._reading_ends.wait(backoff * (0.5 + self._jitter()))

    def _begin(self) -> None:
        if self.away:
            logger.info("the stream answers")
        self.away = ""
        self._identity = dict(self._source.identity())
        begins = self._source.positions()
        self._cursor.begin(begins, self._source.replaced)
        self._partitions = frozenset(begins)
        self._commits.begin(begins)
        self._started.set()

    def _close(self) -> None:
        try:
            self._source.close()
        except Exception as error:
            logger.warning("the source could not be closed (%s)", type(error).__name__)

    def _turn(self) -> None:
        """Read or decode a little, and see to what is due."""
        self.last_turn = time.monotonic()
        self._commits.make(self._partitions)
        self._laps.lap("commit")
        if self._reading_ends.is_set():
            self._reading_ended.set()
            self._stopping.wait(POLL_TIMEOUT_S)
            self._laps.lap("wait")
            return
        if time.monotonic() >= self._lag_due:
            self._observe_lag()
            self._lag_due = time.monotonic() + LAG_INTERVAL_S
        self._judge.settle()
        self._pause_or_resume()
        self._laps.lap("other")
        chunk = self._ready_chunk()
        if chunk:
            self._process(chunk)
        elif self._buffer.ended:
            self._stopping.wait(POLL_TIMEOUT_S)
        elif self._failure is not None and not self._buffer.full:
            self._buffer.end(self._failure)
        else:
            self._read()
        self._laps.lap("decode" if chunk else "hold" if self._paused else "wait")
        self._observe_buffer()

    def _read(self) -> None:
        # A paused source is polled too: it sees to what is due, new partitions for example.
        try:
            self._source.hold(self._rotation.to_hold())
            records = self._source.poll(POLL_TIMEOUT_S)
        except SourceError as error:  # what was read before is decided first
            self._failure = error
            return
        self._metrics.records_read.inc(len(records))
        self._metrics.bytes_read.inc(sum(len(record.value or b"") for record in records))
        self._horizon.note(records)
        self._rotation.put(records)
        source = self._source
        positions, drained, waiting = source.positions(), source.drained, self._rotation.waiting or self._in_hand
        self._rotation.know(positions, drained, finite=source.finite)
        self.idle = not (records or waiting) and drained >= positions.keys()
        if not (waiting or self._dead_letters.held) and source.exhausted:
            self._buffer.end(self._why_of_no_use())

    def _why_of_no_use(self) -> PoisonError | None:
        try:
            self._judge.check_end()
        except PoisonError as error:
            return error
        return None

    def _pause_or_resume(self) -> None:
        if self._paused and self._buffer.low and not (self._dead_letters.full or self._lacks_schemas):
            self._source.resume()
            self._paused = False
        elif not self._paused and self._is_full():
            self._source.pause()
            self._paused = True

    def _is_full(self) -> bool:
        return self._buffer.full or self._dead_letters.full or self._lacks_schemas

    @property
    def _lacks_schemas(self) -> bool:
        return self._registry is not None and self._registry.waits

    def _ready_chunk(self) -> list[tuple[Record, bool]]:
        """What can be decoded now. Raises SourceError if the registry refuses us."""
        if self._is_full():
            return []
        self._in_hand = self._in_hand or self._next_chunk()
        if self._registry is not None:
            ready = self._registry.ready([record for record, is_fresh in self._in_hand if is_fresh])
            self.away = self._registry.away
            if not ready:
                return []
        chunk, self._in_hand = self._in_hand, []
        return chunk

    def _next_chunk(self) -> list[tuple[Record, bool]]:
        chunk: list[tuple[Record, bool]] = []
        size = 0
        while len(chunk) < CHUNK_RECORDS and size < CHUNK_BYTES and (found := self._rotation.next()) is not None:
            chunk.append(found)
            size += len(found[0].value or b"")
        return chunk

    def _process(self, chunk: list[tuple[Record, bool]]) -> None:
        self._buffer.put(*self._judge.judge(chunk))
        if self._judge.poison is not None and not self._reading_ends.is_set():
            # Read nothing more; the thread goes on, for the commit of the last checkpoint.
            self._buffer.fail(self._judge.poison)
            self._reading_ends.set()

    def _observe_lag(self) -> None:
        """Export how far behind we are, and pass what the stream holds but never returns."""
        self._metrics.records_lost.inc(self._source.records_lost - self._lost)
        self._lost = self._source.records_lost
        self._observe_retention()
        try:
            read_to, ends = self._source.positions(), self._source.end_positions()
        except Exception as error:  # if it lasts, polling will say so
            logger.debug("the lag is unknown for now (%s)", type(error).__name__)
            return
        self._partitions, self._ends = frozenset(read_to), ends
        for partition, position in read_to.items():
            if self._rotation.is_empty(partition):
                self._cursor.reached(partition, position)
        positions = self._cursor.positions()
        for partition, end in ends.items():
            behind = max(0, end - positions.get(partition, 0))
            labels = partition.topic, str(partition.number)
            self._metrics.lag.set(behind, *labels)
            self._metrics.decided_offset.set(end - behind, *labels)
        for partition, count in self._source.held_back().items():
            self._metrics.behind_transactions.set(count, partition.topic, str(partition.number))
        self._metrics.partitions_without_leader.set(len(self._source.without_leader()))
        self._metrics.passes.inc(self._rotation.passes - self._passes)
        self._passes = self._rotation.passes

    def _observe_retention(self) -> None:
        """Before the ends are asked for: during an outage time runs on."""
        if self._source.retention_s is None:
            return
        positions = self._cursor.positions()
        found = self._horizon.remaining(self._source.retention_s, positions, self._ends, time.time())
        for partition, seconds in found.items():
            self._metrics.retention.labels(partition.topic).set(self._source.retention_s)
            self._metrics.retention_remaining.set(seconds, partition.topic, str(partition.number))

    def _observe_buffer(self) -> None:
        self._metrics.buffer_records.set(self._buffer.records)
        self._metrics.buffer_bytes.set(self._buffer.bytes)
        self._metrics.buffer_tokens.set(self._buffer.tokens)
        self._metrics.paused.set(self._paused)
        self._note_reachable(reachable=self._source.reachable and not self.away)

    def _note_reachable(self, *, reachable: bool) -> None:
        self._metrics.reachable.set(reachable)
        if reachable:
            self.unreachable_since = None
        elif self.unreachable_since is None:
            self.unreachable_since = time.monotonic()

"""What becomes of a record that was read: a sample, a decision, or a dead letter."""

import logging
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from stream_trainer.errors import PoisonError, SampleError, SourceError
from stream_trainer.ingest.cursor import Cursor
from stream_trainer.ingest.dead_letters import DeadLetters
from stream_trainer.ingest.letter import DeadLetter
from stream_trainer.ingest.poison import PoisonWatch
from stream_trainer.monitoring.metrics import Metrics
from stream_trainer.records import Outcome, Partition, Record, Sample
from stream_trainer.samples.decoder import Decoder
from stream_trainer.samples.duplicates import Duplicates
from stream_trainer.settings.schema import DeadLetterSettings

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


class Judge:
    """Decodes records, and decides those that cannot be used. `snapshot` may be called by any thread.

    Attributes:
        poison: why no more should be read: too many records cannot be used.
    """

    def __init__(
        self,
        decoder: Decoder,
        dead_letters: DeadLetters,
        cursor: Cursor,
        metrics: Metrics,
        limits: DeadLetterSettings,
    ) -> None:
        self._decoder, self._dead_letters = decoder, dead_letters
        self._cursor, self._metrics = cursor, metrics
        self._watch = PoisonWatch(limits)
        self._duplicates = Duplicates(decoder.settings)
        self._lock = threading.RLock()  # what is kept and what is decided change together
        self._reasons_seen: set[str] = set()
        self._gave_samples = False
        self.poison: PoisonError | None = None

    def snapshot(self) -> Snapshot:
        """What is decided now; letters that were sent just now are given a few seconds to be kept."""
        self._dead_letters.wait()
        with self._lock:
            with suppress(SourceError):  # the thread raises it: here their records only stay undecided
                self.settle()
            cursor, counts = self._cursor.state_dict(), self._cursor.counts
            positions = {Partition.parse(name): log["next"] for name, log in cursor["partitions"].items()}
            parts = {
                "dead_letters": self._dead_letters.state_dict(),
                "poison": self._watch.state_dict(positions),
                "duplicates": self._duplicates.state_dict(),
            }
        return Snapshot(cursor, counts, parts)

    @property
    def parts(self) -> dict[str, object]:
        """Whatever takes back the `parts` of a snapshot, by name."""
        return {"dead_letters": self._dead_letters, "poison": self._watch, "duplicates": self._duplicates}

    def judge(self, chunk: Sequence[tuple[Record, bool]]) -> list[Sample]:
        """The samples of records that the cursor has taken note of; False marks one that was decided before."""
        decoded = self._decoder.decode_batch([record for record, is_fresh in chunk if is_fresh])
        self._count_notes(decoded)
        results = iter(decoded)
        samples = []
        for record, is_fresh in chunk:
            result = next(results) if is_fresh else None
            if isinstance(result, SampleError):
                self._dead_letter(record, result)
                continue
            if isinstance(result, Sample) and not self._is_duplicate(result):
                samples.append(result)
            elif is_fresh:
                outcome = Outcome.FILTERED if result is None else Outcome.DUPLICATE
                self._cursor.resolve(record.partition, record.offset, outcome, id=result.id if result else None)
                self._metrics.unselected.inc(1, outcome.value)
            self._note_usable(record, is_fresh)
        self._metrics.unusable_ratio.set(self._watch.ratio)
        self._gave_samples = self._gave_samples or bool(samples)
        return samples

    def dead_letter(self, letter: DeadLetter) -> None:
        """Keep a record that turned out to be unusable later. It is decided once its place has it."""
        with self._lock:
            self._dead_letters.send(letter)
            self.settle()

    def check_end(self) -> None:
        """Raises PoisonError if the stream has ended, and the model was never given one sample of it."""
        counts = self._cursor.counts
        used = (Outcome.TRAINED, Outcome.NOT_SELECTED, Outcome.DISCARDED)
        if not self._gave_samples and not any(counts[outcome] for outcome in used):
            self._watch.check_end()

    def settle(self) -> None:
        """Decide the records whose letters are kept."""
        with self._lock:
            for letter in self._dead_letters.settled():
                record, dead = letter.record, Outcome.DEAD_LETTERED
                self._cursor.resolve(record.partition, record.offset, dead, reason=letter.reason)
                self._metrics.dead_letters.labels(letter.reason).inc()
        self._metrics.dead_letters_held.set(self._dead_letters.held)

    def _count_notes(self, decoded: Sequence[Sample | SampleError | None]) -> None:
        noted = (note for sample in decoded if isinstance(sample, Sample) for note in sample.notes)
        for note, count in Counter(noted).items():
            self._metrics.sample_notes.labels(note).inc(count)

    def _is_duplicate(self, sample: Sample) -> bool:
        with self._lock:  # a snapshot must not come between
            return self._duplicates.is_one(sample)

    def _note_usable(self, record: Record, is_fresh: bool) -> None:
        with self._lock:
            if is_fresh:
                self._watch.note(record.partition, record.offset, None)
            else:
                self._watch.note_again(record.partition, record.offset)

    def _dead_letter(self, record: Record, error: SampleError) -> None:
        with self._lock:
            self._watch.note(record.partition, record.offset, error.reason)
            self.dead_letter(DeadLetter(record, error.reason, str(error)))
        try:
            self._watch.check()
        except PoisonError as poison:
            self.poison = poison
        if error.reason not in self._reasons_seen:
            self._reasons_seen.add(error.reason)
            logger.warning(
                "%s offset %d is dead-lettered (%s: %s); further records with this reason are only counted",
                record.partition,
                record.offset,
                error.reason,
                error,
            )

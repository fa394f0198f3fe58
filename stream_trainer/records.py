"""The nouns that travel through the service, from the bytes of the stream to what was decided about them.

`Record` (bytes and position) -> `Sample` (token ids, labels, origin) -> a pool of them -> the `Outcome` of each.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple, Protocol


class Partition(NamedTuple):
    """One ordered log: a partition of a Kafka topic, or a file (number 0)."""

    topic: str
    number: int

    def __str__(self) -> str:
        return f"{self.topic}:{self.number}"

    @classmethod
    def parse(cls, text: str) -> "Partition":
        """Inverse of `str()`; a topic or a file name may itself contain colons."""
        topic, _, number = text.rpartition(":")
        return cls(topic, int(number))


class Outcome(StrEnum):
    """What became of a record. Every record that is fetched ends as exactly one of these."""

    TRAINED = "trained"  # it entered an update with a coefficient above zero
    NOT_SELECTED = "not_selected"  # it was scored, and others were better, or it pointed away from the target
    FILTERED = "filtered"  # it was legal but carries nothing to train on (a tombstone)
    DUPLICATE = "duplicate"  # it is the same as an earlier one, by its id or its tokens
    DEAD_LETTERED = "dead_lettered"  # it could not be used; its bytes are kept
    DISCARDED = "discarded"  # it was trained on or not selected, and a rollback took that back


class Decided(NamedTuple):
    """What became of a record, for the ledger.

    Attributes:
        time: of the decision (Unix time).
        id: the producer's name for its sample, if one was made of it and has one.
        step: that decided it; None if it was decided before it came to a step.
        coefficient: of a sample that a step scored, zero if it was not selected; None if it was not scored.
        reason: of its dead letter.
    """

    partition: Partition
    offset: int
    outcome: Outcome
    time: float
    id: str | None = None
    step: int | None = None
    coefficient: float | None = None
    reason: str | None = None


class Decisions(Protocol):
    """Whoever keeps what was decided. Decisions are numbered as they are made, over the life of the model."""

    def note(self, decided: Decided) -> None:
        """Take note of the next decision."""

    def discard(self, after: int) -> None:
        """Take note that a rollback undid what was trained on or not selected from decision `after` on."""

    def write(self, total: int, step: int) -> None:
        """Make the first `total` durable, before the checkpoint of `step` that holds them."""

    def saved(self) -> None:
        """Take note that this checkpoint is durable."""


@dataclass(frozen=True, slots=True)
class Record:
    """One record as it was read: bytes, untouched.

    Attributes:
        offset: Kafka offset; for a file the byte at which the line starts.
        next_offset: where reading goes on after this record: `offset + 1`, or the byte after the newline.
        timestamp: seconds since the epoch, or None where the stream carries none.
        mark: tells this record from another one at the same offset of a log that was replaced; empty if unknown.
        damage: why its bytes could not be decoded, empty for a sound record; `value` is then what was found instead.
    """

    partition: Partition
    offset: int
    next_offset: int
    value: bytes | None
    key: bytes | None = None
    headers: tuple[tuple[str, bytes | None], ...] = ()
    timestamp: float | None = None
    mark: str = ""
    damage: str = ""


@dataclass(frozen=True, slots=True)
class Sample:
    """One training sample.

    Attributes:
        input_ids: T token ids.
        labels: T token ids, `-100` where the token carries no loss (prompt). Not shifted.
        partition, offset: the record it came from.
        size: bytes of the record's value, for backpressure.
        weight: how much the producer says it counts; 1 unless stated.
        timestamp: event time in seconds since the epoch, or None.
        id: the producer's name for it, or None.
        domain: the producer's label for where it comes from, or None.
        fields: names and values of the record's fields that a learned draw may tell producers apart by.
        record: the record itself, whose bytes a dead letter keeps should a step fail on the sample. Its value takes
            less memory than the token ids, and the buffer's limit in bytes counts it.
        notes: what is to be counted of it beside its outcome.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    partition: Partition
    offset: int
    size: int
    weight: float = 1.0
    timestamp: float | None = None
    id: str | None = None
    domain: str | None = None
    fields: tuple[tuple[str, str], ...] = ()
    record: Record | None = field(default=None, repr=False, compare=False)
    notes: tuple[str, ...] = ()

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

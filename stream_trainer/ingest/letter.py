"""A dead letter: a record that could not be used, and how it is written to a file and to a topic, and read back.

- A file of JSON lines: `topic`, `partition`, `offset`, `next_offset`, `timestamp` (seconds or null), `key`, `value`
  (base64 or null), `headers` (`[name, base64 or null]` pairs), `reason`, `detail`, `trainer_version`, `trainer` (whose
  letter it is: the checkpoint directory, hashed).
- A Kafka topic: key, value and headers as they were, and the headers `stream-trainer-topic`, `-partition`, `-offset`,
  `-timestamp` (milliseconds), `-reason`, `-detail`, `-version` and `-trainer` (whose letter it is: a random name) after
  them. A record without a key gets `topic:partition:offset` for one, marked by `stream-trainer-null-key`. Header values
  that were null are sent empty and named by index in `stream-trainer-null-headers`.
"""

import base64
import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from stream_trainer import __version__
from stream_trainer.errors import SettingsError
from stream_trainer.records import Partition, Record

DETAIL_CHARS = 200
HEADER = "stream-trainer-"
MAX_HELD = 1000
MAX_HELD_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A record that was kept, and why.

    Attributes:
        reason: one of `samples.decoder.REASONS`.
        detail: more of it, never a piece of the record.
        trainer: whose letter it is; empty where nobody said so.
    """

    record: Record
    reason: str
    detail: str
    trainer_version: str = __version__
    trainer: str = ""

    @property
    def position(self) -> str:
        """`topic:partition:offset`: no two records have the same, so a letter that is there twice is known by it."""
        return f"{self.record.partition}:{self.record.offset}"

    @property
    def size(self) -> int:
        """About the bytes that it takes in memory."""
        record = self.record
        named = sum(len(name) + len(value or b"") for name, value in record.headers)
        return len(record.value or b"") + len(record.key or b"") + named + 500


def are_too_many(held: Collection[DeadLetter]) -> bool:
    """Whether so many letters wait for their place that nothing more should be read."""
    return len(held) >= MAX_HELD or sum(letter.size for letter in held) >= MAX_HELD_BYTES


def read_dead_letters(path: Path) -> Iterator[DeadLetter]:
    """What a file of dead letters holds, with the original bytes. Raises SettingsError at a line that is none."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                yield from_json(line)
            except (ValueError, KeyError, TypeError) as error:
                raise SettingsError(
                    f"{path} line {number} is no dead letter ({type(error).__name__}); remove that line"
                ) from error


def to_json(letter: DeadLetter) -> bytes:
    """One line of a file."""
    record = letter.record
    fields = {
        "topic": record.partition.topic,
        "partition": record.partition.number,
        "offset": record.offset,
        "next_offset": record.next_offset,
        "timestamp": record.timestamp,
        "key": _encoded(record.key),
        "value": _encoded(record.value),
        "headers": [[name, _encoded(value)] for name, value in record.headers],
        "reason": letter.reason,
        "detail": letter.detail[:DETAIL_CHARS],
        "trainer_version": letter.trainer_version,
        "trainer": letter.trainer,
    }
    return json.dumps(fields).encode() + b"\n"


def from_json(line: bytes) -> DeadLetter:
    """Inverse of `to_json`. Raises ValueError, KeyError or TypeError if the line is no dead letter."""
    fields = json.loads(line)
    record = Record(
        partition=Partition(fields["topic"], fields["partition"]),
        offset=fields["offset"],
        next_offset=fields["next_offset"],
        value=_decoded(fields["value"]),
        key=_decoded(fields["key"]),
        headers=tuple((name, _decoded(value)) for name, value in fields["headers"]),
        timestamp=fields["timestamp"],
    )
    return DeadLetter(record, fields["reason"], fields["detail"], fields["trainer_version"], fields.get("trainer", ""))


def to_message(letter: DeadLetter) -> tuple[bytes, list[tuple[str, bytes]]]:
    """Key and headers of the message in a topic. The client refuses null header values, which Kafka itself allows."""
    record = letter.record
    ours = {
        "topic": record.partition.topic,
        "partition": record.partition.number,
        "offset": record.offset,
        "reason": letter.reason,
        "detail": letter.detail[:DETAIL_CHARS],
        "version": letter.trainer_version,
    }
    if letter.trainer:
        ours["trainer"] = letter.trainer
    if record.timestamp is not None:
        ours["timestamp"] = round(record.timestamp * 1000)
    if record.key is None:
        ours["null-key"] = 1
    nulls = [str(index) for index, (_, value) in enumerate(record.headers) if value is None]
    if nulls:
        ours["null-headers"] = ",".join(nulls)
    original = [(name, value or b"") for name, value in record.headers]
    key = letter.position.encode() if record.key is None else record.key
    return key, original + [(HEADER + name, str(value).encode()) for name, value in ours.items()]


def from_message(message: Record) -> DeadLetter:
    """Inverse of `to_message`. Raises ValueError or KeyError if the message is no dead letter.

    Our headers come last: earlier ones of the same name belong to the record, which may be a letter itself.
    """
    first = max(index for index, (name, _) in enumerate(message.headers) if name == f"{HEADER}topic")
    ours = {name.removeprefix(HEADER): (value or b"").decode() for name, value in message.headers[first:]}
    nulls = {int(index) for index in ours["null-headers"].split(",")} if "null-headers" in ours else set()
    original = enumerate(message.headers[:first])
    record = Record(
        partition=Partition(ours["topic"], int(ours["partition"])),
        offset=int(ours["offset"]),
        next_offset=int(ours["offset"]) + 1,
        value=message.value,
        key=None if "null-key" in ours else message.key,
        headers=tuple((name, None if index in nulls else value) for index, (name, value) in original),
        timestamp=int(ours["timestamp"]) / 1000 if "timestamp" in ours else None,
    )
    return DeadLetter(record, ours["reason"], ours["detail"], ours["version"], ours.get("trainer", ""))


def _encoded(data: bytes | None) -> str | None:
    return None if data is None else base64.b64encode(data).decode("ascii")


def _decoded(text: str | None) -> bytes | None:
    return None if text is None else base64.b64decode(text, validate=True)

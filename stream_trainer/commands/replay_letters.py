"""`stream-trainer dead-letters replay`: publish the original records again, each once however often it is called.

A ledger beside the letters notes which were published, batch by batch: a batch is written to it before it is committed,
and the brokers know the number of the last one that was (`publish`). So an interrupted replay is gone on with exactly.

    {"id": "5f3c..."}                                   names the ledger to the brokers
    {"to": "samples", "batch": 1, "positions": [...]}   about to be committed
    {"to": "samples", "done": 1}                        committed
"""

import argparse
import json
import os
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

from stream_trainer.commands.letters import add_letter_arguments, wanted_letters
from stream_trainer.commands.produce import kafka_settings
from stream_trainer.commands.publish import Publisher
from stream_trainer.errors import SettingsError
from stream_trainer.ingest.letter import DeadLetter

EXAMPLES = """\
examples:
  stream-trainer dead-letters replay dead-letters.jsonl --to samples --reason too_long --dry-run
  stream-trainer dead-letters replay dead-letters.jsonl --to samples --reason too_long
  stream-trainer dead-letters replay --topic samples.dead-letters --to samples

Value, key and headers are those of the original; the time is that of the replay. A letter that was published to the
same topic before is passed over: FILE.replayed, or TOPIC.replayed, remembers it.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    add_letter_arguments(parser)
    parser.add_argument("--to", metavar="TOPIC", required=True, help="topic to publish to")
    parser.add_argument("--ledger", type=Path, metavar="FILE", help="what was published before (default: see below)")
    parser.add_argument("--dry-run", action="store_true", help="only count what would be published")


def run(args: argparse.Namespace) -> int:
    """Publish what was not published before. Returns the exit code.

    Raises SettingsError if letters or ledger cannot be used, SourceError if the brokers cannot take the records.
    """
    ledger = Ledger(args.ledger or Path(f"{args.file if args.file is not None else args.topic}.replayed"), args.to)
    if args.dry_run:
        fresh = Counter(letter.reason for letter in wanted_letters(args) if letter.position not in ledger.done(0))
        for reason, count in fresh.most_common():
            print(f"{count:8,}  {reason}")
        print(f"{fresh.total():8,}  would be published to {args.to}")
        return 0
    publisher = Publisher(kafka_settings(args), args.to, ledger.job)
    try:
        published, before, empty = _replay(args, ledger, publisher)
    finally:
        publisher.close()
    print(f"published {published} records to {args.to}; {before} were published before")
    if empty:
        print(f"left out: {empty} without key and value")
    if not publisher.exact:
        print("the brokers have no transactions: an interrupted run would publish some records twice")
    return 0


def _replay(args: argparse.Namespace, ledger: "Ledger", publisher: Publisher) -> tuple[int, int, int]:
    """Records published, published before, and left out."""
    done, before, empty = ledger.done(publisher.stored[0]), 0, 0
    positions: list[str] = []
    for letter in wanted_letters(args):
        if letter.position in done:
            before += 1
        elif letter.record.key is None and letter.record.value is None:
            empty += 1
        else:
            _send(publisher, letter)
            positions.append(letter.position)
        if publisher.due:
            ledger.commit(publisher, positions)
            positions = []
    ledger.commit(publisher, positions)
    return publisher.records, before, empty


def _send(publisher: Publisher, letter: DeadLetter) -> None:
    record = letter.record
    headers = [(name, value or b"") for name, value in record.headers]  # the client has no null values
    publisher.send(record.value, key=record.key, headers=headers)


class Ledger:
    """The file that remembers what was published to one topic."""

    def __init__(self, path: Path, to: str) -> None:
        """Raises SettingsError if it is no ledger."""
        self._path, self._to = path, to
        self._batches: dict[int, list[str]] = {}
        self._done = 0
        self._id = uuid.uuid4().hex
        self._is_new = not path.exists()
        if not self._is_new:
            self._read()

    @property
    def job(self) -> str:
        """Its name at the brokers."""
        return f"stream-trainer-replay-{self._id}-{self._to}"

    def done(self, stored: int) -> frozenset[str]:
        """Positions that were published, where the brokers have stored the number of the last batch."""
        self._done = max(self._done, stored)
        return frozenset(
            position for batch, positions in self._batches.items() if batch <= self._done for position in positions
        )

    def commit(self, publisher: Publisher, positions: list[str]) -> None:
        """Make what was sent durable here and there. Raises SourceError if the brokers fail, SettingsError if we do."""
        if not positions:
            return
        batch = self._done + 1
        self._write({"to": self._to, "batch": batch, "positions": positions})
        publisher.commit(batch, "")
        self._write({"to": self._to, "done": batch})
        self._done = batch

    def _read(self) -> None:
        try:
            for line in self._path.read_bytes().splitlines():
                self._take(json.loads(line))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SettingsError(
                f"--ledger {self._path} cannot be read ({error}); name another file, with which all is published again"
            ) from error

    def _take(self, entry: dict[str, Any]) -> None:
        if "id" in entry:
            self._id = entry["id"]
        elif entry["to"] == self._to and "done" in entry:
            self._done = max(self._done, entry["done"])
        elif entry["to"] == self._to:
            self._batches[entry["batch"]] = entry["positions"]

    def _write(self, entry: dict[str, Any]) -> None:
        lines = [{"id": self._id}, entry] if self._is_new else [entry]
        try:
            with self._path.open("ab") as file:
                file.write(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise SettingsError(f"--ledger {self._path} cannot be written ({error.strerror}); name another") from error
        self._is_new = False

"""Publish JSON lines to a topic, mixed as asked: for demos, load tests and backfills.

Each line becomes a record with its original bytes, no key and the current time. Files of other formats are read as
`formats.files` says. Records go to the partitions in turn, so the same arguments give the same topic. A run that was
interrupted is gone on with when the same command is given again: no line is published twice, and none is left out.
"""

import argparse
import hashlib
import json
import math
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from kafka import KafkaAdminClient
from kafka.errors import KafkaError, TopicAlreadyExistsError
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from stream_trainer.commands.publish import COMMIT_S, Publisher
from stream_trainer.errors import SettingsError, SourceError
from stream_trainer.formats.files import LINES, form_of, main_file, records_in
from stream_trainer.settings.schema import ENVIRONMENT_PREFIX
from stream_trainer.settings.sections.source import KafkaSettings
from stream_trainer.sources.connection import Topic, connect, describe_topic

FIRST_BYTES = 4096  # of a file's first line, which tell it from another of its name

EXAMPLES = """\
examples:
  stream-trainer produce math.jsonl --topic samples
      all lines of one file, as fast as the broker takes them
  stream-trainer produce math.jsonl:0.25 roleplay.jsonl:0.35 tools.jsonl:0.40 --topic samples --rate 100
      a mixture: each record is drawn from a file with the stated probability, 100 records a second,
      until a file runs out, so that the mixture stays as stated
  stream-trainer produce math.jsonl tools.jsonl --topic samples --count 1000 --seed 1
      without shares the files are interleaved in proportion to their length

A command that was interrupted goes on where it was when it is given again, and one that was finished publishes what its
files have gained at their ends, or nothing; --again publishes all from the start. The brokers remember this as long as
they keep the offsets of a group (offsets.retention.minutes, 7 days by default). Read the topic with
isolation.level=read_committed, as `run` does.

Whatever an option leaves out comes from the same environment variables as for `run`, such as
STREAM_TRAINER_SOURCE__KAFKA__BOOTSTRAP_SERVERS; the password comes from there only
(STREAM_TRAINER_SOURCE__KAFKA__SASL_PASSWORD, or SASL_PASSWORD_FILE for one in a file).
"""


@dataclass(frozen=True, slots=True)
class ProduceReport:
    """What was published.

    Attributes:
        records, bytes: acknowledged by the brokers in this run; bytes of the values.
        before: records that earlier runs of the same have published.
        exact: whether an interruption and a new start would publish nothing twice.
        seconds: from the first record to the last acknowledgement.
        per_file: records of each file, in the order the files were given.
        ended_by: why it stopped there.
    """

    records: int
    bytes: int
    before: int
    exact: bool
    seconds: float
    per_file: tuple[tuple[Path, int], ...]
    ended_by: str


def produce(
    files: Sequence[Path],
    shares: Sequence[float] | None,
    settings: KafkaSettings,
    *,
    rate: float | None = None,
    count: int | None = None,
    seed: int = 0,
    partitions: int = 1,
    again: bool = False,
    exact: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> ProduceReport:
    """Publish the lines of `files` to `settings.topic`, which is created with `partitions` if missing.

    With `shares` (positive, any scale) each record is drawn from a file with that probability and publishing ends when
    a drawn file has no line left; without, it ends with the last line of all. `count` ends it earlier, `rate` limits
    the records per second. What an earlier run with the same files, shares and seed has published is passed over,
    unless `again`, or the files begin otherwise now. `exact=False` does without transactions, and so without this.
    `progress(done, total)` is called after each record; `total` is an estimate with `shares`.
    Raises SettingsError for files or shares that cannot be used, SourceError if the brokers cannot take the records.
    """
    with ExitStack() as stack:
        lines = [_count_lines(path) for path in files]
        mixture = _Mixture(files, lines, shares, seed)
        topic = _ensure_topic(settings, partitions)
        job = _job_of(topic, files, lines, shares, seed) if exact else None
        publisher = Publisher(settings, topic.name, job)
        stack.callback(publisher.close)
        digest = hashlib.sha256()
        if not again and not _pass_over(mixture, *publisher.stored, digest):
            digest, mixture = hashlib.sha256(), _Mixture(files, lines, shares, seed)
        before, drawn_before, begun = mixture.total, mixture.drawn(), time.monotonic()
        total = mixture.expected_records() if count is None else min(count, mixture.expected_records())
        while count is None or mixture.total < count:
            line = mixture.next_line()
            if line is None:
                break
            if rate is not None and (wait := begun + publisher.records / rate - time.monotonic()) > 0:
                if wait > COMMIT_S:
                    publisher.commit(mixture.total - 1, digest.hexdigest())
                time.sleep(wait)
            publisher.send(line, topic.partitions[(mixture.total - 1) % len(topic.partitions)])
            _extend(digest, line)
            if publisher.due:
                publisher.commit(mixture.total, digest.hexdigest())
            if progress is not None:
                progress(mixture.total, total)
        publisher.commit(mixture.total, digest.hexdigest())
        return ProduceReport(
            records=publisher.records,
            bytes=publisher.bytes,
            before=before,
            exact=publisher.exact,
            seconds=time.monotonic() - begun,
            per_file=tuple(
                (path, now - then) for path, now, then in zip(files, mixture.drawn(), drawn_before, strict=True)
            ),
            ended_by=mixture.ended_by or f"count={count} reached",
        )


def _job_of(
    topic: Topic, files: Sequence[Path], lines: Sequence[int], shares: Sequence[float] | None, seed: int
) -> str:
    """A name for what is published: the same for the same topic, files and mixture."""
    firsts = [hashlib.sha256(_first_bytes(path)).hexdigest() for path in files]
    counted = list(lines) if shares is None and len(files) > 1 else []  # these set the order
    paths = [str(path.resolve()) for path in files]
    parts = json.dumps([topic.name, topic.id, topic.partitions, paths, firsts, counted, shares, seed])
    return f"stream-trainer-produce-{hashlib.sha256(parts.encode()).hexdigest()[:16]}"


def _first_bytes(path: Path) -> bytes:
    with main_file(path).open("rb") as file:
        return file.readline(FIRST_BYTES)


def _pass_over(mixture: "_Mixture", number: int, note: str, digest: "hashlib._Hash") -> bool:
    """Draw the records that were published before. Returns whether they are the same, by the digest noted with them."""
    while mixture.total < number:
        line = mixture.next_line()
        if line is None:
            return False
        _extend(digest, line)
    return number == 0 or digest.hexdigest() == note


def _extend(digest: "hashlib._Hash", line: bytes) -> None:
    digest.update(b"%d:" % len(line) + line)


class _Mixture:
    """Lines drawn from several files at random, each file's own in order."""

    def __init__(self, files: Sequence[Path], lines: Sequence[int], shares: Sequence[float] | None, seed: int) -> None:
        self._files = files
        self._records = [records_in(path, f"file {path}") for path in files]
        self._lines = lines
        self._shares = shares
        self._rng = random.Random(seed)  # noqa: S311 - a mixture, no secret
        self._taken = [0] * len(files)
        self.total = 0
        self.ended_by = ""

    def expected_records(self) -> int:
        """Records until it ends: exact without shares, else the expectation."""
        if self._shares is None:
            return sum(self._lines)
        total = sum(self._shares)
        return min(int(lines * total / share) for lines, share in zip(self._lines, self._shares, strict=True))

    def next_line(self) -> bytes | None:
        """The next line without its newline, or None at the end, after which `ended_by` says why."""
        left = [lines - taken for lines, taken in zip(self._lines, self._taken, strict=True)]
        if self._shares is None and not any(left):
            self.ended_by = "every file was read to its end"
            return None
        # Weights that fall as lines are used up make every order of the remaining lines equally likely.
        (index,) = self._rng.choices(range(len(left)), self._shares or left)
        if not left[index]:
            self.ended_by = f"{self._files[index]} ran out"
            return None
        self._taken[index] += 1
        self.total += 1
        line = next(self._records[index], None)
        if line is None:
            raise SettingsError(f"file {self._files[index]} became shorter while it was read; give the command again")
        return line

    def drawn(self) -> list[int]:
        """Lines taken of each file."""
        return list(self._taken)


def _count_lines(path: Path) -> int:
    """Lines of a file, the last with or without its newline; of a file of another format its records."""
    if form_of(path, f"file {path}") != LINES:
        return sum(1 for _ in records_in(path, f"file {path}"))
    lines, last = 0, b"\n"
    with path.open("rb") as file:
        while chunk := file.read(1024 * 1024):
            lines += chunk.count(b"\n")
            last = chunk[-1:]
    return lines + (last != b"\n")


def _ensure_topic(settings: KafkaSettings, partitions: int) -> Topic:
    """The topic, created if it is missing. Raises SourceError if that fails."""
    name = settings.topic or ""
    admin = connect(KafkaAdminClient, settings, "stream-trainer-produce-admin")
    try:
        topic = describe_topic(admin, name)
        if topic is None:
            try:
                admin.create_topics({name: {"num_partitions": partitions}}, wait_for_metadata=True)
            except TopicAlreadyExistsError:
                admin.wait_for_topics([name])  # somebody else was faster
            topic = describe_topic(admin, name)
    except KafkaError as error:
        raise SourceError(f"topic {name} cannot be created or described ({error}); check access") from error
    finally:
        admin.close()
    if topic is None:
        raise SourceError(f"topic {name} vanished right after it was created; check who deletes topics")
    return topic


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `stream-trainer produce`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = "Publish files of samples to a Kafka topic, one record a line, mixed as asked."
    parser.epilog = EXAMPLES
    parser.add_argument("files", nargs="+", metavar="FILE[:SHARE]", help="JSONL file, and its share of the mixture")
    parser.add_argument("--topic", help="topic to publish to; created if missing")
    parser.add_argument("--rate", type=float, metavar="N", help="records per second (default: as fast as possible)")
    parser.add_argument("--count", type=int, metavar="N", help="records to publish at most (default: until files end)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the mixture (default 0)")
    parser.add_argument("--partitions", type=int, default=1, metavar="N", help="partitions of a new topic (default 1)")
    parser.add_argument("--again", action="store_true", help="publish from the start what was published before")
    add_connection_arguments(parser)


def add_connection_arguments(parser: argparse.ArgumentParser) -> None:
    """How to reach the brokers: what is left out comes from the environment."""
    parser.add_argument("--bootstrap-servers", metavar="HOST:PORT,...", help="brokers (default localhost:9092)")
    parser.add_argument("--security-protocol", choices=["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"])
    parser.add_argument("--sasl-mechanism", choices=["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER"])
    parser.add_argument("--sasl-username", metavar="NAME")
    parser.add_argument("--ssl-cafile", metavar="PEM", help="authorities to trust (default: the system's)")


def run(args: argparse.Namespace) -> int:
    """Publish as the command line says, with a progress bar on a terminal; returns the exit code.

    Raises SettingsError for input that cannot be used, SourceError if the brokers cannot take it.
    """
    for name, value in (("--rate", args.rate), ("--count", args.count), ("--partitions", args.partitions)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise SettingsError(f"{name} {value:g} is not above zero; correct it")
    files, shares = parse_files(args.files)
    settings = kafka_settings(args)
    if settings.topic is None:
        raise SettingsError("--topic is missing; name the topic to publish to")
    columns = (TextColumn("publishing"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("publishing")
        report = produce(
            files,
            shares,
            settings,
            rate=args.rate,
            count=args.count,
            seed=args.seed,
            partitions=args.partitions,
            again=args.again,
            progress=lambda sent, total: bar.update(task, completed=sent, total=max(sent, total)),
        )
    print(
        f"published {report.records} records, {report.bytes} bytes, to {settings.topic} in {report.seconds:.1f} s; "
        f"{report.ended_by}"
    )
    if report.before:
        print(f"  {report.before:>8}  published before; --again publishes them again")
    if not report.exact:
        print("the brokers have no transactions: an interrupted run would publish some lines twice")
    for path, records in report.per_file:
        print(f"  {records:>8}  {path}")
    return 0


def parse_files(arguments: Sequence[str]) -> tuple[list[Path], list[float] | None]:
    """Files and their shares from `FILE` or `FILE:SHARE`. Raises SettingsError unless all or none have a share."""
    files: list[Path] = []
    shares: list[float] = []
    for argument in arguments:
        name, colon, share = argument.rpartition(":")
        if not colon or Path(argument).exists():
            files.append(Path(argument))
            continue
        files.append(Path(name))
        shares.append(_parse_share(argument, share))
    for path in files:
        if not (path.is_file() or path.is_dir()):
            raise SettingsError(f"file {path} does not exist; correct the path")
    if shares and len(shares) < len(files):
        raise SettingsError(f"{len(shares)} of {len(files)} files have a share; give every file one, or none")
    return files, shares or None


def _parse_share(argument: str, text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not (math.isfinite(share) and share > 0):
        raise SettingsError(f"{argument}: the share {text!r} is not a number above zero; write FILE:SHARE, as in a:0.5")
    return share


def kafka_settings(args: argparse.Namespace) -> KafkaSettings:
    """Options first, then the environment of `source.kafka`, then the defaults."""
    values: dict[str, str] = {}
    for name in KafkaSettings.model_fields.keys() - {"format"}:  # what is published is JSON
        value = getattr(args, name, None) or os.environ.get(f"{ENVIRONMENT_PREFIX}SOURCE__KAFKA__{name.upper()}")
        if value is not None:
            values[name] = value
    try:
        return KafkaSettings.model_validate(values)
    except ValidationError as error:
        problem = error.errors(include_input=False, include_url=False)[0]
        field = ".".join(("source.kafka", *map(str, problem["loc"])))
        raise SettingsError(f"{field}: {problem['msg'].removeprefix('Value error, ')}") from None

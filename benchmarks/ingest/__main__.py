"""What ingest costs, from a topic to the buffer, and where the time goes.

Records of 1 KB, prompt and response, 1 % of them malformed, wait in a topic and are read

- by the source alone, then parsed too, then tokenised too;
- by the service's own ingest thread: decoded, buffered or dead-lettered, taken in pools and decided.

Beside it stands what the tokenizer's backend takes for the same texts by itself, in batches as large.

The process is pinned to `--cores` for that (one), where the system allows it; the broker runs beside it. With more than
one the tokenizer's backend uses threads of its own, as it does in the service. Each figure is the
median of some readings, by a decoder that has seen as many other records of the same vocabulary, but none of these.
What one does that has seen none is told apart.

Then pools are taken at a fixed rate while a producer publishes at twice that rate, and the service trains a small model
on the topic: how far behind it falls, what it holds meanwhile, and what share of its time it waits for data.
"""

import argparse
import logging
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.common.reporting import write_result
from benchmarks.ingest.service import FULL_AFTER_S, fall_behind, ingesting, lag_growth, train
from benchmarks.ingest.stream import load_tokenizer, make_records, open_stream, start_broker, write_records
from stream_trainer.errors import SampleError, SettingsError, StreamTrainerError
from stream_trainer.ingest.thread import CHUNK_RECORDS
from stream_trainer.records import Partition, Record
from stream_trainer.samples.decoder import Decoder
from stream_trainer.samples.fields import parse_fields
from stream_trainer.settings.schema import SampleSettings
from stream_trainer.settings.sections.source import SourceSettings
from stream_trainer.sources import open_source

RECORDS, READINGS, LAG_S, STEPS = 20_000, 3, 12.0, 12
WITH_DECODER = ("poll, parse, tokenise", "ingest")
PACKAGES = ("stream-trainer", "kafka-python", "crc32c", "tokenizers", "transformers", "torch")
EXAMPLES = """\
examples:
  KAFKA_HOME=kafka_2.13-4.1.0 python -m benchmarks.ingest --json ingest.json
      Apache Kafka and the byte tokenizer
  KAFKA_HOME=kafka_2.13-4.1.0 python -m benchmarks.ingest --tokenizer path/to/model --cores 2
      the same as a service on two cores
  python -m benchmarks.ingest --source jsonl --records 2000
      a file, without a broker: in seconds, but it cannot tell the lag
"""


@dataclass(frozen=True)
class Figure:
    """One line of the result."""

    figure: str
    value: float
    unit: str


@dataclass(frozen=True)
class Spent:
    """Seconds by the clock, and those in which a thread of this process ran: the same on a core of its own."""

    clock: float
    cpu: float


@dataclass(frozen=True)
class Bench:
    """What every part works with; `size` is in bytes of all values."""

    folder: Path
    source: SourceSettings
    records: int
    size: int
    tokenizer: Any
    samples: SampleSettings

    def decoder(self, seen: int = 0) -> Decoder:
        """A new one that has decoded so many other records."""
        decoder = Decoder(self.tokenizer, self.samples)
        records = (Record(Partition("seen", 0), n, n + 1, value) for n, value in enumerate(make_records(seen, seed=4)))
        while chunk := list(islice(records, CHUNK_RECORDS)):
            decoder.decode_batch(chunk)
        return decoder


def stopwatch() -> Callable[[], Spent]:
    """Starts; what it returns tells the time since."""
    clock, cpu = time.perf_counter(), time.process_time()
    return lambda: Spent(time.perf_counter() - clock, time.process_time() - cpu)


def read(bench: Bench, use: Callable[[Sequence[Record]], object]) -> Spent:
    """Time from the first poll to the last record, with each chunk of records given to `use`."""
    source = open_source(bench.source)
    source.start({}, {}, {})
    try:
        spent = stopwatch()
        while not source.exhausted:
            records = iter(source.poll(0.1))
            while chunk := list(islice(records, CHUNK_RECORDS)):
                use(chunk)
        return spent()
    finally:
        source.close()


def parse(records: Sequence[Record]) -> None:
    """Bytes to checked fields; what is malformed is passed over."""
    for record in records:
        with suppress(SampleError):
            parse_fields(record.value or b"", sys.maxsize)


def tokenize(bench: Bench) -> Spent:
    """Time of the tokenizer's backend alone for the texts of as many good records."""
    texts = []
    for value in make_records(bench.records, seed=0):
        with suppress(SampleError):
            form = parse_fields(value, sys.maxsize).form
            texts += [text for text in form.values() if isinstance(text, str)]
    batches, backend = iter(texts), bench.tokenizer.backend_tokenizer
    spent = stopwatch()
    while batch := list(islice(batches, 2 * CHUNK_RECORDS)):
        backend.encode_batch_fast(batch, add_special_tokens=False)
    return spent()


def ingest(bench: Bench, decoder: Decoder) -> Spent:
    """Time from the first pool out of the buffer to the last one decided."""
    with ingesting(bench.source, decoder, bench.folder) as parts:
        parts.take()
        watch = stopwatch()
        while parts.take():
            pass
        spent = watch()
    decided = sum(parts.cursor.counts.values())
    if decided != bench.records:
        raise StreamTrainerError(f"{decided} records of {bench.records} are decided; no figure of this run counts")
    return spent


def measure_phases(bench: Bench, stage: Callable[[str], None]) -> list[Figure]:
    """Records a second of each part of the way, one reading after another."""
    stage("ingest by a new decoder")
    figures = _rates(bench, "ingest by a decoder that has seen nothing", [ingest(bench, bench.decoder())])
    phases: dict[str, Callable[[Decoder], Spent]] = {
        "poll": lambda _: read(bench, len),
        "poll, parse": lambda _: read(bench, parse),
        "the tokenizer's backend alone": lambda _: tokenize(bench),
        "poll, parse, tokenise": lambda decoder: read(bench, decoder.decode_batch),
        "ingest": lambda decoder: ingest(bench, decoder),
    }
    for name, run in phases.items():
        readings = []
        for number in range(READINGS):
            stage(f"{name}: reading {number + 1} of {READINGS}")
            readings.append(run(bench.decoder(seen=bench.records if name in WITH_DECODER else 0)))
        figures += _rates(bench, name, readings)
    return [*figures, Figure("ingest", bench.size / statistics.median(spent.clock for spent in readings) / 1e6, "MB/s")]


def _rates(bench: Bench, name: str, readings: Sequence[Spent]) -> list[Figure]:
    clock, cpu = (statistics.median(getattr(spent, kind) for spent in readings) for kind in ("clock", "cpu"))
    return [
        Figure(name, bench.records / clock, "records/s"),
        Figure(f"{name}: CPU time", cpu / bench.records * 1e6, "us/record"),
    ]


def measure_lag(bench: Bench, servers: str) -> list[Figure]:
    """What happens behind a trainer that is half as fast as the producer."""
    moments = fall_behind(servers, bench.decoder(), bench.folder, LAG_S)
    late = [moment for moment in moments if moment.time >= FULL_AFTER_S]
    memory = [moment.memory / 1e6 for moment in late]
    return [
        Figure("lag growth at twice the trainer's rate", lag_growth(late), "records/s"),
        Figure("most records in the buffer", max(m.records for m in moments), "records"),
        Figure("share of the time that reading paused", sum(m.paused for m in late) / len(late), "ratio"),
        Figure("memory growth once the buffer was full", memory[-1] - memory[0], "MB"),
    ]


def measure_wait(bench: Bench) -> list[Figure]:
    """The share of the service's time in which the trainer waits for data."""
    phases = train(bench.source, bench.tokenizer, bench.folder, STEPS)
    return [
        Figure("step", sum(phases.values()) / STEPS, "s"),
        Figure("share of the step spent waiting for data", phases["wait"] / sum(phases.values()), "ratio"),
    ]


@contextmanager
def pinned(count: int) -> Iterator[list[int] | None]:
    """Keep this thread, and those it starts, on `count` cores; yields their numbers, None where that is impossible."""
    if not hasattr(os, "sched_setaffinity"):
        yield None
        return
    allowed = os.sched_getaffinity(0)
    cores = sorted(allowed)[-count:]
    os.sched_setaffinity(0, cores)
    try:
        yield cores
    finally:
        os.sched_setaffinity(0, allowed)


def versions() -> dict[str, str | None]:
    """Of Python and the packages that matter; None where one is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        found[name] = None
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


@contextmanager
def quiet(cores: int) -> Iterator[None]:
    """One thread in every library on one core, and no log of the dead letters, which are part of the load."""
    logger = logging.getLogger("stream_trainer")
    level = logger.level
    logger.setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    try:
        with patch.dict(os.environ, {"TOKENIZERS_PARALLELISM": str(cores > 1).lower()}):
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def stages(total: int) -> Iterator[Callable[[str], None]]:
    """A progress bar on standard error; the yielded function names what begins next."""
    columns = (TextColumn("{task.description:40}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total, completed=-1)
        yield lambda name: bar.update(task, advance=1, description=name)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that the arguments ask for."""
    tokenizer = load_tokenizer(args.tokenizer, args.gguf_file)
    kafka = args.source == "kafka"
    with ExitStack() as stack:
        stage = stack.enter_context(stages(4 + 5 * READINGS + 2 * kafka))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ingest-benchmark-")))
        servers = None
        if kafka:
            stage("starting the broker")
            servers = start_broker(folder / "broker", stack)
        stage("making and publishing records")
        size = write_records(folder / "records.jsonl", args.records, seed=0)
        source = open_stream(folder / "records.jsonl", servers, "ingest")
        samples = SampleSettings(max_tokens=args.max_tokens)
        bench = Bench(folder, source, args.records, size, tokenizer, samples)
        with pinned(args.cores) as cores:
            figures = measure_phases(bench, stage)
        if servers is not None:
            stage("falling behind on purpose")
            figures += measure_lag(bench, servers)
        stage("training")
        figures += measure_wait(bench)
        stage("done")
    return {
        "summary": [asdict(figure) for figure in figures],
        "arguments": {name: value for name, value in vars(args).items() if name != "json"},
        "pinned_to_cores": cores,
        "record_bytes": size / args.records,
        "versions": versions(),
    }


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line. Raises SettingsError for numbers that cannot be used."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ingest",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    parser.add_argument("--records", type=int, default=RECORDS, metavar="N", help=f"records of 1 KB ({RECORDS})")
    parser.add_argument("--tokenizer", default="bytes", metavar="DIR", help="a model's directory, or bytes (bytes)")
    parser.add_argument("--gguf-file", metavar="F", help="file in that directory that holds the tokenizer")
    parser.add_argument("--max-tokens", type=int, default=512, metavar="T", help="where samples are cut (512)")
    parser.add_argument("--cores", type=int, default=1, metavar="N", help="cores of this process (1)")
    parser.add_argument(
        "--source",
        choices=["kafka", "jsonl"],
        default="kafka",
        help="a topic of the Apache Kafka that KAFKA_HOME names, or a file (kafka)",
    )
    args = parser.parse_args(arguments)
    for name, value, least in (
        ("records", args.records, 100),
        ("max-tokens", args.max_tokens, 2),
        ("cores", args.cores, 1),
    ):
        if value < least:
            raise SettingsError(f"--{name} {value} is too few; give {least} or more")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table, write the file. Returns the exit code: 2 for a setting that cannot be used."""
    try:
        args = parse_arguments(arguments)
        with quiet(args.cores):
            result = measure(args)
    except StreamTrainerError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for figure in result["summary"]:
        print(f"{figure['figure']:44}{figure['value']:12,.4g} {figure['unit']}")
    if args.json:
        write_result(Path(args.json), result)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Kill a training service again and again, and show that it ends as if nothing had happened.

    python -m tests.system.faults.crash_proof --seeds 200 --summary crash-proof.json [--kafka [--letters]]

For each seed a service trains on a finite stream, is killed up to three times at named or random moments, and is
started again until the stream ends. Model, optimizer and selector state must then be those of an undisturbed run, bit
for bit; every step, whenever it was made, must be one of the undisturbed run's; every record must have one outcome, and
be counted once. The summary says how many seeds there were, where kills fell, and which seeds failed and why.
"""

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from stream_trainer.models.loading import load_model
from stream_trainer.models.saving import save_model
from stream_trainer.settings.schema import ModelSettings
from tests.helpers.brokers import apache_kafka, create_topic, publish, why_no_apache_kafka
from tests.helpers.crashes import RANDOM, Kill, Place, fork, run_in_child
from tests.helpers.service import ALL_ON, MODEL, configuration, good, jsonl, kafka, write_lines
from tests.system.faults.ends import (
    differences,
    ledger_differences,
    letters_of,
    newest,
    outcomes_of,
    rows_of,
    steps_of,
)

# Wider than 64, so that the target's directions have a low rank and rows are drawn.
WIDE = MODEL | {"hidden_size": 96, "intermediate_size": 160}
POISON = (b"not JSON", b'{"text": ""}', b"\xff\xfe")
POISON_EVERY = 33
PARTITIONS = 3
FETCH_BYTES = 1_400_000  # of each partition: the client fetches 1 MiB of one at a time
MAX_KILLS = 3
ON_THE_WAY_OF_LETTERS = ("letter", "transaction", "commit")
ALONE = 10**9  # the number of the run that is left alone, above all seeds: points are named without numbers
TIMEOUT_S = 180.0
MEMORY = Path("/dev/shm")  # a killed process loses nothing of what it wrote, so a disk would prove no more


@dataclass(frozen=True)
class Variant:
    """Settings to prove it with.

    Attributes:
        records: of the stream, poison among them.
        selection: what is set of the selection.
        ledger: whether a ledger is kept, with a checkpoint after each step, so that segments are merged.
        asynchronous: whether checkpoints are written while training goes on.
    """

    name: str
    records: int
    selection: Mapping[str, Any]
    ledger: bool = False
    asynchronous: bool = False


VARIANTS = (
    Variant("default", 800, {"filter_then_weight": {"solver_max_iterations": 1000}}),
    Variant("everything", 240, ALL_ON),
    Variant("ledger", 240, {"filter_then_weight": {"solver_max_iterations": 1000}}, ledger=True),
    Variant("asynchronous", 240, ALL_ON, ledger=True, asynchronous=True),
)


@dataclass(frozen=True)
class Stream:
    """Records by partition, the section of settings that names them, and the topic of letters, if they go to one.

    All runs share that topic: whose a letter is shows.
    """

    values: Sequence[Sequence[bytes]]
    source: Callable[[str], dict[str, Any]]
    letters: str | None = None

    @property
    def size(self) -> int:
        return sum(map(len, self.values))


@dataclass(frozen=True)
class Undisturbed:
    """What a run that nobody killed came to.

    Attributes:
        steps: lines of its trace by step.
        outcomes: by partition and offset.
        seconds: how long it took.
    """

    checkpoint: Path
    steps: Mapping[int, str]
    outcomes: Mapping[str, str]
    points: Mapping[str, int]
    seconds: float


@dataclass
class Summary:
    """What is written of a proof, after each run, so that one that is broken off leaves what it found.

    Attributes:
        letters_twice: dead letters that a file or a topic holds more than once.
    """

    path: Path | None
    seeds: int
    started: float = field(default_factory=time.monotonic)
    runs: Counter[str] = field(default_factory=Counter)
    kills: Counter[str] = field(default_factory=Counter)
    letters_twice: int = 0
    failures: list[dict[str, Any]] = field(default_factory=list)

    def write(self) -> None:
        content = {
            "seeds": self.seeds,
            "runs": dict(self.runs),
            "kills": sum(self.kills.values()),
            "kills_by_point": dict(sorted(self.kills.items())),
            "letters_kept_twice": self.letters_twice,
            "failures": self.failures,
            "seconds": round(time.monotonic() - self.started, 1),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }
        if self.path is not None:
            self.path.write_text(json.dumps(content, indent=2) + "\n")


def values_of(count: int, size: int = 0) -> list[bytes]:
    """Samples of at least `size` bytes with poison among them."""
    poison = iter(POISON[i % len(POISON)] for i in range(count))
    return [
        next(poison) if number % POISON_EVERY == POISON_EVERY - 1 else _padded(good(number), size)
        for number in range(count)
    ]


def _padded(sample: bytes, size: int) -> bytes:
    """With a field that nobody reads."""
    return sample[:-1] + b', "note": "' + b"x" * max(0, size - len(sample)) + b'"}' if size else sample


def config_of(variant: Variant, stream: Stream, folder: Path) -> dict[str, Any]:
    folder.mkdir(parents=True)
    every_steps = 1 if variant.ledger else 6
    config = configuration(
        folder,
        stream.source(folder.name),
        model={"config": WIDE},
        checkpoint={"every_steps": every_steps, "every_seconds": 1e6, "asynchronous": variant.asynchronous},
        ledger={"enabled": variant.ledger},
        target={"refresh_samples": 2},
        dead_letters={} if stream.letters is None else {"kind": "topic", "topic": stream.letters},
    )
    return config | {"selection": dict(variant.selection)}


def leave_alone(variant: Variant, stream: Stream, folder: Path) -> Undisturbed:
    """The run that others are compared with. Raises RuntimeError if it fails."""
    config, place = config_of(variant, stream, folder), Place(folder)
    started = time.monotonic()
    code = run_in_child(config, place, None, TIMEOUT_S)
    seconds = time.monotonic() - started
    if code or (wrong := list(ledger_differences(config, place, stream.size))):
        raise RuntimeError(f"{variant.name}: exit code {code}, {'' if code else wrong}; see {place.log}")
    outcomes = {at: next(iter(kinds)) for at, kinds in outcomes_of(place).items()}
    points = json.loads(place.counts.read_text())
    return Undisturbed(newest(config), dict(steps_of(place)), outcomes, points, seconds)


def kills_of(seed: int, expected: Undisturbed, stream: Stream) -> list[Kill]:
    """One to three. The first is sure to fall, and goes round all points from seed to seed.

    Where letters go to a topic, all fall on their way there.
    """
    chance = random.Random(seed)
    found = [name for name in expected.points if stream.letters is None or name.startswith(ON_THE_WAY_OF_LETTERS)]
    names = random.Random(0).sample(sorted([*found, RANDOM]), k=len(found) + 1)
    points = [names[seed % len(names)], *chance.choices(names, k=chance.randrange(MAX_KILLS))]
    return [
        Kill(RANDOM, seconds=chance.uniform(0, 1.2 * expected.seconds))
        if point == RANDOM
        else Kill(point, chance.randint(1, expected.points[point]))
        for point in points
    ]


def prove(seed: int, variant: Variant, stream: Stream, expected: Undisturbed, folder: Path, summary: Summary) -> None:
    """One run with its kills; what is wrong at its end goes into the summary, and its folder stays."""
    config, place = config_of(variant, stream, folder), Place(folder)
    kills = kills_of(seed, expected, stream)
    summary.runs[variant.name] += 1
    try:
        for kill in [*kills, None]:
            code = run_in_child(config, place, kill, TIMEOUT_S)
            if place.killed.exists():
                summary.kills[place.killed.read_text()] += 1
            elif code:
                raise RuntimeError(f"exit code {code}: {place.log.read_text().splitlines()[-1]}")
        wrong = list(_what_is_wrong(config, place, stream, expected))
        summary.letters_twice += sum(count - 1 for count in letters_of(config).values())
    except (RuntimeError, TimeoutError, ValueError, OSError) as error:
        wrong = [f"{type(error).__name__}: {error}"]
    if wrong:
        reason = {"seed": seed, "variant": variant.name, "kills": [str(kill) for kill in kills], "wrong": wrong[:8]}
        summary.failures.append(reason)
        print(json.dumps(reason), flush=True)
    else:
        shutil.rmtree(folder)
    summary.write()


def _what_is_wrong(config: Mapping[str, Any], place: Place, stream: Stream, expected: Undisturbed) -> Iterator[str]:
    yield from ledger_differences(config, place, stream.size)
    if others := sorted({step for step, line in steps_of(place) if expected.steps.get(step) != line}):
        yield f"steps {others[:5]} were not made as in the undisturbed run"
    if strays := sorted(at for at, kinds in outcomes_of(place).items() if kinds != {expected.outcomes.get(at)}):
        yield f"records {strays[:5]} had other outcomes than in the undisturbed run"
    bad = {at for at, outcome in expected.outcomes.items() if outcome == "dead_lettered"}
    letters = letters_of(config)
    if set(letters) != bad:
        yield f"{len(letters)} records are kept as dead letters instead of {len(bad)}"
    if stream.letters is not None and max(letters.values(), default=1) > 1:
        yield f"{letters.total()} letters of {len(letters)} records are in the topic"
    yield from differences(newest(config), expected.checkpoint)
    rows, wanted = (rows_of(checkpoint.parent) for checkpoint in (newest(config), expected.checkpoint))
    if config["ledger"]["enabled"] and (len(rows) != stream.size or rows != wanted):
        yield f"the ledger has {len(rows)} rows, {sum(row not in wanted for row in rows)} not of the undisturbed run"
    if config["ledger"]["enabled"] and {f"{row[1]} {row[2]}": row[5] for row in rows} != expected.outcomes:
        yield "the ledger has other outcomes than were decided"


def file_stream(variant: Variant, folder: Path) -> Stream:
    values, path = values_of(variant.records), folder / f"{variant.name}.jsonl"
    write_lines(path, values)
    return Stream([values], lambda _: jsonl(path))


def kafka_stream(variant: Variant, servers: str, with_letters: bool) -> Stream:
    """Three partitions, each of which takes more than one fetch. Raises RuntimeError if they cannot be filled."""
    values = values_of(variant.records, PARTITIONS * FETCH_BYTES // variant.records)
    topic = f"{variant.name}-{os.getpid()}"
    parts = [values[number::PARTITIONS] for number in range(PARTITIONS)]
    # The client's threads must not be here when a run is forked.
    _, status = os.waitpid(fork(lambda: _fill(servers, topic, parts)), 0)
    if status:
        raise RuntimeError(f"{topic} could not be filled")
    letters = f"{topic}.dead-letters" if with_letters else None
    return Stream(parts, lambda run: kafka(servers, topic, group_id=f"{topic}-{run}"), letters)


def _fill(servers: str, topic: str, parts: Sequence[Sequence[bytes]]) -> int:
    create_topic(servers, topic, PARTITIONS)
    create_topic(servers, f"{topic}.dead-letters", PARTITIONS)
    for number, part in enumerate(parts):
        publish(servers, topic, part, partition=number)
    return 0


def warm_up(folder: Path) -> None:
    """Have whatever transformers prepares at a first use ready in every child."""
    loaded = load_model(ModelSettings(config=WIDE, tokenizer="bytes"), seed=0)
    save_model(loaded, folder / "warm-up")


def run(
    seeds: range, variants: Sequence[Variant], with_kafka: bool, with_letters: bool, folder: Path, summary: Summary
) -> None:
    """All seeds under all variants."""
    with ExitStack() as up:
        if with_kafka:
            (folder / "broker").mkdir()
            servers = up.enter_context(apache_kafka(folder / "broker")).bootstrap_servers
        for variant in variants:
            stream = kafka_stream(variant, servers, with_letters) if with_kafka else file_stream(variant, folder)
            expected = leave_alone(variant, stream, folder / f"{variant.name}-{ALONE}")
            print(
                f"{variant.name}: {len(expected.steps)} steps in {expected.seconds:.1f} s", expected.points, flush=True
            )
            for seed in seeds:
                prove(seed, variant, stream, expected, folder / f"{variant.name}-{seed}", summary)


def main() -> int:
    """Returns 1 if any seed failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8, help="seeds, each of them under every variant")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--variant", choices=[variant.name for variant in VARIANTS], help="one variant only")
    parser.add_argument("--kafka", action="store_true", help="three partitions on the Apache Kafka in KAFKA_HOME")
    parser.add_argument("--letters", action="store_true", help="with --kafka: letters in a topic, kills on their way")
    parser.add_argument("--summary", type=Path, help="JSON file to write")
    options = parser.parse_args()
    if options.kafka and (missing := why_no_apache_kafka()):
        parser.error(f"--kafka: {missing}")
    variants = [variant for variant in VARIANTS if options.variant in (None, variant.name)]
    folder = Path(tempfile.mkdtemp(prefix="crash-proof-", dir=MEMORY if MEMORY.is_dir() else None))
    summary = Summary(options.summary, options.seeds)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    warm_up(folder)
    run(range(options.first, options.first + options.seeds), variants, options.kafka, options.letters, folder, summary)
    print(f"{dict(summary.runs)} runs, {sum(summary.kills.values())} kills, {len(summary.failures)} failures")
    if summary.failures:
        print(f"what failed is kept in {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())

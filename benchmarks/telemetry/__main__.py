"""What watching a run costs: a step with everything on against one with nothing, and how fast a scrape is answered.

    python -m benchmarks.telemetry --json telemetry.json [--rounds 60]

Three services train a model on the demo's stream, each in a process of its own: `off` writes no metric,
no ledger and no log and has no page; `ledger` has the ledger alone; `all` has metrics, the page's history, the ledger,
progress and logs. They take turns, five steps each, and make the same steps. Compared are seconds of the processor, in
whatever thread, for the wall's are also those of other work on the machine. So it is for two models: the demo's, whose
steps are so short that watching them shows most, and one of two million parameters. A checkpoint every
50 steps is among them.

Two processes that do the same differ by some percent for as long as they live. So the ledger's calls are also timed
where they are made, its writing for a checkpoint among them: `own` is their mean over the steps.

Then `all` trains on without a pause, with series of 100 partitions, and is scraped: milliseconds of each GET /metrics.
Exit codes: 0 done, 2 a mistake in the options.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Any

import numpy as np

from benchmarks.common.reporting import OneLineParser, at_least_one, duration, say, table, writable_file, write_result
from benchmarks.telemetry.worker import MODELS, VARIANTS
from stream_trainer.demo.broker import free_port

TURN_STEPS = 5
WARM_UP = 4  # rounds that count in nothing
PARTITIONS = 100
SCRAPES, SCRAPE_EVERY_S = 200, 0.05
DRAWS = 2000  # of the bootstrap


class Service:
    """One of the services, held up between its turns."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self._process, self._port = process, port
        self.receive()

    def begin(self, steps: int) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()

    def receive(self) -> dict[str, list[float]]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"error: a service ended with code {self._process.wait()}")
        answer: dict[str, list[float]] = json.loads(line)
        return answer

    def turn(self) -> dict[str, list[float]]:
        self.begin(TURN_STEPS)
        return self.receive()

    def scrape_ms(self) -> tuple[float, int]:
        """Milliseconds and bytes of one scrape."""
        began = time.perf_counter()
        with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/metrics", timeout=60) as answer:
            size = len(answer.read())
        return 1000 * (time.perf_counter() - began), size


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure as the command line says; returns the exit code."""
    form = argparse.RawDescriptionHelpFormatter
    parser = OneLineParser("python -m benchmarks.telemetry", description=__doc__, formatter_class=form)
    parser.add_argument("--json", type=writable_file, required=True, metavar="FILE", help="where the result is written")
    parser.add_argument("--rounds", type=at_least_one, default=60, metavar="R", help="turns of each service (60)")
    parser.add_argument("--scrapes", type=at_least_one, default=SCRAPES, metavar="S", help=f"scrapes ({SCRAPES})")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="telemetry-") as folder:
        steps = (options.rounds + WARM_UP) * TURN_STEPS + 400 + 20 * options.scrapes
        summary = []
        for model in MODELS:
            with ExitStack() as up:
                own = Path(folder) / model
                services = {name: up.enter_context(started(name, model, own, steps)) for name in VARIANTS}
                rounds = measure(services, options.rounds)
                scrapes = scrape(services["all"], options.scrapes)
            summary += [{"model": model, **summarise(name, rounds)} for name in VARIANTS if name != "off"]
    versions = {"python": python_version(), **{name: version(name) for name in ("torch", "prometheus-client")}}
    write_result(options.json, {"versions": versions, "telemetry": summary, "scrapes": scrapes})
    print(report(summary, scrapes))
    return 0


@contextmanager
def started(variant: str, model: str, folder: Path, steps: int) -> Iterator[Service]:
    """A service that has made its first step."""
    say(f"{model}: starting {variant}")
    own, port = folder / variant, free_port()
    own.mkdir(parents=True)
    job = {
        "variant": variant,
        "model": model,
        "folder": str(own),
        "steps": steps,
        "port": port,
        "partitions": PARTITIONS,
    }
    command = [sys.executable, "-m", "benchmarks.telemetry.worker", json.dumps(job)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Service(process, port)
        finally:
            process.kill()


def measure(services: Mapping[str, Service], rounds: int) -> dict[str, list[dict[str, list[float]]]]:
    """Seconds of each step by their kind, by service and turn. Who is first is drawn by chance."""
    found: dict[str, list[dict[str, list[float]]]] = {name: [] for name in services}
    chance, began = random.Random(0), time.monotonic()
    for i in range(rounds + WARM_UP):
        for name in chance.sample(list(services), len(services)):
            seconds = services[name].turn()
            if i >= WARM_UP:
                found[name].append(seconds)
        if i % 10 == 9:
            left = (time.monotonic() - began) / (i + 1) * (rounds + WARM_UP - i - 1)
            say(f"round {i + 1} of {rounds + WARM_UP}, {duration(left)} left")
    return found


def scrape(service: Service, count: int) -> dict[str, float]:
    """How long scrapes take while steps are made: none of them is waited for."""
    service.begin(20 * count)
    time.sleep(SCRAPE_EVERY_S)
    found = []
    for _ in range(count):
        found.append(service.scrape_ms())
        time.sleep(SCRAPE_EVERY_S)
    times = [ms for ms, _ in found]
    return {
        "partitions": PARTITIONS,
        "scrapes": count,
        "bytes": found[-1][1],
        **{f"p{share}_ms": float(np.percentile(times, share)) for share in (50, 95, 99)},
        "max_ms": max(times),
    }


def summarise(name: str, rounds: Mapping[str, Sequence[Mapping[str, Sequence[float]]]]) -> dict[str, Any]:
    """The cost over `off`: the median over steps of differences to the same step, and where that may lie by chance.

    Of the ledger alone also what its own calls took.
    """
    turns = {each: np.array([turn["processor_s"] for turn in rounds[each]]) for each in (name, "off")}
    own, off = (turns[each].reshape(-1) for each in (name, "off"))
    base, generator = float(np.median(off)), np.random.default_rng(0)
    draws = generator.integers(0, len(own), (DRAWS, len(own)))
    medians = np.median((own - off)[draws], axis=1)
    calls = np.mean([turn["ledger_s"] for turn in rounds[name]])
    low, high = (float(x) for x in np.percentile(medians, (2.5, 97.5)))
    return {
        "variant": name,
        "steps": len(own),
        "off_ms": 1000 * base,
        "cost_ms": 1000 * float(np.median(own - off)),
        "share": float(np.median(own - off)) / base,
        "share_low": low / base,
        "share_high": high / base,
        "share_of_sums": float(own.sum() / off.sum() - 1),
        "median_of_turns": float(np.median(turns[name].sum(axis=1) / turns["off"].sum(axis=1))) - 1,
        **({"own_ms": 1000 * float(calls), "own_share": float(calls) / base} if name == "ledger" else {}),
    }


def report(summary: Sequence[Mapping[str, Any]], scrapes: Mapping[str, float]) -> str:
    """What people read at the end."""
    names = ("off_ms", "cost_ms", "share", "share_low", "share_high", "share_of_sums", "median_of_turns", "own_share")
    rows = [
        (
            f"{row['model']}, {row['variant']}",
            f"{row['steps']}",
            *("" if name not in row else f"{row[name]:.{'2f' if name.endswith('_ms') else '2%'}}" for name in names),
        )
        for row in summary
    ]
    times = ", ".join(f"{name} {scrapes[name]:.1f}" for name in ("p50_ms", "p95_ms", "p99_ms", "max_ms"))
    return f"{table(('on', 'steps', *names), rows)}\nscrape of {scrapes['bytes']:.0f} bytes: {times}"


if __name__ == "__main__":
    sys.exit(main())

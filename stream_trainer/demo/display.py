"""What the demo shows: progress while it trains, live on a terminal and as plain lines elsewhere, and the report."""

import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from urllib.request import urlopen

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from stream_trainer.demo.stream import MALFORMED, TARGET
from stream_trainer.records import Outcome, Sample
from stream_trainer.training.step import StepReport

SELECTION, UNIFORM = "selection", "uniform"  # what the two runs are called
HELD_OUT = "held-out"  # the evaluation set that both are measured on
STATUS_INTERVAL_S = 0.5
STATUS_TIMEOUT_S = 5.0
PLAIN_LINES = 10  # of a run, where there is no terminal


@dataclass(frozen=True)
class Check:
    """Loss on held-out samples of the target (nats per token), and what it had taken: samples trained on, seconds."""

    samples: float
    seconds: float
    loss: float


@dataclass
class Watch:
    """What one run of the service has done so far.

    Attributes:
        method: what the run is called.
        steps: steps it is expected to make.
        pool_loss: mean loss of the samples scored at the last step (nats per token).
        trained: samples by domain.
        curve: what was measured before the first step and since then; the seconds of measuring itself do not count.
        status: what the service last said at `/status`.
    """

    method: str
    steps: int
    step: int = 0
    pool_loss: float = math.nan
    trained: Counter[str] = field(default_factory=Counter)
    curve: list[Check] = field(default_factory=list)
    status: dict[str, Any] = field(default_factory=dict)
    _began: float = field(default=0.0, init=False)
    _measuring: float = field(default=0.0, init=False)

    def evaluated(self, _step: int, losses: Mapping[str, float], seconds: float) -> None:
        """Take an evaluation into account. The service calls this after each, the first time before any step."""
        now = time.monotonic()
        if self.curve:
            self._measuring += seconds
        else:
            self._began = now
        spent = now - self._began - self._measuring
        self.curve.append(Check(self.trained.total(), spent, losses[HELD_OUT]))

    def took(self, loss: float) -> Check | None:
        """What it took to get down to a loss, between two checks by a straight line; None if it never did."""
        for before, after in pairwise(self.curve):
            if after.loss <= loss:
                share = (before.loss - loss) / (before.loss - after.loss) if before.loss > loss else 0.0
                samples = before.samples + share * (after.samples - before.samples)
                return Check(samples, before.seconds + share * (after.seconds - before.seconds), loss)
        return None

    def count(self, step: int, pool: Sequence[Sample], report: StepReport) -> None:
        """Take a step into account."""
        self.step = step
        self.pool_loss = sum(report.losses) / len(report.losses)
        self.trained.update(str(pool[i].domain) for i in report.selected)

    def cells(self) -> tuple[str, ...]:
        """Step, records read, pool loss, target loss, target's share of the trained, dead letters."""
        records = self.status.get("records", {})
        target_loss = self.status.get("evaluation_loss", {}).get("target", math.nan)
        return (
            f"{self.step}",
            f"{sum(records.values())}",
            f"{self.pool_loss:.2f}",
            f"{target_loss:.2f}",
            f"{share(self.trained, TARGET):.0%}",
            f"{records.get(Outcome.DEAD_LETTERED.value, 0)}",
        )

    def line(self) -> str:
        """The same on one line, of at most 80 columns until the steps are a thousand."""
        step, read, pool, target, on_target, dead = self.cells()
        return (
            f"{self.method} {step}: read {read}, loss {pool}, target loss {target}, on target {on_target}, dead {dead}"
        )


COLUMNS = ("step", "read", "pool loss", "target loss", "on target", "dead")  # the table fits 80 columns


def share(counts: Counter[str], domain: str) -> float:
    """The domain's share of all; 0 of nothing."""
    return counts[domain] / max(1, counts.total())


class Display:
    """Progress of one run after the other. Numbers of the service come from its own status page at `url`."""

    def __init__(self, console: Console, url: str) -> None:
        self._console = console
        self._url = url
        self._watches: list[Watch] = []
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("time left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._live = Live(self._picture(), console=console, auto_refresh=False)
        self._bar = TaskID(0)
        self._status_due = 0.0

    @contextmanager
    def shown(self) -> Iterator[None]:
        """On the screen within this context."""
        if not self._console.is_terminal:
            yield
            return
        with self._live:
            yield

    def begin(self, watch: Watch) -> None:
        """From now on show this run."""
        self._watches.append(watch)
        self._bar = self._bars.add_task(watch.method, total=watch.steps)

    def step(self, step: int, pool: Sequence[Sample], report: StepReport) -> None:
        """The service calls this after every step."""
        watch = self._watches[-1]
        watch.count(step, pool, report)
        if self._console.is_terminal:
            if time.monotonic() >= self._status_due or step == watch.steps:
                watch.status = self._status()
                self._status_due = time.monotonic() + STATUS_INTERVAL_S
            self._bars.update(self._bar, completed=step)
            self._live.update(self._picture(), refresh=True)
        elif step % max(1, watch.steps // PLAIN_LINES) == 0 or step == watch.steps:
            watch.status = self._status()
            self._console.print(watch.line())

    def _status(self) -> dict[str, Any]:
        with urlopen(f"{self._url}/status", timeout=STATUS_TIMEOUT_S) as answer:  # noqa: S310 - our own server
            status: dict[str, Any] = json.load(answer)
        return status

    def _picture(self) -> Group:
        table = Table("run", *COLUMNS)
        for watch in self._watches:
            table.add_row(watch.method, *watch.cells())
        return Group(self._bars, table)


def print_report(console: Console, stream: dict[str, int], selected: Watch, uniform: Watch) -> None:
    """What the stream held, what each run trained on, and what that bought on held-out samples of the target."""
    runs = (selected, uniform)
    records = Table("records by domain", "in the stream", title="What was read, and what each run trained on")
    for watch in runs:
        records.add_column(watch.method)
    held = Counter(stream)
    usable = Counter({domain: held[domain] for domain in held if domain != MALFORMED})
    for domain, _ in usable.most_common():
        cells = (f"{counts[domain]} ({share(counts, domain):.0%})" for counts in (usable, *(w.trained for w in runs)))
        records.add_row(domain, *cells, style="bold" if domain == TARGET else None)
    records.add_section()
    records.add_row("usable", *(f"{counts.total()}" for counts in (usable, *(w.trained for w in runs))))
    records.add_row(MALFORMED, f"{held[MALFORMED]}", *("dead-lettered" for _ in runs))
    console.print(records, _gains(selected, uniform))


def _gains(selected: Watch, uniform: Watch) -> Table:
    """Loss, samples and seconds of both runs, and what the selecting one took to get where the other ended."""
    table = Table("", selected.method, uniform.method, title=f"What it bought: {TARGET}, on held-out samples")
    ends = selected.curve[-1], uniform.curve[-1]
    table.add_row("loss before (nats per token)", *(f"{watch.curve[0].loss:.3f}" for watch in (selected, uniform)))
    table.add_row("loss after", *(f"{end.loss:.3f}" for end in ends))
    table.add_row("samples trained on", *(f"{end.samples:.0f}" for end in ends))
    table.add_row("seconds of training", *(f"{end.seconds:.1f}" for end in ends))
    table.add_section()
    took = selected.took(ends[1].loss)
    samples, seconds = ("never", "never") if took is None else _relative(took, ends[1])
    table.add_row(f"samples to {uniform.method}'s last loss", samples, f"{ends[1].samples:.0f}", style="bold")
    table.add_row(f"seconds to {uniform.method}'s last loss", seconds, f"{ends[1].seconds:.1f}", style="bold")
    return table


def _relative(took: Check, end: Check) -> tuple[str, str]:
    """Samples and seconds, each with what share of the other run's they are."""
    samples = f"{took.samples:.0f} ({took.samples / max(1.0, end.samples):.0%})"
    return samples, f"{took.seconds:.1f} ({took.seconds / max(1e-9, end.seconds):.0%})"

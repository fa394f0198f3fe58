"""What the demo shows: progress while it trains, live on a terminal and as plain lines elsewhere, and the report."""

import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.request import urlopen

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from stream_trainer.demo.stream import MALFORMED, TARGET
from stream_trainer.records import Outcome, Sample
from stream_trainer.training.step import StepReport

STATUS_INTERVAL_S = 0.5
STATUS_TIMEOUT_S = 5.0
PLAIN_LINES = 10  # of a run, where there is no terminal


@dataclass
class Watch:
    """What one run of the service has done so far.

    Attributes:
        method: its `selection.weigh`.
        steps: steps it is expected to make.
        pool_loss: mean loss of the samples scored at the last step (nats per token).
        scored, trained: samples by domain.
        status: what the service last said at `/status`.
    """

    method: str
    steps: int
    step: int = 0
    pool_loss: float = math.nan
    scored: Counter[str] = field(default_factory=Counter)
    trained: Counter[str] = field(default_factory=Counter)
    status: dict[str, Any] = field(default_factory=dict)

    def count(self, step: int, pool: Sequence[Sample], report: StepReport) -> None:
        """Take a step into account."""
        self.step = step
        self.pool_loss = sum(report.losses) / len(report.losses)
        self.scored.update(str(pool[i].domain) for i in report.candidates)
        self.trained.update(str(pool[i].domain) for i in report.chosen)

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


COLUMNS = ("step", "records read", "pool loss", "target loss", "target share trained", "dead-lettered")


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
            values = ", ".join(f"{name} {cell}" for name, cell in zip(COLUMNS, watch.cells(), strict=True))
            self._console.print(f"{watch.method}: {values}")

    def _status(self) -> dict[str, Any]:
        with urlopen(f"{self._url}/status", timeout=STATUS_TIMEOUT_S) as answer:  # noqa: S310 - our own server
            status: dict[str, Any] = json.load(answer)
        return status

    def _picture(self) -> Group:
        table = Table("run", *COLUMNS)
        for watch in self._watches:
            table.add_row(watch.method, *watch.cells())
        return Group(self._bars, table)


def print_report(
    console: Console, stream: dict[str, int], runs: Sequence[Watch], before: float, after: Sequence[float]
) -> None:
    """What the stream held, what each run trained on, and what that bought on held-out samples of the target.

    `after` are the losses of `runs`, in order; `before` is that of the model they both began with.
    """
    records = Table("records by domain", "in the stream", title="What was read, and what each run trained on")
    losses = Table("loss (nats per token)", "before", title=f"What it bought: {TARGET}, on held-out samples")
    for watch in runs:
        records.add_column(watch.method)
        losses.add_column(watch.method)
    held = Counter(stream)
    usable = Counter({domain: held[domain] for domain in held if domain != MALFORMED})
    for domain, _ in usable.most_common():
        cells = (f"{counts[domain]} ({share(counts, domain):.0%})" for counts in (usable, *(w.trained for w in runs)))
        records.add_row(domain, *cells, style="bold" if domain == TARGET else None)
    records.add_section()
    records.add_row("usable", *(f"{counts.total()}" for counts in (usable, *(w.trained for w in runs))))
    records.add_row(MALFORMED, f"{held[MALFORMED]}", *("dead-lettered" for _ in runs))
    losses.add_row(f"held-out {TARGET}", f"{before:.3f}", *(f"{loss:.3f}" for loss in after))
    console.print(records, losses)

"""Whoever wants to know what a run does: displays, the status page, trackers."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from stream_trainer.monitoring.progress import Phase, Progress
from stream_trainer.records import Sample
from stream_trainer.training.step import StepReport

OnStep = Callable[[int, Sequence[Sample], StepReport], None]
OnEvaluation = Callable[[int, Mapping[str, float], float], None]
OnCheckpoint = Callable[[int, Path], None]
OnEvent = Callable[[int, str, str], None]
OnPhase = Callable[[Phase], None]


@dataclass(frozen=True)
class Watcher:
    """What to call, on the main thread, between two steps. A call that raises ends the run.

    Attributes:
        on_step: after every step, with its number, the scored pool and the report.
        on_evaluation: after every evaluation, with the step, the loss by set, and the seconds it took.
        on_checkpoint: after every checkpoint is durable, with the step and its directory.
        on_event: when something happens that is worth a mark on a chart, with the step, its kind (one word of a closed
            set) and a sentence.
        on_phase: when something that may take seconds begins, goes on and ends: loading, evaluations, checkpoints.
    """

    on_step: OnStep | None = None
    on_evaluation: OnEvaluation | None = None
    on_checkpoint: OnCheckpoint | None = None
    on_event: OnEvent | None = None
    on_phase: OnPhase | None = None


@dataclass
class Watchers:
    """All watchers of a run, told in the order in which they came."""

    all: list[Watcher] = field(default_factory=list)

    def step(self, step: int, pool: Sequence[Sample], report: StepReport) -> None:
        """Tell of a step."""
        for watcher in self.all:
            if watcher.on_step is not None:
                watcher.on_step(step, pool, report)

    def evaluation(self, step: int, losses: Mapping[str, float], seconds: float) -> None:
        """Tell of an evaluation."""
        for watcher in self.all:
            if watcher.on_evaluation is not None:
                watcher.on_evaluation(step, dict(losses), seconds)

    def checkpoint(self, step: int, path: Path) -> None:
        """Tell of a checkpoint."""
        for watcher in self.all:
            if watcher.on_checkpoint is not None:
                watcher.on_checkpoint(step, path)

    def event(self, step: int, kind: str, text: str) -> None:
        """Tell of an event."""
        for watcher in self.all:
            if watcher.on_event is not None:
                watcher.on_event(step, kind, text)

    @contextmanager
    def during(self, name: str, total: int = 0) -> Iterator[Callable[[int], None]]:
        """Tell of a phase around what may take seconds; what is yielded tells how many of its `total` are done."""
        started = time.perf_counter()
        self._phase(Phase(name, 0, total))
        try:
            yield lambda done: self._phase(Phase(name, done, total))
        finally:
            self._phase(Phase(name, total, total, time.perf_counter() - started))

    def _phase(self, phase: Phase) -> None:
        for watcher in self.all:
            if watcher.on_phase is not None:
                watcher.on_phase(phase)


def watching(progress: Progress) -> Watcher:
    """What keeps `progress` up to date."""

    def stepped(step: int, pool: Sequence[Sample], report: StepReport) -> None:
        tokens = sum(sample.num_tokens for sample in pool)
        progress.stepped(step, tokens, report.losses, len(report.selected) / len(pool), gain_of(report))

    return Watcher(
        on_step=stepped, on_evaluation=lambda step, losses, _: progress.evaluated(step, losses), on_phase=progress.phase
    )


def gain_of(report: StepReport) -> float | None:
    """Share of the pool's pull towards the target that the trained samples have; None if it is not known."""
    pulls = [max(0.0, utility) for utility in report.utilities or () if math.isfinite(utility)]
    if report.utilities is None or sum(pulls) == 0 or len(pulls) < len(report.utilities):
        return None
    return sum(pulls[i] for i in report.selected) / sum(pulls)

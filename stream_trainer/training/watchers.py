"""Whoever wants to know what a run does: displays, the status page, trackers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from stream_trainer.records import Sample
from stream_trainer.training.step import StepReport

OnStep = Callable[[int, Sequence[Sample], StepReport], None]
OnEvaluation = Callable[[int, Mapping[str, float], float], None]
OnCheckpoint = Callable[[int, Path], None]
OnEvent = Callable[[int, str, str], None]


@dataclass(frozen=True)
class Watcher:
    """What to call, on the main thread, between two steps. A call that raises ends the run.

    Attributes:
        on_step: after every step, with its number, the scored pool and the report.
        on_evaluation: after every evaluation, with the step, the loss by set, and the seconds it took.
        on_checkpoint: after every checkpoint is durable, with the step and its directory.
        on_event: when something happens that is worth a mark on a chart, with the step, its kind (one word of a closed
            set) and a sentence.
    """

    on_step: OnStep | None = None
    on_evaluation: OnEvaluation | None = None
    on_checkpoint: OnCheckpoint | None = None
    on_event: OnEvent | None = None


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

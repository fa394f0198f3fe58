"""Gathers what the page shows, on the main thread between two steps; HTTP threads read what is ready.

What they read is replaced as a whole, never changed: nobody waits for anybody.
"""

import copy
import logging
import math
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from prometheus_client.registry import Collector

from stream_trainer.monitoring.history import History
from stream_trainer.monitoring.metrics import Metrics
from stream_trainer.records import Sample
from stream_trainer.settings.schema import Settings
from stream_trainer.training.draw.waiting import BanditSampler
from stream_trainer.training.live.pools import ShownPool, TextOf, label_of, shown_pool
from stream_trainer.training.live.stages import arms_as_json, arms_of, learned_of, mask_of
from stream_trainer.training.observe import layers_of
from stream_trainer.training.step import StepReport
from stream_trainer.training.trainer import Trainer
from stream_trainer.training.watchers import Watcher

ROW_S = 0.5  # a row of the charts stands for the steps of at least so long
PANELS_S = 1.0  # between looks at pool and stages, whose numbers are many
WINDOW_S = 60.0  # what the shares of time, and the time to drain, look back on
MIX_SAMPLES = 2000
MIX_LABELS = 11  # of the stream, the most frequent; the others are one
SHOWN_POOLS = 3
OTHERS = "(others)"


logger = logging.getLogger(__name__)


class Live:
    """What the page shows of a run.

    Attributes:
        trainer: once it is built.
        history: rows, evaluations and events for the charts.
    """

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.trainer: Trainer | None = None
        self.history = History()
        self._metrics = metrics
        self._shows_text = settings.server.show_text
        self._text_of: TextOf | None = None
        self._pools: tuple[ShownPool, ...] = ()
        self._stages: dict[str, Any] = {}
        self._panels_due = 0.0
        self._pulls: Counter[int] = Counter()
        self._mix: deque[tuple[str | None, bool]] = deque(maxlen=MIX_SAMPLES)
        self._failed = False
        self._since_row = _Since()
        self._phases: deque[tuple[float, dict[tuple[str, ...], float]]] = deque(maxlen=int(2 * WINDOW_S / ROW_S))

    @property
    def watcher(self) -> Watcher:
        """To be told of the run."""
        return Watcher(self._on_step, self._on_evaluation, self._on_checkpoint, self._on_event)

    def panels(self) -> dict[str, Any]:
        """All but the charts, for a browser; what does not apply to this run is not there."""
        trainer, found = self.trainer, dict(self._stages)
        if trainer is None:
            return {}
        text_of = self._texts(trainer)
        if "arms" in found:
            found["arms"] = arms_as_json(found["arms"], text_of)
        if self._pools:
            found["pools"] = [pool.as_json(text_of) for pool in self._pools]
        if trainer.engine.route is not None:
            found["layers"] = layers_of(trainer.engine)
        return found | {"time": self._time()} | self._mixture()

    def to_drain(self) -> float | None:
        """Seconds until the lag is gone if it falls on as it did in the last minute; None if it does not fall."""
        lag, change = self._metrics.lag.sum(), self.history.change("lag", WINDOW_S)
        if lag == 0:
            return 0.0
        if lag is None or change is None or change[0] >= 0:
            return None
        return lag / (-change[0] / change[1])

    def _texts(self, trainer: Trainer) -> TextOf | None:
        """A tokenizer of our own: the ingest thread uses the other one at the same time."""
        if self._shows_text and self._text_of is None:
            own = copy.deepcopy(trainer.loaded.tokenizer)
            self._text_of = partial(own.decode, skip_special_tokens=True)
        return self._text_of

    def _on_step(self, step: int, pool: Sequence[Sample], report: StepReport) -> None:
        try:
            self._gather(step, pool, report)
        except Exception:  # a page that cannot be fed is no reason to end a run
            if not self._failed:
                logger.exception("step %d cannot be shown on the page, and later ones may be missing there too", step)
            self._failed = True

    def _gather(self, step: int, pool: Sequence[Sample], report: StepReport) -> None:
        trainer = self.trainer
        assert trainer is not None
        sampler = trainer.sampler
        arms = sampler.last_arms if isinstance(sampler, BanditSampler) else ()
        self._pulls.update(arms)
        selected = set(report.selected)
        self._mix.extend((label_of(sample), i in selected) for i, sample in enumerate((*pool, *trainer.last_undrawn)))
        self._since_row.step(pool, report)
        now = time.monotonic()
        if now >= self._panels_due:
            self._panels_due = now + PANELS_S
            self._pools = (shown_pool(step, pool, report, arms), *self._pools[: SHOWN_POOLS - 1])
            stages = {"arms": arms_of(sampler, self._pulls), "learned": learned_of(sampler, self._metrics.draws)}
            stages["mask"] = mask_of(trainer.engine)
            self._stages = {name: found for name, found in stages.items() if found is not None}
        if self._since_row.seconds >= ROW_S:
            self._row(step, report)

    def _row(self, step: int, report: StepReport) -> None:
        row = self._since_row.means() | {
            "step": step,
            "lag": self._metrics.lag.sum(),
            "advantage": value_of(self._metrics.selection_advantage),
            "advantage_measured": value_of(self._metrics.shadow.advantage),
            "effective_samples": report.decision.effective_samples,
        }
        self.history.row(**row)
        self._since_row = _Since()
        self._phases.append((time.monotonic(), self._metrics.phase_seconds.by_labels.copy()))

    def _mixture(self) -> dict[str, Any]:
        """How many of the last samples came from where, and how many of these were trained on."""
        mix = [(label or "(none)", is_trained) for label, is_trained in self._mix.copy()]
        if all(label == "(none)" for label, _ in mix):
            return {}
        known = [label for label, _ in Counter(label for label, _ in mix).most_common(MIX_LABELS)]
        named = [(label if label in known else OTHERS, trained) for label, trained in mix]
        stream, trained = Counter(label for label, _ in named), Counter(label for label, is_in in named if is_in)
        rows = [{"label": label, "stream": count, "trained": trained[label]} for label, count in stream.most_common()]
        return {"mix": rows}

    def _time(self) -> dict[str, float]:
        """Seconds by phase over the last minute or less; since the start, before there are two looks."""
        now = self._metrics.phase_seconds.by_labels.copy()
        late = [phases for at, phases in self._phases.copy() if time.monotonic() - at <= WINDOW_S]
        before = late[0] if late else {}
        return {labels[0]: seconds - before.get(labels, 0.0) for labels, seconds in now.items()}

    def _on_evaluation(self, step: int, losses: Mapping[str, float], seconds: float) -> None:  # noqa: ARG002
        self.history.evaluation(step, losses)

    def _on_checkpoint(self, step: int, path: Path) -> None:
        self.history.event(step, "checkpoint", path.name)

    def _on_event(self, step: int, kind: str, text: str) -> None:
        if kind == "target_replaced":
            self.history.restart("target")
        self.history.event(step, kind, text)


class _Since:
    """Sums over the steps since the last row."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._tokens = 0
        self._values: dict[str, list[float]] = {}

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def step(self, pool: Sequence[Sample], report: StepReport) -> None:
        self._tokens += sum(sample.num_tokens for sample in pool)
        selected = [report.losses[i] for i in report.selected]
        values = {
            "pool_loss": sum(report.losses) / len(report.losses),
            "trained_loss": sum(selected) / len(selected) if selected else math.nan,
            "selected_ratio": len(selected) / len(report.losses),
            "gradient_norm": report.gradient_norm,
            "learning_rate": report.learning_rate,
        }
        for name, value in values.items():
            if math.isfinite(value):
                self._values.setdefault(name, []).append(value)

    def means(self) -> dict[str, float]:
        """Of each value; what was never finite is not there."""
        means = {name: sum(values) / len(values) for name, values in self._values.items()}
        return means | {"tokens_per_second": self._tokens / self.seconds}


def value_of(gauge: Collector) -> float | None:
    """What a gauge without labels stands at; None if that is not finite."""
    value: float = next(sample.value for family in gauge.collect() for sample in family.samples)
    return value if math.isfinite(value) else None

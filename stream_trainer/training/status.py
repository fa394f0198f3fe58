"""What the HTTP server shows of a run: health, and the report of its page."""

import time
from dataclasses import asdict
from platform import python_version
from typing import Any

from stream_trainer import __version__
from stream_trainer.errors import FencedError, StreamTrainerError
from stream_trainer.monitoring.metrics import Metrics, State
from stream_trainer.monitoring.pages import Condition, Health
from stream_trainer.records import Outcome
from stream_trainer.settings.schema import Settings
from stream_trainer.training.live.watch import Live
from stream_trainer.training.trainer import Trainer

READY = frozenset({State.CATCHING_UP, State.TRAINING, State.IDLE, State.PAUSED})
OUTAGE_GRACE_S = 60.0  # brokers that are restarted are away for less
DOING = {
    State.LOADING: "loading",
    State.IDLE: "waiting for samples",
    State.PAUSED: "paused by an order",
    State.DRAINING: "making the last checkpoint",
}


class Status:
    """What the HTTP server shows; read from its threads while the trainer works."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.trainer: Trainer | None = None
        self.live: Live | None = None
        self._settings = settings
        self._metrics = metrics
        self._state = State.STARTING
        self._failure = ""
        self.enter(State.STARTING)

    def enter(self, state: State) -> None:
        self._state = state
        self._metrics.state.state(state.value)

    def fail(self, error: BaseException) -> None:
        """Go to the last state, and say why if it is for people to mend."""
        self._metrics.fenced.set(isinstance(error, FencedError))
        self._failure = str(error) if isinstance(error, StreamTrainerError) else "the service failed; see its log"
        self.enter(State.FAILED)

    def health(self) -> Health:
        """Stalled means: for `server.stall_s` seconds no step while there is something to do, or no turn of reading.

        A run that got over something says what it was, and is well.
        """
        trainer = self.trainer
        if self._state is State.FAILED:
            return Health(State.FAILED.value, ok=False, ready=False, detail=self._failure, health=Condition.STUCK)
        if trainer is None:
            loading = "the model is being loaded"
            return Health(State.LOADING.value, ok=True, ready=False, detail=loading, health=Condition.STARTING)
        outage_s = _outage_s(trainer)
        if trainer.ingest.away:
            detail = f"waiting for the stream: {trainer.ingest.away}"
            health = Condition.DEGRADED if outage_s > OUTAGE_GRACE_S else Condition.STARTING
            return Health(trainer.state.value, ok=True, ready=False, detail=detail, health=health)
        state, ready, failing = trainer.state.value, trainer.state in READY, trainer.saver.failing
        detail = self._why_stuck(trainer)
        if detail:
            return Health(state, ok=False, ready=ready, detail=detail, health=Condition.STUCK)
        if failing is not None:
            failed_s = time.monotonic() - failing.since
            detail = f"fails for {failed_s:.0f} s: {failing.error}"
            return Health("degraded", ok=True, ready=ready, detail=detail, health=Condition.DEGRADED)
        (family,) = self._metrics.degraded.collect()
        causes = [sample.labels["cause"] for sample in family.samples if sample.value]
        health = Condition.STARTING if trainer.state is State.LOADING else Condition.HEALTHY
        if causes or outage_s > OUTAGE_GRACE_S:
            health = Condition.DEGRADED
        detail = trainer.recovery.trouble or _why_not(trainer)
        if outage_s > 0:
            detail = f"the stream cannot be read for {outage_s:.0f} s; trying on"
        elif causes and not detail:
            detail = f"{' and '.join(causes)} fails; the log says why"
        return Health(state, ok=True, ready=ready, detail=detail, health=health)

    def _why_stuck(self, trainer: Trainer) -> str:
        """Empty unless neither steps nor reading come on."""
        limit = self._settings.server.stall_s
        # A step may rightly wait `buffer.wait_s` for samples that would fill its pool.
        age = time.monotonic() - trainer.last_progress - self._settings.buffer.wait_s
        silence = time.monotonic() - trainer.ingest.last_turn if trainer.ingest.alive else 0.0
        if trainer.state is not State.IDLE and age > limit:
            return f"no progress for {age:.0f} s, server.stall_s={limit:.0f}"
        return f"reading hangs since {silence:.0f} s, server.stall_s={limit:.0f}" if silence > limit else ""

    def _doing(self) -> str:
        """What it does at this moment, for people."""
        trainer = self.trainer
        if trainer is None:
            return "loading the model"
        if trainer.state in DOING:
            return DOING[trainer.state]
        return f"step {trainer.step + 1}, for {time.monotonic() - trainer.last_progress:.0f} s"

    def report(self) -> dict[str, Any]:
        """The service in a page: state, step, losses, records by outcome, what waits."""
        trainer, health = self.trainer, self.health()
        report: dict[str, Any] = {
            "version": __version__,
            "python": python_version(),
            "model": self._settings.model.name or "built from model.config",
            "selection": f"{self._settings.selection.draw}, {self._settings.selection.weigh}",
            "state": State.LOADING.value if trainer is None else trainer.state.value,
            "health": asdict(health),
            "doing": self._doing(),
        }
        if trainer is None:
            return report
        last = trainer.last_report
        report |= {
            "step": trainer.step,
            "evaluation_loss": dict(trainer.evaluations.losses),
            "records": {outcome.value: trainer.cursor.counts[outcome] for outcome in Outcome},
            "buffer_records": trainer.buffer.records,
            "lag": self._metrics.lag.sum(),
            "seconds_to_drain": None if self.live is None else self.live.to_drain(),
            "resumed_otherwise": list(trainer.changed),
        }
        report |= _effects_of(trainer)
        moved = trainer.evaluations.moved
        if moved is not None:
            report |= {"moved_tensors": moved.tensors, "moved_weights": moved.weights}
        if last is not None:
            report |= {
                "pool_loss": sum(last.losses) / len(last.losses),
                "learning_rate": last.learning_rate,
                "step_seconds": sum(last.seconds.values()),
            }
        return report


def _effects_of(trainer: Trainer) -> dict[str, Any]:
    """By how much a step's samples lower the loss on the held-back target, and those of chance; nats per token."""
    shadows = trainer.paying.shadows
    if shadows is None or shadows.measured.means is None:
        return {}
    kinds = {"predicted": shadows.predicted.means, "measured": shadows.measured.means}
    return {
        "effects": {kind: dict(zip(("chosen", "uniform"), means or (), strict=False)) for kind, means in kinds.items()}
    }


def _outage_s(trainer: Trainer) -> float:
    """For how long the stream cannot be read."""
    since = trainer.ingest.unreachable_since
    return 0.0 if since is None else time.monotonic() - since


def _why_not(trainer: Trainer) -> str:
    """Why no step is made although all is well."""
    return "paused by an order; stream-trainer ctl resume ends that" if trainer.state is State.PAUSED else ""

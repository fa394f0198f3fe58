"""What the HTTP server shows of a run: health, and the report of its page."""

import time
from platform import python_version
from typing import Any

from stream_trainer import __version__
from stream_trainer.errors import FencedError, StreamTrainerError
from stream_trainer.monitoring.metrics import Metrics, State
from stream_trainer.monitoring.pages import Health
from stream_trainer.records import Outcome
from stream_trainer.settings.schema import Settings
from stream_trainer.training.live.watch import Live, sum_of
from stream_trainer.training.trainer import Trainer

READY = frozenset({State.CATCHING_UP, State.TRAINING, State.IDLE, State.PAUSED})
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
        trainer, limit = self.trainer, self._settings.server.stall_s
        if self._state is State.FAILED:
            return Health(State.FAILED.value, ok=False, ready=False, detail=self._failure)
        if trainer is None:
            return Health(State.LOADING.value, ok=True, ready=False, detail="the model is being loaded")
        if trainer.ingest.away:
            detail = f"waiting for the stream: {trainer.ingest.away}"
            return Health(trainer.state.value, ok=True, ready=False, detail=detail)
        # A step may rightly wait `buffer.wait_s` for samples that would fill its pool.
        age = time.monotonic() - trainer.last_progress - self._settings.buffer.wait_s
        silence = time.monotonic() - trainer.ingest.last_turn if trainer.ingest.alive else 0.0
        detail = ""
        if trainer.state is not State.IDLE and age > limit:
            detail = f"no progress for {age:.0f} s, server.stall_s={limit:.0f}"
        elif silence > limit:
            detail = f"reading hangs since {silence:.0f} s, server.stall_s={limit:.0f}"
        state, ready, failing = trainer.state.value, trainer.state in READY, trainer.saver.failing
        if failing is not None and not detail:
            failed_s = time.monotonic() - failing.since
            return Health("degraded", ok=True, ready=ready, detail=f"fails for {failed_s:.0f} s: {failing.error}")
        return Health(state, ok=not detail, ready=ready, detail=detail or trainer.recovery.trouble or _why_not(trainer))

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
            "health": {"ok": health.ok, "ready": health.ready, "state": health.state, "detail": health.detail},
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
            "lag": sum_of(self._metrics.lag),
            "seconds_to_drain": None if self.live is None else self.live.to_drain(),
            "resumed_otherwise": list(trainer.changed),
        }
        if last is not None:
            report |= {
                "pool_loss": sum(last.losses) / len(last.losses),
                "learning_rate": last.learning_rate,
                "step_seconds": sum(last.seconds.values()),
            }
        return report


def _why_not(trainer: Trainer) -> str:
    """Why no step is made although all is well."""
    return "paused by an order; stream-trainer ctl resume ends that" if trainer.state is State.PAUSED else ""

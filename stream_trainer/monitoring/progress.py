"""How far a run is: what it tells of itself, put together for whoever shows it to people."""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from stream_trainer.monitoring.metrics import Metrics
from stream_trainer.monitoring.pages import Health

RATE_S = 60.0  # over which rates are measured
NET_RATE_S, LEAST_NET_S = 120.0, 10.0  # over which the lag's fall is, at most and at least
MARK_S, LAG_S = 0.5, 1.0  # between two marks of the steps made, and two looks at the lag
SMOOTHED_STEPS = 20  # of which the pools' mean loss is shown
LONG_S = 1.0  # what takes longer is announced before it begins

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Phase:
    """What a run does beside its steps.

    Attributes:
        name: in words, for example `evaluating target`.
        done, total: samples; 0 of 0 where nothing is counted.
        seconds: it took; None until it has ended.
    """

    name: str
    done: int = 0
    total: int = 0
    seconds: float | None = None


@dataclass(frozen=True)
class Loss:
    """Nats per token, at the start of this run and now."""

    start: float
    now: float


@dataclass(frozen=True)
class Now:
    """A run at a moment. None is what is not known.

    Attributes:
        state: of `metrics.State`, or `degraded`.
        doing: in words, and for how many seconds.
        trouble: what is wrong, if anything is.
        up_s: seconds since the run began.
        lag: records behind the end of the log; of a file, bytes.
        drain_s: seconds until there is no lag, at the rate at which it falls.
        pool: mean loss of the last pools, before training on them.
        sets: loss of each evaluation set.
        chosen: share of the last pool that was trained on.
        gain: share of a pool's pull towards the target that its chosen samples had, when it was last known.
    """

    state: str
    doing: str
    doing_s: float
    trouble: str
    up_s: float
    step: int | None
    steps_per_s: float | None
    tokens_per_s: float | None
    lag: float | None
    drain_s: float | None
    pool: Loss | None
    sets: Mapping[str, Loss]
    chosen: float | None
    gain: float | None


@dataclass
class Progress:
    """What is known of a run, told by its own thread and asked for by others. Neither waits for the other for long."""

    clock: Callable[[], float] = time.monotonic
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _metrics: Metrics | None = None
    _health: Callable[[], Health] | None = None
    _phases: list[tuple[Phase, float]] = field(default_factory=list)
    _took: dict[str, float] = field(default_factory=dict)
    _marks: deque[tuple[float, int, int]] = field(default_factory=deque)  # time, step, tokens since the start
    _lags: deque[tuple[float, float]] = field(default_factory=deque)
    _pools: deque[float] = field(default_factory=lambda: deque(maxlen=SMOOTHED_STEPS))
    _first_pools: list[float] = field(default_factory=list)
    _sets: dict[str, Loss] = field(default_factory=dict)
    _step: int | None = None
    _tokens: int = 0
    _shares: tuple[float | None, float | None] = (None, None)

    def __post_init__(self) -> None:
        self._began = self._stepped_at = self.clock()

    def begin(self, metrics: Metrics, health: Callable[[], Health]) -> None:
        """Take the lag from these metrics, and the state from `health`."""
        self._metrics, self._health = metrics, health

    def stepped(self, step: int, tokens: int, losses: Sequence[float], chosen: float, gain: float | None) -> None:
        """A step was made on a pool of so many tokens, and these losses before it."""
        finite = [loss for loss in losses if math.isfinite(loss)]
        with self._lock:
            now = self.clock()
            self._step, self._tokens, self._stepped_at = step, self._tokens + tokens, now
            self._shares = (chosen, self._shares[1] if gain is None else gain)
            self._mark(now)
            if finite:
                self._pools.append(sum(finite) / len(finite))
                if len(self._first_pools) < SMOOTHED_STEPS:
                    self._first_pools.append(self._pools[-1])

    def evaluated(self, step: int, losses: Mapping[str, float]) -> None:
        """The sets were evaluated; the first time of a run is its start."""
        with self._lock:
            if self._step is None:
                self._step, self._stepped_at = step, self.clock()
                self._mark(self._stepped_at)
            self._sets = {
                name: Loss(self._sets[name].start if name in self._sets else loss, loss)
                for name, loss in losses.items()
            }

    def phase(self, phase: Phase) -> None:
        """A phase begins, goes on or ends. What may take longer than `LONG_S` is logged at its begin and end."""
        with self._lock:
            now = self.clock()
            is_known = [known.name for known, _ in self._phases]
            began = next((since for known, since in self._phases if known.name == phase.name), now)
            self._phases = [(known, since) for known, since in self._phases if known.name != phase.name]
            is_long = self._took.get(phase.name, LONG_S) >= LONG_S
            if phase.seconds is None:
                self._phases.append((phase, began))
            else:
                self._took[phase.name] = phase.seconds
        if phase.seconds is not None and (is_long or phase.seconds >= LONG_S):
            logger.info("%s: done in %.1f s", phase.name, phase.seconds)
        elif phase.seconds is None and phase.name not in is_known and is_long:
            logger.info("%s%s", phase.name, f", {phase.total} samples" if phase.total else "")

    def now(self) -> Now:
        """The run as it is. Called by whoever shows it."""
        lag = None if self._metrics is None else self._metrics.lag.sum()
        health = Health("starting", ok=True, ready=False, detail="") if self._health is None else self._health()
        with self._lock:
            now = self.clock()
            doing, since = self._doing(health.state)
            steps_per_s, tokens_per_s = self._rates(now)
            return Now(
                state=health.state,
                doing=doing,
                doing_s=now - since,
                trouble=health.detail if self._step is not None else "",
                up_s=now - self._began,
                step=self._step,
                steps_per_s=steps_per_s,
                tokens_per_s=tokens_per_s,
                lag=lag,
                drain_s=None if lag is None else self._drain(now, lag),
                pool=Loss(_mean(self._first_pools), _mean(self._pools)) if self._pools else None,
                sets=dict(self._sets),
                chosen=self._shares[0],
                gain=self._shares[1],
            )

    def _mark(self, now: float) -> None:
        if self._step is None:
            return
        if len(self._marks) > 1 and now - self._marks[-2][0] < MARK_S:
            self._marks.pop()
        self._marks.append((now, self._step, self._tokens))
        while len(self._marks) > 2 and self._marks[1][0] < now - RATE_S:
            self._marks.popleft()

    def _rates(self, now: float) -> tuple[float | None, float | None]:
        if not self._marks or self._step is None or now <= self._marks[0][0]:
            return None, None
        began, step, tokens = self._marks[0]
        return (self._step - step) / (now - began), (self._tokens - tokens) / (now - began)

    def _drain(self, now: float, lag: float) -> float | None:
        if not self._lags or now - self._lags[-1][0] >= LAG_S:
            self._lags.append((now, lag))
        while len(self._lags) > 2 and self._lags[1][0] < now - NET_RATE_S:
            self._lags.popleft()
        began, before = self._lags[0]
        fallen = before - lag
        if lag == 0:
            return 0.0
        return lag * (now - began) / fallen if fallen > 0 and now - began >= LEAST_NET_S else None

    def _doing(self, state: str) -> tuple[str, float]:
        if self._phases:
            phase, since = self._phases[-1]
            return f"{phase.name}{f' {phase.done}/{phase.total}' if phase.total else ''}", since
        if self._step is None or state in ("starting", "failed"):
            return state, self._began
        if state == "idle":
            return "waiting for records", self._stepped_at
        return f"step {self._step + 1}", self._stepped_at


@contextmanager
def announced(what: str) -> Iterator[None]:
    """Log a phase that may take seconds as it begins, and its seconds at its end."""
    logger.info("%s", what)
    started = time.monotonic()
    yield
    logger.info("%s: done in %.1f s", what, time.monotonic() - started)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)

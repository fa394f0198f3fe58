"""Publishes checkpoints beside the training, on a thread of its own: whatever fails there never stops a step."""

import json
import logging
import queue
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from stream_trainer.checkpoints.manifest import DamagedError
from stream_trainer.checkpoints.trouble import remedy_of, sync
from stream_trainer.errors import FencedError
from stream_trainer.monitoring.metrics import Metrics
from stream_trainer.publishing.gate import Gate, why_held_back
from stream_trainer.publishing.held import HeldFiles
from stream_trainer.publishing.hooks import FAILURES, Hook
from stream_trainer.publishing.making import DIRECTORY_MODE, Candidate, Origin, is_published, make_version, put_in_place
from stream_trainer.publishing.newest import Newest
from stream_trainer.publishing.versions import (
    changing,
    current_in,
    is_held,
    making,
    name_of,
    point_at,
    prune,
    read_about,
    remove_leftovers,
    versions_in,
)
from stream_trainer.settings.sections.publish import PublishSettings
from stream_trainer.training.watchers import OnEvent, Watcher

logger = logging.getLogger(__name__)

BASELINE = "baseline.json"
STOP_WAIT_S = 30.0  # for what is being published when the run ends


@dataclass(frozen=True)
class _Evaluation:
    """What was found at a step: no losses if it failed. `measured` is the last step before or then that has some."""

    step: int
    measured: int
    losses: dict[str, float]


class Publisher:
    """What a run publishes. Its watcher is called on the main thread, all the rest happens on its own."""

    def __init__(
        self, directory: Path, settings: PublishSettings, origin: Origin, hooks: Mapping[str, Hook], metrics: Metrics
    ) -> None:
        self._directory, self._settings, self._origin = directory, settings, origin
        self._hooks, self._metrics = dict(hooks), metrics
        self._events = queue.SimpleQueue[tuple[int, str, str]]()
        self._first_losses: dict[str, float] = {}
        self._evaluations = [_Evaluation(-1, -1, {})]
        self._failed_evaluation = -1
        self._checkpoints = settings.every_checkpoints  # since the last version; the first is published at once
        self._last_number = 0
        self._unfinished: set[str] = set()  # hooks that failed on the current version
        self._is_failing = False
        self._begin()
        self._worker = Newest[Candidate]("publish", self._work)

    def watcher(self, tell: OnEvent) -> Watcher:
        """`tell`: takes the events, on the main thread."""

        def tell_all() -> None:
            with suppress(queue.Empty):
                while True:
                    tell(*self._events.get_nowait())

        def on_checkpoint(step: int, path: Path) -> None:
            self._offer(step, path)
            tell_all()

        return Watcher(
            on_step=lambda *_: tell_all(),
            on_evaluation=self._on_evaluation,
            on_checkpoint=on_checkpoint,
            on_event=self._on_event,
        )

    def end(self, error: BaseException | None) -> None:
        """Finish what there is to publish, for a while; one that was taken over publishes nothing more."""
        if not self._worker.close(STOP_WAIT_S, drop=isinstance(error, FencedError)):
            logger.warning("publishing takes longer than %.0f s and is given up", STOP_WAIT_S)

    # On the main thread

    def _begin(self) -> None:
        """Make the directory, once: one that is gone later is a mount that is gone."""
        try:
            self._directory.mkdir(DIRECTORY_MODE, parents=True, exist_ok=True)
            if newest := versions_in(self._directory)[:1]:
                self._last_number = newest[0].number
                self._show(newest[0].step, newest[0].path.stat().st_mtime)
        except OSError as error:
            self._fail("version", f"publish.dir={self._directory} cannot be read ({error}); {remedy_of(error)}")

    def _on_evaluation(self, step: int, losses: Mapping[str, float], seconds: float) -> None:  # noqa: ARG002
        if step == self._failed_evaluation:
            self._evaluations.append(_Evaluation(step, self._evaluations[-1].measured, {}))
            return
        self._evaluations.append(_Evaluation(step, step, dict(losses)))
        self._first_losses = {**losses, **self._first_losses}

    def _on_event(self, step: int, kind: str, text: str) -> None:  # noqa: ARG002
        if kind == "evaluation_failed":
            self._failed_evaluation = step

    def _offer(self, step: int, path: Path) -> None:
        # It may have been written while training went on, and what was found then is not of it.
        found = next((found for found in reversed(self._evaluations) if found.step <= step), self._evaluations[0])
        self._evaluations = [later for later in self._evaluations if later.step >= found.step]
        self._checkpoints += 1
        if self._checkpoints < self._settings.every_checkpoints or found.measured < 0:
            return  # the first checkpoint of all comes before the first evaluation
        self._checkpoints = 0
        try:
            files = HeldFiles(path, is_published)
        except OSError as error:
            self._try_again("version", step, f"checkpoint {path} cannot be read ({error})")
            return
        self._worker.offer(Candidate(step, path.name, files, found.losses, found.measured))

    # On the thread

    def _work(self, candidate: Candidate) -> None:
        self._metrics.publish_busy.set(1)
        try:
            made = self._publish(candidate)
        except (OSError, SafetensorError, DamagedError, ValueError, KeyError) as error:
            why = f"publish.dir={self._directory}: step {candidate.step} is not published ({error}); {remedy_of(error)}"
            self._try_again("version", candidate.step, why)
        else:
            self._run_hooks(made)
        finally:
            self._metrics.publish_busy.set(0)

    def _publish(self, candidate: Candidate) -> Path | None:
        """The version, if it is the current one now; None if it was held back or may not become that."""
        started = time.perf_counter()
        with making(self._directory):
            remove_leftovers(self._directory)
            gate = self._gate(candidate)
            if gate is not None:
                self._hold_back(candidate, gate)
                return None
            number = 1 + max([self._last_number, *(found.number for found in versions_in(self._directory))])
            name = name_of(number, candidate.step)
            start = self._start_losses()
            temporary = make_version(self._directory, name, candidate, self._origin, start)
            with changing(self._directory):
                path = put_in_place(temporary, name)
                self._last_number = number
                held = is_held(self._directory)
                if not held:
                    point_at(self._directory, name)
            self._prune()
        self._metrics.publish_seconds.observe(time.perf_counter() - started)
        self._show(candidate.step, time.time(), held)
        where = f", current stays {current_in(self._directory)}: it is held" if held else ""
        losses = ", ".join(f"{of} loss {loss:.4f}" for of, loss in candidate.losses.items())
        logger.info("published %s in %.1f s: %s%s", path, time.perf_counter() - started, losses, where)
        self._events.put((candidate.step, "published", f"{name}{where}"))
        return None if held else path

    def _prune(self) -> None:
        """What cannot be deleted now is tried again after the next version."""
        try:
            prune(self._directory, self._settings.keep, self._settings.grace_s)
        except OSError as error:
            logger.warning("old versions in %s cannot be deleted: %s", self._directory, error)

    def _gate(self, candidate: Candidate) -> Gate | None:
        """Against the current version: it is what a new one would take the place of."""
        current, before = current_in(self._directory), None
        if current is not None:
            try:
                before = read_about(self._directory / current)["losses"]
            except (OSError, ValueError, KeyError) as error:  # somebody took it away: nothing to compare with
                logger.warning("current version %s cannot be read (%s); nothing is compared with it", current, error)
        return why_held_back(candidate.losses, self._start_losses(), before, self._settings)

    def _start_losses(self) -> dict[str, float]:
        """Losses at the start of the model, which `baseline.json` keeps over restarts; new sets are added to it."""
        path = self._directory / BASELINE
        known: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
        start = {**self._first_losses, **known}
        if start != known:
            temporary = path.with_name(f".{BASELINE}")
            temporary.write_text(json.dumps(start))
            sync(temporary)
            temporary.replace(path)
        return start

    def _hold_back(self, candidate: Candidate, gate: Gate) -> None:
        self._checkpoints = self._settings.every_checkpoints
        self._metrics.publish_gated.labels(gate.reason).inc()
        logger.warning("step %d is not published: %s", candidate.step, gate.detail)
        self._events.put((candidate.step, "publish_gated", gate.detail))

    def _run_hooks(self, made: Path | None) -> None:
        """All of them on a new version; on one that stays the current one those that failed on it."""
        path, wanted = (made, set(self._hooks)) if made is not None else (self._current_path(), self._unfinished)
        self._unfinished = set()
        for stage, hook in self._hooks.items():
            if path is None or stage not in wanted:
                continue
            try:
                hook(path)
            except FAILURES as error:
                self._unfinished.add(stage)
                self._fail(stage, str(error))
        if not self._unfinished:
            self._is_failing = False
            self._metrics.degraded.labels("publish").set(0)

    def _current_path(self) -> Path | None:
        with suppress(OSError):
            current = current_in(self._directory)
            return self._directory / current if current is not None else None
        return None

    def _try_again(self, stage: str, step: int, why: str) -> None:
        self._checkpoints = self._settings.every_checkpoints
        if not self._is_failing:
            self._events.put((step, "publish_failed", why))
        self._fail(stage, why)

    def _fail(self, stage: str, why: str) -> None:
        self._is_failing = True
        self._metrics.publish_failures.labels(stage).inc()
        self._metrics.degraded.labels("publish").set(1)
        logger.error("%s; training goes on, and the next checkpoint tries again", why)

    def _show(self, step: int, time_s: float, held: bool = False) -> None:
        self._metrics.publish_step.set(step)
        self._metrics.publish_time.set(time_s)
        self._metrics.publish_held.set(held)

"""A thread for each tracker: one that raises or hangs loses figures, and training goes on."""

import logging
import queue
import threading
import time
from collections.abc import Mapping

from stream_trainer.models.refusals import first_line
from stream_trainer.monitoring.metrics import Metrics
from stream_trainer.tracking.trackers import Tracker

logger = logging.getLogger(__name__)

WAITING = 100  # reports that wait for a tracker at most; later ones are lost
HANGS_S = 60.0  # for one report, after which a tracker is given no others until it returns
STOP_WAIT_S = 10.0  # for a tracker to take what waits when the run ends


class Reporter:
    """Hands reports over to one tracker.

    Attributes:
        failing: whether the last report was lost.
    """

    def __init__(self, tracker: Tracker, metrics: Metrics, hangs_s: float = HANGS_S) -> None:
        self.failing = False
        self._tracker, self._metrics, self._hangs_s = tracker, metrics, hangs_s
        self._reports: queue.Queue[tuple[int, Mapping[str, float]] | None] = queue.Queue(WAITING)
        self._at_work_since: float | None = None
        self._thread = threading.Thread(target=self._run, name=f"report-{tracker.name}", daemon=True)
        self._thread.start()

    def report(self, step: int, values: Mapping[str, float]) -> None:
        """Never waits and never raises."""
        since = self._at_work_since
        if since is not None and time.monotonic() - since > self._hangs_s:
            self._lost(f"it has not answered for {self._hangs_s:g} s")
            return
        try:
            self._reports.put_nowait((step, values))
        except queue.Full:
            self._lost(f"it has not taken {WAITING} reports")

    def end(self) -> None:
        """Let the tracker finish, for a while."""
        try:
            self._reports.put(None, timeout=STOP_WAIT_S)
            self._thread.join(STOP_WAIT_S)
        except queue.Full:
            pass
        if self._thread.is_alive():
            logger.warning("tracker %s does not finish and is given up", self._tracker.name)

    def _run(self) -> None:
        while (report := self._reports.get()) is not None:
            self._at_work_since = time.monotonic()
            try:
                self._tracker.write(*report)
            except Exception as error:  # whatever its client raises
                self._lost(f"{type(error).__name__}: {first_line(error)}")
            else:
                self.failing = False
            self._at_work_since = None
        try:
            self._tracker.close()
        except Exception as error:
            self._lost(f"{type(error).__name__}: {first_line(error)}")

    def _lost(self, why: str) -> None:
        self._metrics.tracking_failures.labels(self._tracker.name).inc()
        if not self.failing:
            logger.error("tracker %s fails (%s); training goes on without its figures", self._tracker.name, why)
        self.failing = True

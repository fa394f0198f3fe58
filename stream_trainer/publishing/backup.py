"""Copies of checkpoints in an object store, made once they are durable here, on a thread of its own."""

import logging
from dataclasses import dataclass
from pathlib import Path

from stream_trainer.checkpoints.manifest import MANIFEST
from stream_trainer.errors import FencedError, SettingsError
from stream_trainer.monitoring.metrics import Metrics
from stream_trainer.publishing.held import HeldFiles
from stream_trainer.publishing.newest import Newest
from stream_trainer.publishing.stores import StoreError, open_store, upload
from stream_trainer.training.watchers import Watcher

logger = logging.getLogger(__name__)

SETTING = "checkpoint.upload"
STOP_WAIT_S = 30.0  # for what is being copied when the run ends


@dataclass(frozen=True)
class _Checkpoint:
    """One to copy, its files held open: it may be deleted here meanwhile."""

    step: int
    name: str
    files: HeldFiles

    def close(self) -> None:
        self.files.close()


class Backup:
    """Of checkpoints that wait only the newest is copied. One that fails is left, and the next is tried."""

    def __init__(self, url: str, metrics: Metrics) -> None:
        """Raises SettingsError if a package is missing."""
        open_store(SETTING, url)
        self._url, self._metrics = url, metrics
        self._worker = Newest[_Checkpoint]("checkpoint-upload", self._work)

    @property
    def watcher(self) -> Watcher:
        """Hands over every checkpoint."""
        return Watcher(on_checkpoint=self._offer)

    def end(self, error: BaseException | None) -> None:
        """Finish the copy, for a while; one that was taken over copies nothing more."""
        if not self._worker.close(STOP_WAIT_S, drop=isinstance(error, FencedError)):
            logger.warning("%s takes longer than %.0f s and is given up", SETTING, STOP_WAIT_S)

    def _offer(self, step: int, path: Path) -> None:
        try:
            files = HeldFiles(path)
        except OSError as error:
            self._fail(f"{SETTING}: {path} cannot be read ({error})")
        else:
            self._worker.offer(_Checkpoint(step, path.name, files))

    def _work(self, checkpoint: _Checkpoint) -> None:
        try:
            upload(SETTING, self._url, checkpoint.name, checkpoint.files, last=MANIFEST)
        except (StoreError, SettingsError, OSError) as error:
            self._fail(str(error))
            return
        self._metrics.checkpoint_upload_step.set(checkpoint.step)
        self._metrics.degraded.labels("upload").set(0)
        logger.info("copied checkpoint %s to %s", checkpoint.name, self._url)

    def _fail(self, why: str) -> None:
        self._metrics.checkpoint_upload_failures.inc()
        self._metrics.degraded.labels("upload").set(1)
        logger.error("%s; training goes on, and the next checkpoint is tried", why)

"""The faults: what is done, what undoes it, and which alert has to tell of it."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from stream_trainer.training.status import OUTAGE_GRACE_S
from tests.system.operations.fault_table.stage import Stage

BALLAST, CHUNK = "ballast", 1 << 16
ELECTION_S = 15.0  # until a broker that listens serves its partitions, and the trainer has found that out
DISK_BYTES = 64 << 20


class TooBusyError(Exception):
    """This machine is too slow for a fault to be the one that it is named after."""


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong.

    Attributes:
        alert: of `deploy/prometheus/alerts.yml`; None where nobody is to be called.
        hold_s: for how long the fault lasts at least: a minute, so that the lines of a minute can be counted.
        stays: whether its alert looks back over minutes, so that it outlasts the fault.
        needs_disk: whether checkpoints lie on a small disk of their own, for which one has to be root.
    """

    name: str
    title: str
    alert: str | None
    do: Callable[[Stage], None]
    undo: Callable[[Stage], None]
    hold_s: float = 62.0
    stays: bool = False
    needs_disk: bool = False


def _fill_disk(stage: Stage) -> None:
    with suppress(OSError), _ballast(stage).open("wb", buffering=0) as file:
        while file.write(bytes(CHUNK)):
            pass


def _ballast(stage: Stage) -> Path:
    return Path(stage.config["checkpoint"]["dir"]).parent / BALLAST


def _free_disk(stage: Stage) -> None:
    _ballast(stage).unlink()


def _kill_broker(stage: Stage) -> None:
    stage.broker_process.kill()
    stage.broker_process.wait()


def _start_broker(stage: Stage) -> None:
    stage.start_broker()


def _restart_broker(stage: Stage) -> None:
    """Raises TooBusyError if that took so long that it was an outage."""
    began = time.monotonic()
    _kill_broker(stage)
    time.sleep(3.0)
    stage.start_broker()
    away_s = time.monotonic() - began
    if away_s > OUTAGE_GRACE_S - ELECTION_S:
        raise TooBusyError(f"a restart of the broker took {away_s:.0f} s, which is an outage; less else may run here")


def _nothing(_: Stage) -> None:
    """It is over by itself."""


def _signal(number: signal.Signals) -> Callable[[Stage], None]:
    return lambda stage: stage.trainer.send_signal(number)


def _flag(name: str) -> Callable[[Stage], None]:
    return lambda stage: (stage.folder / name).touch()


def _unflag(name: str) -> Callable[[Stage], None]:
    return lambda stage: (stage.folder / name).unlink()


def _spoil_target(stage: Stage) -> None:
    target = Path(stage.config["target"]["path"])
    shutil.copy(target, target.with_suffix(".good"))
    target.write_bytes(os.urandom(4096))


def _mend_target(stage: Stage) -> None:
    target = Path(stage.config["target"]["path"])
    target.with_suffix(".good").replace(target)


def _take_published(stage: Stage) -> None:
    (stage.folder / "published").rename(stage.folder / "away")


def _return_published(stage: Stage) -> None:
    (stage.folder / "away").rename(stage.folder / "published")


FAULTS = (
    Fault(
        "disk", "the disk is full", "StreamTrainerCheckpointsFail", _fill_disk, _free_disk, stays=True, needs_disk=True
    ),
    Fault("broker", "the broker is killed", "StreamTrainerSourceAway", _kill_broker, _start_broker, hold_s=80.0),
    Fault("restart", "the broker restarts within seconds", None, _restart_broker, _nothing),
    Fault("stopped", "SIGSTOP", "StreamTrainerDown", _signal(signal.SIGSTOP), _signal(signal.SIGCONT)),
    Fault("hang", "a step hangs", "StreamTrainerStalled", _flag("hang"), _unflag("hang")),
    Fault("target", "the target becomes garbage", "StreamTrainerTargetFileRefused", _spoil_target, _mend_target),
    Fault(
        "publish", "the publish directory is gone", "StreamTrainerPublishFailing", _take_published, _return_published
    ),
    Fault("nan", "NaN in the model", "StreamTrainerRolledBack", _flag("nan"), _nothing, stays=True),
)


def mount(folder: Path) -> None:
    """A small disk at `folder`. Raises CalledProcessError unless one is root."""
    folder.mkdir()
    options = ["-o", f"size={DISK_BYTES}"]
    subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", str(folder)], check=True, capture_output=True)


def unmount(folder: Path) -> None:
    subprocess.run(["umount", "--lazy", str(folder)], check=False, capture_output=True)


def can_mount() -> bool:
    return os.geteuid() == 0 and shutil.which("mount") is not None

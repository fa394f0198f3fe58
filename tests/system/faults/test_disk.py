"""A disk that fails at a checkpoint: training goes on, it is tried again, and the last one stays as it was."""

import errno
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from stream_trainer.errors import CheckpointError
from stream_trainer.service import serve
from stream_trainer.settings.schema import Settings
from stream_trainer.training import failing
from stream_trainer.training.watchers import Watcher
from tests.helpers.service import (
    checkpoints,
    configuration,
    counts,
    get,
    goods,
    hashes,
    jsonl,
    metrics,
    on_free_port,
    run_main,
    write_lines,
)

TEMPORARY = ".tmp-"


class Disk:
    """Refuses to make the directory of a checkpoint for as long as `number` is set."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.number: int | None = None
        self._mkdir = os.mkdir
        patch.setattr(os, "mkdir", self.mkdir)

    def mkdir(self, path: Any, *others: Any, **options: Any) -> None:
        if self.number is not None and TEMPORARY in str(path):
            raise OSError(self.number, os.strerror(self.number), str(path))
        self._mkdir(path, *others, **options)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    monkeypatch.setattr(failing, "FIRST_PAUSE_S", 0.002)
    return Disk(monkeypatch)


def config_of(folder: Path, **checkpoint: Any) -> dict[str, Any]:
    folder.mkdir()
    write_lines(folder / "samples.jsonl", goods(80))
    sections = {"dir": str(folder / "checkpoints"), "every_steps": 2} | checkpoint
    return on_free_port(configuration(folder, jsonl(folder / "samples.jsonl"), checkpoint=sections))


def test_a_disk_that_fails_for_a_while_degrades_the_run_and_no_more(
    disk: Disk, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Pauses double. Each is over when a step is, and not before the next one begins, which would try once more.
    pause_s = 0.2
    monkeypatch.setattr(failing, "FIRST_PAUSE_S", pause_s)
    config, seen = config_of(tmp_path / "failing"), dict[int, tuple[str, int, float]]()
    errors = {3: errno.EIO, 4: errno.ENOSPC, 5: errno.EACCES, 6: errno.EMFILE}

    def on_step(step: int, *_: object) -> None:
        degraded = metrics(config)['degraded{cause="checkpoint"}']
        seen[step] = (get(config, "/healthz")[1], get(config, "/readyz")[0], degraded)
        disk.number = errors.get(step)
        if degraded:
            time.sleep(pause_s * 2 ** (step - 5))
        if step == 7:
            assert checkpoints(config)[-1].name == "step-00000002.e1"

    with caplog.at_level("INFO"):
        summary = serve(Settings(**config), threading.Event(), Watcher(on_step))
    # One is due after step 4, and then after every step until it is written.
    assert [degraded for _, _, degraded in seen.values()] == [0, 0, 0, 0, 1, 1, 1, 0, 0, 0]
    assert {ready for _, ready, _ in seen.values()} == {200}
    for step, remedy in ((5, "free space"), (6, "mend its permissions"), (7, "raise the limit of open files")):
        assert '"degraded"' in seen[step][0]
        assert remedy in seen[step][0]
        assert caplog.text.count(f"; {remedy}") == 1
    assert caplog.text.count("can be written again") == 1
    assert summary.counts == counts(config)
    whole = config_of(tmp_path / "whole")
    serve(Settings(**whole), threading.Event())
    found, expected = (hashes(checkpoints(made)[-1]) for made in (config, whole))
    assert found | {"trainer.json": ""} == expected | {"trainer.json": ""}  # it names the owner of the dead letters


def test_a_disk_that_fails_for_too_long_ends_the_run(disk: Disk, tmp_path: Path) -> None:
    config, steps = config_of(tmp_path / "run", max_failing_s=0.0), list[int]()

    def on_step(step: int, *_: object) -> None:
        steps.append(step)
        disk.number = errno.ENOSPC if step >= 3 else None

    with pytest.raises(CheckpointError, match=r"free space; this lasts longer than checkpoint.max_failing_s=0$"):
        serve(Settings(**config), threading.Event(), Watcher(on_step))
    assert steps[-1] == 4
    assert checkpoints(config)[-1].name == "step-00000002.e1"


@pytest.mark.parametrize("mended", [True, False])
def test_told_to_stop_while_the_disk_fails_it_tries_once_more(
    mended: bool, disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failing, "FIRST_PAUSE_S", 60.0)  # so that it is not tried before
    config, stop = config_of(tmp_path / "run"), threading.Event()
    failures = list[float]()

    def on_step(step: int, *_: object) -> None:
        disk.number = errno.EIO if step >= 3 else None
        if step == 5:
            failures.append(metrics(config)["checkpoint_failures_total"])
            disk.number = None if mended else errno.EIO
            stop.set()

    if mended:
        assert serve(Settings(**config), stop, Watcher(on_step)).step == 5
        assert checkpoints(config)[-1].name == "step-00000005.e1"
    else:
        with pytest.raises(CheckpointError, match="check the disk"):
            serve(Settings(**config), stop, Watcher(on_step))
        assert checkpoints(config)[-1].name == "step-00000002.e1"
    assert failures == [1]


def test_a_model_that_is_not_finite_is_never_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A learning rate that spoils the model in one step; its weights stay those of the checkpoint before it."""
    config = config_of(tmp_path / "run") | {"training": {"max_steps": 2}, "server": {"enabled": False}}
    serve(Settings(**config), threading.Event())
    kept = hashes(checkpoints(config)[-1])["model/model.safetensors"]
    broken = config | {"training": {}, "optimizer": {"learning_rate": 1e38, "clip_norm": None}}
    capsys.readouterr()
    assert run_main(tmp_path, broken) == 7
    assert "optimizer.learning_rate=1e+38" in capsys.readouterr().err.splitlines()[-1]
    assert {hashes(path)["model/model.safetensors"] for path in checkpoints(config)} == {kept}

"""What disks refuse: named with its own remedy, found at the start, or borne."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from stream_trainer.checkpoints.trouble import remedy_of, sync_directory, try_out
from stream_trainer.commands.check import check_offline
from stream_trainer.errors import SettingsError
from stream_trainer.settings.schema import Settings
from tests.helpers.service import configuration, jsonl, write_lines


def refuse(patch: pytest.MonkeyPatch, function: str, number: int, when: Callable[[Any], bool] = lambda _: True) -> None:
    """Have one of os fail for what a mount would refuse."""
    original = getattr(os, function)

    def fail(first: Any, *others: Any, **options: Any) -> Any:
        if when(first):
            raise OSError(number, os.strerror(number), str(first))
        return original(first, *others, **options)

    patch.setattr(os, function, fail)


def is_directory(descriptor: int) -> bool:
    return os.path.isdir(f"/proc/self/fd/{descriptor}")


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "free space"),
        (errno.EDQUOT, "free space"),
        (errno.EACCES, "mend its permissions"),
        (errno.EROFS, "mend its permissions"),
        (errno.EMFILE, "raise the limit of open files (ulimit -n)"),
        (errno.EIO, "check the disk, dmesg tells"),
        (errno.ESTALE, "check that the mount is still there"),
    ],
)
def test_each_error_has_its_own_remedy(number: int, remedy: str) -> None:
    assert remedy_of(OSError(number, os.strerror(number))) == remedy
    said = SafetensorError(f"I/O error: {os.strerror(number)} (os error {number})")
    assert remedy_of(said) == remedy


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_mount_that_cannot_flush_directories_is_borne(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sync_directory(tmp_path)
    assert try_out(tmp_path)
    refuse(monkeypatch, "fsync", number, is_directory)
    assert not sync_directory(tmp_path)
    assert not try_out(tmp_path)


def test_a_disk_that_cannot_flush_is_not_borne(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, "fsync", errno.EIO)
    with pytest.raises(OSError, match="Input/output"):
        sync_directory(tmp_path)
    with pytest.raises(SettingsError, match=r"cannot be written \(Input/output error\); check the disk"):
        try_out(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EPERM, errno.EXDEV, errno.ENOTSUP])
def test_a_mount_that_cannot_rename_directories_is_found_at_the_start(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, "rename", number)
    with pytest.raises(SettingsError, match=rf"^checkpoint.dir={tmp_path}/new is on a mount that cannot rename dir"):
        try_out(tmp_path / "new")
    write_lines(tmp_path / "samples.jsonl", [b"{}"])
    settings = Settings(**configuration(tmp_path, jsonl(tmp_path / "samples.jsonl")))
    (failed,) = [check for check in check_offline(settings) if not check.ok]
    assert failed.name == "checkpoint mount"
    assert "cannot rename directories" in failed.detail
    assert "free space" not in failed.detail


def test_the_trial_leaves_nothing_behind(tmp_path: Path) -> None:
    assert try_out(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []

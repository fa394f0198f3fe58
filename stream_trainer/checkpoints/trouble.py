"""What a disk refuses: the remedy of each error, and a trial at the start of what a checkpoint will need.

Some mounts cannot flush a directory, which is borne. Some cannot rename one, and then nothing can become whole at once:
that must be known before training has begun, not at the first checkpoint.
"""

import errno
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from stream_trainer.errors import CheckpointError, SettingsError

TRIAL_PREFIX = ".trial-"

# What mounts say of `fsync` on a directory, or of renaming one, that they do not know.
NOT_FLUSHED = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS})
NOT_RENAMED = frozenset({errno.EPERM, errno.EXDEV, *NOT_FLUSHED})

_REMEDIES = {
    "free space": {errno.ENOSPC, errno.EDQUOT},
    "mend its permissions": {errno.EACCES, errno.EPERM, errno.EROFS},
    "raise the limit of open files (ulimit -n)": {errno.EMFILE, errno.ENFILE},
    "raise the limit of a file's size (ulimit -f)": {errno.EFBIG},
    "name a place where a directory can be made": {errno.ENOTDIR, errno.EEXIST},
    "check that the mount is still there": {errno.ENOENT, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT},
}


def remedy_of(error: Exception) -> str:
    """What an operator can do about an OSError, or about what safetensors makes of one."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := re.search(r"os error (\d+)", str(error))):
        number = int(found[1])
    return next((remedy for remedy, numbers in _REMEDIES.items() if number in numbers), "check the disk, dmesg tells")


@contextmanager
def writing(what: str, path: Path) -> Iterator[None]:
    """Raise CheckpointError for what a disk refuses within."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"checkpoint.dir: writing {what} to {path} failed ({error}); {remedy_of(error)}"
        ) from error


def sync(path: Path) -> None:
    """Flush a file to the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(path: Path) -> bool:
    """Flush the names in a directory; False on a mount that cannot. Raises OSError for any other reason."""
    try:
        sync(path)
    except OSError as error:
        if error.errno not in NOT_FLUSHED:
            raise
        return False
    return True


def try_out(directory: Path) -> bool:
    """Write, flush, rename and delete a small directory in `checkpoint.dir`, or where that will be made.

    Returns whether directories can be flushed there. Raises SettingsError if one of the rest cannot be done.
    """
    place = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    trial = place / f"{TRIAL_PREFIX}{secrets.token_hex(4)}"
    renamed = trial.with_name(f"{trial.name}-renamed")
    try:
        flushes = _write(trial)
        _rename(trial, renamed, directory)
        return sync_directory(place) and flushes
    except OSError as error:
        raise SettingsError(
            f"checkpoint.dir={directory} cannot be written ({error.strerror}); {remedy_of(error)}"
        ) from error
    finally:
        for path in (trial, renamed):
            shutil.rmtree(path, ignore_errors=True)


def _write(trial: Path) -> bool:
    trial.mkdir()
    (trial / "file").write_text("trial")
    sync(trial / "file")
    return sync_directory(trial)


def _rename(trial: Path, renamed: Path, directory: Path) -> None:
    try:
        trial.rename(renamed)
    except OSError as error:
        if error.errno not in NOT_RENAMED:
            raise
        raise SettingsError(
            f"checkpoint.dir={directory} is on a mount that cannot rename directories ({error.strerror}), and without "
            "that no checkpoint becomes whole; name a directory on another mount"
        ) from error


def free_bytes(directory: Path) -> float:
    """What may still be written there; not a number while that cannot be told."""
    try:
        return float(shutil.disk_usage(directory).free)
    except OSError:
        return math.nan

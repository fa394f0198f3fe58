"""The names in `publish.dir`, and which version its readers are to use.

    v000012-step-3400/       a version: whole as soon as it has this name, and never changed
    v000012-step-3400.pin    keeps that version from being deleted, until somebody deletes this file
    current -> v000012-...   what readers follow
    held                     `current` stays where somebody has put it
    baseline.json            the losses that forgetting is measured from
    .new-*, .trash-*         being written or deleted
    .lock, .publisher.lock   held while `current` moves; while a version is made

A reader resolves `current` once and then opens its files. What it found stays for `publish.grace_s` seconds after
`current` has moved on: the time a version was left is the time of its directory.
"""

import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from stream_trainer.checkpoints.trouble import sync_directory

ABOUT = "version.json"
CARD = "README.md"
CURRENT = "current"
HELD = "held"
PIN = ".pin"
NEW, TRASH, LINK = ".new-", ".trash-", ".current-"
LOCK, PUBLISHER_LOCK = ".lock", ".publisher.lock"

_VERSION = re.compile(r"v(\d{6,})-step-(\d+)")


class Named(NamedTuple):
    """A version by its name; later ones compare as greater."""

    number: int
    step: int
    path: Path

    @property
    def name(self) -> str:
        return self.path.name


def versions_in(directory: Path) -> list[Named]:
    """All versions, newest first. Raises OSError."""
    matches = [(_VERSION.fullmatch(path.name), path) for path in directory.iterdir()]
    return sorted((Named(int(match[1]), int(match[2]), path) for match, path in matches if match), reverse=True)


def name_of(number: int, step: int) -> str:
    """The name of a version. Names sort as versions were made."""
    return f"v{number:06d}-step-{step}"


def current_in(directory: Path) -> str | None:
    """The name of the current version, None before there is one."""
    try:
        return os.readlink(directory / CURRENT)
    except FileNotFoundError:
        return None


def point_at(directory: Path, name: str) -> None:
    """Make a version the current one, at once for every reader. Raises OSError. To be called while `changing`."""
    before = current_in(directory)
    if before not in (None, name) and (directory / str(before)).is_dir():
        os.utime(directory / str(before))  # from now on its last readers have their time
    link = directory / f"{LINK}{secrets.token_hex(4)}"
    link.symlink_to(name)
    link.replace(directory / CURRENT)
    sync_directory(directory)


def is_held(directory: Path) -> bool:
    """Whether somebody has put `current` where it is, to stay there."""
    return (directory / HELD).exists()


def hold(directory: Path, why: str) -> None:
    """Let nothing but a person move `current`. Raises OSError."""
    (directory / HELD).write_text(f"{why}\n")
    sync_directory(directory)


def release(directory: Path) -> None:
    """Let new versions become the current one again. Raises OSError."""
    (directory / HELD).unlink(missing_ok=True)
    sync_directory(directory)


@contextmanager
def changing(directory: Path) -> Iterator[None]:
    """Keep others from moving `current` meanwhile. Raises OSError."""
    with (directory / LOCK).open("a") as file:
        _flock(file.fileno(), fcntl.LOCK_EX)
        yield


@contextmanager
def making(directory: Path) -> Iterator[None]:
    """Keep others from making a version meanwhile. Raises OSError, BlockingIOError if another trainer does."""
    with (directory / PUBLISHER_LOCK).open("a") as file:
        try:
            _flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(error.errno, "another trainer publishes there now") from None
        yield


def _flock(descriptor: int, how: int) -> None:
    try:
        fcntl.flock(descriptor, how)
    except BlockingIOError:
        raise
    except OSError:  # a mount without locks: one trainer and careful people
        return


def prune(directory: Path, keep: int, grace_s: float) -> None:
    """Delete what is not among the `keep` newest, not current, not pinned, and was left long enough ago.

    Raises OSError. To be called while `making`.
    """
    with changing(directory):
        current, now = current_in(directory), time.time()
        doomed = [
            version.path
            for version in versions_in(directory)[keep:]
            if version.name != current
            and not (directory / f"{version.name}{PIN}").exists()
            and now - version.path.stat().st_mtime > grace_s
        ]
        trash = [path.rename(path.with_name(f"{TRASH}{path.name}")) for path in doomed]
    for path in trash:
        shutil.rmtree(path)


def remove_leftovers(directory: Path) -> None:
    """Delete what a killed trainer left half written or half deleted. Raises OSError. To be called while `making`."""
    for path in directory.iterdir():
        if path.name.startswith((NEW, TRASH)):
            shutil.rmtree(path, ignore_errors=True)
        elif path.name.startswith(LINK):
            path.unlink(missing_ok=True)


def about_text(about: Mapping[str, Any]) -> str:
    """What `version.json` holds: `about`, and a digest of it."""
    return json.dumps({**about, "sha256": _digest(about)}, indent=2) + "\n"


def read_about(path: Path) -> dict[str, Any]:
    """What `version.json` says. Raises OSError or ValueError."""
    about = json.loads((path / ABOUT).read_bytes())
    if not isinstance(about, dict):
        raise ValueError(f"{ABOUT} holds no object")
    return about


def problems_of(path: Path) -> list[str]:
    """What is not as it was published, one line for each file; empty if all is well. Raises OSError."""
    try:
        about = read_about(path)
        digest = about.pop("sha256", "")
        files = about["files"]
    except (ValueError, KeyError):
        return [f"{ABOUT} cannot be read"]
    found = [] if digest == _digest(about) else [f"{ABOUT} is not as it was written"]
    there = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_symlink() or not file.is_dir()}
    found += [f"{name} is missing" for name in sorted(files.keys() - there)]
    found += [f"{name} is not of its files" for name in sorted(there - files.keys() - {ABOUT})]
    for name in sorted(files.keys() & there):
        with (path / name).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != files[name]["sha256"]:
                found.append(f"{name} has other contents than were published")
    return found


def _digest(about: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()

"""Who may write to `checkpoint.dir`: one trainer at a time.

A trainer claims the next epoch by creating `epoch-N`, which only one can, and is the owner until a higher one is
claimed. That holds across machines, and for one that was stopped, or cut off, and comes back. Trainers of one machine
are kept apart at once by a lock on `owner.lock`, which dies with its process: none takes over from another that lives.
A mount without such locks has the epochs alone.

The first line of `epoch-N` says whose claim it is. Behind it is the owner's note for its successor, who copies it into
a claim of its own and deletes this one. So whatever a trainer writes that was taken over, nobody reads.
"""

import fcntl
import json
import logging
import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from stream_trainer.checkpoints.directory import checkpoints_in, claim_path, claims_in, remove_leftovers
from stream_trainer.checkpoints.trouble import remedy_of, sync_directory
from stream_trainer.errors import CheckpointError, FencedError

LOCK = "owner.lock"
NO_NOTE = b"{}"  # of the first trainer of a directory
_BOOT = Path("/proc/sys/kernel/random/boot_id")  # containers of one machine share it, whatever host names they have

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Owner:
    """The trainer that claimed an epoch of a directory.

    Attributes:
        words: the first line of its claim, unlike any other's: a directory that is emptied counts from 1 again.
    """

    directory: Path
    epoch: int
    words: bytes = field(default_factory=lambda: json.dumps(_myself()).encode() + b"\n")

    @property
    def writes(self) -> bool:
        """Whether this process writes there; of several that train together only one does."""
        return True

    def agreed(self, note: dict[str, Any]) -> dict[str, Any]:
        """What the process that writes has read of the note."""
        return note

    @property
    def path(self) -> Path:
        """The file of the claim. Once another trainer has taken over it is gone, and not made again."""
        return claim_path(self.directory, self.epoch)

    def confirm(self) -> None:
        """Raise FencedError if another has taken over since, CheckpointError if that cannot be told."""
        try:
            if not claims_in(self.directory):  # somebody emptied the directory, and nobody came
                self.directory.mkdir(parents=True, exist_ok=True)
                _create(self)
            newest = claim_path(self.directory, claims_in(self.directory)[-1])
            ours = newest == self.path and _first_line(newest) == self.words
        except OSError as error:
            raise _unreadable(self.directory, error) from error
        if not ours:
            raise FencedError(
                f"checkpoint.dir={self.directory} was taken over by {_read(newest)}, so this trainer ends and writes "
                "nothing more; run one trainer, or set another checkpoint.dir"
            )


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keep other trainers of this machine away from a directory, which is made if there is none.

    Raises FencedError if one of them has it, CheckpointError if it cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise _unreadable(directory, error) from error
    try:
        _lock(descriptor, directory)
        yield
    finally:
        os.close(descriptor)


def claim(directory: Path) -> Owner:
    """Take a directory over with the next epoch, and away from whoever had it what it was about to write.

    Raises CheckpointError if it cannot be written.
    """
    try:
        owner = _claim_next(directory)
        remove_leftovers(directory, owner.epoch)
        _write_note(owner, _inherited_note(owner))
        for epoch in claims_in(directory):
            if epoch < owner.epoch:
                claim_path(directory, epoch).unlink(missing_ok=True)
    except OSError as error:
        raise _unreadable(directory, error) from error
    return owner


def note_in(content: bytes) -> bytes:
    """The note in a claim; empty while its trainer has not copied that of the one before."""
    return content.partition(b"\n")[2]


def _claim_next(directory: Path) -> Owner:
    while True:
        epoch = 1 + max([*claims_in(directory), *(found.epoch for found in checkpoints_in(directory))], default=0)
        owner = Owner(directory, epoch)
        try:
            _create(owner)
        except FileExistsError:
            continue
        # Between our look and our claim others may have come, and the older of their claims be gone again.
        if claims_in(directory)[-1] == epoch:
            return owner


def _create(owner: Owner) -> None:
    with owner.path.open("xb") as file:
        file.write(owner.words)
        file.flush()
        os.fsync(file.fileno())
    sync_directory(owner.directory)


def _inherited_note(owner: Owner) -> bytes:
    """That of the newest trainer before us that has one."""
    while True:
        older = [epoch for epoch in claims_in(owner.directory) if epoch < owner.epoch]
        try:
            notes = [note_in(claim_path(owner.directory, epoch).read_bytes()) for epoch in reversed(older)]
        except FileNotFoundError:  # another that claims just now has copied it, or is our successor
            continue
        return next(filter(None, notes), NO_NOTE)


def _write_note(owner: Owner, note: bytes) -> None:
    """Durably, for what it is copied from goes. Where our claim is gone already, the first look tells who has come."""
    with suppress(FileNotFoundError), owner.path.open("r+b") as file:
        file.seek(len(owner.words))
        file.write(note)
        file.flush()
        os.fsync(file.fileno())


def _first_line(path: Path) -> bytes:
    """Empty if there is none, or no file."""
    try:
        line, end, _ = path.read_bytes().partition(b"\n")
    except FileNotFoundError:
        return b""
    return line + end


def _lock(descriptor: int, directory: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if _machine_of(directory / LOCK) in (None, _machine()):
            raise FencedError(
                f"checkpoint.dir={directory} is in use by {_read(directory / LOCK)}; stop that trainer first, or set "
                "another checkpoint.dir"
            ) from None
        # A network mount keeps locks for all machines, also for one that was cut off. Across machines epochs decide.
        logger.warning("checkpoint.dir=%s is taken over from %s", directory, _read(directory / LOCK))
        return
    except OSError as error:
        logger.info("checkpoint.dir=%s is on a mount without locks (%s); epochs guard it", directory, error.strerror)
        return
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(_myself()).encode(), 0)


def _myself() -> dict[str, Any]:
    since = datetime.now(UTC).isoformat(timespec="seconds")
    myself = {"pid": os.getpid(), "host": socket.gethostname(), "since": since, "machine": _machine()}
    return myself | {"claim": secrets.token_hex(8)}


def _machine() -> str:
    try:
        return _BOOT.read_text().strip()
    except OSError:
        return socket.gethostname()


def _machine_of(path: Path) -> str | None:
    return str(found["machine"]) if (found := _load(path)) else None


def _read(path: Path) -> str:
    """Who wrote a claim or holds the lock, for people."""
    found = _load(path)
    if found is None:  # caught between creating and writing
        return "another trainer"
    return "pid {pid} on {host} since {since}".format(**found)


def _load(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(_first_line(path))
    except (OSError, ValueError):
        return None
    known = isinstance(content, dict) and {"pid", "host", "since", "machine"} <= content.keys()
    return content if known else None


def _unreadable(directory: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"checkpoint.dir={directory} cannot be written ({error}); {remedy_of(error)}")

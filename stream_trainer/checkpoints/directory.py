"""The names in `checkpoint.dir`: which checkpoints there are, how one gets its place, and how old ones leave it.

    step-00000042.e3        the checkpoint of step 42, by the trainer of epoch 3
    step-00000042.e3-2      of the same step and epoch once more: nothing that is whole is ever replaced
    step-00000042           written before epochs were; counts as epoch 0
    .tmp-e3-...             being written or deleted by the trainer of epoch 3
    epoch-3, owner.lock     see `ownership`

Everything that a trainer changes passes through a `.tmp-` directory with its epoch in the name. A successor takes those
away when it begins, and with them whatever its predecessor was about to do.
"""

import logging
import re
import secrets
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from stream_trainer.checkpoints.trouble import sync_directory

logger = logging.getLogger(__name__)

# Earlier versions moved a checkpoint that they replaced to the first prefix.
_CHECKPOINT = re.compile(r"(\.replaced-)?step-(\d{8,})(?:\.e(\d+)(?:-(\d+))?)?")
_CLAIM = re.compile(r"epoch-(\d+)")
_TEMPORARY = re.compile(r"\.tmp-(?:e(\d+)-)?.*")

TRAINER = "trainer.json"  # of a checkpoint: step, cursor and more


class Found(NamedTuple):
    """A checkpoint by its name; later ones compare as greater."""

    epoch: int
    step: int
    number: int
    path: Path


def checkpoints_in(directory: Path) -> list[Found]:
    """All that are named as checkpoints, newest first. Raises OSError."""
    if not directory.exists():
        return []
    return sorted(filter(None, map(named, directory.iterdir())), reverse=True)


def named(path: Path) -> Found | None:
    """What a checkpoint's name says; None if it is none. Nothing needs to be there."""
    match = _CHECKPOINT.fullmatch(path.name)
    if match is None:
        return None
    return Found(int(match[3] or 0), int(match[2]), 0 if match[1] else int(match[4] or 1), path)


def claims_in(directory: Path) -> list[int]:
    """The epochs that were claimed, in order. Raises OSError."""
    if not directory.exists():
        return []
    return sorted(int(match[1]) for path in directory.iterdir() if (match := _CLAIM.fullmatch(path.name)))


def claim_path(directory: Path, epoch: int) -> Path:
    """The file whose existence is the claim."""
    return directory / f"epoch-{epoch}"


def make_temporary(directory: Path, epoch: int, what: str) -> Path:
    """A new directory of our own. Raises OSError."""
    path = directory / f".tmp-e{epoch}-{secrets.token_hex(4)}-{what}"
    path.mkdir()
    return path


def put_in_place(temporary: Path, directory: Path, epoch: int, step: int) -> Path:
    """Rename a finished checkpoint to the first free name of its step, durably. Raises OSError."""
    last = max((found.number for found in checkpoints_in(directory) if found[:2] == (epoch, step)), default=0)
    name = f"step-{step:08d}"
    if epoch or last:
        name += f".e{epoch}"
    if last:
        name += f"-{last + 1}"
    final = directory / name
    temporary.rename(final)
    sync_directory(directory)
    return final


def remove_leftovers(directory: Path, epoch: int) -> None:
    """Delete what trainers up to this epoch left half written or half deleted. Raises OSError."""
    matches = [(_TEMPORARY.fullmatch(path.name), path) for path in directory.iterdir()]
    found = [(int(match[1] or 0), path) for match, path in matches if match]
    for path in [path for owner, path in found if owner == epoch]:
        _delete(path)
    _discard(directory, epoch, [path for owner, path in found if owner < epoch])


def prune(directory: Path, epoch: int, step: int, keep: int, confirm: Callable[[], None]) -> None:
    """Delete what is not among the `keep` newest up to that epoch and step; what later epochs wrote is theirs.

    Later steps were passed over when the run resumed from an older one: what they hold is being done again.
    """
    try:
        ours = [found for found in checkpoints_in(directory) if found.epoch <= epoch]
        kept = [found for found in ours if found.step <= step and found.number][:keep]
        doomed = [found.path for found in ours if found not in kept]
        _discard(directory, epoch, doomed, confirm)
    except OSError as error:
        logger.warning("old checkpoints in %s cannot be deleted: %s", directory, error)


def _discard(directory: Path, epoch: int, doomed: Sequence[Path], confirm: Callable[[], None] = lambda: None) -> None:
    """Move to a directory of ours, then delete: half way, nothing looks like a damaged checkpoint."""
    if not doomed:
        return
    trash = make_temporary(directory, epoch, "trash")
    confirm()  # a successor that comes after this takes the trash away, so that nothing can be moved there
    for path in doomed:
        try:
            path.rename(trash / path.name)
        except OSError as error:
            logger.warning("%s cannot be deleted: %s", path, error)
    _delete(trash)


def _delete(path: Path) -> None:
    try:
        shutil.rmtree(path)
    except OSError as error:
        logger.warning("%s cannot be deleted: %s", path, error)

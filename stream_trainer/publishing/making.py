"""Make a version of a durable checkpoint: complete in a hidden directory, durable, then renamed once."""

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePath
from typing import Any

from stream_trainer import __version__
from stream_trainer.checkpoints.manifest import MADE_WITH, MANIFEST, DamagedError
from stream_trainer.checkpoints.trouble import sync, sync_directory
from stream_trainer.models.peft_format import CONFIG, WEIGHTS
from stream_trainer.publishing.card import card_text
from stream_trainer.publishing.gate import forgetting
from stream_trainer.publishing.held import HeldFiles
from stream_trainer.publishing.versions import ABOUT, CARD, NEW, about_text

FILE_MODE, DIRECTORY_MODE = 0o640, 0o750
ADAPTER_DIRECTORY = "adapter"

_MODEL, _TRAINER = "model/", "trainer.json"
_ADAPTER = (f"{ADAPTER_DIRECTORY}/{CONFIG}", f"{ADAPTER_DIRECTORY}/{WEIGHTS}")
_BASE = "base.safetensors"  # by which a resume knows the base again; no server needs it


def is_published(name: str) -> bool:
    """Whether a version is made from this file of a checkpoint."""
    return name.startswith(_MODEL) or name in (*_ADAPTER, _TRAINER, MANIFEST)


@dataclass(frozen=True)
class Candidate:
    """A checkpoint that may be published.

    Attributes:
        checkpoint: its name.
        files: those of it that are needed, held open.
        losses: by evaluation set, measured at `evaluated_step`; empty if they could not be measured.
    """

    step: int
    checkpoint: str
    files: HeldFiles
    losses: Mapping[str, float]
    evaluated_step: int

    def close(self) -> None:
        """Let the files go."""
        self.files.close()


@dataclass(frozen=True)
class Origin:
    """What all versions of a run have in common.

    Attributes:
        base_model: name of the model that training began with; None if it began with random parameters.
        target: name of the file that says what to get better at.
        adapter: whether adapters are trained.
        merged: whether the whole model is published.
    """

    base_model: str | None
    target: str
    adapter: bool
    merged: bool


def make_version(
    directory: Path, name: str, candidate: Candidate, origin: Origin, start_losses: Mapping[str, float]
) -> Path:
    """Write a version to a hidden directory and make it durable; `put_in_place` is what gives it its name.

    Raises OSError if it cannot be written, DamagedError if the checkpoint is not as its manifest says.
    """
    temporary = directory / f"{NEW}{secrets.token_hex(4)}-{name}"
    temporary.mkdir()
    try:
        _write_model(temporary, candidate.files, origin)
        about = _about(name, candidate, origin, start_losses)
        (temporary / CARD).write_text(card_text(about, name))
        _write_about(temporary, about)
        _make_readable_and_durable(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return temporary


def put_in_place(temporary: Path, name: str) -> Path:
    """Give a version its name, durably. Raises OSError."""
    final = temporary.with_name(name)
    temporary.rename(final)
    sync_directory(final.parent)
    return final


def _write_model(temporary: Path, files: HeldFiles, origin: Origin) -> None:
    expected = json.loads(files.read(MANIFEST))["files"]
    for name, place in _places(files.names, origin):
        # Not what is above: a directory that has vanished is not made again halfway.
        for parent in reversed(PurePath(place).parents[:-1]):
            (temporary / parent).mkdir(exist_ok=True)
        if files.copy_file(name, temporary / place) != expected[name]["sha256"]:
            raise DamagedError(f"{name} of the checkpoint has other contents than were written")


def _is_whole(names: list[str]) -> bool:
    """Whether a checkpoint's `model/` is a whole model, and not adapters alone as PEFT has them."""
    return f"{_MODEL}{_BASE}" not in names


def _places(names: list[str], origin: Origin) -> Iterator[tuple[str, str]]:
    """Files of the checkpoint's model, and where they go: the whole model on top, adapters below `adapter/`."""
    whole = _is_whole(names)
    for name in names:
        if name in _ADAPTER:
            yield name, name
        inner = name.removeprefix(_MODEL)
        if inner == name or inner in (_BASE, CARD):
            continue
        if not whole:
            yield name, f"{ADAPTER_DIRECTORY}/{inner}"
        elif origin.merged:
            yield name, inner


def _about(name: str, candidate: Candidate, origin: Origin, start_losses: Mapping[str, float]) -> dict[str, Any]:
    trainer = json.loads(candidate.files.read(_TRAINER))
    cursor = trainer["cursor"]
    made_with = json.loads(candidate.files.read(MANIFEST)).get(MADE_WITH, {})  # older checkpoints do not say
    return {
        "format_version": 1,
        "version": name,
        "step": candidate.step,
        "checkpoint": candidate.checkpoint,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "stream_trainer": __version__,
        "base_model": origin.base_model,
        "target": origin.target,
        "merged": origin.merged and _is_whole(candidate.files.names),
        "adapter": origin.adapter,
        "settings": made_with.get("settings_hash", "unknown"),
        "positions": {partition: log["next"] for partition, log in cursor["partitions"].items()},
        "records": cursor["counts"],
        "evaluated_step": candidate.evaluated_step,
        "losses": dict(candidate.losses),
        "start_losses": dict(start_losses),
        "forgetting": forgetting(candidate.losses, start_losses),
    }


def _write_about(temporary: Path, about: dict[str, Any]) -> None:
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(path for path in temporary.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        files[path.relative_to(temporary).as_posix()] = {"size": path.stat().st_size, "sha256": digest}
    (temporary / ABOUT).write_text(about_text({**about, "files": files}))


def _make_readable_and_durable(temporary: Path) -> None:
    """For the owner's group, whatever the umask is; a group that is inherited stays inherited."""
    for path in sorted(temporary.rglob("*"), reverse=True):
        if path.is_file():
            path.chmod(FILE_MODE)
            sync(path)
    for path in [*(path for path in temporary.rglob("*") if path.is_dir()), temporary]:
        path.chmod(DIRECTORY_MODE | (path.stat().st_mode & 0o2000))
        sync_directory(path)
    os.utime(temporary)

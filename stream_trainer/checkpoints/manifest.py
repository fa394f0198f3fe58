"""Make the files of a directory durable, and tell later whether they are still as they were written."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypedDict

import torch
import transformers

from stream_trainer.checkpoints.trouble import sync, sync_directory
from stream_trainer.errors import CheckpointError

FORMAT_VERSION, IN_ROWS = 2, 3  # the latter with the optimizer's state in several files, which earlier versions miss
READABLE = (1, 2, 3)
MANIFEST = "manifest.json"
MADE_WITH = "made_with"


class DamagedError(Exception):
    """The files are not as the manifest says."""


class Sealed(TypedDict):
    """What a durable file holds."""

    size: int
    sha256: str


def seal(path: Path) -> Sealed:
    """Make a file durable. Raises OSError."""
    sync(path)
    return {"size": path.stat().st_size, "sha256": _sha256(path)}


def files_in(directory: Path) -> dict[str, Path]:
    """All files below a directory, by their path in it."""
    return {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_file()}


def write_manifest(
    directory: Path, step: int, made_with: Mapping[str, Any] | None = None, sealed: Mapping[str, Sealed] | None = None
) -> int:
    """Make every file durable, then the manifest, then the directories. Return the bytes of all files.

    `directory` is to be one that only its writers know: the manifest lists what is there. `made_with` says who wrote it
    (see `provenance`), `sealed` what other ranks have made durable there: none of this is read. Raises CheckpointError
    if it is not there.
    """
    known = sealed or {}
    there = files_in(directory)
    if known.keys() - there.keys():
        raise CheckpointError(
            "checkpoint.dir: what other processes have written is not there; put it on a file system that they share"
        )
    files = {name: known.get(name) or seal(there[name]) for name in sorted(there)}
    manifest = directory / MANIFEST
    content = {
        "format_version": IN_ROWS if known else FORMAT_VERSION,
        "step": step,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        MADE_WITH: dict(made_with or {}),
        "files": files,
    }
    manifest.write_text(_manifest_text(content))
    _make_as_readable_as(manifest, there.values())
    sync(manifest)
    for path in [path for path in directory.rglob("*") if path.is_dir()]:
        sync_directory(path)
    sync_directory(directory)
    return _size(directory)


def _make_as_readable_as(manifest: Path, files: Iterable[Path]) -> None:
    """Of files that safetensors has written nobody but their owner may read, whatever the umask is."""
    mode = manifest.stat().st_mode & 0o777
    for path in files:
        with suppress(OSError):  # a mount that knows no modes
            path.chmod(mode)


def written(path: Path) -> tuple[float, int]:
    """When a verified checkpoint was written (Unix time), and the bytes of all its files."""
    time = datetime.fromisoformat(json.loads((path / MANIFEST).read_bytes())["time"]).timestamp()
    return time, _size(path)


def format_of(path: Path) -> int:
    """The format of a verified checkpoint."""
    return int(json.loads((path / MANIFEST).read_bytes())["format_version"])


def _size(directory: Path) -> int:
    return sum(path.stat().st_size for path in files_in(directory).values())


def verify(path: Path, step: int) -> None:
    """Raise DamagedError or OSError unless every file is as the manifest says, and no other is there."""
    text = (path / MANIFEST).read_bytes().decode(errors="replace")
    try:
        content = json.loads(text)
        del content["sha256"]
        intact = text == _manifest_text(content) and content["step"] == step
    except (ValueError, KeyError, TypeError, RecursionError):
        intact = False
    if not intact:
        raise DamagedError(f"{MANIFEST} is not as it was written")
    if content["format_version"] not in READABLE:
        raise CheckpointError(
            f"checkpoint {path} has format_version={content['format_version']}, this version reads up to "
            f"{READABLE[-1]}; "
            f"use the version of stream-trainer that wrote it, or set another checkpoint.dir"
        )
    there = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_symlink() or not file.is_dir()}
    if foreign := sorted(there - {MANIFEST, *content["files"]}):
        raise DamagedError(f"{foreign[0]} is not of its files")  # it could change what is loaded
    for name, expected in content["files"].items():
        size = (path / name).stat().st_size
        if size != expected["size"]:
            raise DamagedError(f"{name} has {size} bytes instead of {expected['size']}")
    for name, expected in content["files"].items():
        if _sha256(path / name) != expected["sha256"]:
            raise DamagedError(f"{name} has other contents than were written")


def _manifest_text(content: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps({**content, "sha256": digest}, indent=2)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""`stream-trainer replay`: make the steps between two checkpoints again, undisturbed, and compare to the bit.

The run is one that resumes from the first checkpoint, in a directory of its own, and follows the plan of the one that
was made: the same records in the same order, from the same stream. Nothing of that one is written: not its
checkpoints, not its dead letters, no offsets of its group, and it may go on meanwhile.
"""

import hashlib
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from stream_trainer.checkpoints.directory import TRAINER, Found, checkpoints_in
from stream_trainer.checkpoints.fingerprint import TARGET_CONTENTS
from stream_trainer.checkpoints.manifest import DamagedError, verify
from stream_trainer.checkpoints.plan import NAME, Entry, lines_of, read_plan
from stream_trainer.errors import DataLossError, NotAsPlannedError, SettingsError
from stream_trainer.records import Sample
from stream_trainer.service import serve, stopping_on_signals
from stream_trainer.settings.schema import Settings
from stream_trainer.training.step import StepReport
from stream_trainer.training.watchers import Watcher

DECIDES = ("engine", "sampler", "recovery")  # parts of a checkpoint that later steps depend on
NEVER = 10**12
PROGRESS_S = 5.0
SHOWN = 5  # names that differ


@dataclass(frozen=True)
class State:
    """What a checkpoint is compared by.

    Attributes:
        tensors: SHA-256 of kind, shape and contents, by file and name.
        parts: all else that later steps depend on, as JSON by path.
        records: how many are decided.
    """

    tensors: Mapping[str, str]
    parts: Mapping[str, str]
    records: int

    @classmethod
    def of(cls, checkpoint: Path) -> "State":
        tensors: dict[str, str] = {}
        for file in sorted(checkpoint.rglob("*.safetensors")):
            with safe_open(file, framework="pt") as opened:
                name = file.relative_to(checkpoint)
                tensors |= {f"{name}: {key}": _digest(opened.get_tensor(key)) for key in sorted(opened.keys())}
        trainer = json.loads((checkpoint / TRAINER).read_text())
        parts = {name: _as_text(value) for part in DECIDES for name, value in _leaves(part, trainer["parts"].get(part))}
        return cls(tensors, parts, sum(trainer["cursor"]["counts"].values()))

    def differences(self, other: "State") -> list[str]:
        """Names of what is not, to the bit, the same; weights first."""
        pairs = ((self.tensors, other.tensors), (self.parts, other.parts))
        return [name for a, b in pairs for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)]


def run(settings: Settings, first: str, last: str, scratch: Path | None = None) -> int:
    """Make the steps again and print what that says. Returns 0 if all is equal, 1 if not, 130 if told to stop.

    Raises SettingsError if they cannot be made again, and whatever else a run raises.
    """
    begin, end = (_find(settings.checkpoint.dir, name) for name in (first, last))
    if begin.step >= end.step:
        raise SettingsError(f"--from={first} is not before --to={last}; exchange them, or name two others")
    _require_one_course(begin, end)
    entries = _planned(begin, end)
    decided = State.of(begin.path).records
    expected = State.of(end.path)  # it may be pruned before we are done
    if scratch is not None and not scratch.is_dir():
        raise SettingsError(f"--scratch={scratch} is no directory; make it, or name another")
    with tempfile.TemporaryDirectory(prefix="stream-trainer-replay-", dir=scratch) as name:
        folder = Path(name)
        _prepare(folder, begin, entries)
        try:
            found, changed = _make_again(_elsewhere(settings, folder, end.step), end.step)
        except NotAsPlannedError as error:
            return _not_as_planned(error)
        except DataLossError as error:
            raise _gone(str(error)) from error
    if found is None:
        return 130
    if changed:
        print(f"warning: made otherwise now than then, so differences say little: {', '.join(changed)}", flush=True)
    return _compare(found, expected, len(entries), expected.records - decided)


def _find(directory: Path, name: str) -> Found:
    """A checkpoint that verifies. Raises SettingsError if there is none of that name."""
    path = Path(name) if Path(name).is_dir() else directory / name
    there = checkpoints_in(path.parent)
    found = next((found for found in there if found.path.name == path.name), None)
    if found is None:
        names = ", ".join(found.path.name for found in reversed(there)) or "none"
        raise SettingsError(f"there is no checkpoint {path}; {path.parent} holds {names}")
    try:
        verify(found.path, found.step)
    except (OSError, DamagedError) as error:
        raise SettingsError(f"checkpoint {path} is damaged ({error}); name another") from error
    return found


def _require_one_course(begin: Found, end: Found) -> None:
    """Raise SettingsError if the plan does not hold what made the later one of the earlier one."""
    one, other = (json.loads((found.path / TRAINER).read_text()) for found in (begin, end))
    targets, factors = [], []
    for trainer in (one, other):
        targets.append(trainer.get("fingerprint", {}).get(TARGET_CONTENTS))
        factors.append(trainer["parts"].get("recovery", {}).get("factor", 1.0))
    for what, values in (("the target was replaced", targets), ("the run went back to an earlier model", factors)):
        if values[0] != values[1]:
            raise SettingsError(
                f"between {begin.path.name} and {end.path.name} {what}, which cannot be made again; replay up to the "
                "checkpoint before that, or from the one that was made then"
            )


def _planned(begin: Found, end: Found) -> list[Entry]:
    """The entries of all steps between. Raises SettingsError if one is missing."""
    path = end.path.parent / NAME
    try:
        entries = read_plan(path)
    except OSError as error:
        raise SettingsError(f"{path} cannot be read ({error.strerror}); mend its permissions") from error
    missing = [step for step in range(begin.step + 1, end.step + 1) if step not in entries]
    if missing:
        raise SettingsError(
            f"{path} does not have step {missing[0]}, so the steps from {begin.path.name} to {end.path.name} cannot be "
            "made again; name two checkpoints of one checkpoint.dir that were made by this version"
        )
    return [entries[step] for step in range(begin.step + 1, end.step + 1)]


def _prepare(folder: Path, begin: Found, entries: Sequence[Entry]) -> None:
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir()
    (checkpoints / begin.path.name).symlink_to(begin.path.resolve())
    (checkpoints / NAME).write_bytes(lines_of(entries))


def _elsewhere(settings: Settings, folder: Path, last_step: int) -> Settings:
    """The same run, which writes to `folder` alone, joins no group, and makes no checkpoint of its own accord."""
    kafka = settings.source.kafka.model_copy(update={"group_id": None, "fencing": "off"})
    rare = {"every_steps": NEVER, "every_seconds": float(NEVER)}
    checkpoint = {"dir": folder / "checkpoints", "on_mismatch": "accept", "asynchronous": False, **rare}
    return settings.model_copy(
        update={
            "source": settings.source.model_copy(update={"kafka": kafka}),
            "checkpoint": settings.checkpoint.model_copy(update=checkpoint),
            "dead_letters": settings.dead_letters.model_copy(
                update={"kind": "file", "path": folder / "dead-letters.jsonl"}
            ),
            "evaluation": settings.evaluation.model_copy(
                update={"every_steps": NEVER, "sets": {}, "retention_path": None}
            ),
            "server": settings.server.model_copy(update={"enabled": False}),
            "training": settings.training.model_copy(update={"max_steps": last_step}),
        }
    )


def _make_again(settings: Settings, last_step: int) -> tuple[State | None, Sequence[str]]:
    """What the run came to, None if it was told to stop, and what it is made with otherwise than at first."""
    stop = threading.Event()
    with stopping_on_signals(stop):
        summary = serve(settings, stop, Watcher(_progress(last_step)), strict=True)
    if stop.is_set():
        return None, ()
    if summary.step < last_step:
        raise _gone(f"the stream ends at step {summary.step} of {last_step}")
    newest = next(found for found in checkpoints_in(settings.checkpoint.dir) if found.step == last_step)
    return State.of(newest.path), summary.changed


def _progress(last_step: int) -> Callable[[int, Sequence[Sample], StepReport], None]:
    """A line every few seconds."""
    said = time.monotonic()

    def on_step(step: int, _pool: Sequence[Sample], _report: StepReport) -> None:
        nonlocal said
        if time.monotonic() - said >= PROGRESS_S:
            said = time.monotonic()
            print(f"step {step} of {last_step}", file=sys.stderr, flush=True)

    return on_step


def _not_as_planned(error: NotAsPlannedError) -> int:
    if error.gone:
        raise _gone(str(error)) from error
    print(f"differs: {error}", flush=True)
    return 1


def _gone(what: str) -> SettingsError:
    return SettingsError(f"{what}; replay checkpoints whose records the stream still holds, or raise its retention")


def _compare(found: State, expected: State, steps: int, records: int) -> int:
    names = found.differences(expected)
    for name in names[:SHOWN]:
        print(f"differs: {name}", flush=True)
    if names:
        print(f"{len(names)} of {len(expected.tensors) + len(expected.parts)} differ after {steps} steps", flush=True)
        return 1
    print(f"equal: {steps} steps, {records} records", flush=True)
    return 0


def _digest(tensor: torch.Tensor) -> str:
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _leaves(name: str, value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, Mapping):
        return [leaf for key, inner in value.items() for leaf in _leaves(f"{name}/{key}", inner)]
    return [(name, value)]


def _as_text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)

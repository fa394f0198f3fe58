"""The durable truth: weights, optimizer, random states and cursor in one directory that exists whole or not at all.

    <checkpoint.dir>/step-00000042.e3/
        model/                  a plain transformers checkpoint, adapters merged in; or these alone, as `saving` says
        adapter.safetensors     with LoRA: the adapters' weights by parameter name
        adapter/                with LoRA, merged or not: the adapters as PEFT has them
        optimizer.safetensors   `<parameter name>.<field>`, for example `lm_head.weight.exp_avg`; or as `rows` says
        state.safetensors       tensors of whatever else has state, by path: `engine/target/gradient/lm_head.weight`;
                                what lies in rows as `rows` says
        trainer.json            step, cursor, identity of the source, the rest of that state, and what it was made with
        manifest.json           written last: who made it, size and SHA-256 of every other file, and of itself

A checkpoint is written to a temporary directory, made durable, and renamed, if its writer still owns the place. A crash
at any point leaves it whole or not at all. On resume the newest that verifies is used, by epoch and step (see
`directory`); a damaged one is reported and passed over. No pickle.
"""

import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from gradient_selectors.capture.shards import is_sharded, own_rows
from gradient_selectors.state import flatten, unflatten
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from stream_trainer.checkpoints.directory import (
    TRAINER,
    checkpoints_in,
    make_temporary,
    prune,
    put_in_place,
    remove_leftovers,
)
from stream_trainer.checkpoints.manifest import (
    DamagedError,
    Sealed,
    files_in,
    format_of,
    seal,
    verify,
    write_manifest,
    written,
)
from stream_trainer.checkpoints.rows import INDEX, OF_PARTS, InRows, SavedRows, own_tensors, read_joined
from stream_trainer.checkpoints.trouble import remedy_of, writing
from stream_trainer.checkpoints.version_1 import read_tensors, read_version_1
from stream_trainer.errors import CheckpointError, FencedError, NotFiniteError
from stream_trainer.models.loading import LoadedModel
from stream_trainer.models.saving import (
    check_base,
    check_shapes,
    load_adapter,
    load_weights,
    save_adapter,
    save_for_peft,
    save_model,
)
from stream_trainer.models.twin import is_first, made_whole

logger = logging.getLogger(__name__)

MODEL = "model"
ADAPTER, PEFT = "adapter.safetensors", "adapter"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.safetensors"


class Moments(Protocol):
    """What a checkpoint asks of an optimizer: its state by parameter name."""

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """Those that it trains, by name."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors as `<parameter name>.<field>`."""


class NamedOptimizer(Moments, Protocol):
    """What a resume asks of one, too."""

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a copy of what `state_dict` returned. Raises ValueError if it does not fit."""


@dataclass(frozen=True)
class TrainerState:
    """What a run is, beside its model and optimizer.

    Attributes:
        step: steps made.
        cursor: JSON of what is decided.
        source_identity: JSON that tells the stream apart from another of the same name.
        version: of the package that wrote it.
        parts: states by part: nested dictionaries of tensors and JSON values. Tensors are read back on the CPU.
        fingerprint: what the run was made with (see `fingerprint`); empty in checkpoints from before there was one.
        made_with: what the manifest says of its making (see `provenance`); not read back.
    """

    step: int
    cursor: dict[str, Any]
    source_identity: dict[str, Any]
    version: str
    parts: Mapping[str, Any]
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    made_with: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint that is durable. `bytes` is the size of all its files."""

    path: Path
    step: int
    bytes: int


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose every file has been verified against its manifest.

    Attributes:
        time: when it was written (Unix time).
        bytes: size of all its files.
    """

    path: Path
    step: int
    time: float
    bytes: int


def save_checkpoint(
    directory: Path,
    loaded: LoadedModel,
    optimizer: Moments,
    state: TrainerState,
    keep: int,
    epoch: int = 0,
    confirm: Callable[[], None] = lambda: None,
    before_rename: Callable[[], None] = lambda: None,
    rows: InRows | None = None,
    *,
    checked: bool = False,
) -> SavedCheckpoint:
    """Write a checkpoint of `state.step` durably, then delete all but the `keep` newest up to that epoch and step.

    `confirm` raises FencedError if another trainer has taken over from `epoch`. It is asked once all files are durable,
    before they get their place, and again after. `before_rename` is called once, when nothing is published yet; what it
    raises leaves all as it was. `rows` is what the ranks have written of the optimizer's state, in the directory that
    becomes the checkpoint. With `checked` all is known to be finite. Raises NotFiniteError before anything is written,
    and CheckpointError if it cannot be written; every earlier checkpoint is then as it was.
    """
    if rows is None and not checked:
        require_finite(loaded, optimizer)
    temporary = begin_checkpoint(directory, epoch, state.step) if rows is None else rows.directory
    with gone_unless_written(temporary, confirm):
        _write_files(temporary, loaded, optimizer if rows is None else None, state)
    there = InRows(temporary, {}) if rows is None else rows
    return publish(directory, there, state, keep, epoch, confirm, before_rename)


def publish(
    directory: Path,
    there: InRows,
    state: TrainerState,
    keep: int,
    epoch: int,
    confirm: Callable[[], None],
    before_rename: Callable[[], None],
) -> SavedCheckpoint:
    """Seal a checkpoint whose files are there, and give it its place. Arguments and errors as of `save_checkpoint`."""
    with gone_unless_written(there.directory, confirm):
        with writing("the manifest", there.directory):
            size = write_manifest(there.directory, state.step, state.made_with, there.files)
        confirm()
        before_rename()
        with writing("the rename", directory):
            final = put_in_place(there.directory, directory, epoch, state.step)
    prune(directory, epoch, state.step, keep, confirm)
    confirm()
    return SavedCheckpoint(final, state.step, size)


@contextmanager
def gone_unless_written(temporary: Path, confirm: Callable[[], None]) -> Iterator[None]:
    """Take away what is half written, if it cannot be written. Raises FencedError instead, if a successor has."""
    try:
        yield
    except FencedError:
        raise  # nothing there is ours to delete any more
    except Exception:
        give_up(temporary, confirm)
        raise
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def give_up(temporary: Path, confirm: Callable[[], None]) -> None:
    """Take away what cannot be written. Raises FencedError if a successor has, for whom it then could not be."""
    confirm()
    shutil.rmtree(temporary, ignore_errors=True)


def write_first(directory: Path, loaded: LoadedModel, state: TrainerState) -> dict[str, Sealed]:
    """Write durably, of a checkpoint in rows, what no other process writes. Raises CheckpointError."""
    _write_files(directory, loaded, None, state)
    # By name: what the others are writing meanwhile comes and goes, for safetensors writes under another name first.
    own = {MODEL, PEFT, ADAPTER, STATE, TRAINER, INDEX}
    with writing("the model", directory):
        return {name: seal(path) for name, path in files_in(directory).items() if name.partition("/")[0] in own}


def begin_checkpoint(directory: Path, epoch: int, step: int) -> Path:
    """Make a directory to write a checkpoint to, in the place of what was left half written. Raises CheckpointError."""
    with writing("the directory", directory):
        directory.mkdir(parents=True, exist_ok=True)
        remove_leftovers(directory, epoch)
        return make_temporary(directory, epoch, f"step-{step:08d}")


def load_latest(directory: Path) -> Checkpoint | None:
    """The newest checkpoint that verifies, or None if there is none at all.

    Damaged ones are logged and passed over. Raises CheckpointError if there are some and none verifies: to start afresh
    would apply records twice, so that is for the user to decide.
    """
    try:
        found = checkpoints_in(directory)
    except OSError as error:
        raise CheckpointError(f"checkpoint.dir={directory} cannot be read ({error}); {remedy_of(error)}") from error
    for _, step, _, path in found:
        try:
            verify(path, step)
        except (OSError, DamagedError) as error:
            logger.error("checkpoint %s is damaged and passed over: %s", path, error)
        else:
            return Checkpoint(path, step, *written(path))
    if found:
        raise CheckpointError(
            f"checkpoint.dir={directory} holds {len(found)} checkpoints and none is whole; restore one from a backup, "
            f"or set another directory to start afresh"
        )
    return None


def restore(checkpoint: Checkpoint, loaded: LoadedModel, optimizer: NamedOptimizer) -> TrainerState:
    """Put weights and optimizer state into the live objects, bit for bit, and return the rest.

    Optimizer state is matched by parameter name. Learning rate and its like stay as the settings have them.
    Raises CheckpointError, naming the first parameter that does not fit.
    """
    path = checkpoint.path
    if (path / ADAPTER).exists() != loaded.lora:
        made, remedy = ("without", "unset") if loaded.lora else ("with", "set")
        raise CheckpointError(
            f"checkpoint {path} was made {made} adapters; {remedy} model.lora, or set another checkpoint.dir"
        )
    if loaded.lora:
        load_adapter(loaded, path / ADAPTER)
        with made_whole(loaded, keeps=is_first(loaded.model)) as whole:
            if is_first(loaded.model):
                check_base(whole, path / MODEL)
    else:
        load_weights(loaded, path / MODEL)
    _restore_optimizer(path, optimizer)
    if format_of(path) == 1:
        return TrainerState(**read_version_1(path))
    trainer = json.loads((path / TRAINER).read_text())
    tensors = read_tensors(path / STATE) | read_joined(path, OF_PARTS)
    return TrainerState(**{**trainer, "parts": unflatten(tensors, trainer["parts"])})


def require_finite(loaded: LoadedModel, optimizer: Moments) -> None:
    """Raise NotFiniteError unless all is finite that lies here of the trained weights and of the optimizer's state."""
    tensors = {name: own_rows(weight) for name, weight in loaded.model.named_parameters() if weight.requires_grad}
    name = first_not_finite(tensors) or first_not_finite(own_tensors(optimizer.state_dict()))
    if name is not None:
        raise NotFiniteError(
            f"checkpoint.dir: {name} is not finite, so nothing is written; lower optimizer.learning_rate and start "
            "again, the run goes on from the checkpoint before"
        )


def first_not_finite(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """The name of the first tensor that holds a value that is not finite; None if there is none."""
    found = {name: t.detach() for name, t in tensors.items() if t.is_floating_point() and t.numel()}
    in_rows = [tensor for tensor in found.values() if is_sharded(tensor)]
    if all(map(_are_finite, (in_rows, [tensor for tensor in found.values() if not is_sharded(tensor)]))):
        return None
    return next(name for name, tensor in found.items() if not _are_finite([tensor]))


def _are_finite(tensors: Sequence[torch.Tensor]) -> bool:
    """Of what lies in rows a call of all processes, which have the same answer."""
    # The largest absolute value: a sum of squares would overflow for values that are finite. A CPU finds the least and
    # the largest one in a tenth of the time.
    on_cpu = [tensor for tensor in tensors if tensor.is_cpu and not is_sharded(tensor)]
    others = [tensor for tensor in tensors if not tensor.is_cpu or is_sharded(tensor)]
    if others and not math.isfinite(float(torch.nn.utils.get_total_norm(others, math.inf))):
        return False
    return all(math.isfinite(float(end)) for tensor in on_cpu for end in torch.aminmax(tensor))


def _write_files(directory: Path, loaded: LoadedModel, optimizer: Moments | None, state: TrainerState) -> None:
    """All but the manifest; None for an optimizer whose state is there already."""
    with writing("the model", directory):
        save_model(loaded, directory / MODEL)
        if loaded.lora:
            save_adapter(loaded, directory / ADAPTER)
            save_for_peft(loaded, directory / PEFT)
    if optimizer is not None:
        with writing("the optimizer", directory):
            tensors = own_tensors(optimizer.state_dict())
            # A parameter may have no state yet, so the names are kept apart from it.
            save_file(tensors, directory / OPTIMIZER, metadata={"parameters": json.dumps(list(optimizer.parameters))})
    with writing("the trainer's state", directory):
        tensors, rest = flatten(state.parts)
        save_file(own_tensors(tensors), directory / STATE)
        trainer = {
            "step": state.step,
            "cursor": state.cursor,
            "source_identity": state.source_identity,
            "version": state.version,
            "fingerprint": dict(state.fingerprint),
            "parts": rest,
        }
        (directory / TRAINER).write_text(json.dumps(trainer, indent=2))


def _restore_optimizer(directory: Path, optimizer: NamedOptimizer) -> None:
    shapes = {name: tuple(parameter.shape) for name, parameter in optimizer.parameters.items()}
    saved: Mapping[str, torch.Tensor]
    if (directory / INDEX).exists():
        saved = SavedRows.of(directory, optimizer.parameters)
        check_shapes("optimizer state of", shapes, saved.shapes, directory)
    else:
        path = directory / OPTIMIZER
        with safe_open(path, framework="pt") as file:
            names = json.loads(file.metadata()["parameters"])
        check_shapes("optimizer state of", shapes, {name: shapes.get(name, ()) for name in names}, path)
        saved = load_file(path)
    try:
        optimizer.load_state_dict(saved)
    except ValueError as error:
        raise CheckpointError(
            f"checkpoint {directory} does not fit: {error}; restore the settings it was made with, or set another "
            "checkpoint.dir"
        ) from error

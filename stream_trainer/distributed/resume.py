"""How each of several processes takes up its part of one checkpoint, whatever number of them made it."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

from gradient_selectors.world.base import World, first, gathered

from stream_trainer.checkpoints.checkpoint import Checkpoint, TrainerState
from stream_trainer.distributed.buffer import SharedBuffer
from stream_trainer.distributed.control import Control
from stream_trainer.distributed.cursor import SharedCursor, owns
from stream_trainer.distributed.saver import ELSEWHERE, RowsSaver, SharedSaver
from stream_trainer.errors import CheckpointError
from stream_trainer.ingest.buffer import Buffer
from stream_trainer.ingest.cursor import Cursor
from stream_trainer.ingest.dead_letters import open_file
from stream_trainer.records import Partition
from stream_trainer.settings.schema import Settings
from stream_trainer.training.saver import Saver


def require_same(world: World, directory: Path, found: Checkpoint | None) -> None:
    """Raise CheckpointError unless all ranks have found the same checkpoint."""
    if world.size > 1 and len(set(gathered(world, None if found is None else found.path.name))) > 1:
        raise CheckpointError(
            f"checkpoint.dir={directory} is not the same for all processes; put it on a file system that they share"
        )


def make_cursor(control: Control | None, decided: Mapping[str, Any] | None) -> Cursor:
    """What is decided, of this process's partitions; nothing yet without a checkpoint."""
    if control is not None:
        return SharedCursor.of(control, decided)
    return Cursor() if decided is None else Cursor.restore(decided)


def make_saver(control: Control | None, buffer: Buffer, **parts: Any) -> Saver:
    """What makes the checkpoints. All ranks try again at the same time, by one clock."""
    if control is None or not isinstance(buffer, SharedBuffer):
        return Saver(**parts)
    jitter = Random(first(control.world, parts.pop("jitter").random()))  # noqa: S311
    kind = SharedSaver if parts["loaded"].twin is None else RowsSaver
    return kind(**parts, jitter=jitter, clock=control.now, control=control, buffer=buffer)


def own_state(world: World, settings: Settings, state: TrainerState) -> TrainerState:
    """What a rank takes up: its own letters, and what is known of its own partitions.

    The letters of ranks that are no more are cut back by the first, for what came after is read again by others.
    """
    parts, elsewhere = state.parts, state.parts.get(ELSEWHERE, {})
    for rank, mark in elsewhere.items() if world.rank == 0 else ():
        if int(rank) >= world.size:
            _cut_back(settings, int(rank), mark)
    letters = parts.get("dead_letters", {}) if world.rank == 0 else elsewhere.get(str(world.rank), {})
    poison = {name: part for name, part in parts.get("poison", {}).items() if owns(world, Partition.parse(name).number)}
    return replace(state, parts={**parts, "dead_letters": letters, "poison": poison})


def _cut_back(settings: Settings, rank: int, mark: Mapping[str, Any]) -> None:
    path = letters_path(settings.dead_letters.path, rank)
    if path.exists():
        letters = open_file(
            settings.model_copy(update={"dead_letters": settings.dead_letters.model_copy(update={"path": path})})
        )
        letters.load_state_dict(mark)
        letters.close()


def letters_path(path: Path, rank: int) -> Path:
    """The file of a rank's letters: that of the settings for the first, and one beside it for each other."""
    return path if rank == 0 else path.with_name(f"{path.stem}.rank{rank}{path.suffix}")

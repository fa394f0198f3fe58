"""How the ranks write the state that lies in rows on them: all at once, each its own."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from gradient_selectors.world.base import World, first, gathered
from torch import Tensor

from stream_trainer.checkpoints.background import Copied
from stream_trainer.checkpoints.checkpoint import Moments, begin_checkpoint, give_up, require_finite, write_first
from stream_trainer.checkpoints.manifest import Sealed
from stream_trainer.checkpoints.ownership import Owner
from stream_trainer.checkpoints.rows import OF_OPTIMIZER, OF_PARTS, InRows, write_index, write_own
from stream_trainer.distributed.control import agree_on, by_first, failure_of
from stream_trainer.errors import StreamTrainerError
from stream_trainer.models.loading import LoadedModel


def begin_rows(world: World, owner: Owner, step: int, loaded: LoadedModel, optimizer: Moments) -> Path:
    """Begin a checkpoint with all ranks' rows, which no rank has together: its directory, as this rank sees it.

    A call of all ranks. Raises on each what any failed with: NotFiniteError, FencedError, CheckpointError.
    """
    agree_on(world, failure_of(partial(require_finite, loaded, optimizer)))
    made: list[str] = []

    def begin() -> None:
        owner.confirm()
        directory = begin_checkpoint(owner.directory, owner.epoch, step)
        write_index(directory, optimizer.parameters, world.size)
        made.append(directory.name)

    by_first(world, begin)
    return owner.directory / str(first(world, made)[0])


def write_share(
    directory: Path, moments: Mapping[str, Any], parts: Mapping[str, Tensor], world: World
) -> dict[str, Sealed]:
    """Write this rank's rows of the moments, and of other parts by path, durably. Raises CheckpointError."""
    files = write_own(directory, OF_OPTIMIZER, moments, world.rank, world.size)
    return files | write_own(directory, OF_PARTS, parts, world.rank, world.size)


def write_copied(directory: Path, copied: Copied, world: World) -> dict[str, Sealed]:
    """The same of a copy of a run; and all else, on the first rank."""
    files = write_share(directory, copied.moments, copied.rows, world)
    return files if world.rank else files | write_first(directory, copied.loaded, copied.state)


def all_written(world: World, owner: Owner, directory: Path, work: Callable[[], Mapping[str, Sealed]]) -> InRows:
    """What all ranks have written of a checkpoint, each what `work` says.

    A call of all ranks. Raises on each what any failed with, and then nothing is left.
    """
    files: list[Mapping[str, Sealed]] = []
    failure = failure_of(lambda: files.append(work()))
    try:
        agree_on(world, failure)
    except StreamTrainerError:
        by_first(world, lambda: give_up(directory, owner.confirm))
        raise
    return InRows(directory, {name: sealed for rank in gathered(world, files[0]) for name, sealed in rank.items()})

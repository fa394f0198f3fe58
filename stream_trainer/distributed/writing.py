"""How the ranks write the state that lies in rows on them: all at once, each its own."""

import shutil
from pathlib import Path

from gradient_selectors.world.base import World, first, gathered

from stream_trainer.checkpoints.checkpoint import begin_checkpoint, require_finite
from stream_trainer.checkpoints.manifest import Sealed
from stream_trainer.checkpoints.ownership import Owner
from stream_trainer.checkpoints.rows import OF_OPTIMIZER, OF_PARTS, InRows, write_index, write_own
from stream_trainer.checkpoints.whole import Held, in_rows
from stream_trainer.distributed.control import agree_on, by_first, told
from stream_trainer.errors import StreamTrainerError


def write_rows(world: World, owner: Owner, step: int, held: Held) -> InRows | None:
    """Begin a checkpoint with all ranks' rows, which no rank has together; None if each rank has everything.

    A call of all ranks. Raises on each what any failed with, and then nothing is left.
    """
    if held.loaded.twin is None:
        return None
    directory = _begun(world, owner, step)
    failure, files = None, dict[str, Sealed]()
    try:
        require_finite(held.loaded, held.optimizer)
        files = write_own(directory, OF_OPTIMIZER, held.optimizer.state_dict(), world.rank, world.size)
        files |= write_own(directory, OF_PARTS, in_rows(held.parts), world.rank, world.size)
        if world.rank == 0:
            write_index(directory, held.optimizer.parameters, world.size)
    except StreamTrainerError as error:
        failure = told(error)
    try:
        agree_on(world, failure)
    except StreamTrainerError:
        by_first(world, lambda: _give_up(directory, owner))
        raise
    return InRows(directory, {name: sealed for rank in gathered(world, files) for name, sealed in rank.items()})


def _begun(world: World, owner: Owner, step: int) -> Path:
    """The new directory, as each rank sees it."""
    made: list[str] = []

    def begin() -> None:
        owner.confirm()
        made.append(begin_checkpoint(owner.directory, owner.epoch, step).name)

    by_first(world, begin)
    return owner.directory / str(first(world, made)[0])


def _give_up(directory: Path, owner: Owner) -> None:
    owner.confirm()  # a successor takes away what we were writing, which then cannot be written
    shutil.rmtree(directory, ignore_errors=True)

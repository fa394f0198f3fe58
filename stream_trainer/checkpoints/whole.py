"""What one process writes of a run into a checkpoint, whole although it lies in rows on several processes."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from gradient_selectors.state import flatten, unflatten

from stream_trainer.checkpoints.checkpoint import NamedOptimizer
from stream_trainer.checkpoints.rows import InRows
from stream_trainer.models.loading import LoadedModel
from stream_trainer.models.twin import gathered, made_whole


@dataclass(frozen=True)
class Held:
    """What is written.

    Attributes:
        parts: states by part, as of `TrainerState`.
        rows: of the optimizer's state, if it is written already.
    """

    loaded: LoadedModel
    optimizer: NamedOptimizer
    parts: Mapping[str, Any]
    rows: InRows | None = None


@contextmanager
def held_whole(held: Held, *, keeps: bool) -> Iterator[Held]:
    """The same as one process has it, for as long as it is written. A call of all processes, where a model is sharded.

    Gathered one tensor at a time, and kept in the memory of the processes that say so.
    """
    if held.loaded.twin is None:
        yield held
        return
    with made_whole(held.loaded, keeps=keeps) as loaded:
        tensors, rest = flatten(held.parts)
        found = {name: gathered(values, keeps=keeps) for name, values in tensors.items()}
        parts = unflatten({name: values for name, values in found.items() if values is not None}, rest)
        yield replace(held, loaded=loaded, parts=parts)

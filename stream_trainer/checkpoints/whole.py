"""What one process writes of a run into a checkpoint, whole although it lies in rows on several processes."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from gradient_selectors.capture.shards import is_sharded
from gradient_selectors.state import flatten, unflatten
from torch import Tensor

from stream_trainer.checkpoints.checkpoint import NamedOptimizer
from stream_trainer.checkpoints.rows import InRows
from stream_trainer.models.loading import LoadedModel
from stream_trainer.models.twin import made_whole


@dataclass(frozen=True)
class Held:
    """What is written.

    Attributes:
        parts: states by part, as of `TrainerState`.
        rows: of the optimizer's state and of parts, if they are written already.
    """

    loaded: LoadedModel
    optimizer: NamedOptimizer
    parts: Mapping[str, Any]
    rows: InRows | None = None


@contextmanager
def held_whole(held: Held, *, keeps: bool) -> Iterator[Held]:
    """What one process writes, for as long as it does. A call of all processes, where a model is sharded.

    Weights are gathered one at a time, and kept in the memory of the processes that say so. Parts are without what lies
    in rows, which each process writes.
    """
    if held.loaded.twin is None:
        yield held
        return
    with made_whole(held.loaded, keeps=keeps) as loaded:
        tensors, rest = flatten(held.parts)
        whole = {path: values for path, values in tensors.items() if not is_sharded(values)}
        yield replace(held, loaded=loaded, parts=unflatten(whole, rest))


def in_rows(parts: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of parts that lie in rows, by path."""
    return {path: values for path, values in flatten(parts)[0].items() if is_sharded(values)}

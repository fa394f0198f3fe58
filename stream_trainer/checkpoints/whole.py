"""What a checkpoint holds of a run, whole on one process although it lies in rows on several."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from gradient_selectors.state import flatten, unflatten
from torch import Tensor, nn

from stream_trainer.checkpoints.checkpoint import NamedOptimizer
from stream_trainer.models.loading import LoadedModel
from stream_trainer.models.twin import gathered, made_whole


@dataclass(frozen=True)
class Held:
    """What is written.

    Attributes:
        parts: states by part, as of `TrainerState`.
    """

    loaded: LoadedModel
    optimizer: NamedOptimizer
    parts: Mapping[str, Any]


@dataclass
class _Gathered:
    """An optimizer's state, whole."""

    parameters: dict[str, nn.Parameter]
    state: dict[str, Any]

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        raise NotImplementedError("it is only written")


@contextmanager
def held_whole(held: Held, *, keeps: bool) -> Iterator[Held]:
    """The same as one process has it, for as long as it is written. A call of all processes, where a model is sharded.

    Gathered one tensor at a time, and kept in the memory of the processes that say so.
    """
    if held.loaded.twin is None:
        yield held
        return
    with made_whole(held.loaded, keeps=keeps) as loaded:
        state = _gathered(held.optimizer.state_dict(), keeps=keeps)
        tensors, rest = flatten(held.parts)
        parts = unflatten(_gathered(tensors, keeps=keeps), rest)
        yield Held(loaded, _Gathered(held.optimizer.parameters, state), parts)


def _gathered(tensors: Mapping[str, Tensor], *, keeps: bool) -> dict[str, Tensor]:
    found = {name: gathered(values, keeps=keeps) for name, values in tensors.items()}
    return {name: values for name, values in found.items() if values is not None}

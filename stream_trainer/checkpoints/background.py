"""A checkpoint that is written while training goes on: copied between two steps, and written on a thread of its own.

The thread works on the copies alone. What it asks of others, whether this trainer still owns the place, they answer to
any thread.
"""

import copy
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from gradient_selectors.capture.shards import is_sharded, own_rows
from gradient_selectors.state import flatten, unflatten
from torch import Tensor, nn

from stream_trainer.checkpoints.checkpoint import Moments, TrainerState
from stream_trainer.models.loading import LoadedModel
from stream_trainer.models.twin import fill, gathered, without_weights

T = TypeVar("T")


@dataclass(frozen=True)
class Copied:
    """A run at one moment: `state` and `loaded` as `save_checkpoint` takes them, and itself as the optimizer.

    Attributes:
        loaded: whole, also of a run that is in rows; without weights on a process that does not keep them.
        parameters: the copied ones that are trained, in the optimizer's order.
        moments: the optimizer's state; of a run in rows, what lies here.
        rows: of a run in rows, what lies here of the parts of `state`, by path, which are without it.
    """

    loaded: LoadedModel
    state: TrainerState
    parameters: Mapping[str, nn.Parameter]
    moments: dict[str, Tensor]
    rows: Mapping[str, Tensor]

    def state_dict(self) -> dict[str, Any]:
        """As the optimizer had it."""
        return self.moments


class Copies:
    """Main memory for one copy of a run, used again for each. Page-locked where there is a GPU.

    What is frozen is copied once, to where adapters can be merged into it, or not at all.
    """

    def __init__(self, loaded: LoadedModel, *, keeps: bool = True) -> None:
        """To be made before anything is attached to the model. `keeps`: whether this process writes the weights."""
        self._pinned, self._keeps = loaded.device.type == "cuda", keeps
        twin = without_weights(loaded.model)
        self._moments, self._parts = dict[str, Tensor](), dict[str, Tensor]()
        slots = dict(twin.named_parameters())
        for name, parameter in loaded.model.named_parameters() if keeps else ():
            if parameter.requires_grad:
                fill(slots[name], self._room_for(parameter))
            else:
                fill(slots[name], parameter.detach() if loaded.adapters_only else parameter.detach().cpu())
        own = {"tokenizer": copy.deepcopy(loaded.tokenizer), "config": copy.deepcopy(loaded.config)}
        self._loaded = replace(loaded, model=twin, device=torch.device("cpu"), **own)

    def take(self, loaded: LoadedModel, optimizer: Moments, state: TrainerState) -> Copied:
        """Copy a run. What was copied before is gone: nobody may be writing it any more.

        A call of all processes, if the run is in rows.
        """
        slots = dict(self._loaded.model.named_parameters())
        parts, rest = flatten(state.parts)
        with torch.no_grad():
            self._take_weights(loaded, slots)
            self._moments = self._copies(optimizer.state_dict(), self._moments)
            self._parts = self._copies(parts, self._parts)
        if self._pinned:
            torch.cuda.synchronize(loaded.device)
        rows = {path: self._parts[path] for path, values in parts.items() if is_sharded(values)}
        others = {path: values for path, values in self._parts.items() if path not in rows}
        own = replace(state, parts=unflatten(others, copy.deepcopy(rest)), made_with=dict(state.made_with))
        return Copied(self._loaded, own, {name: slots[name] for name in optimizer.parameters}, self._moments, rows)

    def _take_weights(self, loaded: LoadedModel, slots: Mapping[str, nn.Parameter]) -> None:
        for name, parameter in loaded.model.named_parameters():
            if parameter.requires_grad:
                whole = gathered(parameter)
                if self._keeps:
                    slots[name].copy_(whole, non_blocking=self._pinned)
        for name, buffer in loaded.model.named_buffers():
            self._loaded.model.get_buffer(name).copy_(buffer)

    def _copies(self, state: Mapping[str, Tensor], rooms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {path: self._copy(own_rows(values).detach(), rooms.get(path)) for path, values in state.items()}

    def _copy(self, live: Tensor, room: Tensor | None) -> Tensor:
        if room is None or (room.shape, room.dtype) != (live.shape, live.dtype):
            room = self._room_for(live)
        return room.copy_(live, non_blocking=self._pinned)

    def _room_for(self, values: Tensor) -> Tensor:
        return torch.empty(values.shape, dtype=values.dtype, pin_memory=self._pinned)


def in_background(work: Callable[[], T]) -> Future[T]:
    """What work will come to, or what it raises, on a thread of its own, which does not outlive the process."""
    future = Future[T]()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # for whoever asks
            future.set_exception(error)

    threading.Thread(target=run, name="checkpoint", daemon=True).start()
    return future

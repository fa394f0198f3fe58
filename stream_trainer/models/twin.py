"""A sharded model's twin: the same modules on one process, which hold weights only while a checkpoint needs them.

Saving a model and reading it back is for whole ones: how transformers names weights and splits files, how adapters are
merged. So a sharded one is gathered into its twin, one parameter at a time, and that is saved.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from gradient_selectors.capture.shards import is_sharded
from torch import Tensor, nn

from stream_trainer.models.loading import LoadedModel


def without_weights(model: nn.Module) -> nn.Module:
    """A copy whose parameters are on the meta device. To be made before anything is attached to the model."""
    empty = {parameter: _without_values(parameter) for parameter in model.parameters()}
    places = [(module._parameters, name) for module in model.modules() for name in module._parameters]
    held = [parameters[name] for parameters, name in places]
    try:
        for (parameters, name), parameter in zip(places, held, strict=True):
            parameters[name] = None if parameter is None else empty[parameter]
        return copy.deepcopy(model)
    finally:
        for (parameters, name), parameter in zip(places, held, strict=True):
            parameters[name] = parameter


def gathered(values: Any) -> Tensor:
    """The whole of what may lie in rows, where it does. A call of all processes."""
    whole: Tensor = values.detach().full_tensor() if is_sharded(values) else values.detach()
    return whole


def is_first(model: nn.Module) -> bool:
    """Whether this is the first of the processes that a model is sharded over, or the only one."""
    parameter: Any = next(model.parameters())
    return not is_sharded(parameter) or parameter.device_mesh.get_local_rank() == 0


@contextmanager
def made_whole(loaded: LoadedModel, *, keeps: bool) -> Iterator[LoadedModel]:
    """The model as one process has it: itself, or the twin of a sharded one. A call of all processes.

    The twin has weights on those that keep them, until the end.
    """
    if loaded.twin is None:
        yield loaded
        return
    slots = dict(loaded.twin.named_parameters())
    try:
        for name, parameter in loaded.model.named_parameters():
            values = gathered(parameter)
            if keeps:
                fill(slots[name], values.cpu())
        yield replace(loaded, model=loaded.twin, device=torch.device("cpu"), twin=None)
    finally:
        for slot in slots.values():
            fill(slot, torch.empty_like(slot, device="meta"))


def fill(slot: nn.Parameter, values: Tensor) -> None:
    """Give a parameter these values in the place of its own, wherever it is used."""
    torch.utils.swap_tensors(slot, nn.Parameter(values, slot.requires_grad))  # type: ignore[no-untyped-call]


def _without_values(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)

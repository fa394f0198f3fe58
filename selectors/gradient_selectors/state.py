"""State: what whatever has some hands out and takes back, and how it becomes the tensors and the JSON of a file.

A state is a dictionary whose values are tensors, JSON values or further such dictionaries; every key is a string.
"""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

State = Mapping[str, Any]
SEPARATOR = "/"  # names of parameters hold dots


@runtime_checkable
class Stateful(Protocol):
    """Whatever has state."""

    def state_dict(self) -> dict[str, Any]:
        """All that the future depends on, beside settings. Tensors may share memory with the live ones."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a copy of what `state_dict` returned. Raises ValueError if it does not fit."""


def states_of(parts: Mapping[str, object]) -> dict[str, Any]:
    """The state of every part that has some, by name."""
    return {name: part.state_dict() for name, part in parts.items() if isinstance(part, Stateful)}


def load_states(parts: Mapping[str, object], state: State) -> None:
    """Give each part its state. One that was off when the state was made begins afresh, and so does one without any."""
    for name, part in parts.items():
        if isinstance(part, Stateful) and state.get(name):
            part.load_state_dict(state[name])


def flatten(state: State) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors by path, `part/name`, and all else as nested dictionaries of JSON values.

    Examples:
        >>> from gradient_selectors.state import flatten
        >>> flatten({"target": {"age": 3, "gradient": {"a.weight": torch.ones(1)}}})
        ({'target/gradient/a.weight': tensor([1.])}, {'target': {'age': 3, 'gradient': {}}})
    """
    tensors: dict[str, Tensor] = {}
    rest: dict[str, Any] = {}
    for name, value in state.items():
        if isinstance(value, Tensor):
            tensors[name] = value
        elif isinstance(value, Mapping):
            inner, rest[name] = flatten(value)
            tensors |= {f"{name}{SEPARATOR}{path}": tensor for path, tensor in inner.items()}
        else:
            rest[name] = value
    return tensors, rest


def unflatten(tensors: Mapping[str, Tensor], rest: State) -> dict[str, Any]:
    """Inverse of `flatten`."""
    state: dict[str, Any] = {name: unflatten({}, v) if isinstance(v, Mapping) else v for name, v in rest.items()}
    for path, tensor in tensors.items():
        *parts, last = path.split(SEPARATOR)
        place = state
        for part in parts:
            place = place.setdefault(part, {})
        place[last] = tensor
    return state

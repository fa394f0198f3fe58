"""What a pass must know of a model that is sharded: its parameters lie in rows on several processes.

Each parameter is then a DTensor. It is whole only while a pass uses it, and every pass is a call of all processes.
"""

from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor


class Shards(Protocol):
    """How a model is sharded."""

    def passing(self) -> AbstractContextManager[None]:
        """To be around each pass. What fails within it ends the run."""

    def scatter(self, values: Tensor) -> Tensor:
        """Sum of all processes' values, in a parameter's shape, of which each keeps its own rows."""


def own_rows(values: Any) -> Tensor:
    """Rows of a parameter that lie here, or of what lies as one does; all of it where that is whole. No copy."""
    found: Tensor = values.to_local() if is_sharded(values) else values
    return found


def own_part(parameter: Any, values: Tensor) -> Tensor:
    """Of values for a whole parameter what lies here, on its device; all where it is whole. A copy."""
    if not is_sharded(parameter):
        return values.clone().to(parameter.device)
    first, last = span_here(parameter)
    return lying_as(parameter, values[first:last].clone().to(parameter.device))


def span_here(parameter: Any) -> tuple[int, int]:
    """Which rows of a parameter lie here, `first:last`; all where it is whole."""
    num_rows = len(parameter)
    if not is_sharded(parameter):
        return 0, num_rows
    mesh = parameter.device_mesh
    share = -(-num_rows // mesh.size())  # as `torch.chunk` cuts
    first = min(share * mesh.get_local_rank(), num_rows)
    return first, min(first + share, num_rows)


def is_sharded(values: Any) -> bool:
    """Whether it lies in rows on several processes."""
    return hasattr(values, "to_local")


def lying_as(parameter: Any, rows: Tensor) -> Tensor:
    """A tensor of which every process has its own rows, as of the parameter; `rows` themselves where that is whole."""
    if not is_sharded(parameter):
        return rows
    from torch.distributed.tensor import DTensor

    mesh, placements, stride = parameter.device_mesh, parameter.placements, parameter.stride()
    return DTensor.from_local(rows, mesh, placements, run_check=False, shape=parameter.shape, stride=stride)

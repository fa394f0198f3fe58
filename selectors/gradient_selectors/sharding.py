"""Shard a model over the ranks of a run with torch's FSDP2, once a capture is attached to it.

A capture recognises and verifies a model that is whole. So it is attached first, then the model is cut, and the capture
looks again: names stay, for they are of places. The optimizer is made after that, over the parameters in rows.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from gradient_selectors.capture.capture import GradientCapture
from gradient_selectors.world.base import World, ending_all


@dataclass(frozen=True)
class Sharded:
    """A model whose parameters lie in rows on the ranks.

    Attributes:
        parts: modules that torch makes whole, each as it is called.
    """

    world: World
    parts: tuple[Any, ...]

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Around each pass: a call of all ranks, after which every part is in rows again."""
        with ending_all(self.world):
            yield
            for part in self.parts:  # a forward pass by itself leaves some whole, with weights that grow old
                part.reshard()

    def scatter(self, values: Tensor) -> Tensor:
        return self.world.scatter(values)


def shard(capture: GradientCapture, world: World, *, reshard_after_forward: bool = True) -> None:
    """Cut the capture's model into rows, some on each rank, in place. All ranks have the same weights.

    Blocks are cut each by itself, as the model names them, and all else together. `reshard_after_forward`: let go of a
    block's rows of others after its forward pass, and fetch them again for the backward pass.

    Needs a process group. Raises ValueError if a parameter cannot be cut, and ReplacedParameterError if one is shared
    by several blocks.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    model = capture.model
    mesh = init_device_mesh(capture.device.type, (world.size,))
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard_after_forward)
    fully_shard(model, mesh=mesh)
    parts = tuple(module for module in model.modules() if isinstance(module, FSDPModule))
    for part in parts:  # sums, no means: coefficients add to 1 already
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
    capture.passes.shards = Sharded(world, parts)
    capture.refresh()


def blocks_of(model: Any) -> list[nn.Module]:
    """The blocks of a transformers model: modules of the classes that it says not to split, inner ones first."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names][::-1]

"""What one rank of a sharded model does, in a process of its own: `python -m ... FOLDER CASE...`.

Writes what the steps of each case came to, and every collective of them in order.
"""

import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from gradient_selectors.capture.capture import GradientCapture
from gradient_selectors.capture.shards import is_sharded
from gradient_selectors.sharding import shard
from gradient_selectors.target import mean_loss
from gradient_selectors.world.base import LostError
from gradient_selectors.world.ranks import Ranks
from torch.utils._python_dispatch import TorchDispatchMode

from tests.gradient_selectors.world.test_ranks_agree import CASES, course
from tests.helpers.oracle import make_batch, make_model


class Collectives(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Every collective, in order, as it reaches torch."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in func.namespace:
            tensors = [a for a in torch.utils._pytree.tree_leaves(args) if isinstance(a, torch.Tensor)]
            is_uneven = "alltoall" in func.name()  # what a rank gives there is its own
            self.calls.append(f"{func.name()} {[] if is_uneven else [tuple(t.shape) for t in tensors]}")
        return func(*args, **(kwargs or {}))


def main(folder: Path, cases: list[str]) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=100))
    world = Ranks(timedelta(seconds=100))
    for case in cases:
        make, options = CASES[case]
        model = make()
        capture = GradientCapture(model)
        shard(capture, world, reshard_after_forward=case != "tied")
        assert all(is_sharded(p) for p in model.parameters())
        collectives = Collectives()
        with collectives:
            found = course(world, model, capture, **options)
        weights = {name: p.full_tensor() for name, p in model.named_parameters()}
        told = {
            "chosen": found.chosen,
            "coefficients": found.coefficients,
            "losses": found.losses,
            "again": found.again,
            "mean": found.mean,
            "moments": found.moments,
            "weights": weights,
            "own": sum(p.to_local().numel() for p in model.parameters()),
            "calls": collectives.calls,
        }
        torch.save(told, folder / f"{case}.{world.rank}.pt")
    world.facts([0])
    (folder / f"{world.rank}.lost").write_text(fail_on_one(world))
    os._exit(0)  # which closes its connections


def fail_on_one(world: Ranks) -> str:
    """A pass in whose midst rank 1 fails."""
    model = make_model("llama")
    capture = GradientCapture(model)
    shard(capture, world)
    if world.rank == 1:
        model.model.layers[1].register_forward_hook(lambda *_: 1 / 0)
    try:
        mean_loss(capture, [make_batch((9, 7))], world=world)
    except LostError as error:
        return str(error)
    return "nothing"


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

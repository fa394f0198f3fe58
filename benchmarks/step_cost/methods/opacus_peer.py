"""opacus: per-sample gradients by `GradSampleModule`, and the same work on them as in `per_sample`."""

from typing import Any

import torch
from opacus import GradSampleModule  # type: ignore[import-not-found]
from torch import Tensor

from benchmarks.step_cost.methods.per_sample import Oracle, PerSample
from benchmarks.step_cost.workloads import Workload


class Opacus(Oracle):
    """Its hooks write the gradients out during the backward pass of the pool."""

    def __init__(self, workload: Workload, device: str) -> None:
        super().__init__(workload, device)
        # Not strict: it takes any kind of layer, those that it does not know through functorch.
        self._hooked: Any = GradSampleModule(self.bench.model, strict=False, loss_reduction="sum")
        self._hooked.disable_hooks()

    def written(self, ids_NT: Tensor) -> tuple[PerSample, Tensor]:
        self._hooked.enable_hooks()
        losses_N = self.bench.losses(ids_NT, self._hooked)
        torch.autograd.backward([losses_N.sum()])
        self._hooked.disable_hooks()
        written = {name: p.grad_sample.float() for name, p in self.bench.parameters.items()}  # type: ignore[attr-defined]
        for parameter in self.bench.parameters.values():
            parameter.grad_sample = parameter.grad = None  # type: ignore[attr-defined]
        return written, losses_N.detach()

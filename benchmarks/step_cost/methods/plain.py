"""Plain training: forward, mean loss of the samples, backward, fused AdamW. Nothing is scored and nothing clipped."""

from typing import Any

import torch
from torch import Tensor

from benchmarks.step_cost.methods.common import STEPS, Answers, Bench, seconds_of
from benchmarks.step_cost.workloads import Workload


class Plain:
    """Plain steps on the whole pool, or on as many samples as a selection chooses."""

    def __init__(self, workload: Workload, device: str, share: str) -> None:
        """`share`: the field of the workload that says how many samples a step trains on."""
        self._bench = Bench(workload, device)
        self._size: int = getattr(workload, share)

    def warm_up(self) -> None:
        self._step(next(self._bench.pool_ids))

    def repetition(self) -> dict[str, Any]:
        def steps() -> None:
            for _ in range(STEPS):
                self._step(next(self._bench.pool_ids))

        return {"seconds": seconds_of(steps, self._bench.device) / STEPS}

    def answers(self) -> Answers | None:
        return None

    def _step(self, ids_NT: Tensor) -> None:
        torch.autograd.backward([self._bench.losses(ids_NT[: self._size]).mean()])
        self._bench.optimizer.step()
        self._bench.optimizer.zero_grad(set_to_none=True)

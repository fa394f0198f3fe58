"""dattri-llm: `DataSelectionCallback` drops half of the pool within the backward pass, then AdamW.

It does less than the others: plain inner products, no redundancy, no coefficients. Its target is the captured gradient
of the target samples, refreshed as seldom as ours; by its own default it would run a pass over them at every step.
Llama's norms are declared to it as norms, for it leaves out silently what it does not know.
"""

from typing import Any

import torch
from dattri_llm import (  # type: ignore[import-not-found]
    REGISTER_ALL,
    DataSelectionCallback,
    HookManager,
    HookManagerCallback,
    HookManagerConfig,
)
from dattri_llm.utils.module import rms_norm_module_kwargs  # type: ignore[import-not-found]
from torch import Tensor

from benchmarks.step_cost.methods.common import CHECK_SAMPLES, Answers, Bench, amortised, flat
from benchmarks.step_cost.workloads import Workload

DROPPED_SHARE = 0.5


class _Turn(HookManagerCallback):  # type: ignore[misc]
    """Hands the steps of the pool to the selection of the day, and those of the target to none."""

    def __init__(self) -> None:
        self.selection: Any = None

    def on_step_end(self, record: Any) -> None:
        if self.selection is not None:
            self.selection.on_step_end(record)


class Dattri:
    """Selection by dropping, inside `loss.backward()`."""

    def __init__(self, workload: Workload, device: str) -> None:
        self.bench = Bench(workload, device)
        self._turn = _Turn()
        self._manager = HookManager(self.bench.model, config=_hooks_of(self.bench.model), callbacks=[self._turn])
        self._collecting = self._manager.collect()
        self._collecting.__enter__()

    def warm_up(self) -> None:
        self._refresh(self.bench.target_ids_MT)
        self._step(next(self.bench.pool_ids))

    def repetition(self) -> dict[str, Any]:
        ids_NT = next(self.bench.pool_ids)
        refresh = lambda: self._refresh(self.bench.target_ids_MT)  # noqa: E731
        return amortised(lambda: self._step(ids_NT), refresh, self.bench.device)

    def answers(self) -> Answers:
        ids_NT = next(self.bench.pool_ids)[:CHECK_SAMPLES]
        self._refresh(self.bench.target_ids_MT[:CHECK_SAMPLES])
        torch.autograd.backward([self.bench.losses(ids_NT).mean()])
        gradient = {name: p.grad for name, p in self.bench.parameters.items() if p.grad is not None}
        return {
            "plain_utilities_N": self._turn.selection.last_scores * CHECK_SAMPLES,  # its gradients are of the mean
            "kept_gradient": flat(gradient, self.bench.parameters),
        }

    def _refresh(self, target_ids_MT: Tensor) -> None:
        self._turn.selection = None
        torch.autograd.backward([self.bench.losses(target_ids_MT).mean()])
        target = self._manager.get_gradient()
        self.bench.optimizer.zero_grad(set_to_none=True)
        selection = {"threshold": DROPPED_SHARE, "threshold_mode": "bottom_fraction"}
        self._turn.selection = DataSelectionCallback(
            self.bench.model, target="fixed", target_gradient=target, renormalize=True, selection_kwargs=selection
        )

    def _step(self, ids_NT: Tensor) -> None:
        torch.autograd.backward([self.bench.losses(ids_NT).mean()])
        self.bench.optimizer.step()
        self.bench.optimizer.zero_grad(set_to_none=True)


def _hooks_of(model: Any) -> Any:
    norms = {
        name: module
        for name, module in model.named_modules()
        if type(module).__name__.endswith("RMSNorm") and module.weight.requires_grad
    }
    return HookManagerConfig(
        hook_types=dict.fromkeys(norms, "linear_io"),
        linear_io=REGISTER_ALL,
        layer_types=dict.fromkeys(norms, "nn.RMSNorm"),
        module_kwargs={
            name: rms_norm_module_kwargs(normalized_shape=norm.weight.shape[0], eps=norm.variance_epsilon)
            for name, norm in norms.items()
        },
    )

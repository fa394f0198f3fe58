"""One rank's model and optimizer, of which several methods make steps in turn."""

import hashlib
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import torch
from gradient_selectors import FilterThenWeight, SelectionEngine, Sketched
from gradient_selectors.target import Target
from gradient_selectors.views.scoring import Exact, Scoring
from gradient_selectors.world.base import World
from gradient_selectors.world.buckets import summed_in_buckets
from gradient_selectors.world.deal import Shares
from torch import Tensor

from benchmarks.gpu.methods import FIRST_GRADIENT, LEARNING_RATE, as_batch
from benchmarks.gpu.models import make_model, pools
from benchmarks.scale_out.plan import REFRESH_STEPS, SHARE_CHOSEN, SHARE_KEPT, TARGET, Workload

DATA_SEED, TARGET_SEED, CHECK_SEED = 1, 2, 3
SCORINGS: Mapping[str, Callable[[], Scoring]] = {"sketch": Sketched, "exact": Exact}


class Rank:
    """What makes this rank's part of a step. Samples are drawn alike on every rank."""

    def __init__(self, workload: Workload, device: torch.device, world: World) -> None:
        self.workload, self.device, self.world = workload, device, world
        self._model: Any = make_model(workload.case, device)
        # The same weights in other modules, which have none of the engines' hooks.
        self._plain: Any = deepcopy(self._model, {id(parameter): parameter for parameter in self._model.parameters()})
        self.parameters = {name: p for name, p in self._model.named_parameters() if p.requires_grad}
        self._first = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._target_MT = next(pools(workload.case, TARGET, torch.Generator().manual_seed(TARGET_SEED)))
        self._engine: SelectionEngine | None = None
        self.reset()

    @property
    def num_weights(self) -> int:
        return sum(p.numel() for p in self.parameters.values())

    def reset(self) -> None:
        """As at first: the same weights, moments and samples to come."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self._first[name])
                parameter.grad = torch.full_like(parameter, FIRST_GRADIENT)
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=LEARNING_RATE, fused=True)
        self.optimizer.step()  # without moments the engine would find no update that Adam could make
        self.optimizer.zero_grad(set_to_none=True)
        self._generator = torch.Generator().manual_seed(DATA_SEED)

    def begin(self, method: str, pool: int) -> None:
        """The next step is the first of a repetition: it refreshes the target, where there is one."""
        if self._engine is not None:
            self._engine.close()
        self._engine = None if method == "plain" else self._attach(SCORINGS[method](), pool)

    def step(self, pool: int) -> Mapping[str, float]:
        """A step on as many candidates: gradient and update. Returns seconds by phase, if they are known."""
        self.leave_gradient(self._draw(pool))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        report = None if self._engine is None else self._engine.last
        return {} if report is None else report.seconds

    def leave_gradient(self, ids_NT: Tensor) -> list[float]:
        """The update's gradient in `.grad`, the same on all ranks. Returns the coefficients."""
        if self._engine is not None:
            return [float(w) for w in self._engine.backward(as_batch(ids_NT)).coefficients_N]
        own = Shares.of(self.world, [self.workload.tokens] * len(ids_NT)).own
        own_nT = ids_NT[list(own)].to(self.device)
        loss = self._plain(input_ids=own_nT, labels=own_nT, use_cache=False).loss
        torch.autograd.backward([loss * len(own) / len(ids_NT)])
        # The plain all-reduce of the gradient, in as few exchanges as the engine's.
        gradients = ((name, p.grad) for name, p in self.parameters.items() if p.grad is not None)
        for name, total in summed_in_buckets(self.world, gradients):
            self.parameters[name].grad = total
        return [1.0 / len(ids_NT)] * len(ids_NT)

    def answers(self, method: str, pool: int) -> tuple[dict[str, Tensor], str]:
        """Coefficients and gradient of one step, and what tells the weights after it apart from others, to the bit."""
        self.reset()
        self.begin(method, pool)
        ids_NT = next(pools(self.workload.case, pool, torch.Generator().manual_seed(CHECK_SEED)))
        found = {"coefficients_N": torch.tensor(self.leave_gradient(ids_NT))}
        found |= {n: p.grad.detach().cpu().clone() for n, p in self.parameters.items() if p.grad is not None}
        self.optimizer.step()
        digest = hashlib.sha256()
        for name in sorted(self.parameters):
            digest.update(self.parameters[name].detach().cpu().numpy().tobytes())
        self.reset()
        return found, digest.hexdigest()

    def _draw(self, pool: int) -> Tensor:
        return next(pools(self.workload.case, pool, self._generator))

    def _attach(self, scoring: Scoring, pool: int) -> SelectionEngine:
        chosen = pool // SHARE_CHOSEN
        selector = FilterThenWeight(batch_size=chosen, keep_ratio=SHARE_CHOSEN / SHARE_KEPT)
        target = Target.of([as_batch(self._target_MT)], refresh_steps=REFRESH_STEPS, refresh_samples=TARGET)
        return SelectionEngine(self._model, self.optimizer, selector, target=target, scoring=scoring, world=self.world)

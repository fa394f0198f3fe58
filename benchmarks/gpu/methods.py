"""What is timed: one model and one optimizer, of which several methods make steps in turn."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from gradient_selectors import Equal, FilterThenWeight, SelectionEngine, Selector, Sketched
from gradient_selectors.target import Target
from torch import Tensor, nn

from benchmarks.gpu.models import UnmeasuredError, make_model, pools
from benchmarks.gpu.shapes import CHOSEN, Case

DTYPE = torch.bfloat16  # of the passes, under autocast
LEARNING_RATE = 1e-5
FIRST_GRADIENT = 1e-3
DATA_SEED, TARGET_SEED = 1, 2
REFRESH_STEPS = 4  # steps that share a refresh of the target's gradient, the library's default

Scope = Literal["pool", "chosen", "probe"]


@dataclass(frozen=True)
class Method:
    """A way to make a step.

    Attributes:
        scope: which samples it takes.
        refresh_steps: steps that share a refresh of the target, all timed together; None where nothing is scored.
        engine: whether the engine makes the gradient.
    """

    name: str
    scope: Scope
    refresh_steps: int | None = None
    engine: bool = False

    @property
    def steps(self) -> int:
        """Steps of one repetition."""
        return self.refresh_steps or 1

    def samples(self, case: Case) -> int:
        """Samples of one step."""
        return {"pool": case.pool, "chosen": CHOSEN, "probe": 2 * CHOSEN}[self.scope]


METHODS = (
    Method("plain_all", "pool"),
    Method("plain_k", "chosen"),
    Method("select", "pool", REFRESH_STEPS, engine=True),
    Method("probe", "probe", 1, engine=True),
    Method("equal", "chosen", engine=True),
)


class Bench:
    """A case's model and optimizer, at rest between steps: no gradients, and nothing that scoring keeps.

    Attributes:
        plain: the model without the engine's hooks; its weights are the same objects.
    """

    def __init__(self, case: Case, device: torch.device, dtype: torch.dtype | None = DTYPE) -> None:
        """`dtype`: of the passes, or None for that of the weights. Raises UnmeasuredError as `make_model` does."""
        self.case, self.device, self._dtype = case, device, dtype
        self._model = make_model(case, device)
        self.plain: Any = _twin(self._model)
        self.parameters = {name: p for name, p in self._model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=LEARNING_RATE, fused=True)
        self._make_moments()
        self._engine: SelectionEngine | None = None
        self._refusal: str | None = None
        generator = torch.Generator().manual_seed(DATA_SEED)
        self._pools = {size: pools(case, size, generator) for size in (CHOSEN, 2 * CHOSEN, 4 * CHOSEN)}
        self._target_MT = next(pools(case, CHOSEN, torch.Generator().manual_seed(TARGET_SEED)))

    def step(self, method: Method) -> int:
        """One step, gradient and update; returns the samples in it. Raises UnmeasuredError if there were none."""
        ids_NT = next(self._pools[method.samples(self.case)])
        if method.engine:
            engine = self.engine()
            decide = engine.train if method.refresh_steps is None else engine.backward
            selected = len(decide(as_batch(ids_NT)).selected)
        else:
            self.backward_plainly(ids_NT)
            selected = len(ids_NT)
        if not selected:
            raise UnmeasuredError("a step selected no sample, so there was no update to time")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return selected

    def backward_plainly(self, ids_NT: Tensor) -> None:
        """The gradient of the mean loss, as any trainer takes it."""
        ids_NT = ids_NT.to(self.device)
        with torch.autocast(self.device.type, self._dtype, enabled=self._dtype is not None):
            loss = self.plain(input_ids=ids_NT, labels=ids_NT, use_cache=False).loss
        torch.autograd.backward([loss])

    def engine(self) -> SelectionEngine:
        """The engine, attached when it is first asked for. Raises UnmeasuredError if it refuses the model."""
        if self._engine is None and self._refusal is None:
            try:
                self._engine = self.attach(FilterThenWeight(batch_size=CHOSEN))
            except ValueError as error:
                self._refusal = f"the engine refuses the model: {error}"
        if self._engine is None:
            raise UnmeasuredError(self._refusal)
        return self._engine

    def attach(self, selector: Selector) -> SelectionEngine:
        """An engine on the model that decides so."""
        return SelectionEngine(
            self._model,
            self.optimizer,
            selector,
            target=None if isinstance(selector, Equal) else [as_batch(self._target_MT)],
            refresh_steps=REFRESH_STEPS,
            scoring=Sketched(),
            autocast=self._dtype,
        )

    def begin(self, method: Method) -> None:
        """Start afresh: the next step refreshes the target's gradient, if the method has one."""
        self.optimizer.zero_grad(set_to_none=True)
        if method.refresh_steps is not None:
            self.engine().scoring.reset()
            self.engine().target = Target.of([as_batch(self._target_MT)], refresh_steps=method.refresh_steps)

    def rest(self) -> None:
        """Give back what a repetition has left: no method then pays for the memory of another."""
        self.optimizer.zero_grad(set_to_none=True)
        if self._engine is not None:
            self._engine.scoring.reset()
            self._engine.target = None

    def _make_moments(self) -> None:
        """Adam's moments, now rather than in the first step: a model that does not fit is then known at once.

        Of gradients that are all alike: without any, the engine would find no update that Adam could make.
        """
        for parameter in self.parameters.values():
            parameter.grad = torch.full_like(parameter, FIRST_GRADIENT)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def as_batch(ids_NT: Tensor) -> Mapping[str, Tensor]:
    """Samples as a data collator makes them."""
    return {"input_ids": ids_NT, "labels": ids_NT}


def _twin(model: nn.Module) -> nn.Module:
    """The same model in other modules, without the hooks that are put on this one later."""
    return deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})

"""The measured effect of a step beside that of a uniform draw, on samples of the target that steer nothing.

What an update does is mostly momentum, of samples chosen long ago. So both sides are measured beside the same step
without any gradient. And Adam makes all updates about equally long in the long run: the uniform gradient is as long
here as the chosen one, in the metric of P. Each trial is taken back, bit for bit; the chosen update is the step's own.
"""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from gradient_selectors import SelectionEngine
from gradient_selectors.capture.batch import Batch
from gradient_selectors.capture.gradients import Gradient
from gradient_selectors.draw.uniform import draw_uniform
from gradient_selectors.target import mean_gradient, mean_loss
from gradient_selectors.weigh.selector import equal_coefficients
from gradient_selectors.weigh.stated import restated_coefficients
from torch import Tensor, nn

from stream_trainer.errors import StreamTrainerError, TrainingError
from stream_trainer.models.refusals import first_line
from stream_trainer.records import Sample
from stream_trainer.samples.collate import collate

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shadow:
    """What a step is compared with.

    Attributes:
        held: samples of the target that have no say in what is chosen.
        offered: samples that the step could have been made of; the uniform side is drawn from these.
        generator: draws them, on the CPU.
        micro_tokens: bound on the tokens of a pass.
    """

    held: Sequence[Sample]
    offered: Sequence[Sample]
    generator: torch.Generator
    micro_tokens: int | None = None


@dataclass(frozen=True)
class Effect:
    """By how much a side's gradient lowers the loss on the held-back samples in one step (nats per token).

    Attributes:
        predicted: to first order: the change of the weights times the gradient of that loss.
        measured: beside the loss after the same step without a gradient.
    """

    predicted: float
    measured: float


@dataclass(frozen=True)
class Effects:
    """Those of both sides, and the seconds that it took to find them; None where a trial failed."""

    seconds: float
    chosen: Effect | None = None
    uniform: Effect | None = None


@dataclass(frozen=True)
class _Stand:
    """Where a step leads: the loss on the held-back samples, and the weights times the gradient of that loss."""

    loss: float
    along: float

    def from_here_to(self, other: "_Stand") -> Effect:
        return Effect(self.along - other.along, self.loss - other.loss)


class Trial:
    """The sides of one step: the uniform one at once, the chosen one once it was made."""

    def __init__(self, engine: SelectionEngine, shadow: Shadow, count: int, pad_id: int) -> None:
        """Try a step without gradient, and one of `count` samples that chance draws.

        `.grad` holds the chosen gradient, clipped, and learning rates are set. Weights, moments, gradients are left as
        they are. A trial that fails is logged and has no effects.
        """
        self._engine, self._held = engine, collate(shadow.held, pad_id)
        self._uniform: _Stand | None = None
        self._still: _Stand | None = None
        started = time.perf_counter()
        try:
            self._run(shadow, count, pad_id)
        except StreamTrainerError:
            raise
        except Exception as error:  # of the model, of the device: a sample that no step has tried may raise anything
            logger.warning("the effect of a uniform draw cannot be measured (%s)", first_line(error))
        self.seconds = time.perf_counter() - started

    def _run(self, shadow: Shadow, count: int, pad_id: int) -> None:
        engine = self._engine
        self._slope: Gradient = mean_gradient(engine.capture, [self._held], shadow.micro_tokens)
        kept = _Kept(engine.optimizer, engine.capture.parameters)
        try:
            drawn = draw_uniform(len(shadow.offered), count, shadow.generator)
            uniform = _gradient_of(engine, collate([shadow.offered[i] for i in drawn], pad_id))
            scale = _length(engine, kept.gradients) / _length(engine, uniform)
            if math.isfinite(scale):
                self._still = self._after({name: torch.zeros_like(values) for name, values in uniform.items()})
                kept.put_back()
                self._uniform = self._after({name: values * scale for name, values in uniform.items()})
        finally:
            kept.put_back()

    def chosen(self) -> Effects:
        """The effects of both sides, now that the chosen update was made."""
        started = time.perf_counter()
        if self._still is None or self._uniform is None:
            return Effects(self.seconds)
        try:
            found = self._still.from_here_to(self._stand())
        except Exception as error:  # of the device
            logger.warning("the effect of an update cannot be measured (%s)", first_line(error))
            return Effects(self.seconds)
        uniform = self._still.from_here_to(self._uniform)
        seconds = self.seconds + time.perf_counter() - started
        numbers = (found.predicted, found.measured, uniform.predicted, uniform.measured)
        return Effects(seconds, found, uniform) if all(map(math.isfinite, numbers)) else Effects(seconds)

    def _after(self, gradient: Gradient) -> _Stand:
        for name, parameter in self._engine.capture.parameters.items():
            values = gradient.get(name)
            parameter.grad = None if values is None else values.to(parameter.dtype)
        self._engine.optimizer.step()
        return self._stand()

    @torch.no_grad()
    def _stand(self) -> _Stand:
        """In float64: what a step changes is small beside the weights."""
        capture = self._engine.capture
        loss = mean_loss(capture, [self._held])
        products = [
            torch.dot(values.flatten().double(), capture.parameters[name].flatten().double())
            for name, values in self._slope.items()
        ]
        return _Stand(loss, math.fsum(float(product) for product in products))


def _gradient_of(engine: SelectionEngine, batch: Batch) -> dict[str, Tensor]:
    """The gradient of plain training on a batch, as a step would be made of it.

    Masked weights have one too; nothing comes of it, for an optimizer with a mask moves and weighs the others only.
    """
    parameters = engine.capture.parameters
    for parameter in parameters.values():
        parameter.grad = None
    equal_N = equal_coefficients(len(batch), range(len(batch)))
    engine.capture.train(batch, restated_coefficients(equal_N, batch.weights_N))
    return {name: p.grad for name, p in parameters.items() if p.grad is not None}


@torch.no_grad()
def _length(engine: SelectionEngine, gradient: Mapping[str, Tensor]) -> float:
    """Of the update that a gradient makes, in the metric of P."""
    preconditioner, sums = engine.preconditioner, []
    for name, values in gradient.items():
        diagonal, squares = preconditioner(name), values.float().square()
        sums.append(float((squares if diagonal is None else squares * diagonal).sum(dtype=torch.float64)))
    return math.sqrt(math.fsum(sums))


class _Kept:
    """Weights, moments and gradients as they are now, in the host's memory.

    Attributes:
        gradients: these lie where they lay.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> None:
        self._optimizer, self._parameters = optimizer, parameters
        self.gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        self._weights = {name: _copy(p.detach()) for name, p in parameters.items()}
        self._states = {
            p: {field: _copy(value) for field, value in held.items()} for p, held in optimizer.state.items()
        }

    def put_back(self) -> None:
        """All of it, bit for bit. Raises TrainingError if the device fails: what it holds is then of no use."""
        try:
            self._put_back()
        except Exception as error:
            raise TrainingError(
                f"a trial of selection.advantage.shadow_every cannot be taken back ({first_line(error)}); start again "
                "from the last checkpoint, without it"
            ) from error

    @torch.no_grad()
    def _put_back(self) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(self._weights[name])
            parameter.grad = self.gradients.get(name)
        live = self._optimizer.state
        for began in [key for key in live if key not in self._states]:
            del live[began]
        for key, held in self._states.items():
            _put_back(live[key], held)


def _copy(value: Any) -> Any:
    return value.to("cpu", copy=True) if isinstance(value, Tensor) else value


def _put_back(live: dict[str, Any], kept: Mapping[str, Any]) -> None:
    for field, value in kept.items():
        if isinstance(value, Tensor):
            live[field].copy_(value)
        else:
            live[field] = value

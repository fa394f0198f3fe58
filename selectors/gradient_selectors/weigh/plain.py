"""Plain training on all samples of a batch, which scores nothing; on several ranks each takes its share."""

import math

import torch
from torch import Tensor

from gradient_selectors.capture.batch import Batch
from gradient_selectors.capture.capture import GradientCapture
from gradient_selectors.weigh.selector import Decision, equal_coefficients
from gradient_selectors.weigh.stated import restated_coefficients
from gradient_selectors.world.base import World, together
from gradient_selectors.world.buckets import summed_in_buckets
from gradient_selectors.world.deal import Shares, agreed_names


def train_plainly(capture: GradientCapture, batch: Batch, world: World) -> tuple[Tensor, Decision]:
    """Leave the samples' mean gradient in `.grad`, each with its stated weight. Returns losses and coefficients.

    A sample that is not finite spoils the pass, which is then made without it.
    """
    losses_N = torch.full((len(batch),), torch.nan)
    samples = list(range(len(batch)))
    while samples:
        _forget(capture)
        coefficients_N = restated_coefficients(equal_coefficients(len(batch), samples), batch.weights_N)
        losses_N[samples] = _train(capture, batch, samples, coefficients_N, world).to(losses_N.device)
        finite = [i for i in samples if math.isfinite(losses_N[i])]
        if finite == samples:
            _sum_gradients(capture, world)
            return losses_N, Decision(coefficients_N)
        samples = finite
    _forget(capture)
    return losses_N, Decision(torch.zeros(len(batch)))


def _train(capture: GradientCapture, batch: Batch, samples: list[int], coefficients_N: Tensor, world: World) -> Tensor:
    """Losses of some samples, (n,); each rank leaves the gradient of its own."""
    if world.size == 1:
        part = batch if len(samples) == len(batch) else batch.among(samples)
        return capture.train(part, coefficients_N[samples])
    shares = Shares.of(world, [batch.lengths[i] for i in samples])
    own = [samples[place] for place in shares.own]
    losses_n = torch.zeros(0, device=capture.device)
    with together(world, has_calls=capture.is_sharded):
        if own:
            losses_n = capture.train(batch.among(own), coefficients_N[own])
        elif capture.is_sharded:  # every rank makes the pass; one without a sample of its own adds nothing
            shortest = min(samples, key=lambda i: batch.lengths[i])
            capture.train(batch.among([shortest]), torch.zeros(1))
    return shares.spread(losses_n)


def _sum_gradients(capture: GradientCapture, world: World) -> None:
    if world.size == 1 or capture.is_sharded:  # torch has summed those of a sharded model
        return
    present = [name for name, parameter in capture.parameters.items() if parameter.grad is not None]
    names = agreed_names(world, present, list(capture.parameters))
    for name, total in summed_in_buckets(world, ((name, _own_gradient(capture, name)) for name in names)):
        capture.parameters[name].grad = total


def _own_gradient(capture: GradientCapture, name: str) -> Tensor:
    parameter = capture.parameters[name]
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _forget(capture: GradientCapture) -> None:
    for parameter in capture.parameters.values():
        parameter.grad = None

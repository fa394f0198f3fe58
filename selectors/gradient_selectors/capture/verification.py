"""Whether captured gradients are autograd's, looked at when a capture is attached, and what a model is made for it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.modules.dropout import _DropoutNd

from gradient_selectors.capture.batch import Batch, mean_losses
from gradient_selectors.capture.gradients import PoolGradients
from gradient_selectors.capture.kinds import TOLERANCE as RECOGNISED
from gradient_selectors.capture.passes import Passes

if TYPE_CHECKING:
    from gradient_selectors.capture.capture import GradientCapture

# Relative. Looser than for the kinds: float32 products of a few rows over a large vocabulary lose more digits.
TOLERANCE = 2e-3
HEAD_PROBE_SCALE = 100.0
ROUNDING = 2**-8  # of bfloat16, relative
ROUNDINGS = 10  # times as far as it moves autograd's own gradients; two passes differ by one to three of these
MOVE, SIZE_OF_ZEROS = 0.1, 0.2  # noise relative to the size of the weights; their size if all are zero


def probe_batch(vocabulary: int) -> Batch:
    """Two short samples of different length, the first part of each without loss."""
    ids = torch.randint(vocabulary, (2, 6), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :2] = -100
    labels[1, 4:] = -100
    return Batch(ids, labels, (6, 4))


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Modules that drop out keep everything: two passes over the same samples are then the same."""
    active = [module for module in model.modules() if isinstance(module, _DropoutNd) and module.training]
    for module in active:
        module.eval()
    try:
        yield
    finally:
        for module in active:
            module.train()


@contextmanager
def moved(parameters: Mapping[str, nn.Parameter], by: float = MOVE) -> Iterator[None]:
    """Weights with some noise, put back afterwards: zeros, as of fresh adapters, hide what the others are used for.

    All on one device. Takes as much memory as the weights for the time being; Adam's moments will take twice that.
    """
    kept = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    generator = torch.Generator(next(iter(parameters.values())).device).manual_seed(0)
    with torch.no_grad():
        for parameter in parameters.values():
            size = float(parameter.square().mean().sqrt()) or SIZE_OF_ZEROS
            parameter.add_(torch.empty_like(parameter).normal_(generator=generator), alpha=by * size)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(kept[name])


def is_rounded(model: nn.Module) -> bool:
    """Whether some of a model is held in bfloat16 or the like, so that its passes are."""
    return any(p.is_floating_point() and p.dtype.itemsize < 4 for p in model.parameters())


def has_plain_head(model: Any, passes: Passes, probe: Batch) -> bool:
    """Whether the logits are just `hidden W^T + b`, found out by comparing the two.

    The head's weight is scaled up for the probe: soft capping is invisible on the small logits of a fresh model.
    """
    module = model.get_output_embeddings()
    if type(module) is not nn.Linear:
        return False
    scaled = module.weight.detach() * HEAD_PROBE_SCALE
    name = next(name for name, other in model.named_modules() if other is module)
    with torch.no_grad():
        output = functional_call(model, {f"{name}.weight": scaled}, kwargs=passes.inputs(probe), tie_weights=False)
        expected = F.linear(passes.hidden(probe), scaled, module.bias)
    return bool((output.logits - expected).norm() <= RECOGNISED * expected.norm())


def mistake_of(capture: "GradientCapture", model: Any, probe: Batch) -> tuple[str, str] | None:
    """Compare every parameter's weighted gradient with autograd's; unequal weights tell samples apart."""
    weights_N = torch.tensor([0.3, 1.7])
    # The formulas are checked in the weights' own precision.
    autocast, capture.passes.autocast = capture.passes.autocast, None
    try:
        with moved(capture.parameters), without_dropout(model):
            found, wanted = capture.run(probe), _autograd(capture, model, probe, weights_N)
            again = wanted
            if is_rounded(model):
                with moved(capture.parameters, ROUNDING):
                    again = _autograd(capture, model, probe, weights_N)
            return find_mistake(found, wanted, weights_N, again)  # the head's factors read its weights again
    finally:
        capture.passes.autocast = autocast


def _autograd(capture: "GradientCapture", model: Any, batch: Batch, weights_N: Tensor) -> Mapping[str, Tensor | None]:
    with torch.enable_grad():
        logits_NTV = model(**capture.passes.inputs(batch)).logits.float()
        loss = (mean_losses(logits_NTV, batch.labels_NT) * weights_N.to(capture.device)).sum()
        grads = torch.autograd.grad(loss, list(capture.parameters.values()), allow_unused=True)
    return dict(zip(capture.parameters, grads, strict=True))


def find_mistake(
    gradients: PoolGradients,
    expected: Mapping[str, Tensor | None],
    weights_N: Tensor,
    again: Mapping[str, Tensor | None],
) -> tuple[str, str] | None:
    """The first parameter whose weighted gradient is not autograd's, `expected` by name, and what is wrong.

    `again`: autograd's after a change as small as rounding, for a model that rounds; else the same. Where passes round
    to 8 bits, autograd is no nearer to the truth than we are, and how far off both are is the model's own affair.
    """
    largest = max(float(want.norm()) for want in expected.values() if want is not None)
    for name, want in expected.items():
        if name not in gradients.factors:
            if want is not None and want.any():
                return name, "it is used outside the modules that were recognised"
            continue
        got = gradients.weighted_gradient_of(name, weights_N)
        if want is None or bool((got - want).norm() > _allowed(want, again[name], largest)):
            return name, "its captured gradient differs from autograd's (is a dropout of the model on?)"
    return None


def _allowed(want: Tensor, again: Tensor | None, largest: float) -> Tensor:
    """`largest`: norm of a parameter's gradient. Some are zero but for rounding, as of a bias that softmax undoes."""
    allowed: Tensor = TOLERANCE * want.norm() + 1e-7 * max(1.0, largest)
    return allowed if again is None else allowed + ROUNDINGS * (again - want).norm()


@contextmanager
def replaced(forwards: Mapping[nn.Module, Callable[..., Tensor]]) -> Iterator[None]:
    """Within it, the modules compute what they are given here."""
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module in forwards:
            del module.forward

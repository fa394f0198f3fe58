"""Whether a model keeps the samples of a batch apart, and computes each the same way every time.

Per-sample gradients mean something only if it does. Noise in a router, experts of limited capacity, statistics over a
batch: whatever it is called, it shows when the same samples are computed twice, and alone.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gradient_selectors.capture.batch import Batch
from gradient_selectors.capture.places import EntangledSamplesError
from gradient_selectors.capture.verification import is_rounded, without_dropout

SAME, SAME_ROUNDED = 2e-3, 0.05  # relative differences of a token's logits that rounding makes, in float32 and below

Trace = dict[str, tuple[list[Tensor], list[Tensor]]]
"""Inputs and outputs of modules by name, in the order in which they are done."""

Inputs = Callable[[Batch], Mapping[str, Any]]
"""How a model is called on a batch."""


def check_apart(model: nn.Module, inputs: Inputs, batch: Batch) -> None:
    """Raise EntangledSamplesError, naming the part, if a sample's output depends on chance or on its neighbours."""
    with without_dropout(model):
        why = _why_entangled(model, inputs, batch)
    if why is not None:
        raise EntangledSamplesError(f"{why}: it has no gradient of its own; turn that off, or take another model")


def _why_entangled(model: nn.Module, inputs: Inputs, batch: Batch) -> str | None:
    # In bfloat16 and the like, a token in doubt may go to another expert for no more than rounding.
    rounded = is_rounded(model)
    whole = _logits(model, inputs(batch))
    if not _same(whole, _logits(model, inputs(batch)), rounded):
        once, again = _traced(model, inputs(batch)), _traced(model, inputs(batch))
        return f"{_first_difference(model, once, again, _as_it_is)} computes the same samples differently each time"
    for row, alone in enumerate(batch.samples()):
        length = batch.lengths[row]
        if not _same(whole[row : row + 1, :length], _logits(model, inputs(alone)), rounded):
            beside, by_itself = _traced(model, inputs(batch)), _traced(model, inputs(alone))
            part = _first_difference(model, beside, by_itself, partial(_of_sample, batch, row))
            return f"{part} computes a sample differently beside others than alone"
    return None


@torch.no_grad()
def _logits(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    logits: Tensor = model(**inputs).logits.float()
    return logits


def _same(a: Tensor, b: Tensor, rounded: bool) -> bool:
    # What is not finite is not for this check: a dead model is told elsewhere, and some heads hold words at -inf.
    differences = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, a - b)
    errors = differences.norm(dim=-1) / b.nan_to_num(0, 0, 0).norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    return bool(errors.median() <= SAME_ROUNDED) if rounded else bool(errors.max() <= SAME)


def _traced(model: nn.Module, inputs: Mapping[str, Any]) -> Trace:
    trace: Trace = {}
    with _recording(model, trace):
        _logits(model, inputs)
    return trace


@contextmanager
def _recording(model: nn.Module, trace: Trace) -> Iterator[None]:
    given: dict[str, list[Tensor]] = {}

    def before(name: str, _module: nn.Module, args: Any, kwargs: Any) -> None:
        given[name] = [t.clone() for t in _tensors((args, kwargs))]  # some are written over meanwhile

    def after(name: str, _module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
        trace.setdefault(name, (given[name], [t.clone() for t in _tensors(output)]))

    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(partial(before, name), with_kwargs=True))
        handles.append(module.register_forward_hook(partial(after, name), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _first_difference(model: nn.Module, first: Trace, second: Trace, part: Callable[[Tensor], Tensor]) -> str:
    """The innermost module that makes different outputs of the same inputs."""
    for name, (inputs, outputs) in first.items():
        if name not in second:
            continue
        others, results = second[name]
        if _all_equal(inputs, others, part) and not _all_equal(outputs, results, part):
            return f"{name or 'the model'} (a {type(model.get_submodule(name)).__name__})"
    return "the model"


def _all_equal(first: list[Tensor], second: list[Tensor], part: Callable[[Tensor], Tensor]) -> bool:
    pairs = ((part(a), b) for a, b in zip(first, second, strict=False) if a.is_floating_point())
    return all(a.shape != b.shape or bool((a - b).float().norm() <= SAME * b.float().norm()) for a, b in pairs)


def _as_it_is(values: Tensor) -> Tensor:
    return values


def _of_sample(batch: Batch, row: int, values: Tensor) -> Tensor:
    """What is one sample's in a tensor of the batch, without padding, shaped as it is when the sample is alone."""
    num_samples, num_tokens = batch.input_ids_NT.shape
    if values.ndim and values.shape[0] == num_samples * num_tokens:
        return values[row * num_tokens : row * num_tokens + batch.lengths[row]]
    if values.ndim and values.shape[0] == num_samples:
        values = values[row : row + 1]
    for dim in range(1, values.ndim):
        if values.shape[dim] == num_tokens:
            values = values.narrow(dim, 0, batch.lengths[row])
    return values


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from (t for inner in value.values() for t in _tensors(inner))
    elif isinstance(value, tuple | list):
        yield from (t for inner in value for t in _tensors(inner))

"""The gradient that guards what a model already knows: self-distillation from its own past, weighted by confidence.

    (tau^2 / sum_i omega_i) sum_i omega_i KL_i,  KL_i = mean over tokens of KL(softmax(z_base / tau), softmax(z / tau))

with `omega_i` the base model's mean confidence `max_y softmax(z_base / tau)` on sample i, as in the released code of
DualSFT (arXiv 2605.06166). Its gradient with respect to a logit is `tau (p - q)` times the sample's weight, so it is
exactly zero as long as model and base agree. Logits are computed some rows at a time, as in `head`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradient_selectors.capture.batch import Batch, check_lengths, loss_rows
from gradient_selectors.capture.capture import GradientCapture
from gradient_selectors.capture.head import CHUNK_ELEMENTS


@dataclass(frozen=True)
class _Rows:
    """The positions of a batch that carry loss, right before the logits.

    Attributes:
        values: hidden states, or the logits themselves if the head is more than a linear map.
        to_logits: what makes logits of some of them.
        vocabulary: logits in a row.
    """

    values: Tensor
    to_logits: Callable[[Tensor], Tensor]
    vocabulary: int

    def probabilities(self, part: slice, temperature: float) -> Tensor:
        return (self.to_logits(self.values[part]).float() / temperature).softmax(1)

    def chunks(self) -> Iterator[slice]:
        step = max(1, CHUNK_ELEMENTS // self.vocabulary)
        for start in range(0, len(self.values), step):
            yield slice(start, start + step)


def prior_gradient(
    capture: GradientCapture, base: nn.Module, batches: Iterable[Batch], temperature: float = 2.0
) -> dict[str, Tensor]:
    """Gradient of the loss above on anchor samples, by parameter name, float32. `.grad` is left as it is.

    `base` is a frozen copy of the captured model as it was. Parameters that the loss does not touch are absent.
    Raises ValueError without any sample, and as `check_lengths` does.
    """
    total: dict[str, Tensor] = {}
    confidence = 0.0
    for batch in batches:
        check_lengths(batch)
        batch = batch.to(capture.device)
        with torch.no_grad(), capture.passes.autocasting():
            base_rows = _rows(capture, base, batch)
            weights_R, batch_confidence = _row_weights(base_rows, batch, temperature)
        confidence += batch_confidence
        _add_batch(total, capture, batch, base_rows, weights_R, temperature)
    if not confidence:
        raise ValueError("self-distillation needs at least one sample")
    return {name: gradient.div_(confidence) for name, gradient in total.items()}


def _add_batch(
    total: dict[str, Tensor],
    capture: GradientCapture,
    batch: Batch,
    base_rows: _Rows,
    weights_R: Tensor,
    temperature: float,
) -> None:
    """Add the gradient of `tau^2 sum_i omega_i KL_i` to `total`: by chunks at the head, then once through the rest.

    `weights_R` are `omega_i` over the number of sample i's rows.
    """
    with torch.enable_grad(), capture.passes.autocasting():
        rows = _rows(capture, capture._model, batch)
    at_head = _head_parameters(capture)
    seeds = torch.zeros_like(rows.values)
    for part in rows.chunks():
        leaf = rows.values[part].detach().requires_grad_()
        with torch.enable_grad(), capture.passes.autocasting():
            logits = rows.to_logits(leaf).float()
        with torch.no_grad(), capture.passes.autocasting():
            errors = (logits / temperature).softmax(1) - base_rows.probabilities(part, temperature)
        errors *= temperature * weights_R[part, None]
        seeds[part], *grads = torch.autograd.grad(logits, [leaf, *at_head.values()], errors)
        _add(total, at_head, grads)
    if rows.values.requires_grad:
        parameters = capture.parameters
        _add(total, parameters, torch.autograd.grad(rows.values, [*parameters.values()], seeds, allow_unused=True))


def _add(total: dict[str, Tensor], names: Iterable[str], grads: Sequence[Tensor | None]) -> None:
    for name, grad in zip(names, grads, strict=True):
        if grad is not None:
            total[name] = total[name].add_(grad) if name in total else grad.float()


def _rows(capture: GradientCapture, model: Any, batch: Batch) -> _Rows:
    predicts_NT = loss_rows(batch.labels_NT)[0]
    head = model.get_output_embeddings()
    if capture.passes.head is None:
        logits = model(**capture.passes.inputs(batch)).logits[predicts_NT]
        return _Rows(logits, lambda values: values, logits.shape[1])
    hidden = model.base_model(**capture.passes.inputs(batch)).last_hidden_state[predicts_NT]
    return _Rows(hidden, head, head.weight.shape[0])


def _head_parameters(capture: GradientCapture) -> Mapping[str, Tensor]:
    """Trainable parameters of a head that is captured on its own path; they may be tied to the embedding."""
    names = set(capture.head_parameters.values())
    return {name: parameter for name, parameter in capture.parameters.items() if name in names}


def _row_weights(rows: _Rows, batch: Batch, temperature: float) -> tuple[Tensor, float]:
    """`omega_i` over the number of sample i's rows for each of its rows, and the sum of all omega."""
    segments = loss_rows(batch.labels_NT)[2]
    confidence_R = torch.cat([rows.probabilities(part, temperature).amax(1) for part in rows.chunks()])
    counts_N = torch.tensor(segments.offsets, device=confidence_R.device).diff()
    omega_N = segments.sum(confidence_R) / counts_N
    return (omega_N / counts_N)[segments.owners_R.to(omega_N.device)], float(omega_N.sum())

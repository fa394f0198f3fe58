"""Passes over a causal language model that tap nothing: losses alone, and the gradient that plain training takes."""

import inspect
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradient_selectors.capture.batch import Batch, check_lengths, mean_losses
from gradient_selectors.capture.factors import Factor
from gradient_selectors.capture.head import Head, HeadBias, HeadWeight, head_forward_backward, head_losses
from gradient_selectors.capture.shards import Shards, lying_as, own_rows


def checked(batch: Batch) -> Batch:
    """The batch. Raises ValueError if a sample has no label after its first token, or one beyond its length."""
    check_lengths(batch, labelled=True)
    return batch


@dataclass
class Passes:
    """A model, and how it is called.

    Attributes:
        model: a transformers causal LM.
        autocast: dtype of the passes, or None for the model's own.
        head: its head where the logits are just `hidden W^T + b`, else None.
        by_length: whether it computes a text as its length says.
        shards: how the model is sharded; None where it is whole.
    """

    model: Any
    autocast: torch.dtype | None
    head: nn.Linear | None = None
    by_length: bool = False
    shards: Shards | None = None

    def losses(self, batch: Batch) -> Tensor:
        """Mean loss of each sample (nats per token), (N,) float32: a forward pass only."""
        with self.passing(), torch.no_grad(), self.autocasting():
            if self.head is None:
                return mean_losses(self.model(**self.inputs(batch)).logits, batch.labels_NT)
            hidden_NTd = self.hidden(batch)  # before the head: a sharded one is whole from then on
            return head_losses(self.converted_head(), hidden_NTd, batch.labels_NT)

    def train(self, batch: Batch, weights_N: Tensor, head_parameters: Mapping[str, nn.Parameter]) -> Tensor:
        """Add the gradient of `sum_i w_i loss_i` to `.grad`; the losses (nats per token), (N,) float32.

        `head_parameters`: the trained parameters of `head`, by their names within it.
        """
        with self.passing(), torch.enable_grad():
            if self.head is None:
                return self._train_logits(batch, weights_N)
            return self._train_chunked_head(batch, weights_N, head_parameters)

    def _train_logits(self, batch: Batch, weights_N: Tensor) -> Tensor:
        with self.autocasting():
            logits_NTV = self.model(**self.inputs(batch)).logits.float()
        losses_N = mean_losses(logits_NTV, batch.labels_NT)
        torch.autograd.backward([(losses_N * weights_N).sum()])
        return losses_N.detach()

    def _train_chunked_head(
        self, batch: Batch, weights_N: Tensor, head_parameters: Mapping[str, nn.Parameter]
    ) -> Tensor:
        """The head some positions at a time: all logits at once take more memory than the rest of the pass."""
        with self.autocasting():
            hidden_NTd = self.hidden(batch)
            with torch.no_grad():
                head, trainable = self.converted_head(), bool(head_parameters)
                losses_N, grad_NTd, rows = head_forward_backward(
                    head, hidden_NTd.detach(), batch.labels_NT, None, trainable=trainable
                )
                grad_NTd.mul_(weights_N.to(grad_NTd.dtype)[:, None, None])
        if hidden_NTd.requires_grad:
            torch.autograd.backward([hidden_NTd], [grad_NTd])
        weight = HeadWeight(head, rows)
        factors: dict[str, Factor] = {"weight": weight, "bias": HeadBias(weight)}
        for name, parameter in head_parameters.items():
            _add_to_gradient(parameter, factors[name], weights_N, self.shards)
        return losses_N

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """No attention mask: padding is on the right, where a causal model never looks back from.

        Positions are given for every sample, else a learned position embedding would be called once for all of them
        and its gradient summed over the pool (the failure of opacus on GPT-2).
        """
        inputs: dict[str, Any] = {"input_ids": batch.input_ids_NT, "use_cache": False}
        if "position_ids" in inspect.signature(self.model.forward).parameters:
            num_samples, num_tokens = batch.input_ids_NT.shape
            positions_T = torch.arange(num_tokens, device=batch.input_ids_NT.device)
            positions_NT = positions_T.expand(num_samples, num_tokens)
            if self.by_length:  # padding must not make a text longer
                lengths_N1 = torch.tensor(batch.lengths, device=positions_T.device)[:, None]
                positions_NT = positions_NT.minimum(lengths_N1 - 1)
            inputs["position_ids"] = positions_NT
        return inputs

    def hidden(self, batch: Batch) -> Tensor:
        """The last hidden states, (N, T, d)."""
        if self.shards is None:
            hidden: Tensor = self.model.base_model(**self.inputs(batch)).last_hidden_state
            return hidden
        # A sharded model is whole only within its own call, so that is made, and the head hands on what it is given.
        assert self.head is not None
        head: nn.Module = self.head
        head.forward = torch.clone
        try:
            handed_on: Tensor = self.model(**self.inputs(batch)).logits
        finally:
            del head.forward
        return handed_on

    def passing(self) -> AbstractContextManager[None]:
        """To be around whatever calls the model."""
        return nullcontext() if self.shards is None else self.shards.passing()

    def converted_head(self) -> Head:
        """The head in the dtype of the passes; a copy of a sharded one, whose weight is gone after the pass."""
        assert self.head is not None
        weight, bias = self.head.weight, self.head.bias
        dtype = self.autocast or weight.dtype
        copies = self.shards is not None
        return Head(weight.to(dtype, copy=copies), None if bias is None else bias.to(dtype, copy=copies))

    def autocasting(self) -> torch.autocast:
        """The context of a pass."""
        device = next(self.model.parameters()).device
        return torch.autocast(device.type, self.autocast, enabled=self.autocast is not None)


@torch.no_grad()
def _add_to_gradient(parameter: nn.Parameter, factor: Factor, weights_N: Tensor, shards: Shards | None) -> None:
    """Add `sum_i w_i g_i` to `.grad`, which is there already for a head that is tied to the embedding."""
    grad = parameter.grad
    if shards is not None:
        rows = shards.scatter(weighted(factor, weights_N, parameter.shape, weights_N.device))
        parameter.grad = lying_as(parameter, rows if grad is None else own_rows(grad).add_(rows))
        return
    if grad is not None and grad.dtype == torch.float32:
        factor.add_weighted(weights_N, grad, begin=False)
        return
    added = torch.empty_like(parameter, dtype=torch.float32)
    factor.add_weighted(weights_N, added, begin=True)
    parameter.grad = added.to(parameter.dtype) if grad is None else grad.add_(added)


def weighted(factor: Factor, weights_N: Tensor, shape: torch.Size, device: torch.device) -> Tensor:
    """`sum_i w_i g_i` of one factor, float32, on the device of the factor; the weights may lie elsewhere."""
    out = torch.zeros(shape, dtype=torch.float32, device=device)
    if bool((weights_N != 0).any()):
        factor.add_weighted(weights_N, out, begin=True)
    return out

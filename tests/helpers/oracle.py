"""Independent answers: autograd one sample at a time, everything dense, no code of the library in the mathematics.

In float64, so that what is compared with them is measured by its own rounding alone: in float32 torch's answers are no
better than ours, and how far off both are depends on the processor's kernels.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from gradient_selectors.capture.batch import Batch
from gradient_selectors.capture.capture import GradientCapture
from torch import Tensor
from torch.nn import functional as F

from stream_trainer.models.loading import load_model
from stream_trainer.settings.schema import LoraSettings, ModelSettings
from tests.helpers.tiny_models import CONFIGS, settings_of, shake, with_config

GEMMA = {**CONFIGS["llama"], "model_type": "gemma2", "head_dim": 8, "final_logit_softcapping": 1.0}
QWEN3 = {**CONFIGS["llama"], "model_type": "qwen3", "head_dim": 8}

MODELS: dict[str, Callable[[], ModelSettings]] = {
    "llama": lambda: settings_of("llama"),
    "qwen2_tied": lambda: settings_of("qwen2"),
    "gpt2": lambda: settings_of("gpt2"),
    "lora": lambda: settings_of("llama", lora=LoraSettings(rank=3, alpha=4.0)),
    "checkpointing": lambda: settings_of("llama", gradient_checkpointing=True),
    "lora_checkpointing": lambda: settings_of(
        "gpt2", lora=LoraSettings(rank=2, alpha=3.0), gradient_checkpointing=True
    ),
    "gemma2_capped": lambda: with_config("llama", **GEMMA),
    "qwen3_head_norms": lambda: with_config("llama", **QWEN3),
}


def make_model(kind: str) -> Any:
    """A tiny model whose every weight, norms and adapters too, is away from its initial value.

    Those of a frozen base as well: as they are made they are so small that norms blow up every rounding, and the
    gradients of autograd itself were off by 1e-5. Duck-typed, for tests reach into it.
    """
    model = load_model(MODELS[kind](), seed=0).model
    shake(model, frozen=True)
    return model


def make_batch(lengths: tuple[int, ...], prompt: int = 3, seed: int = 1) -> Batch:
    """Random samples padded on the right, the first `prompt` tokens without loss."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 300, (len(lengths), max(lengths)), generator=generator)
    labels = ids.clone()
    labels[:, :prompt] = -100
    for i, length in enumerate(lengths):
        ids[i, length:] = 0
        labels[i, length:] = -100
    return Batch(ids, labels, lengths)


@dataclass(frozen=True)
class Dense:
    """Per-sample gradients written out: (N, total) float64, and where each parameter lies in a row."""

    gradients: Tensor
    losses: Tensor
    parameters: dict[str, Tensor]

    def flat(self, values: Mapping[str, Tensor]) -> Tensor:
        """Values of all parameters in a row's order, float64."""
        return torch.cat([values[name].detach().flatten().double() for name in self.parameters])

    def update(self, weights_N: Tensor) -> Tensor:
        """`sum_i w_i g_i`, (total,)."""
        return weights_N.double() @ self.gradients

    def gram(self, preconditioner: Mapping[str, Tensor] | None = None) -> Tensor:
        """`<g_i, P g_j>`, (N, N); P = 1 without any."""
        scaled = self.gradients if preconditioner is None else self.gradients * self.flat(preconditioner)
        return scaled @ self.gradients.T


def dense(model: Any, batch: Batch, autocast: torch.dtype | None = None) -> Dense:
    """Each sample by itself, without padding, through transformers' own forward and torch's own loss.

    With `autocast`, as torch rounds the passes under it: the measure of what rounding is to be put up with.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows, losses = [], []
    with in_float64(model) if autocast is None else torch.autocast("cpu", autocast):
        for i, length in enumerate(batch.lengths):
            ids, labels = batch.input_ids_NT[i : i + 1, :length], batch.labels_NT[i, :length]
            logits = model(input_ids=ids, use_cache=False).logits[0]
            loss = F.cross_entropy(logits[:-1].to(torch.promote_types(logits.dtype, torch.float32)), labels[1:])
            grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            filled = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters.values(), grads, strict=True)]
            rows.append(torch.cat([g.flatten() for g in filled]).double())
            losses.append(loss.detach().double())
    return Dense(torch.stack(rows), torch.stack(losses), parameters)


@contextmanager
def in_float64(model: Any) -> Iterator[None]:
    """Within it, the model computes in double precision (some norms of transformers excepted, which never do)."""
    tensors = [t for t in chain(model.parameters(), model.buffers()) if t.is_floating_point()]
    kept, config = [tensor.data for tensor in tensors], model.config
    how = getattr(config, "_experts_implementation", None)
    for tensor in tensors:
        tensor.data = tensor.data.double()
    config._experts_implementation = "eager"  # torch's grouped product has no float64
    try:
        yield
    finally:
        config._experts_implementation = how
        for tensor, data in zip(tensors, kept, strict=True):
            tensor.data = data


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def random_like(capture: GradientCapture, seed: int) -> dict[str, Tensor]:
    """A positive tensor for each parameter, spread over two orders of magnitude like a preconditioner."""
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.exp(torch.randn(p.shape, generator=generator)) for n, p in capture.parameters.items()}

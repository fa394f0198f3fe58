"""Independent answers: autograd one sample at a time, everything dense, no code of the library in the mathematics."""

from dataclasses import dataclass
from typing import Any

import torch
from gradient_selectors.capture.batch import Batch
from gradient_selectors.capture.capture import GradientCapture
from torch import Tensor
from torch.nn import functional as F

from stream_trainer.models.loading import load_model
from stream_trainer.settings.schema import LoraSettings
from tests.helpers.tiny_models import CONFIGS, settings_of, shake, with_config

GEMMA = {**CONFIGS["llama"], "model_type": "gemma2", "head_dim": 8, "final_logit_softcapping": 1.0}
QWEN3 = {**CONFIGS["llama"], "model_type": "qwen3", "head_dim": 8}

MODELS = {
    "llama": lambda: settings_of("llama"),
    "qwen2_tied": lambda: settings_of("qwen2"),
    "gpt2": lambda: settings_of("gpt2"),
    "lora": lambda: settings_of("llama", lora=LoraSettings(rank=3, alpha=7.0)),
    "checkpointing": lambda: settings_of("llama", gradient_checkpointing=True),
    "lora_checkpointing": lambda: settings_of("gpt2", lora=LoraSettings(rank=2), gradient_checkpointing=True),
    "gemma2_capped": lambda: with_config("llama", **GEMMA),
    "qwen3_head_norms": lambda: with_config("llama", **QWEN3),
}


def make_model(kind: str) -> torch.nn.Module:
    """A tiny model whose every weight, norms and adapters too, is away from its initial value."""
    model = load_model(MODELS[kind](), seed=0).model
    shake(model)
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
    """Per-sample gradients written out: (N, total), and where each parameter lies in a row."""

    gradients: Tensor
    losses: Tensor
    parameters: dict[str, Tensor]

    def flat(self, values: dict[str, Tensor]) -> Tensor:
        return torch.cat([values[name].flatten() for name in self.parameters])


def dense(model: Any, batch: Batch) -> Dense:
    """Each sample by itself, without padding, through transformers' own forward and torch's own loss."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows, losses = [], []
    for i, length in enumerate(batch.lengths):
        ids, labels = batch.input_ids_NT[i : i + 1, :length], batch.labels_NT[i, :length]
        logits = model(input_ids=ids, use_cache=False).logits[0]
        loss = F.cross_entropy(logits[:-1].to(torch.promote_types(logits.dtype, torch.float32)), labels[1:])
        grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        filled = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters.values(), grads, strict=True)]
        rows.append(torch.cat([g.flatten() for g in filled]))
        losses.append(loss.detach())
    return Dense(torch.stack(rows), torch.stack(losses), parameters)


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def random_like(capture: GradientCapture, seed: int) -> dict[str, Tensor]:
    """A positive tensor for each parameter, spread over two orders of magnitude like a preconditioner."""
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.exp(torch.randn(p.shape, generator=generator)) for n, p in capture.parameters.items()}

"""The optimizer and its learning rate."""

import math

import torch
from gradient_selectors.capture.capture import GradientCapture
from gradient_selectors.mask.masked_adamw import MaskedAdamW

from stream_trainer.settings.schema import OptimizerSettings
from stream_trainer.settings.selection import SelectionSettings


def make_optimizer(
    capture: GradientCapture, settings: OptimizerSettings, selection: SelectionSettings
) -> torch.optim.AdamW | MaskedAdamW:
    """AdamW over the trainable parameters; biases and norms (one dimension) are not decayed.

    With a mask it is the one that keeps moments for unmasked weights only; nothing moves before it is given a mask.
    """
    matrices = [(name, p) for name, p in capture.parameters.items() if p.ndim > 1]
    vectors = [(name, p) for name, p in capture.parameters.items() if p.ndim <= 1]
    groups = [
        {"params": members, "weight_decay": decay}
        for members, decay in ((matrices, settings.weight_decay), (vectors, 0.0))
        if members
    ]
    rate, betas, eps = settings.learning_rate, settings.betas, settings.eps
    if selection.mask != "none":
        return MaskedAdamW(groups, lr=rate, betas=betas, eps=eps, granularity=selection.dual_sft.granularity)
    return torch.optim.AdamW(groups, lr=rate, betas=betas, eps=eps, fused=True)  # one pass over memory, not about ten


def learning_rate(settings: OptimizerSettings, updates: int) -> float:
    """Learning rate of the update that follows `updates` earlier ones."""
    if updates < settings.warmup_steps:
        return settings.learning_rate * (updates + 1) / settings.warmup_steps
    if settings.schedule == "constant" or settings.decay_steps is None:
        return settings.learning_rate
    progress = min(1.0, (updates - settings.warmup_steps) / settings.decay_steps)
    remaining = 1 - progress if settings.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return settings.learning_rate * (settings.final_share + (1 - settings.final_share) * remaining)

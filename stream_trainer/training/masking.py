"""The mask stage: which weights may move, from a file or chosen anew while training goes on."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradient_selectors.capture.capture import GradientCapture
from gradient_selectors.capture.gradients import Gradient
from gradient_selectors.mask.dual_sft import DualSft, Response
from gradient_selectors.mask.masked_adamw import MaskChange, MaskedAdamW
from gradient_selectors.mask.rule import MaskRule
from gradient_selectors.mask.self_distillation import prior_gradient
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from stream_trainer.errors import SettingsError
from stream_trainer.records import Sample
from stream_trainer.samples.collate import micro_batches
from stream_trainer.settings.selection import DualSftSettings
from stream_trainer.training.target import MICRO_BATCH, mean_gradient


@dataclass(frozen=True)
class Anchors:
    """What the model knows already and should keep: samples, and the model that still knows it.

    Attributes:
        base: None where self-distillation counts for nothing: it takes as much memory as the model.
    """

    base: nn.Module | None
    samples: Sequence[Sample]

    @classmethod
    def of(cls, model: Any, samples: Sequence[Sample], lambda_prior: float) -> "Anchors":
        """With a frozen copy of a transformers model as it is now: make it before a checkpoint is restored."""
        return cls(copy.deepcopy(model).requires_grad_(False) if lambda_prior else None, samples)


@dataclass
class Masking:
    """DualSFT in the service.

    Attributes:
        last: what the last refresh changed; None before the first one of this process.
    """

    method: DualSft
    optimizer: MaskedAdamW
    anchors: Anchors | None = None
    last: MaskChange | None = None

    def follow(self, capture: GradientCapture, gradient: Gradient, target: Gradient, pad_id: int) -> bool:
        """Take in the gradient of a step's update, and refresh the mask if it is time. Returns whether it was.

        `gradient` must be finite, and neither masked nor clipped yet.
        """
        self.method.observe(gradient)
        if not self.method.due:
            return False
        prior, answers = self._guards(capture, pad_id)
        self.last = self.method.refresh(self.optimizer, target, prior, answers)
        return True

    def _guards(self, capture: GradientCapture, pad_id: int) -> tuple[Gradient | None, Gradient | None]:
        """The gradients of self-distillation and of the anchors' loss, each where it counts for something."""
        if self.anchors is None:
            return None, None
        prior, answers, samples = None, None, self.anchors.samples
        if self.anchors.base is not None:
            prior = prior_gradient(capture, self.anchors.base, micro_batches(samples, pad_id, MICRO_BATCH))
        if self.method.response.lambda_answers:
            answers = mean_gradient(capture, samples, pad_id)
        return prior, answers

    @property
    def age(self) -> int:
        """Updates since the mask was chosen."""
        return self.method.age


def make_dual_sft(settings: DualSftSettings, learning_rate: float) -> DualSft:
    """The method with the settings' rule; the learning rate weighs the term of the curvature."""
    rule = MaskRule(
        settings.density, settings.granularity, settings.absolute, settings.layer_quota, settings.module_quota
    )
    curvature_rate = learning_rate if settings.second_order else 0.0
    response = Response(curvature_rate, settings.lambda_new, settings.lambda_prior, settings.lambda_answers)
    return DualSft(rule, response, settings.refresh_steps, settings.decay)


def start_from(optimizer: MaskedAdamW, path: Path) -> None:
    """Give the optimizer a mask as `stream-trainer select dual-sft` writes it: bool, by parameter name.

    Raises SettingsError if the file cannot be read, does not fit the model, or keeps no weight.
    """
    setting = f"selection.mask_path={path}"
    remedy = "name the mask.safetensors of a selection with this model"
    try:
        masks = load_file(path)
        change = optimizer.replace_mask(masks)
    except (OSError, SafetensorError) as error:
        raise SettingsError(f"{setting} cannot be read ({error}); {remedy}") from error
    except ValueError as error:
        raise SettingsError(f"{setting} does not fit ({error}); {remedy}") from error
    if not change.kept:
        raise SettingsError(f"{setting} keeps no weight at all; {remedy}")

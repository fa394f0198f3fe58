"""The optimizer and its learning rate."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from gradient_selectors import MaskedAdamW
from gradient_selectors.capture.shards import is_sharded, own_part
from gradient_selectors.mask.masked_adamw import parameters_by_name
from gradient_selectors.world.base import World
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from stream_trainer.errors import SettingsError
from stream_trainer.models.refusals import loading
from stream_trainer.settings.schema import OptimizerSettings
from stream_trainer.settings.sections.selection import SelectionSettings

if TYPE_CHECKING:
    from stream_trainer.training.moments import NamedAdamW8bit


class NamedAdamW(torch.optim.AdamW):
    """Torch's AdamW, whose state goes by parameter name, as that of `MaskedAdamW` does."""

    density = 1.0

    def __init__(self, params: Iterable[dict[str, Any]], **options: Any) -> None:
        """`params`: groups of (name, parameter) pairs."""
        super().__init__(params, **options)
        self.parameters = parameters_by_name(self.param_groups)

    def state_dict(self) -> dict[str, Any]:
        """Without the settings of groups: these stay as they are given. Tensors share memory with the live ones."""
        return {
            f"{name}.{field}": value
            for name, parameter in self.parameters.items()
            for field, value in self.state.get(parameter, {}).items()
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a copy of what `state_dict` returned, or of a whole state: a rank takes its own of it.

        Raises ValueError, naming a parameter that does not fit.
        """
        if any(key.endswith(".kept") for key in state_dict):
            raise ValueError("it was made with a mask; set selection.mask to fixed or dual_sft")
        if any(key.endswith(".state1") for key in state_dict):
            raise ValueError("it was made with moments in 8 bits; set optimizer.moments to int8")
        found: dict[str, dict[str, Tensor]] = {}
        for key, tensor in state_dict.items():
            name, _, field = key.rpartition(".")
            found.setdefault(name, {})[field] = self._fitting(name, field, tensor)
        self.state.clear()
        for name, fields in found.items():
            self.state[self.parameters[name]] = fields

    def _fitting(self, name: str, field: str, tensor: Tensor) -> Tensor:
        parameter = self.parameters.get(name)
        if parameter is None:
            raise ValueError(f"it holds optimizer state of {name}, which is not trained")
        if tensor.dim() > 0 and tensor.shape != parameter.shape:
            raise ValueError(f"{field} of {name} is {tuple(tensor.shape)}, not {tuple(parameter.shape)}")
        if not tensor.dim():
            return tensor.clone().to(parameter.device)  # a fused update has the step there, too
        return tensor.clone() if is_sharded(tensor) else own_part(parameter, tensor)


def make_optimizer(
    model: nn.Module, settings: OptimizerSettings, selection: SelectionSettings, world: World | None = None
) -> "NamedAdamW | NamedAdamW8bit | MaskedAdamW":
    """AdamW over the model's trainable parameters; biases and norms (one dimension) are not decayed.

    With a mask it is the one that keeps moments for unmasked parameters only; nothing moves before it is given a mask.
    `world`: the ranks on which the model may lie in rows. Raises SettingsError if the file of a mask to start from does
    not fit, or bitsandbytes is missing.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [(name, p) for name, p in trained if p.ndim > 1]
    vectors = [(name, p) for name, p in trained if p.ndim <= 1]
    groups = [
        {"params": members, "weight_decay": decay}
        for members, decay in ((matrices, settings.weight_decay), (vectors, 0.0))
        if members
    ]
    rate, betas, eps = settings.learning_rate, settings.betas, settings.eps
    if selection.mask != "none":
        granularity = selection.dual_sft.granularity
        masked = MaskedAdamW(groups, lr=rate, betas=betas, eps=eps, granularity=granularity, world=world)
        if selection.mask_path is not None:
            start_from(masked, selection.mask_path)
        return masked
    if settings.moments == "int8":
        with loading("optimizer.moments=int8", "set optimizer.moments to float32", "quantised"):
            from stream_trainer.training.moments import NamedAdamW8bit
        return NamedAdamW8bit(groups, lr=rate, betas=betas, eps=eps)
    return NamedAdamW(groups, lr=rate, betas=betas, eps=eps, fused=True)  # one pass over memory, not about ten


def start_from(optimizer: MaskedAdamW, path: Path) -> None:
    """Give the optimizer a mask as `stream-trainer select dual-sft` writes it: bool, by parameter name.

    Raises SettingsError if the file cannot be read, does not fit the model, or keeps no parameter.
    """
    setting = f"selection.mask_path={path}"
    remedy = "name the mask.safetensors of a selection with this model"
    try:
        change = optimizer.replace_mask(load_file(path))
    except (OSError, SafetensorError) as error:
        raise SettingsError(f"{setting} cannot be read ({error}); {remedy}") from error
    except ValueError as error:
        raise SettingsError(f"{setting} does not fit ({error}); {remedy}") from error
    if not change.kept:
        raise SettingsError(f"{setting} keeps no weight at all; {remedy}")


def learning_rate(settings: OptimizerSettings, updates: int) -> float:
    """Learning rate of the update that follows `updates` earlier ones."""
    if updates < settings.warmup_steps:
        return settings.learning_rate * (updates + 1) / settings.warmup_steps
    if settings.schedule == "constant" or settings.decay_steps is None:
        return settings.learning_rate
    progress = min(1.0, (updates - settings.warmup_steps) / settings.decay_steps)
    remaining = 1 - progress if settings.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return settings.learning_rate * (settings.final_share + (1 - settings.final_share) * remaining)

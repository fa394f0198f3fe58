"""Selection in transformers' `Trainer`, and in trainers derived from it, such as TRL's `SFTTrainer`."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gradient_selectors.engine import Batches, SelectionEngine
from gradient_selectors.mask.dual_sft import DualSft
from gradient_selectors.route.gast import Gast
from gradient_selectors.state import flatten, unflatten
from gradient_selectors.target import Target
from gradient_selectors.views.scoring import Scoring
from gradient_selectors.weigh.selector import Selector

TENSORS, REST = "selection.safetensors", "selection.json"


class SelectionMixin:
    """Put before a trainer's class: each batch of the loader is then a pool of candidates that the engine selects from.

    Examples:
        >>> from gradient_selectors.integrations.transformers import SelectionMixin
        >>> from transformers import Trainer
        >>> class SelectingTrainer(SelectionMixin, Trainer):
        ...     pass

    It takes the trainer's own arguments and those of `SelectionEngine`, by name. `per_device_train_batch_size` is the
    number of candidates; the selector's `batch_size` says how many enter the update. Checkpoints of the trainer hold
    the engine's state, and `resume_from_checkpoint` brings it back.
    """

    def __init__(
        self,
        *args: Any,
        selector: Selector,
        target: Target | Batches | None = None,
        refresh_steps: int = 4,
        scoring: Scoring | None = None,
        route: Gast | None = None,
        mask: DualSft | None = None,
        preconditioner_warmup_steps: int = 1,
        **kwargs: Any,
    ) -> None:
        """Raises ValueError for settings of the trainer under which a step would not be what it says."""
        super().__init__(*args, **kwargs)
        self.engine: SelectionEngine | None = None
        self._make_engine = partial(
            SelectionEngine,
            selector=selector,
            target=target,
            refresh_steps=refresh_steps,
            scoring=scoring,
            route=route,
            mask=mask,
            preconditioner_warmup_steps=preconditioner_warmup_steps,
        )
        self._resume_from: Path | None = None
        trainer: Any = self
        _check(trainer.args)
        trainer.add_callback(_KeepState(self))

    def training_step(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        num_items_in_batch: Any = None,  # noqa: ARG002
    ) -> Tensor:
        """One pass over the candidates. Returns the mean loss of those that enter the update, before it."""
        trainer: Any = self
        model.train()
        if self.engine is None:
            self.engine = self._attach(trainer.accelerator.unwrap_model(model))
        decision = self.engine.backward(trainer._prepare_inputs(inputs))
        losses_N = self.engine.losses_N
        return losses_N[decision.selected].mean() if decision.selected else losses_N.new_zeros(())

    def _attach(self, model: nn.Module) -> SelectionEngine:
        """The optimizer exists by the first step, and not before."""
        trainer: Any = self
        optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # accelerate wraps it
        autocast = torch.bfloat16 if trainer.args.bf16 else None
        engine = self._make_engine(model, optimizer, autocast=autocast)
        if self._resume_from is not None and (self._resume_from / REST).exists():
            rest = json.loads((self._resume_from / REST).read_text())
            engine.load_state_dict(unflatten(load_file(self._resume_from / TENSORS), rest))
        return engine

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        self._resume_from = Path(resume_from_checkpoint)
        trainer: Any = super()
        trainer._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)

    def save_selection(self, directory: Path) -> None:
        """Write the engine's state into a checkpoint of the trainer."""
        if self.engine is not None:
            tensors, rest = flatten(self.engine.state_dict())
            save_file({path: tensor.detach().contiguous() for path, tensor in tensors.items()}, directory / TENSORS)
            (directory / REST).write_text(json.dumps(rest))


class _KeepState(TrainerCallback):  # type: ignore[misc]
    """Adds the engine's state to each checkpoint."""

    def __init__(self, trainer: SelectionMixin) -> None:
        self._trainer = trainer

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        **_: Any,
    ) -> None:
        self._trainer.save_selection(Path(args.output_dir) / f"checkpoint-{state.global_step}")


def _check(args: TrainingArguments) -> None:
    if args.gradient_accumulation_steps != 1:
        raise ValueError(
            f"gradient_accumulation_steps={args.gradient_accumulation_steps} would select from parts of a batch; "
            "set it to 1 and raise per_device_train_batch_size"
        )
    if args.fp16:
        raise ValueError("fp16=True loses small gradients to underflow; set bf16=True or neither")
    if args.world_size != 1 or args.n_gpu > 1:
        raise ValueError("selection runs in one process on one device; start the trainer so")

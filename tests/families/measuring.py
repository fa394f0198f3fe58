"""Whether a family can be trained: a sample's loss and gradient in a padded batch against autograd's of it alone."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from gradient_selectors import Batch, UnsupportedParameterError
from gradient_selectors.capture.capture import GradientCapture

from stream_trainer.errors import SettingsError
from stream_trainer.models.loading import load_model
from stream_trainer.settings.schema import LoraSettings, ModelSettings
from tests.families.configurations import FAMILIES, Family
from tests.helpers.oracle import Dense, dense, make_batch, relative_error
from tests.helpers.tiny_models import shake

EXACT = 1e-5  # relative
ROUNDING = 10.0  # times torch's own
LENGTHS = (12, 7, 9, 5)  # on both sides of what the small configurations call long
YES, UNSUPPORTED = "yes", "no exact per-sample gradient for trainable parameter"

INTRO = """\
<!-- Written by python -m tests.families.measuring. Change the code, then run it again. -->

# Models

A small model of every family here was built from random weights and measured. In full, every weight is trained. With
LoRA, adapters of all linear layers are. "Yes" means that batches change nothing. The loss and the gradient of a sample
in a padded batch are those of the sample alone, to 1e-5.

Elsewhere the line says which parameter stands in the way. `model.freeze` leaves parameters out by their names. In a
mixture of experts, routers and experts are trained in full. LoRA adapts the layers around them.

Every model is checked when training begins, whatever it is called. A part that computes a sample by chance, or in
another way beside others than alone, is refused by name.
"""
PAGE = Path(__file__).parents[2] / "docs" / "reference" / "models.md"


def verdict(family: Family, lora: bool) -> str:
    """`yes`, or the line of the refusal. Raises AssertionError for a family that is accepted and wrong."""
    adapters = LoraSettings(rank=3, alpha=4.0) if lora else None
    try:
        model: Any = load_model(ModelSettings(config=family.config, tokenizer="bytes", lora=adapters), seed=0).model
        shake(model, frozen=True)
        capture = GradientCapture(model)
    except (UnsupportedParameterError, SettingsError) as refusal:
        return str(refusal)
    batch = make_batch(LENGTHS)
    gradients, alone = capture.run(batch), dense(model, batch)
    assert relative_error(gradients.losses_N, alone.losses) < EXACT, f"{family.title}: loss"
    for i, one_N in enumerate(torch.eye(len(LENGTHS))):
        error = relative_error(alone.flat(gradients.weighted_gradient(one_N)), alone.gradients[i])
        assert error < EXACT or error < ROUNDING * _of_torch(model, batch, i, alone), f"{family.title}: sample {i}"
    return YES


def _of_torch(model: Any, batch: Batch, i: int, alone: Dense) -> float:
    """How far torch's own gradient of a sample is off in float32: some are near a cancellation."""
    ids, labels = batch.input_ids_NT[i : i + 1, : batch.lengths[i]], batch.labels_NT[i, : batch.lengths[i]]
    loss = torch.nn.functional.cross_entropy(model(input_ids=ids, use_cache=False).logits[0, :-1], labels[1:])
    found = torch.autograd.grad(loss, list(alone.parameters.values()), allow_unused=True, materialize_grads=True)
    return relative_error(torch.cat([gradient.flatten() for gradient in found]), alone.gradients[i])


def page(rows: Iterable[tuple[Family, str, str]]) -> str:
    """The page of the documents. A row: family, verdict in full, verdict with LoRA."""
    lines = ["| family | `model_type` | in full | with LoRA |", "| --- | --- | --- | --- |"]
    for family, full, lora in rows:
        has_experts = any("experts" in name for name in family.config)
        around = f"{YES}, around the experts" if has_experts and lora == YES else _cell(lora)
        lines.append(f"| {family.title} | `{family.config['model_type']}` | {_cell(full)} | {around} |")
    return INTRO + "\n" + "\n".join(lines) + "\n"


def _cell(verdict: str) -> str:
    """What is in the way, without a remedy or another library's own words."""
    if verdict == YES:
        return YES
    what = verdict.partition("(")[0].partition(":")[0].strip()
    return f"no: `{what.rpartition(' ')[2]}`" if what.startswith(UNSUPPORTED) else f"no: {what}"


def rows() -> Iterator[tuple[Family, str, str]]:
    """Every family, measured: a minute or two."""
    for family in FAMILIES:
        yield family, verdict(family, lora=False), verdict(family, lora=True)


if __name__ == "__main__":
    PAGE.write_text(page(rows()))

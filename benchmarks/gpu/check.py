"""Whether the engine's update with equal coefficients is that of plain autograd: else nothing is timed."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from gradient_selectors import Decision, Equal, Interaction, Selector
from gradient_selectors.weigh.selector import equal_coefficients
from torch import Tensor

from benchmarks.gpu.methods import Bench, as_batch
from benchmarks.gpu.models import pools
from benchmarks.gpu.shapes import CHOSEN, Case
from benchmarks.step_cost.agreement import DisagreementError

# Relative. Under autocast each side rounds in other places, to three digits.
TOLERANCES: Mapping[torch.dtype | None, float] = {None: 1e-4, torch.bfloat16: 5e-2}
SEED = 3


@dataclass(frozen=True)
class AllAlike:
    """Every candidate with the same coefficient, through the pass that scores; `Equal` takes none."""

    def decide(self, interaction: Interaction) -> Decision:
        return Decision(equal_coefficients(interaction.num_samples, range(interaction.num_samples)))


def check(case: Case, device: torch.device) -> list[dict[str, Any]]:
    """The error of each way to an update, with float32 and with bfloat16 passes.

    Raises DisagreementError if one is too large, UnmeasuredError if the model cannot be made.
    """
    rows = []
    for dtype, allowed in TOLERANCES.items():
        bench = Bench(case, device, dtype)
        ids_NT = next(pools(case, 2 * CHOSEN, torch.Generator().manual_seed(SEED)))
        bench.backward_plainly(ids_NT)
        wanted = _gradient(bench)
        for way, selector in (("scored", AllAlike()), ("equal", Equal())):
            error = relative_error(_update(bench, selector, ids_NT), wanted)
            passes = str(dtype or torch.float32).removeprefix("torch.")
            if not error <= allowed:
                message = f"the update of a step ({way}, {passes} passes) differs from plain autograd's on {case.name}"
                raise DisagreementError(f"{message}: relative error {error:.2g}, allowed {allowed:g}")
            rows.append({"shape": case.shape.name, "way": way, "passes": passes, "error": error, "allowed": allowed})
    return rows


def _update(bench: Bench, selector: Selector, ids_NT: Tensor) -> dict[str, Tensor]:
    with bench.attach(selector) as engine:
        engine.backward(as_batch(ids_NT))
    return _gradient(bench)


def _gradient(bench: Bench) -> dict[str, Tensor]:
    """What is in `.grad`, which is then empty."""
    found = {name: p.grad.float() for name, p in bench.parameters.items() if p.grad is not None}
    bench.rest()
    return found


def relative_error(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """Length of the difference over the length of what is wanted; infinite if a name differs or a number is none."""
    if found.keys() != wanted.keys():
        return float("inf")
    names = sorted(wanted)
    differences = torch.stack([(found[name] - wanted[name]).double().square().sum() for name in names])
    squares = torch.stack([wanted[name].double().square().sum() for name in names])
    error = float((differences.sum() / squares.sum()).sqrt())
    return error if isfinite(error) else float("inf")

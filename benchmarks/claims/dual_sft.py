"""DualSFT: mask and subset read off one interaction matrix, against a mask and then a subset chosen separately.

arXiv 2605.06166. A tenth of the weights may move, and a tenth of the pool is trained on, with every arm: budgets of the
released script for its smallest model. The rivals choose the subset by the cosine of a sample's gradient with the
target's; before that, one takes DualSFT's mask and one the weights whose mean gradient is largest. The stream `narrow`
holds none of what is measured as forgotten.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from gradient_selectors import MaskRule, select_cluster_ucb, select_dual_sft
from gradient_selectors.capture.capture import GradientCapture
from gradient_selectors.mask.rule import choose_mask
from gradient_selectors.target import mean_gradient
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.claims.runs import ON_ALL, Choice, choice_from, on_stream, over_subset
from benchmarks.claims.table import Figure, Values
from benchmarks.learning.plan import Tier
from benchmarks.learning.run import Bench

SAYS = "Mask and subset chosen together gain more on the target, and keep more, than one after the other"
SELECTED, RULE = 0.10, MaskRule(density=0.10)
GAINED, RETAINED = "fall of the target's test loss", "fall of the retention loss"
TOGETHER, THEN_COSINE, LARGEST_THEN_COSINE = "together", "its mask, then cosine", "largest gradients, then cosine"
RANDOM = "random mask and subset"

FIGURES = tuple(
    Figure(name, TOGETHER, (THEN_COSINE, LARGEST_THEN_COSINE), shown=(RANDOM,), higher=True)
    for name in (GAINED, RETAINED)
)


@dataclass(frozen=True)
class Chosen:
    """Where weights may move, bool by parameter name, and the samples to train on."""

    mask: Mapping[str, Tensor]
    samples: Sequence[int]


def measure(bench: Bench, tier: Tier, seed: int) -> Values:
    """How far both losses fall; below zero for what is forgotten."""
    choice = choice_from(bench, tier, "narrow", seed)
    path = bench.directory / "mask.safetensors"
    found: dict[str, dict[str, float | None]] = {GAINED: {}, RETAINED: {}}
    for arm, chosen in choose(choice, tier.learning_rate, seed).items():
        start, end = _learned(bench, tier, choice, chosen, path, seed)
        found[GAINED][arm] = start["test"] - end["test"]
        found[RETAINED][arm] = start["retention"] - end["retention"]
    return found


def choose(choice: Choice, learning_rate: float, seed: int) -> dict[str, Chosen]:
    """What each arm trains, and on what: as many weights and samples with all of them."""
    generator = torch.Generator().manual_seed(seed)
    both = select_dual_sft(
        choice.model,
        choice.pool,
        choice.target,
        share=SELECTED,
        rule=RULE,
        learning_rate=learning_rate,
        generator=generator,
    )
    count = len(both.selected)
    cosine = select_cluster_ucb(
        choice.model, choice.pool, choice.target, budget=1.0, share=count / len(choice.records), generator=generator
    ).selected
    any_of_them = torch.randperm(len(choice.records), generator=generator)[:count].tolist()
    noise = {name: torch.rand(mask.shape, generator=generator) for name, mask in sorted(both.mask.items())}
    return {
        TOGETHER: Chosen(both.mask, both.selected),
        THEN_COSINE: Chosen(both.mask, cosine),
        LARGEST_THEN_COSINE: Chosen(choose_mask(_sizes(choice), RULE), cosine),
        RANDOM: Chosen(choose_mask(noise, RULE), any_of_them),
    }


def _sizes(choice: Choice) -> dict[str, Tensor]:
    """Squares of the pool's mean gradient."""
    capture = GradientCapture(choice.model)
    try:
        return {name: gradient.square() for name, gradient in mean_gradient(capture, choice.pool).items()}
    finally:
        capture.close()


def _learned(
    bench: Bench, tier: Tier, choice: Choice, chosen: Chosen, path: Path, seed: int
) -> tuple[Mapping[str, float], Mapping[str, float]]:
    """Losses before and after training."""
    save_file(dict(chosen.mask), path)
    stream = over_subset(tier, [choice.records[i] for i in chosen.samples], seed)
    points = on_stream(bench, tier, stream, ON_ALL | {"mask": "fixed", "mask_path": path}, seed)
    return points[0], points[-1]

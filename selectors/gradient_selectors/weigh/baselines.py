"""Baselines, without which nothing can be shown to help: top-k by first-order utility, and all alike.

The greedy baseline has a file of its own (`greedy`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from gradient_selectors.draw.uniform import draw_uniform
from gradient_selectors.state import Stateful
from gradient_selectors.views.interaction import Interaction
from gradient_selectors.weigh.filter_then_weight import positive_samples, usable_utilities
from gradient_selectors.weigh.selector import Decision, Selector, equal_coefficients, needs_target


@dataclass(frozen=True)
class Equal:
    """Every candidate with the same coefficient: plain training. Reads no view, so none is computed.

    Examples:
        >>> from gradient_selectors import Equal
        >>> Equal().needs_target
        False
    """

    needs_target: ClassVar[bool] = False

    def decide(self, interaction: Interaction) -> Decision:
        finite = torch.isfinite(interaction.gradients.losses_N).nonzero().squeeze(1).tolist()
        return Decision(equal_coefficients(interaction.num_samples, finite))


@dataclass(frozen=True)
class TopK:
    """The k candidates with the largest positive `c_i`, with equal coefficients: first order, no redundancy.

    Examples:
        >>> from gradient_selectors import TopK
        >>> selector = TopK(batch_size=4)
    """

    batch_size: int

    def decide(self, interaction: Interaction) -> Decision:
        utilities_N = usable_utilities(interaction)
        positive = positive_samples(utilities_N)
        return Decision(equal_coefficients(len(utilities_N), positive[: self.batch_size]), num_positive=len(positive))


@dataclass(frozen=True)
class OrUniform:
    """Another selector's decision, or where nothing helps `batch_size` candidates at random, all alike.

    Attributes:
        generator: source of the draws, on the CPU.
    """

    selector: Selector
    batch_size: int
    generator: torch.Generator

    @property
    def needs_target(self) -> bool:
        return needs_target(self.selector)

    def decide(self, interaction: Interaction) -> Decision:
        decision = self.selector.decide(interaction)
        if decision.selected:
            return decision
        drawn = draw_uniform(interaction.num_samples, self.batch_size, self.generator)
        return replace(decision, coefficients_N=equal_coefficients(interaction.num_samples, drawn))

    def state_dict(self) -> dict[str, Any]:
        """The generator, and what the other selector keeps."""
        inner = self.selector.state_dict() if isinstance(self.selector, Stateful) else {}
        return {"generator": self.generator.get_state(), "selector": inner}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.generator.set_state(state["generator"])
        if isinstance(self.selector, Stateful):
            self.selector.load_state_dict(state["selector"])

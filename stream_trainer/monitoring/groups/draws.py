"""Metrics of what draws samples, and of what it has learned."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prometheus_client import Counter, Gauge

    from stream_trainer.monitoring.groups.numbers import Numbers

LEARNED_S = 5.0  # between looks at what a draw has learned: they take matrices


class DrawMetrics:
    """Of bandits, predictors and `draw: auto`. Attributes are prometheus_client objects, or plain numbers."""

    def __init__(
        self, counter: "Callable[..., Counter]", gauge: "Callable[..., Gauge]", numbers: "Callable[..., Numbers]"
    ) -> None:
        """`counter`, `gauge` and `numbers` make metrics, given a name, a text and labels."""
        self._due = 0.0
        self.arm_reward = gauge(
            "arm_reward", "Discounted mean reward of a cluster, in units of all clusters' mean size.", ("arm",)
        )
        self.arm_draws = counter("arm_draws_total", "Samples drawn from a cluster.", ("arm",))
        self.coefficient = numbers(
            "draw_coefficient", "What a feature is thought to add to a sample's worth, in its deviations.", ("feature",)
        )
        self.coefficient_deviation = numbers(
            "draw_coefficient_deviation", "How uncertain that is: one standard deviation.", ("feature",)
        )
        self.way_rate = gauge(
            "way_rate", "Progress of a way of training in the time of a plain step, by `draw: auto`.", ("way",)
        )
        self.explained = gauge(
            "draw_explained_ratio", "Share of the utilities' variance in late probes that was predicted."
        )
        self.probe_interval = gauge("draw_probe_interval_steps", "Steps between probes.")
        self.probes = counter("draw_probes_total", "Probes: steps that scored what was drawn.")

    def learned_due(self) -> bool:
        """Whether what a draw has learned is to be shown again: every few seconds."""
        now = time.monotonic()
        due = now >= self._due
        self._due = now + LEARNED_S if due else self._due
        return due

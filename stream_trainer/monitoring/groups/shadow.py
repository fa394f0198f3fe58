"""Metrics of what steps do to the samples of the target that are held back."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prometheus_client import Counter, Gauge

SHADOW_RESULTS = ("measured", "failed")


class ShadowMetrics:
    """Of measured effects. Attributes are prometheus_client objects."""

    def __init__(self, counter: "Callable[..., Counter]", gauge: "Callable[..., Gauge]") -> None:
        """`counter` and `gauge` make metrics, given a name, a text and labels."""
        self.advantage = gauge(
            "selection_advantage_measured",
            "What an update of selection is worth on the held-back target, as measured; NaN before it is known.",
        )
        self.advantage.set(math.nan)
        self.shadows = counter("shadows_total", "Steps whose effect was to be measured, by result.", ("result",))
        for result in SHADOW_RESULTS:
            self.shadows.labels(result)
        self.effect = gauge(
            "shadow_effect_nats",
            "By how much one step's samples lower the loss on the held-back target, late steps counting more.",
            ("side", "kind"),
        )
        for side in ("chosen", "uniform"):
            for kind in ("predicted", "measured"):
                self.effect.labels(side, kind)
        self.disagrees = gauge("shadow_disagrees", "1 while measured effects speak against what is predicted of them.")

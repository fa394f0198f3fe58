"""Metrics of what training has changed."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prometheus_client import Gauge


class MovedMetrics:
    """Of trained tensors and their weights. Attributes are prometheus_client objects; NaN before they are known."""

    def __init__(self, gauge: "Callable[..., Gauge]") -> None:
        """`gauge` makes metrics, given a name and a text."""
        self.tensors = gauge(
            "moved_tensors_ratio", "Share of the trained tensors that changed between the last two evaluations."
        )
        self.weights = gauge("moved_weights_ratio", "The same of their weights, an estimate.")
        for one in (self.tensors, self.weights):
            one.set(math.nan)

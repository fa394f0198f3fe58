"""Metrics of the processes that make a run together."""

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prometheus_client import Counter, Gauge

# Updates and targets, the same of a model in rows, numbers by sample and what is made whole of rows, gradients, facts.
SENT = ("sum", "scatter", "rows", "exchange", "control")


class RankMetrics:
    """Of what ranks exchange. Attributes are prometheus_client objects."""

    def __init__(self, counter: "Callable[..., Counter]", gauge: "Callable[..., Gauge]") -> None:
        """`counter` and `gauge` make metrics, given a name, a text and labels."""
        self.processes = gauge("processes", "Processes that make the run together.")
        self.sent = counter("sent_bytes_total", "Bytes sent to the other processes of the run.", ("kind",))
        for kind in SENT:
            self.sent.labels(kind)

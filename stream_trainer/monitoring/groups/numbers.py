"""Series that the service itself reads as often as it writes them."""

import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString


class Numbers(Collector):
    """A gauge or a counter, kept as plain numbers: a scrape makes its series of them, and nobody else.

    A series is written by one thread only; any may read it.

    Attributes:
        by_labels: the number of each series, by the values of its labels.
    """

    def __init__(
        self,
        family: type[GaugeMetricFamily] | type[CounterMetricFamily],
        name: str,
        text: str,
        labels: tuple[str, ...],
        registry: CollectorRegistry,
    ) -> None:
        """Without labels there is one number, and it begins at 0."""
        self._family, self._name, self._text, self._labels = family, name, text, labels
        self.by_labels: dict[tuple[str, ...], float] = {} if labels else {(): 0.0}
        registry.register(self)

    def set(self, value: float, *labels: str) -> None:
        """Replace a number."""
        self.by_labels[labels] = float(value)

    def inc(self, value: float = 1, *labels: str) -> None:
        """Let a number grow; it begins at 0."""
        self.by_labels[labels] = self.by_labels.get(labels, 0.0) + value

    def sum(self) -> float | None:
        """The sum over all series; None if there is none yet, or it is not finite."""
        values = list(self.by_labels.values())
        total = sum(values)
        return total if values and math.isfinite(total) else None

    def collect(self) -> Iterator[Metric]:
        """The series as they are now."""
        family = self._family(self._name, self._text, labels=self._labels)
        for labels, value in self.by_labels.copy().items():
            family.add_metric(labels, value)
        yield family


class Spread(Collector):
    """A histogram that takes many values at once. One thread only observes."""

    def __init__(self, name: str, text: str, bounds: Sequence[float], registry: CollectorRegistry) -> None:
        """`bounds`: upper ones of the buckets, ascending; the last bucket has none."""
        self._name, self._text, self._bounds = name, text, (*bounds, math.inf)
        self._counts, self._sum = [0] * len(self._bounds), 0.0
        registry.register(self)

    def observe(self, values: Iterable[float]) -> None:
        """Count values."""
        for value in values:
            self._counts[bisect_left(self._bounds, value)] += 1
            self._sum += value

    def collect(self) -> Iterator[Metric]:
        """The buckets as they are now."""
        names = map(floatToGoString, self._bounds)
        buckets = [*zip(names, accumulate(self._counts), strict=True)]
        yield HistogramMetricFamily(self._name, self._text, buckets=buckets, sum_value=self._sum)

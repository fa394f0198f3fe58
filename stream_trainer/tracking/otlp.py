"""Sends the metrics to an OTLP collector: the same registry that `/metrics` shows, histograms included."""

import logging
import threading
import time
from collections.abc import Iterator
from itertools import groupby, pairwise
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric, Sample

from stream_trainer import __version__
from stream_trainer.models.refusals import first_line, loading
from stream_trainer.monitoring.metrics import Metrics
from stream_trainer.settings.sections.publish import TrackingSettings

logger = logging.getLogger(__name__)

NAME = "otlp"
TIMEOUT_S = 10.0  # for a collector to answer, and for the last report when the run ends
PLAIN = ("gauge", "counter", "info", "stateset")


class OtlpReporter:
    """Sends everything every so often, on a thread of its own.

    Attributes:
        failing: whether the last report was lost.
    """

    def __init__(self, settings: TrackingSettings, metrics: Metrics) -> None:
        """Raises SettingsError if the package is missing."""
        self.failing = False
        self._metrics, self._every_s = metrics, settings.otlp_every_s
        with loading(f"tracking.otlp_url={settings.otlp_url}", "correct the address", NAME):
            self._exporter = _exporter(str(settings.otlp_url))
        self._began_ns = time.time_ns()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="report-otlp", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Send once more, and stop."""
        self._ending.set()
        self._thread.join(TIMEOUT_S)

    def _run(self) -> None:
        while True:
            ends = self._ending.wait(self._every_s)
            try:
                result = self._exporter.export(metrics_data(self._metrics.registry, self._began_ns))
                why = "" if result.name == "SUCCESS" else "the collector took nothing"
            except Exception as error:  # whatever its client raises
                why = f"{type(error).__name__}: {first_line(error)}"
            self._note(why)
            if ends:
                return

    def _note(self, why: str) -> None:
        if why:
            self._metrics.tracking_failures.labels(NAME).inc()
        if why and not self.failing:
            logger.error("OTLP fails (%s); training goes on without its figures", why)
        self.failing = bool(why)


def _exporter(url: str) -> Any:
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter

    # It logs every try of its own; what matters of them is said once, above.
    logging.getLogger("opentelemetry.exporter.otlp").setLevel(logging.CRITICAL)
    return OTLPMetricExporter(endpoint=url, timeout=TIMEOUT_S)


def metrics_data(registry: CollectorRegistry, began_ns: int) -> Any:
    """All metrics of a registry as OpenTelemetry has them. `began_ns`: since when counters count."""
    from opentelemetry.sdk.metrics.export import MetricsData, ResourceMetrics, ScopeMetrics
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope

    found = [metric for family in registry.collect() if (metric := _metric(family, began_ns)) is not None]
    resource = Resource.create({"service.name": "stream-trainer", "service.version": __version__})
    scope = ScopeMetrics(InstrumentationScope("stream_trainer", __version__), found, "")
    return MetricsData([ResourceMetrics(resource, [scope], "")])


def _metric(family: Metric, began_ns: int) -> Any:
    from opentelemetry.sdk.metrics.export import AggregationTemporality, Gauge, Histogram, Sum
    from opentelemetry.sdk.metrics.export import Metric as OtlpMetric

    now, cumulative = time.time_ns(), AggregationTemporality.CUMULATIVE
    data: Any
    if family.type == "histogram":
        data = Histogram(list(_histogram_points(family, began_ns, now)), cumulative)
    elif family.type == "counter":
        data = Sum(_points(family, began_ns, now), cumulative, is_monotonic=True)
    elif family.type in PLAIN:
        data = Gauge(_points(family, None, now))
    else:
        return None
    return OtlpMetric(name=family.name, description=family.documentation, unit=family.unit, data=data)


def _points(family: Metric, began_ns: int | None, now: int) -> list[Any]:
    from opentelemetry.sdk.metrics.export import NumberDataPoint

    return [NumberDataPoint(dict(sample.labels), began_ns, now, sample.value) for sample in family.samples]


def _histogram_points(family: Metric, began_ns: int, now: int) -> Iterator[Any]:
    """Prometheus' buckets hold all below them, OpenTelemetry's what is in each."""
    from opentelemetry.sdk.metrics.export import HistogramDataPoint

    for labels, group in groupby(family.samples, _own_labels):
        samples = list(group)
        buckets = [sample for sample in samples if sample.name.endswith("_bucket")]
        bounds = [float(sample.labels["le"]) for sample in buckets][:-1]
        upto = [0, *(int(sample.value) for sample in buckets)]
        total = next(sample.value for sample in samples if sample.name.endswith("_sum"))
        counts = [later - earlier for earlier, later in pairwise(upto)]
        # Prometheus keeps no extremes.
        yield HistogramDataPoint(dict(labels), began_ns, now, upto[-1], total, counts, bounds, min=0.0, max=0.0)


def _own_labels(sample: Sample) -> list[tuple[str, str]]:
    return sorted((name, value) for name, value in sample.labels.items() if name != "le")

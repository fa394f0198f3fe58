"""Series kept as plain numbers look like any other to whoever scrapes them."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from stream_trainer.monitoring.groups.numbers import Numbers, Spread

LABELS = ("topic", "partition")


def test_they_are_written_as_the_clients_own_are() -> None:
    disable_created_metrics()  # type: ignore[no-untyped-call]
    own, plain = CollectorRegistry(), CollectorRegistry()
    gauge = Gauge("g", "A gauge.", LABELS, registry=own)
    counter = Counter("c_total", "A counter.", ("x",), registry=own)
    lag = Numbers(GaugeMetricFamily, "g", "A gauge.", LABELS, plain)
    spent = Numbers(CounterMetricFamily, "c", "A counter.", ("x",), plain)
    assert generate_latest(plain) == generate_latest(own), "without a series yet"
    gauge.labels("t", "0").set(3)
    lag.set(3, "t", "0")
    for _ in range(2):
        counter.labels('a "b"\n').inc(1.5)
        spent.inc(1.5, 'a "b"\n')
    assert generate_latest(plain) == generate_latest(own)


def test_their_sum_is_unknown_without_one_and_with_one_that_is_not_finite() -> None:
    lag = Numbers(GaugeMetricFamily, "lag", "Lag.", LABELS, CollectorRegistry())
    assert lag.sum() is None
    lag.set(3, "t", "0")
    lag.set(4, "t", "1")
    assert lag.sum() == 7
    lag.set(float("nan"), "t", "1")
    assert lag.sum() is None


def test_values_fall_into_the_buckets_that_the_clients_own_have() -> None:
    disable_created_metrics()  # type: ignore[no-untyped-call]
    own, plain = CollectorRegistry(), CollectorRegistry()
    histogram = Histogram("h", "Ages.", buckets=(0.5, 1, 5), registry=own)
    ages = Spread("h", "Ages.", (0.5, 1, 5), plain)
    assert generate_latest(plain) == generate_latest(own), "before the first"
    values = (0.0, 0.5, 0.75, 1.0, 5.0, 6.5)
    for value in values:
        histogram.observe(value)
    ages.observe(values)
    assert generate_latest(plain) == generate_latest(own)

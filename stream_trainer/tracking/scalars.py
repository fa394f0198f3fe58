"""The metrics of a run as plain numbers."""

import math

from prometheus_client import CollectorRegistry

from stream_trainer.monitoring.metrics import PREFIX

KINDS = ("gauge", "counter")
LEFT_OUT = ("state", "training_way")  # one number for each word they may be


def scalars_of(registry: CollectorRegistry) -> dict[str, float]:
    """Gauges and counters of ours, named as in Prometheus without its prefix: `evaluation_loss/target`.

    What is not finite, or was never set, is left out.
    """
    found: dict[str, float] = {}
    for family in registry.collect():
        name = family.name.removeprefix(f"{PREFIX}_")
        if name == family.name or family.type not in KINDS or name in LEFT_OUT:
            continue
        for sample in family.samples:
            if math.isfinite(sample.value):
                key = "/".join([sample.name.removeprefix(f"{PREFIX}_"), *sample.labels.values()])
                found[key] = sample.value
    return found

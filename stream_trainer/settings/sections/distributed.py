"""Settings of a run on several processes."""

from operator import attrgetter
from typing import Any, Literal

from stream_trainer.settings.base import Positive, Section


class DistributedSettings(Section):
    """One run on several processes, which `torchrun` starts. Without it the run has one process."""

    mode: Literal["none", "replicated"] = "none"
    """How processes share a run. `replicated`: every process has the whole model, scores its share of each pool and
    reads its own partitions. `none`: one process."""
    timeout_s: Positive = 600.0
    """Seconds that a process waits for the others within a step. Then all end, and no checkpoint is written."""


def why_not_shared(settings: Any) -> str | None:
    """What of all settings does not go with several processes yet, in a line; None if all do."""
    allowed: dict[str, tuple[object, ...]] = {
        "selection.scoring": ("sketched", "exact"),
        "dead_letters.kind": ("file",),
        "ledger.enabled": (False,),
        "target.topic": (None,),
        "selection.advantage.shadow_every": (None,),
        "source.kafka.format": ("json",),
        "samples.duplicates": ("keep",),
    }
    if ":" in settings.model.device:
        return (
            f"model.device={settings.model.device} is for one process only; set it to cuda, or distributed.mode to none"
        )
    own = next((name for name in settings.selection.learned.features if ":" in name), None)
    if own is not None:
        return (
            f"selection.learned.features={own} is for one process only; leave it out, or set distributed.mode to none"
        )
    for name, values in allowed.items():
        found = attrgetter(name)(settings)
        if found not in values:
            instead = " or ".join(_shown(value) for value in values)
            return f"{name}={_shown(found)} is for one process only; set it to {instead}, or distributed.mode to none"
    return None


def _shown(value: object) -> str:
    """As it is written in the file."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)

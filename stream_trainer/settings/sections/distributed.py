"""Settings of a run on several processes."""

from operator import attrgetter
from typing import Any, Literal

from stream_trainer.settings.base import Positive, Section


class DistributedSettings(Section):
    """One run on several processes, which `torchrun` starts. Without it the run has one process."""

    mode: Literal["none", "replicated", "fsdp2"] = "none"
    """How processes share a run. `replicated`: every process has the whole model, scores its share of each pool and
    reads its own partitions. `fsdp2`: the same, but each process keeps only its part of the weights, of their gradient
    and of the optimizer's state. `none`: one process."""
    reshard_after_forward: bool = True
    """With `fsdp2`, let go of the others' part of a block after its forward pass, and fetch it again for the backward
    pass. False keeps it, which sends less and takes more memory."""
    timeout_s: Positive = 600.0
    """Seconds that a process waits for the others in an exchange of gradients or weights. Then all end, and no
    checkpoint is written. With `replicated` ranks meet before each exchange, and wait there as long as it takes."""


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
    if settings.distributed.mode == "fsdp2" and (why := _why_not_sharded(settings)):
        return why
    for name, values in allowed.items():
        found = attrgetter(name)(settings)
        if found not in values:
            instead = " or ".join(_shown(value) for value in values)
            return f"{name}={_shown(found)} is for one process only; set it to {instead}, or distributed.mode to none"
    return None


def _why_not_sharded(settings: Any) -> str | None:
    """What does not go with a model in parts yet, in a line."""
    allowed: dict[str, tuple[object, ...]] = {
        "optimizer.moments": ("float32",),
        "target.watch": (False,),
    }
    found = {name: attrgetter(name)(settings) for name in allowed}
    if settings.model.lora is not None:
        allowed["model.lora.base"], found["model.lora.base"] = ("float32",), settings.model.lora.base
    if settings.selection.mask == "dual_sft":
        anchors = "selection.dual_sft.anchor_path"
        allowed[anchors], found[anchors] = (None,), settings.selection.dual_sft.anchor_path
    for name, values in allowed.items():
        if found[name] not in values:
            return (
                f"{name}={_shown(found[name])} does not go with distributed.mode=fsdp2 yet; set it to "
                f"{_shown(values[0])}, or distributed.mode to replicated"
            )
    return None


def _shown(value: object) -> str:
    """As it is written in the file."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)

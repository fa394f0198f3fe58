"""Settings that were given, and have no effect beside the others. They are named, and nothing is refused for them."""

from collections.abc import Iterator

from pydantic import BaseModel

from stream_trainer.settings.schema import Settings
from stream_trainer.settings.sections.selection import PREDICTS, WAIT


def without_effect(settings: Settings) -> list[str]:
    """One line for each: the setting, and why."""
    # The group's name is completed by itself, and `enabled: false` is what makes its section idle.
    given = {name for name in _given("", settings) if name != "source.kafka.group_id" and not name.endswith(".enabled")}
    found: dict[str, str] = {}
    for is_idle, prefix, why in _idle(settings):
        names = sorted(name for name in given if name == prefix or name.startswith(f"{prefix}.")) if is_idle else ()
        for name in names:
            found.setdefault(name, f"{name} has no effect: {why}")
    return list(found.values())


def _given(prefix: str, section: BaseModel) -> Iterator[str]:
    """Names of all settings that are not left at their defaults by the user."""
    for name in section.model_fields_set:
        value, full = getattr(section, name), f"{prefix}{name}"
        if isinstance(value, BaseModel):
            yield from _given(f"{full}.", value)
        elif value != type(section).model_fields[name].get_default(call_default_factory=True):
            yield full


_Idle = tuple[bool, str, str]
"""Whether a setting or a section is idle, its name, and why."""


def _idle(settings: Settings) -> Iterator[_Idle]:
    yield from _of_the_source(settings)
    yield from _of_the_selection(settings)
    constant, reports = settings.optimizer.schedule == "constant", settings.tracking.report_to
    progress = settings.log.progress
    yield settings.dead_letters.kind == "file", "dead_letters.topic", "dead_letters.kind is file"
    yield constant, "optimizer.decay_steps", "optimizer.schedule is constant"
    yield constant, "optimizer.final_share", "optimizer.schedule is constant"
    yield settings.model.name is None, "model.revision", "model.config names no model on the hub"
    yield not settings.server.enabled, "server", "server.enabled is false"
    yield not settings.control.enabled, "control", "control.enabled is false"
    yield not settings.ledger.enabled, "ledger", "ledger.enabled is false"
    yield settings.publish.dir is None, "publish", "publish.dir is unset"
    yield "tensorboard" not in reports, "tracking.tensorboard_dir", "tracking.report_to does not name tensorboard"
    yield "mlflow" not in reports, "tracking.mlflow_uri", "tracking.report_to does not name mlflow"
    yield progress in ("off", "live"), "log.every_s", f"log.progress is {progress}"


def _of_the_source(settings: Settings) -> Iterator[_Idle]:
    source = settings.source
    yield source.kind == "kafka", "source.jsonl", "source.kind is kafka"
    yield source.kind == "jsonl", "source.kafka", "source.kind is jsonl"
    yield source.kafka.format == "json", "source.kafka.schema_registry", "source.kafka.format is json"
    yield not source.kafka.stop_at_end, "source.kafka.transaction_wait_s", "source.kafka.stop_at_end is false"


def _of_the_selection(settings: Settings) -> Iterator[_Idle]:
    selection = settings.selection
    draw, weigh, scoring = selection.draw, selection.weigh, selection.scoring
    yield draw not in PREDICTS, "selection.learned", f"selection.draw is {draw}"
    yield draw != "cluster_ucb", "selection.cluster_ucb", f"selection.draw is {draw}"
    yield draw not in ("near_random", "auto"), "selection.rivals", f"selection.draw is {draw}"
    for name in ("waiting", "intake"):
        yield draw not in WAIT, f"selection.{name}", f"selection.draw is {draw}"
    for name in ("filter_then_weight", "greedy"):
        yield weigh != name, f"selection.{name}", f"selection.weigh is {weigh}"
    yield selection.route != "gast", "selection.gast", f"selection.route is {selection.route}"
    yield selection.mask != "dual_sft", "selection.dual_sft", f"selection.mask is {selection.mask}"
    for name in ("lambda_prior", "lambda_anchor", "anchors"):
        unset = selection.dual_sft.anchor_path is None
        yield unset, f"selection.dual_sft.{name}", "selection.dual_sft.anchor_path is unset"
    yield scoring != "sketched", "selection.sketch_width", f"selection.scoring is {scoring}"
    for name in ("selection.micro_tokens", "memory.factors_gb"):
        yield scoring == "rank_one", name, "selection.scoring is rank_one, which scores a pool at once and keeps all"

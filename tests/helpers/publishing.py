"""Small checkpoints as a trainer leaves them, and what a publisher makes of them."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stream_trainer.checkpoints.manifest import write_manifest
from stream_trainer.monitoring.metrics import Metrics
from stream_trainer.publishing.hooks import Hook
from stream_trainer.publishing.making import Origin
from stream_trainer.publishing.publisher import Publisher
from stream_trainer.publishing.versions import versions_in
from stream_trainer.settings.sections.publish import PublishSettings
from stream_trainer.training.watchers import Watcher
from tests.helpers.service import wait_for

ORIGIN = Origin(base_model="tiny/base", target="target.jsonl", adapter=False, merged=True)


def write_checkpoint(folder: Path, step: int, size: int = 20_000) -> Path:
    """One whose files all say of which step they are."""
    path = folder / f"step-{step:08d}.e1"
    (path / "model").mkdir(parents=True)
    (path / "model" / "config.json").write_text(json.dumps({"model_type": "llama", "step": step}))
    (path / "model" / "model.safetensors").write_bytes(f"step {step} ".encode() * (size // 10))
    (path / "optimizer.safetensors").write_bytes(b"moments")
    trainer = {
        "step": step,
        "cursor": {"partitions": {"samples:0": {"next": 10 * step}}, "counts": {"trained": step}},
        "fingerprint": {"optimizer.learning_rate": 1e-3, "processor.threads": 1},
    }
    (path / "trainer.json").write_text(json.dumps(trainer))
    write_manifest(path, step, {"settings_hash": "0123456789abcdef"})
    return path


class Run:
    """A publisher and the run that it watches; the watcher's calls are those of the trainer."""

    def __init__(self, folder: Path, hooks: Mapping[str, Hook] | None = None, **settings: Any) -> None:
        self.folder, self.versions = folder, folder / "published"
        self.metrics = Metrics()
        self.events: list[tuple[int, str, str]] = []
        given = PublishSettings(dir=self.versions, **settings)
        self.publisher = Publisher(self.versions, given, ORIGIN, hooks or {}, self.metrics)
        self.watcher: Watcher = self.publisher.watcher(lambda *event: self.events.append(event))

    def checkpoint(self, step: int, **losses: float) -> Path:
        """Evaluate, make a checkpoint, and wait until that is dealt with."""
        assert self.watcher.on_evaluation is not None
        assert self.watcher.on_checkpoint is not None
        self.watcher.on_evaluation(step, losses or {"target": 1.0}, 0.0)
        path = write_checkpoint(self.folder / "checkpoints", step)
        before = self.decided
        self.watcher.on_checkpoint(step, path)
        wait_for(lambda: self.decided > before and not self.value("publish_busy"))
        self.tell()
        return path

    def tell(self) -> None:
        assert self.watcher.on_step is not None
        self.watcher.on_step(0, (), None)  # type: ignore[arg-type]

    @property
    def decided(self) -> float:
        """Checkpoints that were published, held back or failed."""
        reasons = ("not_evaluated", "target_loss", "forgetting")
        gated = sum(self.value("publish_gated_total", reason=reason) for reason in reasons)
        return self.value("publish_seconds_count") + gated + self.value("publish_failures_total", stage="version")

    def value(self, name: str, **labels: str) -> float:
        value = self.metrics.registry.get_sample_value(f"stream_trainer_{name}", labels)
        assert value is not None
        return value

    @property
    def names(self) -> list[str]:
        """Oldest first."""
        return [version.name for version in reversed(versions_in(self.versions))]

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        self.publisher.end(None)


def read_version(path: Path) -> int:
    """Open what a server opens; the step that all of it agrees on. Raises AssertionError if it is mixed."""
    about = json.loads((path / "version.json").read_text())
    for name, file in about["files"].items():
        assert hashlib.sha256((path / name).read_bytes()).hexdigest() == file["sha256"], name
    assert json.loads((path / "config.json").read_text())["step"] == about["step"]
    step: int = about["step"]
    return step

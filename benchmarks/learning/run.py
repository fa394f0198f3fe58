"""One run of `benchmarks.learning`: the service itself on a written stream, watched from outside.

The service is `stream_trainer.service.serve` with settings as a user would write them. Told of every step and every
evaluation, the watch notes at each evaluation what the run has cost so far:

    trained      samples that entered an update, a sample that enters twice counted twice
    scored       samples that were given a gradient: all candidates of all steps; those of the target are not counted,
                 their time is
    seconds      wall-clock since the first checkpoint is made and reading begins, without evaluations: reading,
                 features, clustering, refreshes of target and mask, passes, program, update; neither loading, nor what
                 the service tries before its first step, nor the last checkpoint. What the reader does during
                 evaluations costs nothing, with any method
    cpu_seconds  the same of the process, all threads: steadier where the machine has other work
"""

import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from benchmarks.learning.methods import METHODS, POOL, REFERENCE, Method, records_needed, selection_of
from benchmarks.learning.plan import Run, Tier, warm_up_key
from benchmarks.learning.streams import Data, Label, Stream, even_stream, make_stream, write_records
from stream_trainer.checkpoints.checkpoint import MODEL, load_latest
from stream_trainer.records import Sample
from stream_trainer.service import serve
from stream_trainer.settings.schema import Settings
from stream_trainer.training.step import StepReport
from stream_trainer.training.watchers import Watcher

EXTRA = 1  # evaluations after the reference's loss is reached, before a run ends early
NEVER = 10**9  # steps or seconds
WARM_UP_RATE, WARM_UP_RISE = 1e-3, 20

Point = dict[str, Any]
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Bench:
    """What all runs share.

    Attributes:
        directory: of warmed-up models and of the run in progress.
        stop: set when the user has had enough.
        tell: shows progress within a run.
    """

    data: Data
    directory: Path
    threads: int
    stop: threading.Event
    tell: Tell


@dataclass
class Watch:
    """What a run has come to, from the service's own reports.

    Attributes:
        stop: what ends the service.
        given_up: the user's wish to end everything.
        labels: of the stream's records, by id.
        reference: test loss after which nothing more is to be learned of this run, if any.
        points: one for each evaluation.
    """

    stop: threading.Event
    given_up: threading.Event
    labels: Mapping[str, Label]
    reference: float | None
    tell: Tell
    points: list[Point] = field(default_factory=list)
    trained: int = 0
    scored: int = 0
    _domains: Counter[str] = field(default_factory=Counter)
    _kinds: Counter[str] = field(default_factory=Counter)
    _zero: tuple[float, float] = (0.0, 0.0)
    _now: tuple[float, float] = (0.0, 0.0)

    def on_step(self, _step: int, pool: Sequence[Sample], report: StepReport) -> None:
        """Count; the clocks are read before any evaluation of this step."""
        self._now = _clocks()
        self.scored += len(report.losses)
        self.trained += len(report.selected)
        for i in report.selected:
            label = self.labels[pool[i].id or ""]
            self._domains[label.domain] += 1
            self._kinds[label.kind] += 1
        if self.given_up.is_set():
            self.stop.set()

    def on_checkpoint(self, step: int, _path: Path) -> None:
        """The first one is made after the first evaluation, and before anything is read: now the clocks start."""
        if step == 0:
            self._now = self._zero = _clocks()

    def on_evaluation(self, step: int, losses: Mapping[str, float], _seconds: float) -> None:
        """Note a point."""
        self.points.append(
            {
                "step": step,
                "trained": self.trained,
                "scored": self.scored,
                "seconds": self._now[0] - self._zero[0],
                "cpu_seconds": self._now[1] - self._zero[1],
                **losses,
                "domains": dict(self._domains),
                "kinds": dict(self._kinds),
            }
        )
        self.tell(f"step {step}, test loss {losses['test']:.4f}, {self.points[-1]['seconds']:.0f} s")
        self._domains.clear()
        self._kinds.clear()
        wall, cpu = _clocks()
        # The time since the step's end was the evaluation's.
        self._zero = self._zero[0] + wall - self._now[0], self._zero[1] + cpu - self._now[1]
        if self.reference is not None and any(p["test"] <= self.reference for p in self.points[:-EXTRA]):
            self.stop.set()


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def train(bench: Bench, run: Run, reference: float | None) -> list[Point] | None:
    """Let the service make one run. Returns its points, or None if the user stopped it.

    `reference` is the loss at which the run may end early. Raises StreamTrainerError as the service does.
    """
    work = bench.directory / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    stream = stream_of(bench.data, run)
    settings = prepare(bench, run, stream, work)
    stop = threading.Event()
    watch = Watch(stop, bench.stop, stream.labels, reference if run.tier.stops_early else None, bench.tell)
    try:
        serve(settings, stop, Watcher(watch.on_step, watch.on_evaluation, watch.on_checkpoint))
    finally:
        shutil.rmtree(work, ignore_errors=True)  # a checkpoint is as large as the model and its moments
    return None if bench.stop.is_set() else watch.points


def stream_of(data: Data, run: Run) -> Stream:
    """The stream of a run, as long as its method needs."""
    method = METHODS[run.method]
    share = 100 if method.target_only else run.share
    return make_stream(run.stream, data, share, records_needed(method, run.tier.steps), run.seed)


def prepare(bench: Bench, run: Run, stream: Stream, work: Path) -> Settings:
    """Write a run's files into `work`, and the settings that name them."""
    tier, method, data = run.tier, METHODS[run.method], bench.data
    sets = {
        "stream": stream.records,
        "target": _target(data, run, method)[: tier.target],
        "test": data.test[: tier.test],
        "retention": data.retention[: tier.retention],
    }
    selection = selection_of(method)
    if method.anchored:
        sets["anchors"] = data.warm_up[data.guarded][: tier.retention]
        selection["dual_sft"] = {**selection["dual_sft"], "anchor_path": work / "anchors.jsonl"}
    for name, records in sets.items():
        write_records(work / f"{name}.jsonl", records, tier.prompt_chars)
    model = tier.model
    if tier.warm_up_steps:
        # By its own name: what transformers loads beside a Qwen2 is a tokenizer of that family.
        model = {"name": str(_warmed_up(bench, tier)), "tokenizer": tier.model["tokenizer"]}
        model["dtype"] = tier.model.get("dtype", "float32")
    return _settings(
        tier,
        work,
        model=model,
        target={"path": work / "target.jsonl", "max_samples": tier.target, **_refreshes(tier, method)},
        selection=selection,
        optimizer={"learning_rate": tier.learning_rate},
        training={"max_steps": tier.steps, "seed": run.seed, "threads": bench.threads},
        evaluation={
            "every_steps": tier.every * (4 if run.method == REFERENCE else 1),
            "sets": {name: work / f"{name}.jsonl" for name in ("test", "retention")},
            "max_samples": max(tier.test, tier.retention),
        },
        checkpoint={"dir": work / "checkpoints", "every_steps": NEVER, "every_seconds": NEVER},
    )


def _refreshes(tier: Tier, method: Method) -> dict[str, int]:
    """When the target's gradient is computed anew; nothing for a profile, which says so itself."""
    if method.is_profile:
        return {}
    return {"refresh_steps": tier.refresh_steps, "refresh_samples": tier.refresh_samples}


def _target(data: Data, run: Run, method: Method) -> Sequence[Mapping[str, str]]:
    if not method.shuffled_target:
        return data.target
    return make_stream("mixture", data, run.share, run.tier.target, -1 - run.seed).records


def _settings(tier: Tier, work: Path, **sections: dict[str, Any]) -> Settings:
    return Settings.model_validate(
        {
            "source": {"kind": "jsonl", "jsonl": {"path": str(work / "stream.jsonl")}},
            "samples": {"max_tokens": tier.max_tokens},
            "buffer": {"wait_s": 60.0},
            "dead_letters": {"path": work / "dead-letters.jsonl"},
            "server": {"enabled": False},
            **sections,
        }
    )


def _warmed_up(bench: Bench, tier: Tier) -> Path:
    """The tier's model after its warm-up."""
    checkpoints = bench.directory / warm_up_key(tier, bench.data.fingerprint)
    made = load_latest(checkpoints)
    assert made is not None, "`warm_up` comes before the first run"
    return made.path / MODEL


def warm_up(bench: Bench, tier: Tier) -> bool:
    """Train a tier's model on all domains alike with the service, unless it is there already or none is needed.

    Returns whether it is done; a warm-up that was stopped goes on from its checkpoint.
    """
    checkpoints = bench.directory / warm_up_key(tier, bench.data.fingerprint)
    if not tier.warm_up_steps or any(checkpoints.glob(f"step-{tier.warm_up_steps:08d}*")):
        return True
    work = bench.directory / "work"
    work.mkdir(parents=True, exist_ok=True)
    write_records(
        work / "stream.jsonl",
        even_stream(bench.data.warm_up, POOL * tier.warm_up_steps, seed=0).records,
        tier.prompt_chars,
    )
    write_records(work / "target.jsonl", bench.data.target[:1], tier.prompt_chars)
    settings = _settings(
        tier,
        work,
        model=tier.model,
        target={"path": work / "target.jsonl"},
        selection={"profile": "plain", "batch_size": POOL},
        optimizer={"learning_rate": WARM_UP_RATE, "warmup_steps": WARM_UP_RISE},
        training={"max_steps": tier.warm_up_steps, "seed": 0, "threads": bench.threads},
        evaluation={"every_steps": NEVER},
        checkpoint={"dir": checkpoints, "keep": 2},
    )
    started, made = time.monotonic(), count(1)

    def on_step(step: int, _pool: Sequence[Sample], report: StepReport) -> None:
        left = (time.monotonic() - started) / next(made) * (tier.warm_up_steps - step)
        loss = sum(report.losses) / len(report.losses)
        bench.tell(f"warm-up step {step} of {tier.warm_up_steps}, loss {loss:.3f}, {left:.0f} s left")

    return serve(settings, bench.stop, Watcher(on_step)).step == tier.warm_up_steps

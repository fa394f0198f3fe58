"""Runs that claims are made of: those of `benchmarks.learning`, and the service on records that were chosen before."""

import json
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from gradient_selectors import Batch
from torch import nn

from benchmarks.common.reporting import write_json
from benchmarks.learning.methods import BATCH, POOL, REFERENCE
from benchmarks.learning.plan import Run, Tier, key
from benchmarks.learning.run import Bench, Point, prepare, train
from benchmarks.learning.streams import Stream, make_stream
from benchmarks.learning.supply import Record, Supply
from stream_trainer.models.loading import load_model
from stream_trainer.records import Sample
from stream_trainer.samples.collate import collate
from stream_trainer.samples.decoder import Decoder, read_samples
from stream_trainer.service import serve
from stream_trainer.settings.sections.selection import SelectionSettings
from stream_trainer.training.watchers import Watcher

SHARE = 25  # of the target's domain in a stream, in percent
ON_ALL = {"profile": "plain", "batch_size": BATCH}  # train on all that comes

T = TypeVar("T")


class StoppedError(Exception):
    """The user has had enough. What is finished is kept."""


@dataclass(frozen=True)
class Choice:
    """What is chosen from, before any training.

    Attributes:
        model: as its warm-up left it.
        records: of the pool.
        pool: the same as batches, in the same order.
        target: as batches.
    """

    model: nn.Module
    records: Sequence[Record]
    pool: Sequence[Batch]
    target: Sequence[Batch]


def kept(path: Path, make: Callable[[], T]) -> T:
    """What was made before, or what is made now; it is JSON."""
    if path.exists():
        found: T = json.loads(path.read_text())["made"]
        return found
    made = make()
    partial = path.with_suffix(".partial")  # a half-written file would count as finished
    write_json(partial, {"made": made})
    partial.replace(path)
    return made


def compared(bench: Bench, tier: Tier, stream: str, method: str, seed: int) -> list[Point]:
    """The points of one run of `benchmarks.learning`, all its steps. Raises StoppedError."""
    run = Run(tier, stream, SHARE, method, seed)

    def make() -> list[Point]:
        points = train(bench, run, None)
        if points is None:
            raise StoppedError
        return points

    return kept(bench.directory / key(run, bench.data.fingerprint, bench.threads), make)


def on_stream(bench: Bench, tier: Tier, stream: Stream, selection: Mapping[str, Any], seed: int) -> list[Point]:
    """Losses before, during and after `tier.steps` updates under any settings of the selection. Raises StoppedError."""
    work = _fresh(bench.directory / "work")
    settings = prepare(bench, Run(tier, "mixture", SHARE, REFERENCE, seed), stream, work)
    settings = settings.model_copy(update={"selection": SelectionSettings.model_validate(selection)})
    points: list[Point] = []
    try:
        watcher = Watcher(on_evaluation=lambda step, losses, _: points.append({"step": step, **losses}))
        serve(settings, bench.stop, watcher)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if bench.stop.is_set():
        raise StoppedError
    return points


def over_subset(tier: Tier, records: Sequence[Record], seed: int) -> Stream:
    """Chosen records over and over, in random orders, as many as `tier.steps` updates take.

    Whatever is chosen, the number of updates and the samples of each are the same.
    """
    supply = Supply({"chosen": records}, random.Random(f"chosen {seed}"))
    return Stream(tuple(supply.take("chosen") for _ in range(BATCH * tier.steps)), {})


def choice_from(bench: Bench, tier: Tier, stream: str, seed: int) -> Choice:
    """The pool that a run with `POOL` candidates a step would read, the target, and the model."""
    work = _fresh(bench.directory / "work")
    mixed = make_stream(stream, bench.data, SHARE, POOL * tier.steps, seed)
    settings = prepare(bench, Run(tier, stream, SHARE, REFERENCE, seed), mixed, work)
    loaded = load_model(settings.model, seed)
    decoder = Decoder(loaded.tokenizer, settings.samples, loaded.max_positions)
    samples = read_samples(work / "stream.jsonl", decoder, len(mixed.records), "stream")
    target = read_samples(work / "target.jsonl", decoder, tier.target, "target.path")
    shutil.rmtree(work)
    by_id = {record["id"]: record for record in mixed.records}
    pad_id = loaded.tokenizer.pad_token_id
    return Choice(
        loaded.model,
        [by_id[sample.id or ""] for sample in samples],
        _batches(samples, pad_id),
        _batches(target, pad_id),
    )


def _batches(samples: Sequence[Sample], pad_id: int) -> list[Batch]:
    return [collate(samples[start : start + POOL], pad_id) for start in range(0, len(samples), POOL)]


def _fresh(directory: Path) -> Path:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    return directory

"""The parts of a run, put together: model, selection, checkpoint, stream and what watches them."""

import logging
import random
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

from gradient_selectors import MaskedAdamW, SelectionEngine
from gradient_selectors.world.base import Alone, World

from stream_trainer import __version__
from stream_trainer.checkpoints.background import Copies
from stream_trainer.checkpoints.checkpoint import Checkpoint, TrainerState, load_latest, restore
from stream_trainer.checkpoints.fingerprint import TARGET_CONTENTS, change_of, check_resume, consumed, fingerprint_of
from stream_trainer.checkpoints.ownership import Owner, claim
from stream_trainer.checkpoints.plan import PlanFile
from stream_trainer.checkpoints.provenance import provenance_of, read_provenance, report_changes
from stream_trainer.distributed.buffer import SharedBuffer
from stream_trainer.distributed.control import Control, by_first
from stream_trainer.distributed.cursor import owns
from stream_trainer.distributed.parts import SharedIngest, SharedOwner, SharedPlan
from stream_trainer.distributed.resume import make_cursor, make_saver, own_state, require_same
from stream_trainer.distributed.sharded import cut
from stream_trainer.distributed.steering import SharedSteering
from stream_trainer.ingest.buffer import Buffer
from stream_trainer.ingest.cursor import Cursor
from stream_trainer.ingest.dead_letters import DeadLetters, open_dead_letters
from stream_trainer.ingest.thread import Ingest
from stream_trainer.ledger.opening import open_ledger
from stream_trainer.models.loading import LoadedModel, load_model
from stream_trainer.monitoring.metrics import Metrics
from stream_trainer.monitoring.orders import Orders
from stream_trainer.publishing.attach import attach
from stream_trainer.records import Decisions, Sample
from stream_trainer.samples.decoder import Decoder, read_samples
from stream_trainer.samples.schemas.registry import Registry
from stream_trainer.settings.schema import Settings
from stream_trainer.sources import open_source
from stream_trainer.tracking.attach import track
from stream_trainer.training.build import make_engine, split_target
from stream_trainer.training.control.kept import KeptTarget
from stream_trainer.training.control.steering import Steering
from stream_trainer.training.control.watched import WatchedFile
from stream_trainer.training.draw.sampling import make_paying, make_sampler, resting
from stream_trainer.training.faults.culprits import Failure
from stream_trainer.training.optimizer import NamedAdamW, make_optimizer
from stream_trainer.training.planning import Plan
from stream_trainer.training.saver import Saver
from stream_trainer.training.trainer import Trainer
from stream_trainer.training.watchers import Watchers

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """What a run is asked for, and what must know of it.

    Attributes:
        stack: takes what must be closed at the end.
        strict: whether steps are only made again as they are planned.
        control: what several processes that make the run agree by; None if it has one.
    """

    settings: Settings
    metrics: Metrics
    watchers: Watchers
    orders: Orders
    stop: threading.Event
    stack: ExitStack
    strict: bool
    control: Control | None = None

    @property
    def world(self) -> World:
        """The processes that make the run."""
        return Alone() if self.control is None else self.control.world


def build(run: Run) -> Trainer:
    """Load model, samples and checkpoint."""
    settings, metrics = run.settings, run.metrics
    started = time.perf_counter()
    learner = _learner(run)
    buffer = Buffer(settings.buffer) if run.control is None else SharedBuffer(settings.buffer, run.control)
    paying = make_paying(settings, learner.held)

    def accuse(sample: Sample, failure: Failure) -> None:
        trainer.accuse(sample, failure)  # made below, once there is a cursor

    with run.watchers.during("describing the target"):
        drawn = make_sampler(settings, buffer, learner.loaded, learner.engine, learner.steering, accuse)
    owner = _claim(run)
    with run.watchers.during("looking for a checkpoint to resume"):
        checkpoint = load_latest(settings.checkpoint.dir)
        require_same(run.world, settings.checkpoint.dir, checkpoint)
        state = restore(checkpoint, learner.loaded, learner.optimizer) if checkpoint is not None else None
    logger.info("loaded the model in %.1f s", time.perf_counter() - started)
    if not run.strict:  # what is made again is not reported or published again
        track(settings.tracking, metrics, run.watchers, run.stack)
        by_first(run.world, partial(attach, settings, learner.loaded, metrics, run.watchers, run.stack))
    reading = _reading(run, learner, owner, buffer, state)
    saver = _saver(run, learner, owner, reading, checkpoint)
    trainer = Trainer(
        settings=settings,
        loaded=learner.loaded,
        optimizer=learner.optimizer,
        engine=learner.engine,
        evaluation_sets=learner.sets,
        cursor=reading.cursor,
        buffer=buffer,
        sampler=resting(drawn, paying, settings),
        paying=paying,
        ingest=reading.ingest,
        saver=saver,
        plan=reading.plan,
        metrics=metrics,
        stopped=run.stop.is_set if run.control is None else run.control.is_stopping,
        watchers=run.watchers,
        steering=_steering(run, learner, saver),
    )
    trainer.evaluations.world = run.world
    if checkpoint is not None and state is not None:
        _resume(run, trainer, checkpoint, state)
    saver.ledger = reading.cursor.ledger = _ledger(run, owner, reading.cursor)
    metrics.in_force(saver.made_with["settings_hash"], saver.made_with["settings_since"])
    run.stack.callback(reading.ingest.stop)
    return trainer


@dataclass(frozen=True)
class _Learner:
    """The model and what trains it, before anything is restored.

    Attributes:
        sets: fixed samples by name, whose loss is watched.
        steering: those of the target that steer the selection.
        held: those that do not.
        kept: what keeps the target, if it comes from a topic.
        copies: of it, if this process writes checkpoints while it trains.
        fingerprint: what it is made of; a checkpoint's weights, once they are restored, are others.
    """

    loaded: LoadedModel
    decoder: Decoder
    sets: dict[str, list[Sample]]
    steering: list[Sample]
    held: list[Sample]
    kept: KeptTarget | None
    copies: Copies | None
    optimizer: NamedAdamW | MaskedAdamW
    engine: SelectionEngine
    fingerprint: dict[str, object]


def _learner(run: Run) -> _Learner:
    settings, watchers, kept = run.settings, run.watchers, _kept_target(run)
    with watchers.during("loading model and tokenizer"):
        loaded = load_model(settings.model, settings.training.seed)
    decoder = Decoder(loaded.tokenizer, settings.samples, loaded.max_positions, settings.selection.field_names)
    with watchers.during("reading the target and the evaluation sets"):
        if kept is not None:
            kept.begin(lambda path: read_samples(path, decoder, settings.target.max_samples, kept.setting))
        sets, anchors = _evaluation_sets(settings, decoder), _anchors(settings, decoder)
        steering, held = split_target(settings, sets["target"])
    made_of = fingerprint_of(settings, loaded, __version__)
    with watchers.during("attaching the selection to the model"):
        copies = _copies(run, loaded)
        loaded, capture = cut(settings, loaded, run.world)
        optimizer = make_optimizer(loaded.model, settings.optimizer, settings.selection, run.world)
        engine = make_engine(settings, loaded, optimizer, steering, anchors, run.world, capture)
    return _Learner(loaded, decoder, sets, steering, held, kept, copies, optimizer, engine, made_of)


def _copies(run: Run, loaded: LoadedModel) -> Copies | None:
    """Of what this process writes while it trains, if it does: of a run in rows each rank writes its own."""
    first, distributed = run.world.rank == 0, run.settings.distributed
    writes = first or distributed.mode == "fsdp2"
    return Copies(loaded, keeps=first) if run.settings.checkpoint.asynchronous and writes else None


@dataclass(frozen=True)
class _Reading:
    """What reads the stream, and notes what is read."""

    cursor: Cursor
    dead_letters: DeadLetters
    ingest: Ingest
    plan: Plan


def _reading(run: Run, learner: _Learner, owner: Owner, buffer: Buffer, state: TrainerState | None) -> _Reading:
    settings, metrics, control = run.settings, run.metrics, run.control
    decided = None if state is None else state.cursor
    cursor = make_cursor(control, decided)
    metrics.count_outcomes(lambda: cursor.counts)
    dead_letters = open_dead_letters(settings, owner.confirm)
    run.stack.callback(dead_letters.close)
    source = open_source(settings.source, owner.confirm, partial(owns, run.world))
    kafka = settings.source.kafka
    registry = Registry(kafka) if settings.source.kind == "kafka" and kafka.format != "json" else None
    decoder = learner.decoder if registry is None else replace(learner.decoder, unpack=registry.to_json)
    parts = (source, decoder, dead_letters, cursor, buffer, metrics, settings.dead_letters)
    shared = control is not None
    ingest = SharedIngest.of(run.world, decided, *parts) if shared else Ingest(*parts, registry=registry)
    if isinstance(buffer, SharedBuffer):
        buffer.begin(cursor.last, lambda: ingest.idle)
    file = PlanFile(settings.checkpoint.dir, owner)
    plan = (
        Plan(file, cursor, buffer, run.strict) if control is None else SharedPlan(file, cursor, buffer, world=run.world)
    )
    run.stack.callback(plan.file.close)
    return _Reading(cursor, dead_letters, ingest, plan)


def _saver(run: Run, learner: _Learner, owner: Owner, reading: _Reading, checkpoint: Checkpoint | None) -> Saver:
    settings, earlier = run.settings, {} if checkpoint is None else read_provenance(checkpoint.path)
    return make_saver(
        run.control,
        reading.plan.buffer,
        settings=settings,
        loaded=learner.loaded,
        optimizer=learner.optimizer,
        cursor=reading.cursor,
        ingest=reading.ingest,
        dead_letters=reading.dead_letters,
        metrics=run.metrics,
        owner=owner,
        plan=reading.plan.file,
        fingerprint=learner.fingerprint,
        made_with=provenance_of(settings, __version__, earlier),
        jitter=random.SystemRandom(),
        watchers=run.watchers,
        copies=learner.copies,
    )


def _claim(run: Run) -> Owner:
    """From here on a trainer on another machine writes nothing more."""
    directory = run.settings.checkpoint.dir
    owner = claim(directory) if run.control is None else SharedOwner.claim(run.world, directory)
    run.metrics.owner_epoch.set(owner.epoch)
    return owner


def _ledger(run: Run, owner: Owner, cursor: Cursor) -> Decisions | None:
    """What is made again is in the ledger already."""
    return None if run.strict else open_ledger(run.settings.ledger, owner, sum(cursor.counts.values()))


def _kept_target(run: Run) -> KeptTarget | None:
    """What keeps the target as its topic has it, if it comes from one. Steps that are made again know theirs."""
    settings, topic = run.settings, run.settings.target.topic
    if topic is None or run.strict:
        return None
    from stream_trainer.sources.compacted.topic import CompactedTopic  # only who reads a topic needs a Kafka client

    kept = KeptTarget(settings.target.path, topic)
    followed = CompactedTopic(settings.source.kafka, topic, kept.take)
    with run.watchers.during("reading the target's topic"):
        followed.start(needed=not kept.exists)
    run.stack.callback(followed.close)
    run.metrics.target_topic.set_function(lambda: followed.reachable)
    return kept


def _steering(run: Run, learner: _Learner, saver: Saver) -> Steering:
    if run.control is None:
        return Steering(run.orders, learner.kept or _watched(run.settings, saver))
    watched = _watched(run.settings, saver) if run.world.rank == 0 else None
    return SharedSteering(run.control, run.orders, watched)


def _watched(settings: Settings, saver: Saver) -> WatchedFile | None:
    """The target's file, where a new one is to take over by itself."""
    if not settings.target.watch:
        return None
    return WatchedFile(settings.target.path, lambda: saver.fingerprint.get(TARGET_CONTENTS))


def _resume(run: Run, trainer: Trainer, checkpoint: Checkpoint, found: TrainerState) -> None:
    """Go on from a checkpoint that model and optimizer are restored from, if it goes with what is there now."""
    settings, metrics = run.settings, run.metrics
    state = _without_letters(found) if run.strict else found
    now = trainer.saver.fingerprint | consumed(settings.source, state.cursor)
    trainer.changed = check_resume(checkpoint.path, state.fingerprint, now, settings.checkpoint.on_mismatch)
    changes = [change_of(name, state.fingerprint, now) for name in trainer.changed]
    changes += report_changes(read_provenance(checkpoint.path), trainer.saver.made_with, but=trainer.changed)
    metrics.resumed_otherwise(trainer.changed)
    if changes:
        trainer.watchers.event(state.step, "settings_changed", "; ".join(changes))
        trainer.saver.made_with["settings_since"] = time.time()
    trainer.restore(state if run.strict else own_state(run.world, settings, state))
    metrics.durable(checkpoint.step, checkpoint.time, checkpoint.bytes)
    logger.info("resumed from %s at step %d", checkpoint.path, state.step)


def _without_letters(state: TrainerState) -> TrainerState:
    """What is made again keeps its letters elsewhere."""
    return replace(state, parts={name: part for name, part in state.parts.items() if name != "dead_letters"})


def _evaluation_sets(settings: Settings, decoder: Decoder) -> dict[str, list[Sample]]:
    sets = {"target": read_samples(settings.target.path, decoder, settings.target.max_samples, "target.path")}
    watched = {f"sets.{name}": (name, path) for name, path in settings.evaluation.sets.items()}
    if settings.evaluation.retention_path is not None:
        watched["retention_path"] = ("retention", settings.evaluation.retention_path)
    for setting, (name, path) in watched.items():
        sets[name] = read_samples(path, decoder, settings.evaluation.max_samples, f"evaluation.{setting}")
    return sets


def _anchors(settings: Settings, decoder: Decoder) -> list[Sample]:
    dual_sft = settings.selection.dual_sft
    if settings.selection.mask != "dual_sft" or dual_sft.anchor_path is None:
        return []
    return read_samples(dual_sft.anchor_path, decoder, dual_sft.anchors, "selection.dual_sft.anchor_path")

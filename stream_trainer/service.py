"""Put the parts together, run them, take them apart again: what `stream-trainer run` does.

Truth about where to read on, in this order: the checkpoint, the group's committed offset, `source.kafka.start`.
"""

import logging
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
import transformers

from stream_trainer import __version__
from stream_trainer.checkpoints.checkpoint import Checkpoint, TrainerState, load_latest, restore
from stream_trainer.checkpoints.fingerprint import change_of, check_resume, consumed, fingerprint_of
from stream_trainer.checkpoints.ownership import claim, locked
from stream_trainer.checkpoints.provenance import provenance_of, read_provenance, report_changes
from stream_trainer.checkpoints.trouble import try_out
from stream_trainer.ingest.buffer import Buffer
from stream_trainer.ingest.cursor import Cursor
from stream_trainer.ingest.dead_letters import open_dead_letters
from stream_trainer.ingest.thread import Ingest
from stream_trainer.models.loading import LoadedModel, load_model
from stream_trainer.monitoring.allocator import keep_freed_memory
from stream_trainer.monitoring.logs import adopt_transformers
from stream_trainer.monitoring.metrics import Metrics, State
from stream_trainer.monitoring.progress import Progress
from stream_trainer.monitoring.reporting import shown
from stream_trainer.monitoring.server import Server
from stream_trainer.records import Sample
from stream_trainer.samples.decoder import REASONS, Decoder, read_samples
from stream_trainer.settings.schema import Settings
from stream_trainer.sources import open_source
from stream_trainer.training.build import make_engine
from stream_trainer.training.optimizer import make_optimizer
from stream_trainer.training.sampling import make_sampler
from stream_trainer.training.saver import Saver
from stream_trainer.training.status import Status
from stream_trainer.training.trainer import Trainer
from stream_trainer.training.watchers import Watcher, Watchers, watching

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Summary:
    """What a run came to.

    Attributes:
        step: steps over the life of the model.
        counts: records by outcome over the life of the model.
        losses: last loss of each evaluation set (nats per token).
    """

    step: int
    counts: dict[str, int]
    losses: dict[str, float]


def run(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT, `training.max_steps`, or the end of a finite stream. Returns the exit code."""
    adopt_transformers()
    stop, progress = threading.Event(), Progress()
    source = settings.source.kafka.topic if settings.source.kind == "kafka" else settings.source.jsonl.path
    with stopping_on_signals(stop), shown(progress, f"stream-trainer · {source}", settings.log):
        serve(settings, stop, progress=progress)
    return 0


def serve(settings: Settings, stop: threading.Event, *watchers: Watcher, progress: Progress | None = None) -> Summary:
    """Train until `stop` is set or the work is done, and tell the watchers; ends in a checkpoint.

    `progress` is kept up to date, for somebody to show it. Raises StreamTrainerError for whatever an operator can mend.
    """
    selection = settings.selection
    metrics = Metrics(REASONS, arms=selection.cluster_ucb.clusters if selection.draw == "cluster_ucb" else 0)
    metrics.build.info({"version": __version__, "torch": torch.__version__, "transformers": transformers.__version__})
    status = Status(settings, metrics)
    if progress is not None:
        progress.begin(metrics, status.health)
        watchers = (watching(progress), *watchers)
    keep_freed_memory()
    if settings.training.threads is not None:
        torch.set_num_threads(settings.training.threads)
    with ExitStack() as stack:
        _take_directory(settings.checkpoint.dir, stack)
        if settings.server.enabled:
            server = Server(settings.server, metrics.registry, status.health, status.report)
            host, port = server.start()
            stack.callback(server.stop)
            logger.info("serving http://%s:%d/metrics", host, port)
        metrics.state.state(State.LOADING.value)
        try:
            trainer = _build(settings, metrics, Watchers([*watchers]), stop, stack)
            status.trainer = trainer
            if not stop.is_set():
                trainer.run()
        except BaseException as error:
            status.fail(error)
            raise
        counts = {outcome.value: count for outcome, count in trainer.cursor.counts.items()}
        logger.info("step %d: stopped; records %s", trainer.step, counts)
        return Summary(trainer.step, counts, trainer.losses)


def _take_directory(directory: Path, stack: ExitStack) -> None:
    """Keep other trainers of this machine away until the end, and see whether checkpoints can be written at all."""
    stack.enter_context(locked(directory))
    if not try_out(directory):
        logger.warning("checkpoint.dir=%s is on a mount that cannot flush directories", directory)


def _build(
    settings: Settings, metrics: Metrics, watchers: Watchers, stop: threading.Event, stack: ExitStack
) -> Trainer:
    """Load model, samples and checkpoint, and begin to read. What must be closed goes onto `stack`."""
    started = time.perf_counter()
    loaded, decoder, sets, anchors = _load(settings, watchers)
    buffer = Buffer(settings.buffer)
    with watchers.during("attaching the selection to the model"):
        optimizer = make_optimizer(loaded.model, settings.optimizer, settings.selection)
        engine = make_engine(settings, loaded, optimizer, sets["target"], anchors)
        sampler = make_sampler(settings, buffer, loaded, engine, sets["target"])
    fingerprint = fingerprint_of(settings, loaded, __version__)
    owner = claim(settings.checkpoint.dir)  # from here on a trainer on another machine writes nothing more
    with watchers.during("looking for a checkpoint to resume"):
        checkpoint = load_latest(settings.checkpoint.dir)
        state = restore(checkpoint, loaded, optimizer) if checkpoint is not None else None
    made_with = provenance_of(settings, __version__, {} if checkpoint is None else read_provenance(checkpoint.path))
    logger.info("loaded the model in %.1f s", time.perf_counter() - started)
    cursor = Cursor.restore(state.cursor) if state is not None else Cursor()
    metrics.count_outcomes(lambda: cursor.counts)
    dead_letters = open_dead_letters(settings)
    stack.callback(dead_letters.close)
    ingest = Ingest(open_source(settings.source), decoder, dead_letters, cursor, buffer, metrics, settings.dead_letters)
    saver = Saver(
        settings=settings,
        loaded=loaded,
        optimizer=optimizer,
        cursor=cursor,
        ingest=ingest,
        dead_letters=dead_letters,
        metrics=metrics,
        owner=owner,
        fingerprint=fingerprint,
        made_with=made_with,
        jitter=random.SystemRandom(),
        watchers=watchers,
    )
    trainer = Trainer(
        settings=settings,
        loaded=loaded,
        optimizer=optimizer,
        engine=engine,
        evaluation_sets=sets,
        cursor=cursor,
        buffer=buffer,
        sampler=sampler,
        ingest=ingest,
        saver=saver,
        metrics=metrics,
        stopped=stop.is_set,
        watchers=watchers,
    )
    if checkpoint is not None and state is not None:
        _resume(trainer, checkpoint, state)
    metrics.in_force(made_with["settings_hash"], made_with["settings_since"])
    stack.callback(ingest.stop)
    if not stop.is_set():
        trainer.begin()
    ingest.start(cursor.positions(), state.source_identity if state is not None else {})
    return trainer


def _load(settings: Settings, watchers: Watchers) -> tuple[LoadedModel, Decoder, dict[str, list[Sample]], list[Sample]]:
    """The model, what decodes samples for it, the evaluation sets and the anchors of the mask."""
    with watchers.during("loading model and tokenizer"):
        loaded = load_model(settings.model, settings.training.seed)
    decoder = Decoder(loaded.tokenizer, settings.samples, loaded.max_positions, settings.selection.field_names)
    with watchers.during("reading the target and the evaluation sets"):
        return loaded, decoder, _evaluation_sets(settings, decoder), _anchors(settings, decoder)


def _resume(trainer: Trainer, checkpoint: Checkpoint, state: TrainerState) -> None:
    """Go on from a checkpoint, if what it was made with allows that."""
    settings = trainer.settings
    now = trainer.saver.fingerprint | consumed(settings.source, state.cursor)
    trainer.changed = check_resume(checkpoint.path, state.fingerprint, now, settings.checkpoint.on_mismatch)
    trainer.metrics.resumed_otherwise(trainer.changed)
    changes = [change_of(name, state.fingerprint, now) for name in trainer.changed]
    changes += report_changes(read_provenance(checkpoint.path), trainer.saver.made_with, but=trainer.changed)
    if changes:
        trainer.watchers.event(state.step, "settings_changed", "; ".join(changes))
        trainer.saver.made_with["settings_since"] = time.time()
    trainer.restore(state)
    trainer.metrics.durable(checkpoint.step, checkpoint.time, checkpoint.bytes)
    logger.info("resumed from %s at step %d", checkpoint.path, state.step)


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


@contextmanager
def stopping_on_signals(stop: threading.Event) -> Iterator[list[signal.Signals]]:
    """SIGTERM and SIGINT set `stop` and are listed; a second SIGINT interrupts at once."""
    received: list[signal.Signals] = []

    def handler(number: int, _frame: FrameType | None) -> None:
        received.append(signal.Signals(number))
        logger.info("received %s: stopping after this step", received[-1].name)
        stop.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    previous = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, old in previous.items():
            signal.signal(number, old)

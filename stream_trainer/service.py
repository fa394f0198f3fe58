"""Put the parts together, run them, take them apart again: what `stream-trainer run` does.

Truth about where to read on, in this order: the checkpoint, the group's committed offset, `source.kafka.start`.
"""

import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from platform import python_version
from types import FrameType
from typing import Any

import torch
import transformers
from gradient_selectors.capture.capture import GradientCapture, UnsupportedParameterError
from gradient_selectors.draw.cluster_ucb import ClusterUcb
from gradient_selectors.mask.masked_adamw import MaskedAdamW

from stream_trainer import __version__
from stream_trainer.checkpoints.checkpoint import load_latest, restore
from stream_trainer.errors import SettingsError
from stream_trainer.ingest.buffer import Buffer
from stream_trainer.ingest.cursor import Cursor
from stream_trainer.ingest.dead_letters import open_dead_letters
from stream_trainer.ingest.thread import Ingest
from stream_trainer.models.loading import LoadedModel, load_model
from stream_trainer.monitoring.allocator import keep_freed_memory
from stream_trainer.monitoring.metrics import Metrics, State
from stream_trainer.monitoring.server import Health, Server
from stream_trainer.records import Outcome, Sample
from stream_trainer.samples.decoder import REASONS, Decoder, read_samples
from stream_trainer.settings.schema import Settings
from stream_trainer.sources import open_source
from stream_trainer.training.build import make_generators, make_selector, stream_options
from stream_trainer.training.features import EmbeddingFeatures
from stream_trainer.training.masking import Anchors, Masking, make_dual_sft, start_from
from stream_trainer.training.optimizer import make_optimizer
from stream_trainer.training.pools import ByClusters, Draws, InOrder
from stream_trainer.training.step import Learner
from stream_trainer.training.target import Target
from stream_trainer.training.trainer import OnEvaluation, OnStep, Trainer

logger = logging.getLogger(__name__)

READY = frozenset({State.CATCHING_UP, State.TRAINING, State.IDLE})


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
    stop = threading.Event()
    with stopping_on_signals(stop):
        serve(settings, stop)
    return 0


def serve(
    settings: Settings,
    stop: threading.Event,
    on_step: OnStep | None = None,
    on_evaluation: OnEvaluation | None = None,
) -> Summary:
    """Train until `stop` is set or the work is done; ends in a checkpoint.

    Raises StreamTrainerError for whatever an operator can mend.
    """
    selection = settings.selection
    metrics = Metrics(REASONS, arms=selection.cluster_ucb.clusters if selection.draw == "cluster_ucb" else 0)
    metrics.build.info({"version": __version__, "torch": torch.__version__, "transformers": transformers.__version__})
    status = _Status(settings, metrics)
    keep_freed_memory()
    if settings.training.threads is not None:
        torch.set_num_threads(settings.training.threads)
    with ExitStack() as stack:
        if settings.server.enabled:
            server = Server(settings.server, metrics.registry, status.health, status.report)
            host, port = server.start()
            stack.callback(server.stop)
            logger.info("serving http://%s:%d/metrics", host, port)
        try:
            trainer = _build(settings, metrics, stop, stack)
            trainer.on_step, trainer.on_evaluation = on_step, on_evaluation
            status.trainer = trainer
            if not stop.is_set():
                trainer.run()
        except BaseException:
            status.enter(State.FAILED)
            raise
        counts = {outcome.value: count for outcome, count in trainer.cursor.counts.items()}
        logger.info("step %d: stopped; records %s", trainer.step, counts)
        return Summary(trainer.step, counts, trainer.losses)


def _build(settings: Settings, metrics: Metrics, stop: threading.Event, stack: ExitStack) -> Trainer:
    """Load model, samples and checkpoint, and begin to read. What must be closed goes onto `stack`."""
    metrics.state.state(State.LOADING.value)
    started = time.perf_counter()
    loaded = load_model(settings.model, settings.training.seed)
    decoder = Decoder(loaded.tokenizer, settings.samples, loaded.max_positions)
    sets = _evaluation_sets(settings, decoder)
    learner = make_learner(settings, loaded, sets["target"], _anchors(settings, loaded, decoder))
    buffer = Buffer(settings.buffer)
    draws = make_draws(settings, buffer, loaded, sets["target"])
    checkpoint = load_latest(settings.checkpoint.dir)
    state = restore(checkpoint, loaded, learner.optimizer) if checkpoint is not None else None
    logger.info("loaded the model in %.1f s", time.perf_counter() - started)
    cursor = Cursor.restore(state.cursor) if state is not None else Cursor()
    dead_letters = open_dead_letters(settings)
    stack.callback(dead_letters.close)
    ingest = Ingest(open_source(settings.source), decoder, dead_letters, cursor, buffer, metrics)
    trainer = Trainer(
        settings=settings,
        loaded=loaded,
        learner=learner,
        evaluation_sets=sets,
        cursor=cursor,
        buffer=buffer,
        draws=draws,
        ingest=ingest,
        dead_letters=dead_letters,
        metrics=metrics,
        stopped=stop.is_set,
    )
    if checkpoint is not None and state is not None:
        trainer.restore(state)
        metrics.durable(checkpoint.step, checkpoint.time, checkpoint.bytes)
        logger.info("resumed from %s at step %d", checkpoint.path, state.step)
    stack.callback(ingest.stop)
    ingest.start(cursor.positions(), state.source_identity if state is not None else {})
    return trainer


def make_learner(
    settings: Settings, loaded: LoadedModel, target_samples: list[Sample], anchors: Anchors | None = None
) -> Learner:
    """Everything a step needs.

    Raises SettingsError if a trainable parameter of the model is not covered exactly, or the mask's file does not fit.
    """
    selection, pad_id = settings.selection, loaded.tokenizer.pad_token_id
    try:
        capture = GradientCapture(loaded.model, loaded.autocast_dtype)
    except UnsupportedParameterError as error:
        raise SettingsError(f"model.name={settings.model.name}: {error}; or set model.lora") from error
    optimizer = make_optimizer(capture, settings.optimizer, selection)
    masking = None
    if isinstance(optimizer, MaskedAdamW):
        if selection.mask == "dual_sft":
            method = make_dual_sft(selection.dual_sft, settings.optimizer.learning_rate)
            masking = Masking(method, optimizer, anchors)
        if selection.mask_path is not None:
            start_from(optimizer, selection.mask_path)
    generators = make_generators(settings.training.seed)
    refresh = settings.target
    target = Target(target_samples, refresh.refresh_steps, pad_id, refresh.refresh_samples, refresh.decay)
    return Learner(
        capture=capture,
        optimizer=optimizer,
        selector=make_selector(selection, generators),
        target=target if selection.needs_target else None,
        masking=masking,
        selection=selection,
        optimization=settings.optimizer,
        pad_id=pad_id,
        generators=generators,
    )


def make_draws(settings: Settings, buffer: Buffer, loaded: LoadedModel, target_samples: list[Sample]) -> Draws:
    """What hands out the steps' pools. To be made before a checkpoint is restored: features stay as they are then."""
    selection, wait_s = settings.selection, settings.buffer.wait_s
    if selection.draw == "all":
        return InOrder(buffer, selection.pool_size, wait_s)
    features = EmbeddingFeatures.of_model(loaded.model)
    bandit = ClusterUcb(
        stream_options(selection.cluster_ucb, selection.chosen), settings.training.seed, features.centre(target_samples)
    )
    return ByClusters(
        buffer=buffer,
        bandit=bandit,
        features=features,
        pool_size=selection.pool_size,
        capacity=selection.cluster_ucb.waiting,
        intake=selection.cluster_ucb.intake,
        wait_s=wait_s,
    )


def _evaluation_sets(settings: Settings, decoder: Decoder) -> dict[str, list[Sample]]:
    sets = {"target": read_samples(settings.target.path, decoder, settings.target.max_samples, "target.path")}
    watched = {f"sets.{name}": (name, path) for name, path in settings.evaluation.sets.items()}
    if settings.evaluation.retention_path is not None:
        watched["retention_path"] = ("retention", settings.evaluation.retention_path)
    for setting, (name, path) in watched.items():
        sets[name] = read_samples(path, decoder, settings.evaluation.max_samples, f"evaluation.{setting}")
    return sets


def _anchors(settings: Settings, loaded: LoadedModel, decoder: Decoder) -> Anchors | None:
    dual_sft = settings.selection.dual_sft
    if settings.selection.mask != "dual_sft" or dual_sft.anchor_path is None:
        return None
    setting = "selection.dual_sft.anchor_path"
    samples = read_samples(dual_sft.anchor_path, decoder, dual_sft.anchors, setting)
    return Anchors.of(loaded.model, samples, dual_sft.lambda_prior)


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


class _Status:
    """What the HTTP server shows; read from its threads while the trainer works."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.trainer: Trainer | None = None
        self._settings = settings
        self._metrics = metrics
        self._state = State.STARTING
        self.enter(State.STARTING)

    def enter(self, state: State) -> None:
        self._state = state
        self._metrics.state.state(state.value)

    def health(self) -> Health:
        """Stalled means: for `server.stall_s` seconds no step while there is something to do, or no turn of reading."""
        trainer, limit = self.trainer, self._settings.server.stall_s
        if self._state is State.FAILED:
            return Health(State.FAILED.value, ok=False, ready=False, detail="the service failed; see its log")
        if trainer is None:
            return Health(State.LOADING.value, ok=True, ready=False, detail="the model is being loaded")
        # A step may rightly wait `buffer.wait_s` for samples that would fill its pool.
        age = time.monotonic() - trainer.last_progress - self._settings.buffer.wait_s
        silence = time.monotonic() - trainer.ingest.last_turn if trainer.ingest.alive else 0.0
        detail = ""
        if trainer.state is not State.IDLE and age > limit:
            detail = f"no progress for {age:.0f} s, server.stall_s={limit:.0f}"
        elif silence > limit:
            detail = f"reading hangs since {silence:.0f} s, server.stall_s={limit:.0f}"
        return Health(trainer.state.value, ok=not detail, ready=trainer.state in READY, detail=detail)

    def report(self) -> dict[str, Any]:
        """The service in a page: state, step, losses, records by outcome, what waits."""
        trainer = self.trainer
        report: dict[str, Any] = {
            "version": __version__,
            "python": python_version(),
            "model": self._settings.model.name or "built from model.config",
            "selection": self._settings.selection.weigh,
            "state": State.LOADING.value if trainer is None else trainer.state.value,
        }
        if trainer is None:
            return report
        last = trainer.last_report
        report |= {
            "step": trainer.step,
            "evaluation_loss": dict(trainer.losses),
            "records": {outcome.value: trainer.cursor.counts[outcome] for outcome in Outcome},
            "buffer_records": trainer.buffer.records,
        }
        if last is not None:
            report |= {
                "pool_loss": sum(last.losses) / len(last.losses),
                "learning_rate": last.learning_rate,
                "step_seconds": sum(last.seconds.values()),
            }
        return report

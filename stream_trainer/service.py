"""Put the parts together, run them, take them apart again: what `stream-trainer run` does.

Truth about where to read on, in this order: the checkpoint, the group's committed offset, `source.kafka.start`.
"""

import logging
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType

import torch
import transformers
from gradient_selectors.world.base import World

from stream_trainer import __version__
from stream_trainer.assembly import Run, build
from stream_trainer.checkpoints.ownership import locked
from stream_trainer.checkpoints.trouble import free_bytes, try_out
from stream_trainer.distributed.control import Control
from stream_trainer.distributed.group import counting, joined, settings_of_rank
from stream_trainer.monitoring.allocator import keep_freed_memory, memory_limit
from stream_trainer.monitoring.control import ControlServer
from stream_trainer.monitoring.logs import adopt_transformers
from stream_trainer.monitoring.metrics import Metrics, State
from stream_trainer.monitoring.orders import Orders
from stream_trainer.monitoring.progress import Progress
from stream_trainer.monitoring.reporting import shown
from stream_trainer.monitoring.server import Server
from stream_trainer.samples.decoder import REASONS
from stream_trainer.settings.schema import Settings
from stream_trainer.training.live.watch import Live
from stream_trainer.training.status import Status
from stream_trainer.training.watchers import Watcher, Watchers, watching

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Summary:
    """What a run came to.

    Attributes:
        step: steps over the life of the model.
        counts: records by outcome over the life of the model.
        losses: last loss of each evaluation set (nats per token).
        changed: what the checkpoint that it began with was made with and was other now, by name.
    """

    step: int
    counts: dict[str, int]
    losses: dict[str, float]
    changed: Sequence[str] = ()


def run(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT, `training.max_steps`, or the end of a finite stream. Returns the exit code."""
    adopt_transformers()
    stop, progress = threading.Event(), Progress()
    source = settings.source.kafka.topic if settings.source.kind == "kafka" else settings.source.jsonl.path
    with stopping_on_signals(stop), joined(settings) as world:
        own = settings_of_rank(settings, world)
        with shown(progress, f"stream-trainer · {source}", own.log):
            serve(own, stop, progress=progress, world=world)
    return 0


def serve(
    settings: Settings,
    stop: threading.Event,
    *watchers: Watcher,
    progress: Progress | None = None,
    strict: bool = False,
    world: World | None = None,
) -> Summary:
    """Train until `stop` is set or the work is done, and tell the watchers; ends in a checkpoint.

    `progress` is kept up to date, for somebody to show it. With `strict` steps are only made again as `plan.jsonl` has
    them. `world`: the processes that make the run. Raises NotAsPlannedError if a step is not made again as it was, and
    StreamTrainerError for whatever else an operator can mend.
    """
    selection = settings.selection
    metrics = Metrics(REASONS, arms=selection.cluster_ucb.clusters if selection.draw == "cluster_ucb" else 0)
    metrics.build.info({"version": __version__, "torch": torch.__version__, "transformers": transformers.__version__})
    status, live = Status(settings, metrics), Live(settings, metrics)
    if progress is not None:
        progress.begin(metrics, status.health)
        watchers = (watching(progress), *watchers)
    keep_freed_memory()
    metrics.memory_limit.set(memory_limit())
    if settings.training.threads is not None:
        torch.set_num_threads(settings.training.threads)
    with ExitStack() as stack:
        control = None if world is None or world.size == 1 else Control(world, stop.is_set)
        if control is None or control.world.rank == 0:
            _take_directory(settings.checkpoint.dir, stack)
        metrics.disk_free.set_function(partial(free_bytes, settings.checkpoint.dir))
        orders = Orders()
        metrics.ranks.processes.set(1 if world is None else world.size)
        if control is not None:
            watchers += (counting(control.world, metrics),)
        watchers += (Watcher(on_event=lambda _, kind, __: metrics.happened(kind)),)
        if settings.server.enabled:
            watchers += (live.watcher,)
        _listen(settings, metrics, status, live, orders, stack)
        metrics.state.state(State.LOADING.value)
        try:
            trainer = build(Run(settings, metrics, Watchers([*watchers]), orders, stop, stack, strict, control))
            status.trainer = live.trainer = trainer
            status.live = live
            if not trainer.stopped():
                trainer.begin()
                trainer.run()
        except BaseException as error:
            status.fail(error)
            raise
        counts = {outcome.value: count for outcome, count in trainer.cursor.counts.items()}
        logger.info("step %d: stopped; records %s", trainer.step, counts)
        return Summary(trainer.step, counts, trainer.evaluations.losses, trainer.changed)


def _take_directory(directory: Path, stack: ExitStack) -> None:
    """Keep other trainers of this machine away until the end, and see whether checkpoints can be written at all."""
    stack.enter_context(locked(directory))
    if not try_out(directory):
        logger.warning("checkpoint.dir=%s is on a mount that cannot flush directories", directory)


def _listen(settings: Settings, metrics: Metrics, status: Status, live: Live, orders: Orders, stack: ExitStack) -> None:
    """Open the page, and the address that takes orders, where they are on."""
    if settings.server.enabled:
        history, panels = live.history.since, live.panels
        server = Server(settings.server, metrics.registry, status.health, status.report, history, panels)
        host, port = server.start()
        stack.callback(server.stop)
        logger.info("serving http://%s:%d/metrics", host, port)
    if settings.control.enabled:
        control = ControlServer(settings.control, orders, status.report)
        host, port = control.start()
        stack.callback(control.stop)
        logger.info("taking orders at http://%s:%d", host, port)
    stack.callback(orders.close)


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

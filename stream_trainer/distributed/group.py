"""The process group of a run: joined as torchrun says, left when all are done."""

import logging
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from gradient_selectors.world.base import Alone, LostError, World

from stream_trainer.distributed.leaving import processes
from stream_trainer.distributed.resume import letters_path
from stream_trainer.errors import GroupError, SettingsError
from stream_trainer.monitoring.metrics import Metrics
from stream_trainer.settings.schema import Settings
from stream_trainer.training.watchers import Watcher

# Between two steps a rank may wait for long, for a checkpoint that is written for one. A process that dies is noticed
# at once all the same.
CONTROL_TIMEOUT = timedelta(hours=24)

logger = logging.getLogger(__name__)


@contextmanager
def joined(settings: Settings) -> Iterator[World]:
    """The ranks of the run; this process alone if torchrun did not start several.

    Raises SettingsError if the settings do not say that it may, GroupError if another process ends or does not answer.
    """
    size = processes()
    if size == 1:
        yield Alone()
        return
    if settings.distributed.mode == "none":
        raise SettingsError(
            f"distributed.mode=none, but {size} processes were started; set distributed.mode to replicated, or start "
            "one process"
        )
    _require_own_addresses()
    try:
        with _group(settings) as world:
            yield world
    except LostError as error:
        raise GroupError(
            f"distributed.mode={settings.distributed.mode}: another process has ended or does not answer ({error}); "
            "nothing is written, start all again: they go on from the last checkpoint"
        ) from error


@contextmanager
def _group(settings: Settings) -> Iterator[World]:
    import torch.distributed as dist
    from gradient_selectors.world.ranks import Ranks, plain_words

    backend = "gloo"
    if settings.model.device.startswith("cuda"):
        backend = "nccl"
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=settings.distributed.timeout_s))
        world = Ranks(CONTROL_TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise LostError(plain_words(error)) from error
    logger.info("rank %d of %d", world.rank, world.size)
    yield world
    world.facts([0])  # nobody leaves while another may still wait for him
    dist.destroy_process_group()


def _require_own_addresses() -> None:
    """A second life under torchrun finds the addresses of the first in the store that torchrun shares, and hangs.

    Seen with torch 2.13. With the variable torchrun makes a new store for each life.
    """
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if shared and restarts:
        raise SettingsError(
            f"torchrun --max-restarts={restarts} needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment, or the "
            "processes that it starts again hang; set it"
        )


def counting(world: World, metrics: Metrics) -> Watcher:
    """What keeps count of the bytes that are sent."""
    counted = Counter[str]()

    def on_step(*_: object) -> None:
        for kind, sent in world.sent.items():
            metrics.ranks.sent.labels(kind).inc(sent - counted[kind])
            counted[kind] = sent

    return Watcher(on_step=on_step)


def settings_of_rank(settings: Settings, world: World) -> Settings:
    """What differs between the ranks: where letters and the page are, and that one alone reports and commits."""
    if world.size == 1:
        return settings
    changes: dict[str, dict[str, object]] = {
        "dead_letters": {"path": letters_path(settings.dead_letters.path, world.rank)}
    }
    if settings.server.port:
        changes["server"] = {"port": settings.server.port + world.rank}
    if world.rank:
        changes["log"] = {"progress": "off"}
        changes["tracking"] = {"report_to": (), "otlp_url": None}
        changes["control"] = {"enabled": False}
    copies = {name: getattr(settings, name).model_copy(update=update) for name, update in changes.items()}
    if world.rank:  # offsets are committed by one, which no other may fence
        kafka = settings.source.kafka.model_copy(update={"fencing": "off"})
        copies["source"] = settings.source.model_copy(update={"kafka": kafka})
    return settings.model_copy(update=copies)

"""The whole service on several ranks, as threads of this process."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from gradient_selectors.world.base import Alone, World

from stream_trainer import assembly
from stream_trainer.distributed.group import settings_of_rank
from stream_trainer.models import saving
from stream_trainer.models.loading import load_model
from stream_trainer.records import Sample
from stream_trainer.service import Summary, serve
from stream_trainer.settings.schema import ModelSettings, Settings
from stream_trainer.training.step import StepReport
from stream_trainer.training.watchers import Watcher
from tests.gradient_selectors.world.threads import on_ranks
from tests.helpers.service import MODEL, Step, step_of


def saved_model(folder: Path) -> dict[str, Any]:
    """A model on disk: one that is drawn at random is drawn from a generator that all threads share."""
    path = folder / "model"
    if not path.exists():
        model: Any = load_model(ModelSettings(config=MODEL, tokenizer="bytes"), seed=5).model
        model.save_pretrained(path)
    return {"name": str(path), "config": None, "tokenizer": "bytes"}


@contextmanager
def loading_one_at_a_time() -> Iterator[None]:
    """Threads share the generator of which adapters are drawn, and what transformers replaces while it loads."""
    lock = threading.Lock()

    def alone(load: Callable[..., Any]) -> Callable[..., Any]:
        def loaded(*arguments: Any) -> Any:
            with lock:
                return load(*arguments)

        return loaded

    with (
        patch.object(assembly, "load_model", alone(load_model)),
        patch.object(saving, "_read_saved", alone(saving._read_saved)),
    ):
        yield


def serve_on_ranks(
    config: dict[str, Any],
    size: int,
    last_step: int | None = None,
    *,
    told: int = 0,
    watcher: Watcher = Watcher(),  # noqa: B008
) -> tuple[list[Summary], list[list[Step]]]:
    """Run to the end of the stream, or until rank `told` is told to stop after a step. By rank.

    `watcher` is told of all ranks.
    """

    def work(world: World) -> tuple[Summary, list[Step]]:
        stop, steps = threading.Event(), list[Step]()

        def on_step(number: int, pool: Sequence[Sample], report: StepReport) -> None:
            steps.append(step_of(number, pool, report))
            if number == last_step and world.rank == told:
                stop.set()

        settings = settings_of_rank(Settings(**config), world)
        return serve(settings, stop, Watcher(on_step), watcher, world=world), steps

    with loading_one_at_a_time():
        found = [work(Alone())] if size == 1 else on_ranks(size, work)
    return [summary for summary, _ in found], [steps for _, steps in found]

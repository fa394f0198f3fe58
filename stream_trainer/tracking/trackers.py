"""Trackers of experiments, each behind the same two calls."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from stream_trainer.models.refusals import loading
from stream_trainer.settings.sections.publish import TrackingSettings

MLFLOW_BATCH = 1000  # metrics that one request may have


@dataclass(frozen=True)
class Tracker:
    """Both calls happen on one thread, and may raise or hang.

    Attributes:
        name: one of `metrics.TRACKERS`.
        write: takes the step and its values by name.
        close: called once, at the end.
    """

    name: str
    write: Callable[[int, Mapping[str, float]], None]
    close: Callable[[], None]


def make_tracker(name: str, settings: TrackingSettings) -> Tracker:
    """Load the package, but speak to nobody yet. Raises SettingsError if it is missing."""
    with loading(f"tracking.report_to={name}", "leave it out", name):
        return {"tensorboard": _tensorboard, "mlflow": _mlflow, "wandb": _wandb}[name](settings)


class _Lazy:
    """Made at the first use, on the thread that may hang."""

    def __init__(self, make: Callable[[int], Any]) -> None:
        self._make = make
        self.made: Any = None

    def at(self, step: int) -> Any:
        if self.made is None:
            self.made = self._make(step)
        return self.made


def _tensorboard(settings: TrackingSettings) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    directory = settings.tensorboard_dir / (settings.name or "")
    # What a killed run wrote of the steps that are made again is hidden.
    lazy = _Lazy(lambda step: SummaryWriter(str(directory), purge_step=step))

    def write(step: int, values: Mapping[str, float]) -> None:
        writer = lazy.at(step)
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return Tracker("tensorboard", write, lambda: lazy.made and lazy.made.close())


def _mlflow(settings: TrackingSettings) -> Tracker:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    def begin(_: int) -> tuple[Any, str]:
        client = MlflowClient(settings.mlflow_uri)
        found = client.get_experiment_by_name(settings.project)
        experiment = found.experiment_id if found is not None else client.create_experiment(settings.project)
        return client, client.create_run(experiment, run_name=settings.name).info.run_id

    lazy = _Lazy(begin)

    def write(step: int, values: Mapping[str, float]) -> None:
        (client, run), now = lazy.at(step), int(time.time() * 1000)
        rows = [Metric(name, value, now, step) for name, value in values.items()]
        for first in range(0, len(rows), MLFLOW_BATCH):
            client.log_batch(run, metrics=rows[first : first + MLFLOW_BATCH])

    def close() -> None:
        if lazy.made is not None:
            client, run = lazy.made
            client.set_terminated(run)

    return Tracker("mlflow", write, close)


def _wandb(settings: TrackingSettings) -> Tracker:
    import wandb

    lazy = _Lazy(lambda _: wandb.init(project=settings.project, name=settings.name))

    def write(step: int, values: Mapping[str, float]) -> None:
        lazy.at(step).log(dict(values), step=step)

    return Tracker("wandb", write, lambda: lazy.made and lazy.made.finish())

"""Everything that goes out of a run, as watchers of it."""

import json
from contextlib import ExitStack
from types import TracebackType

from stream_trainer.models.loading import LoadedModel
from stream_trainer.models.peft_format import config_text
from stream_trainer.monitoring.metrics import Metrics
from stream_trainer.publishing.backup import Backup
from stream_trainer.publishing.hooks import make_hooks
from stream_trainer.publishing.making import Origin
from stream_trainer.publishing.publisher import Publisher
from stream_trainer.settings.schema import Settings
from stream_trainer.training.watchers import Watchers


def attach(settings: Settings, loaded: LoadedModel, metrics: Metrics, watchers: Watchers, stack: ExitStack) -> None:
    """Publish and upload whatever the settings say, until `stack` ends. Raises SettingsError."""
    publish = settings.publish
    if publish.dir is not None:
        adapter = json.loads(config_text(loaded.model)) if loaded.lora else None
        origin = Origin(
            # An adapter that is gone on with has another base than itself.
            base_model=adapter["base_model_name_or_path"] if adapter else settings.model.name,
            target=settings.target.path.name,
            adapter=loaded.lora,
            merged=publish.merged or not loaded.lora,
        )
        publisher = Publisher(publish.dir.absolute(), publish, origin, make_hooks(publish), metrics)
        watchers.all.append(publisher.watcher(watchers.event))
        _at_end(stack, publisher)
    if settings.checkpoint.upload is not None:
        backup = Backup(settings.checkpoint.upload, metrics)
        watchers.all.append(backup.watcher)
        _at_end(stack, backup)


def _at_end(stack: ExitStack, part: Publisher | Backup) -> None:
    def end(_: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        part.end(error)

    stack.push(end)

"""A model in rows on several processes: attached to whole, then cut by torch's FSDP2."""

from dataclasses import replace

from gradient_selectors import GradientCapture
from gradient_selectors.capture.places import ReplacedParameterError
from gradient_selectors.sharding import shard
from gradient_selectors.world.base import World

from stream_trainer.errors import SettingsError
from stream_trainer.models.loading import LoadedModel
from stream_trainer.models.twin import without_weights
from stream_trainer.settings.schema import Settings
from stream_trainer.training.build import make_capture


def cut(settings: Settings, loaded: LoadedModel, world: World) -> tuple[LoadedModel, GradientCapture | None]:
    """The model, in rows if the settings say so, and then what is attached to it.

    Its optimizer is made after that. Raises SettingsError if the model cannot be cut.
    """
    distributed = settings.distributed
    if world.size == 1 or distributed.mode != "fsdp2":
        return loaded, None
    twin = without_weights(loaded.model)
    capture = make_capture(settings, loaded)
    try:
        shard(capture, world, reshard_after_forward=distributed.reshard_after_forward)
    except (ValueError, NotImplementedError, ReplacedParameterError) as error:
        why = f"distributed.mode=fsdp2: the model cannot be cut ({error}); set it to replicated"
        raise SettingsError(why) from error
    return replace(loaded, twin=twin), capture

"""Stream Trainer: fine-tunes a language model continuously from a stream, on the samples that help its target.

A run from Python, until `stop` is set or the stream ends:

    import threading
    from stream_trainer import Settings, serve

    summary = serve(Settings(source=..., model=..., target=...), stop=threading.Event())

Names are loaded when they are first used, so that `stream-trainer --help` does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stream_trainer.errors import StreamTrainerError
    from stream_trainer.service import serve
    from stream_trainer.settings.schema import Settings
    from stream_trainer.training.step import StepReport

__version__ = "0.1.0"

__all__ = ["Settings", "StepReport", "StreamTrainerError", "serve"]

_HOMES = {
    "Settings": "stream_trainer.settings.schema",
    "StepReport": "stream_trainer.training.step",
    "StreamTrainerError": "stream_trainer.errors",
    "serve": "stream_trainer.service",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)

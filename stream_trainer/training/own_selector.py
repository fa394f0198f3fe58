"""A selector of the user's own, loaded by its import path: `selection.weigh: package.module:Class`."""

import importlib
import inspect
from typing import cast

import torch
from gradient_selectors import Selector

from stream_trainer.errors import SettingsError
from stream_trainer.models.refusals import first_line
from stream_trainer.settings.sections.selection import SelectionSettings


def load_selector(settings: SelectionSettings, generator: torch.Generator) -> Selector:
    """The selector. It is given `batch_size` and `generator` if it has arguments of these names, and its options.

    Raises SettingsError, in one line, whatever is wrong with it.
    """
    setting = f"selection.weigh={settings.weigh}"
    module, _, name = settings.weigh.partition(":")
    try:
        kind = getattr(importlib.import_module(module), name)
    except Exception as error:  # the user's own code may raise anything
        known_kind = isinstance(error, ImportError | AttributeError)
        reason = first_line(error) if known_kind else f"{type(error).__name__}: {first_line(error)}"
        raise SettingsError(
            f"{setting} cannot be imported ({reason}); put it on the PYTHONPATH as module:Class"
        ) from None
    ours = {"batch_size": settings.batch_size, "generator": generator}
    try:
        known = inspect.signature(kind).parameters
        selector = kind(**{name: value for name, value in ours.items() if name in known} | settings.weigh_options)
    except (TypeError, ValueError) as error:
        raise SettingsError(
            f"{setting} cannot be made ({first_line(error)}); correct selection.weigh_options"
        ) from None
    except Exception as error:  # the user's own code may raise anything
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise SettingsError(f"{setting} cannot be made ({reason}); correct it or selection.weigh_options") from error
    if not callable(getattr(selector, "decide", None)):
        raise SettingsError(f"{setting} has no method decide(interaction); see the page on adding a selector")
    return cast(Selector, selector)

"""Features of a user's own: a record that they fail on is given away; failing on many in a row ends the run.

They are tried on the target's samples at the start, so what fails later is the record's making, or broke since.
"""

import importlib
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from gradient_selectors.features.embeddings import EmbeddingFeatures
from gradient_selectors.features.traits import Traits, describe

from stream_trainer.errors import SettingsError, TrainingError
from stream_trainer.models.refusals import first_line
from stream_trainer.records import Sample
from stream_trainer.settings.sections.selection import PREDICTS, SelectionSettings
from stream_trainer.training.faults.culprits import Failure

FEATURE_FAILED = "feature_failed"  # the reason of its dead letters
MAX_FAILED_IN_A_ROW = 32  # records

Accuse = Callable[[Sample, Failure], None]

logger = logging.getLogger(__name__)


@dataclass
class OwnFeatures:
    """The user's function, and what it returns looked at.

    Attributes:
        setting: what names it, and its value.
        width: numbers that it makes of each of the target's samples; None before these were described.
        failed: records in a row, up to now, that it failed on.
    """

    setting: str
    function: Callable[[Sequence[Any]], Any]
    width: int | None = None
    failed: int = field(default=0, init=False)

    def __call__(self, samples: Sequence[Any]) -> npt.NDArray[np.float64]:
        """A row of numbers for each sample. Raises what the function does, and ValueError if it makes anything else."""
        rows = np.asarray(self.function(samples), dtype=np.float64)
        if len(rows) != len(samples):
            raise ValueError(f"{len(rows)} rows for {len(samples)} samples")
        rows = rows.reshape(len(samples), -1)
        if self.width is not None and rows.shape[1] != self.width:
            raise ValueError(f"{rows.shape[1]} numbers for a sample, and {self.width} for one of target.path")
        if not np.isfinite(rows).all():
            raise ValueError("a number is not finite")
        return rows

    def stop(self, failure: Failure, what: str) -> TrainingError:
        """The error that ends the run; the log has where it was raised."""
        logger.error("%s failed\n%s", self.setting, failure.trace)
        return TrainingError(f"{self.setting} failed on {what} ({failure.detail}); correct it and start again")


def load_own_features(selection: SelectionSettings) -> OwnFeatures | None:
    """The user's own function, if one is named. Raises SettingsError if it cannot be imported."""
    named = [name for name in selection.learned.features if ":" in name]
    if selection.draw not in PREDICTS or not named:
        return None
    setting = f"selection.learned.features={named[0]}"
    module, _, name = named[0].partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:  # the user's own code may raise anything
        raise SettingsError(
            f"{setting} cannot be imported ({type(error).__name__}: {first_line(error)}); put it on the PYTHONPATH"
        ) from None
    if not callable(function):
        raise SettingsError(f"{setting} is no function; name one from samples to an array with a row for each")
    return OwnFeatures(setting, function)


def describe_target(samples: Sequence[Sample], features: EmbeddingFeatures, own: OwnFeatures | None) -> list[Traits]:
    """The traits of the target's samples. Raises SettingsError if the user's own features cannot be used on these."""
    if own is None:
        return describe(samples, features)
    try:
        traits = describe(samples, features, own)
    except Exception as error:  # the user's own code may raise anything
        raise SettingsError(
            f"{own.setting}: your own features cannot be used ({type(error).__name__}: {first_line(error)}); return an "
            "array of finite numbers with a row for each sample"
        ) from error
    own.width = len(traits[0].own_f)
    return traits


def describe_sound(
    samples: Sequence[Sample], features: EmbeddingFeatures, own: OwnFeatures | None, accuse: Accuse
) -> list[Traits | None]:
    """The traits of samples of the stream, None for those that the user's own features fail on, which are given away.

    Raises TrainingError if that are many in a row; none of these samples are given away then.
    """
    if own is None:
        return list(describe(samples, features))
    with suppress(Exception):  # the user's own code may raise anything
        traits = describe(samples, features, own)
        own.failed = 0 if traits else own.failed
        return list(traits)
    return _without_culprits(samples, features, own, accuse)


def _without_culprits(
    samples: Sequence[Sample], features: EmbeddingFeatures, own: OwnFeatures, accuse: Accuse
) -> list[Traits | None]:
    tried = {i: _failure(own, sample) for i, sample in enumerate(samples)}
    culprits = {i: failure for i, failure in tried.items() if failure is not None}
    for i in range(len(samples)):
        own.failed = own.failed + 1 if i in culprits else 0
        if own.failed >= MAX_FAILED_IN_A_ROW:
            raise own.stop(culprits[i], f"{own.failed} records in a row")
    for i, failure in culprits.items():
        accuse(samples[i], replace(failure, reason=FEATURE_FAILED))
    rest = [sample for i, sample in enumerate(samples) if i not in culprits]
    try:
        known = iter(describe(rest, features, own))
    except Exception as error:  # the user's own code may raise anything
        raise own.stop(Failure.of(error), "records together, each of which it takes by itself") from error
    return [None if i in culprits else next(known) for i in range(len(samples))]


def _failure(own: OwnFeatures, sample: Sample) -> Failure | None:
    """Why the user's function cannot take a sample by itself; None if it can."""
    try:
        own([sample])
    except Exception as error:  # the user's own code may raise anything
        return Failure.of(error)
    return None

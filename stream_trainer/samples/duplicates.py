"""Which samples were met before among the last ones: producers send a record again when they are in doubt.

A sample is told by its producer's id or by its tokens, of which a digest of 8 bytes is kept, and by its place in the
stream: the same record that is read again after a restart is no duplicate of itself.
"""

from array import array
from collections import OrderedDict
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

from stream_trainer.records import Sample
from stream_trainer.settings.sections.samples import SampleSettings

BYTES = 8


class Duplicates:
    """The last samples that were met, oldest first."""

    def __init__(self, settings: SampleSettings) -> None:
        self._by, self._window = settings.duplicates, settings.duplicate_window
        self._met: OrderedDict[str, str] = OrderedDict()  # digest -> place of the first

    def is_one(self, sample: Sample) -> bool:
        """Whether another sample of the window is the same; takes note of it if none is."""
        digest = self._digest(sample)
        if digest is None:
            return False
        place = f"{sample.partition}@{sample.offset}"
        first = self._met.setdefault(digest, place)
        if len(self._met) > self._window:
            self._met.popitem(last=False)
        return first != place

    def _digest(self, sample: Sample) -> str | None:
        """None for what cannot be told: a sample without an id."""
        if self._by == "keep" or (self._by == "id" and sample.id is None):
            return None
        content = array("q", (*sample.input_ids, *sample.labels)).tobytes()
        said = str(sample.id).encode() if self._by == "id" else content
        return blake2b(said, digest_size=BYTES, person=self._by.encode()).hexdigest()

    def state_dict(self) -> dict[str, Any]:
        """JSON: digests and places, oldest first."""
        return {"met": [list(pair) for pair in self._met.items()]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`; a window that is shorter now forgets the oldest."""
        self._met = OrderedDict((digest, place) for digest, place in state["met"][-self._window :])

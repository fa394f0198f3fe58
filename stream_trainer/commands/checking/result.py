"""What one look has found."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at. `detail` is the whole error line if it is not `ok`."""

    name: str
    ok: bool
    detail: str

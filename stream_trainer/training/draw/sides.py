"""Two sides of many comparisons, as sums in which newer ones count more."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ERRORS = 2.0  # standard errors that both sides are given, so that noise makes them alike


@dataclass
class Sides:
    """What the chosen side and the uniform one were worth.

    Attributes:
        window: comparisons that are remembered, and that are needed before anything is said.
        comparisons: how many there were.
    """

    window: int
    comparisons: int = field(default=0, init=False)
    _sums: list[float] = field(default_factory=lambda: [0.0] * 5, init=False)

    @property
    def advantage(self) -> float | None:
        """What the chosen side is worth, in uniform ones; None before it is known.

        A ratio of discounted sums, for what chance draws at one step may be worth nothing. Both have two standard
        errors of their difference added: where noise is all there is, the ratio is near 1.
        """
        if self.comparisons < self.window:
            return None
        chosen, uniform = self._sums[:2]
        error = ERRORS * self._error
        below = max(0.0, uniform) + error
        return (max(0.0, chosen) + error) / below if below > 0 else 1.0

    @property
    def means(self) -> tuple[float, float] | None:
        """What either side is worth, the chosen one first; None before there is any comparison."""
        if not self.comparisons:
            return None
        return self._sums[0] / self._total, self._sums[1] / self._total

    @property
    def direction(self) -> int:
        """Which side is worth more: 1 the chosen one, -1 the uniform one, 0 what noise may be, or is not known."""
        difference = self._sums[0] - self._sums[1]
        if self.comparisons < self.window or abs(difference) <= ERRORS * self._error:
            return 0
        return 1 if difference > 0 else -1

    def note(self, chosen: float, uniform: float) -> None:
        """Take note of a comparison."""
        keep, difference = self.keep, chosen - uniform
        old = (keep, keep, keep**2, keep**2, keep**2)
        new = (chosen, uniform, 1.0, difference, difference**2)
        self._sums = [share * was + more for share, was, more in zip(old, self._sums, new, strict=True)]
        self.comparisons += 1

    @property
    def keep(self) -> float:
        """Share of what was known that a comparison leaves."""
        return 1 - 1 / self.window

    @property
    def _total(self) -> float:
        """The sum of the discounts."""
        return (1 - self.keep**self.comparisons) / (1 - self.keep)

    @property
    def _error(self) -> float:
        """Standard error of the difference of both sums."""
        chosen, uniform, weights_2, differences, squares = self._sums
        mean = (chosen - uniform) / self._total
        return math.sqrt(max(0.0, squares - 2 * mean * differences + mean**2 * weights_2))

    def state_dict(self) -> dict[str, Any]:
        """All that the future depends on."""
        return {"sums": list(self._sums), "comparisons": self.comparisons}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self._sums, self.comparisons = list(state["sums"]), state["comparisons"]

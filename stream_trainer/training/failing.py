"""What fails and is tried again: since when, and when next."""

import random
from dataclasses import dataclass

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0


@dataclass(frozen=True)
class Failing:
    """Something that has failed ever since, in the time of `time.monotonic()`.

    Attributes:
        error: the last one, in its own words.
        since: when it first failed.
        pause_s: the last pause before its jitter; pauses double.
        retry_at: when to try again.
    """

    error: str
    since: float
    pause_s: float
    retry_at: float


def failed_again(before: Failing | None, error: Exception, now: float, generator: random.Random) -> Failing:
    """What a failure at `now` makes of those before it. The jitter keeps many services from trying all at once."""
    pause_s = FIRST_PAUSE_S if before is None else min(2 * before.pause_s, LONGEST_PAUSE_S)
    since = now if before is None else before.since
    return Failing(str(error), since, pause_s, now + pause_s * generator.uniform(0.5, 1.0))

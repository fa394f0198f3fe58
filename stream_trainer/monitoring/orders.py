"""Orders that come by HTTP and are obeyed between two steps, on the main thread; and what came of them."""

import threading
from collections import deque
from enum import StrEnum

ACTIONS = ("pause", "resume", "checkpoint", "reload-target")
MAX_WAITING = 16
REMEMBERED = 64  # orders whose outcome can still be asked for


class Outcome(StrEnum):
    """What came of an order."""

    WAITING = "waiting"
    DONE = "done"
    REFUSED = "refused"


class Order:
    """One order. Its outcome is set once, by whoever obeys."""

    def __init__(self, number: int, action: str) -> None:
        self.number = number
        self.action = action
        self.outcome = Outcome.WAITING
        self.detail = "waits for the end of the step"
        self._settled = threading.Event()

    def settle(self, outcome: Outcome, detail: str) -> None:
        """Say what came of it."""
        self.detail, self.outcome = detail, outcome
        self._settled.set()

    def wait(self, seconds: float) -> None:
        """Until it is settled, or so long."""
        self._settled.wait(seconds)


class Orders:
    """Thread-safe, first in, first out."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[Order] = deque()
        self._known: deque[Order] = deque(maxlen=REMEMBERED)
        self._number = 0
        self._closed = False

    def give(self, action: str) -> Order | None:
        """Take an order in; None if too many wait already."""
        with self._changed:
            if len(self._waiting) >= MAX_WAITING:
                return None
            self._number += 1
            order = Order(self._number, action)
            self._known.append(order)
            if self._closed:
                order.settle(Outcome.REFUSED, "the run ends")
            else:
                self._waiting.append(order)
                self._changed.notify()
            return order

    def find(self, number: int) -> Order | None:
        """A late order by its number."""
        with self._changed:
            return next((order for order in self._known if order.number == number), None)

    @property
    def waiting(self) -> bool:
        """Whether there is one to obey."""
        return bool(self._waiting)

    @property
    def actions(self) -> list[str]:
        """What is to be obeyed, in order."""
        with self._changed:
            return [order.action for order in self._waiting]

    def take(self) -> Order | None:
        """The next one to obey."""
        with self._changed:
            return self._waiting.popleft() if self._waiting else None

    def wait(self, seconds: float) -> None:
        """Until there is one to obey, or so long."""
        with self._changed:
            if not self._waiting:
                self._changed.wait(seconds)

    def close(self) -> None:
        """Nobody obeys any more: refuse what waits, and what comes."""
        with self._changed:
            self._closed = True
            while self._waiting:
                self._waiting.popleft().settle(Outcome.REFUSED, "the run ends")

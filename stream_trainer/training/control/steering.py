"""Obeys orders between two steps, on the main thread. Nothing of what is learned depends on when they come, but for
the target.
"""

import logging
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from stream_trainer.errors import SettingsError
from stream_trainer.monitoring.metrics import State
from stream_trainer.monitoring.orders import Order, Orders, Outcome
from stream_trainer.training.control.kept import KeptTarget
from stream_trainer.training.control.target import replace_target
from stream_trainer.training.control.watched import WatchedFile

if TYPE_CHECKING:
    from stream_trainer.training.trainer import Trainer

REST_S = 0.1  # between looks while paused

logger = logging.getLogger(__name__)


class Steering:
    """What steers a run.

    Attributes:
        paused: whether no step is made.
    """

    def __init__(self, orders: Orders | None = None, target_file: WatchedFile | KeptTarget | None = None) -> None:
        self.paused = False
        self._orders = Orders() if orders is None else orders
        self._target_file = target_file

    @property
    def called(self) -> bool:
        """Whether there is something to do before the next step."""
        return self._orders.waiting or (self._target_file is not None and self._target_file.changed)

    def obey(self, trainer: "Trainer") -> None:
        """Do what was ordered; returns once the run is to go on, or is stopped."""
        self._obey_all(trainer)
        if not self.paused:
            return
        began = time.monotonic()
        while self.paused and not trainer.stopped():
            self._orders.wait(REST_S)
            trainer.rest()
            self._obey_all(trainer)
        logger.info("paused for %.0f s", time.monotonic() - began)

    def _obey_all(self, trainer: "Trainer") -> None:
        for order in self._next_orders():
            self._obey(trainer, order)

    def _next_orders(self) -> Iterable[Order]:
        if self._target_file is not None and self._target_file.changed:
            self._target_file.settle()
            yield Order(0, "reload-target")
        while (order := self._orders.take()) is not None:
            yield order

    def _obey(self, trainer: "Trainer", order: Order) -> None:
        try:
            outcome, detail = Outcome.DONE, self._do(trainer, order.action)
        except SettingsError as error:
            outcome, detail = Outcome.REFUSED, str(error)
        except BaseException:  # of a checkpoint: whatever ends a run ends it here, too
            order.settle(Outcome.REFUSED, "the run ends; its log says why")
            raise
        order.settle(outcome, detail)
        trainer.metrics.orders.labels(order.action, outcome.value).inc()
        if order.action == "reload-target":
            self._note_target(trainer, refused=outcome is Outcome.REFUSED)
        level = logging.INFO if outcome is Outcome.DONE else logging.ERROR
        logger.log(level, "step %d: %s %s: %s", trainer.step, order.action, outcome.value, detail)

    def _note_target(self, trainer: "Trainer", *, refused: bool) -> None:
        """Degraded for as long as the file is one that a restart would end with."""
        trainer.metrics.degraded.labels("target_reload").set(refused)
        if isinstance(self._target_file, WatchedFile):
            self._target_file.refused = refused

    def _do(self, trainer: "Trainer", action: str) -> str:
        """What came of it. Raises SettingsError if it is refused."""
        match action:
            case "pause":
                return self._pause(trainer)
            case "resume":
                return self._resume(trainer)
            case "checkpoint":
                return _checkpoint(trainer)
            case _:
                kept = self._target_file if isinstance(self._target_file, KeptTarget) else None
                return replace_target(trainer, kept)

    def _pause(self, trainer: "Trainer") -> str:
        if not self.paused:
            self.paused = True
            trainer.enter(State.PAUSED)
            trainer.watchers.event(trainer.step, "paused", "by an order")
        return f"paused after step {trainer.step}"

    def _resume(self, trainer: "Trainer") -> str:
        if self.paused:
            self.paused = False
            trainer.enter(State.TRAINING)
            trainer.watchers.event(trainer.step, "resumed", "by an order")
        return f"goes on after step {trainer.step}"


def _checkpoint(trainer: "Trainer") -> str:
    trainer.saver.settle()
    if not trainer.saver.has_news(trainer.step):
        return f"nothing is new since the checkpoint of step {trainer.saver.saved}"
    trainer.checkpoint(durable=True)
    if trainer.saver.failing is not None:
        raise SettingsError(trainer.saver.failing.error)
    return f"checkpoint of step {trainer.step}"

"""Orders to a run of several ranks: rank 0 takes them, and all obey between the same two steps."""

from stream_trainer.distributed.control import Control
from stream_trainer.monitoring.orders import Order, Orders
from stream_trainer.training.control.steering import Steering
from stream_trainer.training.control.watched import WatchedFile

FILE = "file"  # not an order: the target's file is another one now


class SharedSteering(Steering):
    """What rank 0 is ordered is told in the control round, so that every rank knows of it before the same step."""

    def __init__(self, control: Control, orders: Orders, target_file: WatchedFile | None) -> None:
        """`target_file` is rank 0's to look at; None for the others."""
        super().__init__(orders, target_file)
        self._control = control
        if control.world.rank == 0:
            control.own_orders = self._waiting

    @property
    def called(self) -> bool:
        return bool(self._control.ordered)

    def _waiting(self) -> list[str]:
        changed = self._target_file is not None and self._target_file.changed
        return [*([FILE] if changed else []), *self._orders.actions]

    def _next_orders(self) -> list[Order]:
        if self.paused:
            self._control.round()  # nothing is taken meanwhile
        ordered, self._control.ordered = self._control.ordered, ()
        if FILE in ordered and self._target_file is not None:
            self._target_file.settle()
        return [self._order(action) for action in ordered]

    def _order(self, action: str) -> Order:
        own = None if action == FILE else self._orders.take()
        return Order(0, "reload-target" if action == FILE else action) if own is None else own

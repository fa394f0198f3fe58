"""What to do when records that were never decided are gone from the log: `source.kafka.on_data_loss`."""

import logging
from collections.abc import Mapping

from stream_trainer.errors import DataLossError
from stream_trainer.records import Partition
from stream_trainer.settings.sections.source import KafkaSettings

logger = logging.getLogger(__name__)


class LossPolicy:
    """Fails, or counts and says what is skipped.

    Attributes:
        records_lost: offsets skipped so far, as far as their number is known.
        replaced: where logs were found replaced: what was decided from there on says nothing any more.
    """

    def __init__(self, settings: KafkaSettings) -> None:
        self._settings = settings
        self.records_lost = 0
        self.replaced: dict[Partition, int] = {}

    def lost(self, what: str, remedy: str, records: int) -> None:
        """Raises DataLossError unless the settings say `skip`."""
        if self._settings.on_data_loss == "fail":
            raise DataLossError(
                f"source.kafka.topic={self._settings.topic}: {what}; restore the log, or set "
                f"source.kafka.on_data_loss=skip to {remedy}"
            )
        self.records_lost += records
        logger.error("source.kafka.topic=%s: %s; on_data_loss=skip: %s", self._settings.topic, what, remedy)

    def within_log(self, p: Partition, offset: int, begin: int, end: int, whose: str) -> int:
        """`offset` if the log still holds it, else what the settings say."""
        if offset < begin:
            what = f"partition {p.number} begins at {begin}, but {whose} is {offset}: {begin - offset} records are gone"
            self.lost(what, f"go on at {begin}", begin - offset)
            return begin
        if offset > end:
            what = f"partition {p.number} ends at {end}, but {whose} is {offset}: the log was cut or made anew"
            self.lost(what, f"go on at {end}", 0)
            self.replaced[p] = end
            return end
        return offset

    def cut(self, p: Partition, position: int, decided: int, remains: int) -> int:
        """A record that was decided is not in the log any more, or another one stands there. Returns where to go on.

        `remains` is where the log left what we know of it, or -1 if nobody can tell.
        """
        what = f"partition {p.number}: the log was replaced below the cursor: offset {decided} is not what was decided"
        if 0 <= remains <= decided:
            start = min(position, remains)
            self.lost(f"{what}, and differs from offset {remains} on", f"go on at {start}", 0)
            self.replaced[p] = remains
        else:
            start = position
            self.lost(f"{what}, and nobody can tell from where on it differs", f"go on at {start}", 0)
            self.replaced[p] = position
        return start

    def of_another_topic(self, cursor: Mapping[Partition, int]) -> dict[Partition, int]:
        """The part of the cursor that is of our topic."""
        ours = {p: offset for p, offset in cursor.items() if p.topic == self._settings.topic}
        if len(ours) < len(cursor):
            others = ", ".join(sorted({p.topic for p in cursor} - {self._settings.topic or ""}))
            logger.warning("the cursor of %s is left behind: source.kafka.topic=%s", others, self._settings.topic)
        return ours

    def shortened(self, what: str) -> DataLossError:
        """A cursor cannot go back while its records are in flight, so this ends the run under either policy."""
        return DataLossError(
            f"source.kafka.topic={self._settings.topic}: {what}; start again to see what is missing, with "
            "source.kafka.on_data_loss=skip to go on without it"
        )

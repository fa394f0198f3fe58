"""Batches that the client cannot decode: read past them, or say which offsets they hold."""

import logging
from collections.abc import Mapping

from stream_trainer.errors import SourceError
from stream_trainer.records import Partition, Record
from stream_trainer.settings.sections.source import KafkaSettings
from stream_trainer.sources.batches import in_one_line, salvage
from stream_trainer.sources.topic_log import TopicLog

logger = logging.getLogger(__name__)


def usable_records(
    settings: KafkaSettings, log: TopicLog, positions: Mapping[Partition, int], error: Exception
) -> list[Record]:
    """What can be read of the batch at one of `positions` that made the client fail with `error`.

    All records of it if `on_undecodable` is `skip`, the damaged ones among them; else those before the first that is
    damaged. Raises SourceError if that one comes next, or if no such batch is found; KafkaError if the brokers do not
    return it.
    """
    for partition, position in positions.items():
        records = salvage(log.raw(partition, position), partition, position)
        if records:
            return _allowed(settings, records)
    reason = in_one_line(error)
    raise SourceError(f"source.kafka.topic={settings.topic} cannot be read ({reason}); check the brokers") from error


def _allowed(settings: KafkaSettings, records: list[Record]) -> list[Record]:
    damaged = [record for record in records if record.damage]
    if not damaged:
        return records
    first, last = damaged[0], damaged[-1]
    offsets = f"offset {first.offset}" if first is last else f"offsets {first.offset} to {last.offset}"
    what = (
        f"source.kafka.topic={settings.topic}: partition {first.partition.number}, {offsets}: {len(damaged)} records "
        f"cannot be decoded ({first.damage})"
    )
    if settings.on_undecodable == "skip":
        logger.error("%s; on_undecodable=skip: they are dead-lettered", what)
        return records
    before = [record for record in records if record.offset < first.offset]
    if not before:
        raise SourceError(f"{what}; set source.kafka.on_undecodable=skip to dead-letter these and go on")
    return before

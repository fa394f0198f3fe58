"""Where reading of each partition begins, and whether its log still is the one that was read.

The order of truth: the checkpoint's cursor, the group's committed offset, the setting `start`.

An unclean leader or a restored backup puts another log in a log's place. Kafka tells by leaders' epochs (KIP-320), and
every broker tells by the last record that was decided: in another log, another one stands at its offset. A record that
retention or compaction took tells nothing.
"""

import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from kafka.errors import KafkaError

from stream_trainer.errors import SourceAwayError
from stream_trainer.records import Partition
from stream_trainer.settings.sections.source import KafkaSettings
from stream_trainer.sources.batches import mark_of
from stream_trainer.sources.connection import Topic
from stream_trainer.sources.group import Group
from stream_trainer.sources.loss import LossPolicy
from stream_trainer.sources.lost_checkpoint import may_begin
from stream_trainer.sources.topic_log import REQUEST_TIMEOUT_MS, TopicLog, to_kafka

logger = logging.getLogger(__name__)

Marks = Mapping[Partition, tuple[int, str]]


@dataclass(frozen=True)
class Cursor:
    """What a checkpoint holds of a stream: see `sources.base.Source.start`."""

    positions: Mapping[Partition, int]
    identity: Mapping[str, str]
    marks: Marks


@dataclass(frozen=True)
class Beginning:
    """Where to begin.

    Attributes:
        positions: of the partitions that are served.
        unserved: of those that the cursor names and no broker serves now.
        ends: the offset after the last record of those that are served.
    """

    positions: Mapping[Partition, int]
    unserved: Mapping[Partition, int]
    ends: Mapping[Partition, int]


@dataclass(frozen=True)
class Brokers:
    """The ways in which the brokers are asked."""

    consumer: Any
    log: TopicLog
    group: Group


def where_to_begin(
    settings: KafkaSettings, brokers: Brokers, loss: LossPolicy, topic: Topic, cursor: Cursor
) -> Beginning:
    """Raises SourceAwayError if no partition can be read, or a finite run cannot read all; DataLossError as `loss`
    does; KafkaError if the brokers refuse.
    """
    found = [Partition(topic.name, number) for number in topic.read]
    leaderless = [p for p in found if p.number in topic.leaderless]
    served = [p for p in found if p.number not in topic.leaderless]
    if not (served or topic.elsewhere) or (settings.stop_at_end and leaderless):
        raise SourceAwayError(
            f"source.kafka.topic={topic.name}: partitions {_numbers(leaderless)} have no leader; check that all "
            "brokers run"
        )
    ours, marks = loss.of_another_topic(cursor.positions), cursor.marks
    if _is_another_topic(loss, topic, ours, cursor.identity.get(topic.name)):
        ours, marks = dict.fromkeys(found, 0), {}
    begins, ends = brokers.log.begins(served), brokers.log.ends(served)
    positions = {p: _first_position(settings, brokers.group, loss, p, ours, (begins[p], ends[p])) for p in served}
    positions = _check_marks(brokers, loss, positions, marks, (begins, ends))
    return Beginning(positions, {p: ours[p] for p in leaderless if p in ours}, ends)


def _is_another_topic(loss: LossPolicy, topic: Topic, ours: Mapping[Partition, int], stored_id: str | None) -> bool:
    """Whether the cursor is of an earlier topic of this name, and that may be left behind."""
    gone = sorted(p.number for p in ours if p.number not in topic.partitions)
    if stored_id and topic.id and stored_id != topic.id:
        what = f"the topic was deleted and created again (id {stored_id}, now {topic.id})"
    elif gone:
        what = f"partitions {gone} are gone, so the topic was deleted and created again"
    else:
        return False
    loss.lost(what, "read the new topic from its first record", 0)
    return True


def _first_position(
    settings: KafkaSettings,
    group: Group,
    loss: LossPolicy,
    p: Partition,
    cursor: Mapping[Partition, int],
    bounds: tuple[int, int],
) -> int:
    begin, end = bounds
    if p in cursor:
        return loss.within_log(p, cursor[p], begin, end, "the cursor")
    if cursor:
        return begin
    found = group.committed(p)
    if found is None or not may_begin(settings, p, found.offset, found.metadata):
        return begin if settings.start == "earliest" else end
    committed = int(found.offset)
    if committed > begin:
        logger.warning(
            "partition %d: there is no checkpoint, so reading begins at %d, where group %s stands, and leaves out the "
            "%d records before it; to read these too set source.kafka.group_id to a new name",
            p.number,
            committed,
            settings.group_id,
            committed - begin,
        )
    return loss.within_log(p, committed, begin, end, f"the offset of group {settings.group_id}")


def _check_marks(
    brokers: Brokers,
    loss: LossPolicy,
    positions: Mapping[Partition, int],
    marks: Marks,
    bounds: tuple[Mapping[Partition, int], Mapping[Partition, int]],
) -> dict[Partition, int]:
    """Where to read on, given where we would and what was decided. `bounds` are begins and ends.

    Assigns other partitions to the consumer. Raises DataLossError if a log was replaced and the settings do not say
    `skip`.
    """
    begins, ends = bounds
    known = {p: mark for p, mark in marks.items() if p in positions and p not in loss.replaced}
    kept = _ends_of_epochs(brokers.log, known)
    result = dict(positions)
    for partition, (offset, mark) in known.items():
        if offset >= ends[partition]:
            result[partition] = loss.cut(partition, positions[partition], offset, ends[partition])
        elif 0 <= kept.get(partition, -1) <= offset:
            result[partition] = loss.cut(partition, positions[partition], offset, kept[partition])
        elif offset >= begins[partition] and _mark_at(brokers.consumer, partition, offset) not in (None, mark):
            result[partition] = loss.cut(partition, positions[partition], offset, -1)
    return result


def _ends_of_epochs(log: TopicLog, marks: Marks) -> dict[Partition, int]:
    epochs = {p: int(mark.split()[0]) for p, (_, mark) in marks.items()}
    try:
        return log.ends_of_epochs({p: epoch for p, epoch in epochs.items() if epoch >= 0})
    except KafkaError:  # brokers that do not know the question
        return {}


def _mark_at(consumer: Any, partition: Partition, offset: int) -> str | None:
    """The mark of the record at an offset; None if there is none, or it cannot be read."""
    asked = to_kafka(partition)
    consumer.assign([asked])
    consumer.seek(asked, offset)
    deadline = time.monotonic() + REQUEST_TIMEOUT_MS / 1000
    try:
        while time.monotonic() < deadline and consumer.position(asked, timeout_ms=0) == offset:
            for message in consumer.poll(timeout_ms=200, max_records=1).get(asked, ()):
                if message.offset != offset:
                    return None
                return mark_of(message.leader_epoch, message.timestamp, message.key, message.value)
    except Exception:  # what cannot be decoded tells nothing
        return None
    return None


def _numbers(partitions: Iterable[Partition]) -> list[int]:
    return sorted(p.number for p in partitions)

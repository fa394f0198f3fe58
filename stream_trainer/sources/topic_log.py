"""What the brokers say of a topic's log: its ends, what open transactions hold back, and its raw bytes.

Only the thread that owns the source calls this. kafka-python has no method for two of the requests: they are sent as
its admin client sends its own.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from kafka import TopicPartition
from kafka.admin import ConfigResource, ConfigResourceType
from kafka.errors import KafkaError, LeaderNotAvailableError, for_code
from kafka.protocol.consumer import FetchRequest, IsolationLevel, OffsetForLeaderEpochRequest, OffsetSpec

from stream_trainer.records import Partition

REQUEST_TIMEOUT_MS = 5_000  # look-ups and commits that run between polls: an outage must not hold the thread longer
FETCH_BYTES = 1024 * 1024  # of one partition at a time; a first batch that is larger comes whole all the same


def to_kafka(partition: Partition) -> Any:
    """As kafka-python names it."""
    return TopicPartition(partition.topic, partition.number)


def from_kafka(partition: Any) -> Partition:
    """Inverse of `to_kafka`."""
    return Partition(partition.topic, partition.partition)


class TopicLog:
    """Asks through clients that somebody else opens and closes. Every method raises KafkaError."""

    def __init__(self, consumer: Any, admin: Any) -> None:
        self._consumer = consumer
        self._admin = admin

    def begins(self, partitions: Iterable[Partition]) -> dict[Partition, int]:
        """The first offset that is still held."""
        found = self._consumer.beginning_offsets(list(map(to_kafka, partitions)), timeout_ms=REQUEST_TIMEOUT_MS)
        return {from_kafka(p): offset for p, offset in found.items()}

    def stable_ends(self, partitions: Iterable[Partition]) -> dict[Partition, int]:
        """The offset after the last record that may be read: open transactions hold back what follows their first."""
        found = self._consumer.end_offsets(list(map(to_kafka, partitions)), timeout_ms=REQUEST_TIMEOUT_MS)
        return {from_kafka(p): offset for p, offset in found.items()}

    def ends(self, partitions: Iterable[Partition]) -> dict[Partition, int]:
        """The offset after the last record, whether it may be read or not."""
        asked = {to_kafka(p): OffsetSpec.LATEST for p in partitions}
        found = self._admin.list_partition_offsets(asked, IsolationLevel.READ_UNCOMMITTED, REQUEST_TIMEOUT_MS)
        return {from_kafka(p): answer.offset for p, answer in found.items()}

    def retention_s(self, topic: str) -> float | None:
        """For how long records are kept; infinite if for ever, None if the brokers do not say."""
        wanted = {"retention.ms": "", "cleanup.policy": ""}
        try:
            asked = [ConfigResource(ConfigResourceType.TOPIC, topic, wanted)]
            found = self._admin.describe_configs(asked, config_filter="all")["topic"][topic]
            kept_ms, policy = float(found["retention.ms"]["value"]), found["cleanup.policy"]["value"]
        except (KafkaError, KeyError, ValueError):  # no permission, or nothing that we know
            return None
        return kept_ms / 1000 if kept_ms >= 0 and "delete" in policy else math.inf

    def open_transactions(self, partition: Partition) -> str:
        """Producers with an open transaction in a partition, oldest first, for people to read."""
        try:
            found = self._admin.describe_producers([to_kafka(partition)])[to_kafka(partition)].active_producers
        except KafkaError:  # brokers before 2.8, or no permission
            return "of a producer that the brokers do not name"
        started = sorted((p.current_transaction_start_offset, p.producer_id) for p in found)
        return ", ".join(f"of producer id {who} since offset {offset}" for offset, who in started if offset >= 0)

    def raw(self, partition: Partition, offset: int) -> bytes:
        """Batches as they are stored, from the one that holds `offset` on."""
        wanted = FetchRequest.FetchTopic.FetchPartition(
            partition=partition.number,
            current_leader_epoch=-1,
            fetch_offset=offset,
            last_fetched_epoch=-1,
            partition_max_bytes=FETCH_BYTES,
        )
        request = FetchRequest(
            max_wait_ms=500,
            min_bytes=1,
            max_bytes=50 * FETCH_BYTES,
            isolation_level=IsolationLevel.READ_COMMITTED.value,
            session_id=0,
            session_epoch=-1,
            topics=[FetchRequest.FetchTopic(topic=partition.topic, partitions=[wanted])],
            forgotten_topics_data=[],
            rack_id="",
            min_version=4,
            max_version=12,
        )
        answer = self._ask(partition, request).responses[0].partitions[0]
        if answer.error_code:
            raise for_code(answer.error_code)()
        return bytes(answer.records or b"")

    def ends_of_epochs(self, epochs: Mapping[Partition, int]) -> dict[Partition, int]:
        """Where the log of each partition left a leader's epoch, or -1 if it does not know it (KIP-320)."""
        ends = {}
        for partition, epoch in epochs.items():
            wanted = OffsetForLeaderEpochRequest.OffsetForLeaderTopic.OffsetForLeaderPartition(
                partition=partition.number, current_leader_epoch=-1, leader_epoch=epoch
            )
            answer = self._ask(
                partition, OffsetForLeaderEpochRequest(replica_id=-1, topics=[(partition.topic, [wanted])])
            )
            found = answer.topics[0].partitions[0]
            if found.error_code:
                raise for_code(found.error_code)()
            ends[partition] = found.end_offset
        return ends

    def _ask(self, partition: Partition, request: Any) -> Any:
        """A leader's answer. The client's thread sends; it gives up after the client's `request_timeout_ms`."""
        (topic,) = self._admin.describe_topics([partition.topic])
        leaders = {found["partition_index"]: found["leader_id"] for found in topic["partitions"]}
        if leaders.get(partition.number, -1) < 0:
            raise LeaderNotAvailableError(str(partition))
        manager = self._admin._manager

        async def send() -> Any:
            return await manager.send(request, node_id=leaders[partition.number])

        return manager.run(send)

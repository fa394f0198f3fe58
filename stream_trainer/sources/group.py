"""The offsets of our consumer group: committed for lag tools, read by a run that has no checkpoint, and fenced.

Reading needs no group, so a client of its own keeps an absent coordinator from stopping it.

Fencing: a transactional id, `GROUP-TOPIC`, belongs to whoever claimed it last. Offsets are committed in transactions
under it, and those of a trainer that another one has replaced are refused.

Of two that start at once, one may come last to `checkpoint.dir` and the other last to the brokers, and then both would
end. So the directory goes first: who still owns it and is refused claims the id again, once in a run.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from kafka import KafkaConsumer, KafkaProducer
from kafka.errors import (
    AuthorizationError,
    CommitFailedError,
    IllegalGenerationError,
    KafkaConnectionError,
    KafkaError,
    ProducerFencedError,
    UnknownMemberIdError,
)
from kafka.structs import OffsetAndMetadata

from stream_trainer.errors import FencedError, SourceAwayError, SourceError
from stream_trainer.records import Partition
from stream_trainer.settings.sections.source import KafkaSettings
from stream_trainer.sources.connection import connect
from stream_trainer.sources.topic_log import REQUEST_TIMEOUT_MS, to_kafka

CLAIM_TIMEOUT_MS = 10_000
CLOSE_TIMEOUT_S = 2.0
# A commit that waits in vain takes its time from reading, so for a while after one that failed it gets less.
HASTY_TIMEOUT_MS, HASTE_S = 1_000, 60.0

logger = logging.getLogger(__name__)


class Group:
    """Commits and reads the offsets of `source.kafka.group_id`; with none, it has none. Opened by `Group.connect`.

    Attributes:
        fences: whether a commit fails once another trainer has taken over.
    """

    def __init__(
        self,
        settings: KafkaSettings,
        consumer: Any = None,
        claim: Callable[[], Any] = lambda: None,
        confirm: Callable[[], None] | None = None,
        admin: Any = None,
    ) -> None:
        """`claim` makes the producer that fences, None where there is none. `confirm` is `Owner.confirm`."""
        self._settings = settings
        self._consumer = consumer
        self._claim = claim
        self._producer = claim()
        self._confirm = confirm  # until it was used
        self._admin = admin
        self._hasty_until = 0.0
        self._is_ours = False  # transactions commit to a group that has members of its own, so it is asked once
        self._transaction: threading.Thread | None = None
        self._outcome: BaseException | None = None

    @classmethod
    def connect(
        cls, settings: KafkaSettings, client_id: str, admin: Any, confirm: Callable[[], None] | None = None
    ) -> "Group":
        """`confirm` raises if another trainer owns `checkpoint.dir`. Raises SourceError if no broker can be reached.

        `admin` is closed by the caller.
        """
        if settings.group_id is None:
            return cls(settings)
        consumer = connect(
            KafkaConsumer,
            settings,
            f"{client_id}-group",
            group_id=settings.group_id,
            enable_auto_commit=False,
            allow_auto_create_topics=False,
        )
        claim = partial(_claim, settings, client_id) if settings.fencing == "auto" else lambda: None
        return cls(settings, consumer, claim, confirm, admin)

    @property
    def fences(self) -> bool:
        """Whether the transactional id was claimed."""
        return self._producer is not None

    def committed(self, partition: Partition) -> OffsetAndMetadata | None:
        """The group's offset and what was said with it, None if it has none.

        Raises SourceAwayError if its coordinator does not answer, KafkaError if it refuses.
        """
        if self._consumer is None:
            return None
        try:
            return self._consumer.committed(to_kafka(partition), metadata=True, timeout_ms=REQUEST_TIMEOUT_MS)
        except KafkaError as error:
            if not error.retriable:
                raise
            raise SourceAwayError(
                f"source.kafka.group_id={self._settings.group_id}: its coordinator does not answer "
                f"({type(error).__name__}), so where to begin is unknown; check that all brokers run, "
                "or set source.kafka.group_id to null to begin at source.kafka.start"
            ) from error

    def commit(self, positions: Mapping[Partition, int], step: int) -> None:
        """Commit offsets with the step as their metadata. Raises SourceError if that fails, FencedError if fenced."""
        if self._consumer is None:
            return
        timeout_ms = HASTY_TIMEOUT_MS if time.monotonic() < self._hasty_until else REQUEST_TIMEOUT_MS
        offsets = {to_kafka(p): OffsetAndMetadata(offset, f"step={step}", -1) for p, offset in positions.items()}
        try:
            if self._producer is None:
                self._consumer.commit(offsets, timeout_ms=timeout_ms)
            else:
                self._commit_fenced(offsets, timeout_ms)
        except (CommitFailedError, IllegalGenerationError, UnknownMemberIdError) as error:
            raise SourceError(
                f"source.kafka.group_id={self._settings.group_id} is in use by a consumer that subscribes, so offsets "
                f"cannot be committed ({type(error).__name__}); give this service a group of its own"
            ) from error
        except ProducerFencedError as error:
            if self._claim_again():
                self.commit(positions, step)
                return
            raise FencedError(
                f"source.kafka.group_id={self._settings.group_id}: another trainer of topic {self._settings.topic} has "
                "taken over, so this one ends; if both are wanted, give each another source.kafka.group_id"
            ) from error
        except KafkaError as error:
            self._hasty_until = time.monotonic() + HASTE_S
            raise SourceError(
                f"offsets could not be committed to group {self._settings.group_id}: {type(error).__name__} {error}"
            ) from error

    def _claim_again(self) -> bool:
        """Take the id back if we own the directory. Raises FencedError if another does; False if we did so before."""
        if self._confirm is None:
            return False
        confirm, self._confirm = self._confirm, None
        confirm()
        logger.warning("another trainer has claimed group %s, and is told to end", self._settings.group_id)
        self._producer.close(timeout=0)
        self._producer = self._claim()
        return True

    def close(self) -> None:
        """Disconnect."""
        if self._consumer is not None:
            self._consumer.close(autocommit=False, timeout_ms=CLOSE_TIMEOUT_S * 1000)
        if self._producer is not None:
            self._producer.close(timeout=0 if self._is_busy() else CLOSE_TIMEOUT_S)

    def _commit_fenced(self, offsets: dict[Any, Any], timeout_ms: int) -> None:
        """In a thread of its own: the client waits for ever while the brokers are away."""
        if self._is_busy():
            raise SourceError("the last commit of offsets is still under way")
        self._transaction = threading.Thread(target=self._transact, args=(offsets,), name="commit", daemon=True)
        self._transaction.start()
        self._transaction.join(timeout_ms / 1000)
        if self._is_busy():
            raise SourceError("offsets could not be committed in time; the brokers do not answer")
        if self._outcome is not None:
            raise self._outcome

    def _is_busy(self) -> bool:
        return self._transaction is not None and self._transaction.is_alive()

    def _transact(self, offsets: dict[Any, Any]) -> None:
        self._outcome = None
        try:
            self._require_no_members()
        except KafkaError as error:
            self._outcome = error
            return
        try:
            self._producer.begin_transaction()
            self._producer.send_offsets_to_transaction(offsets, self._settings.group_id)
            self._producer.commit_transaction()
        except ProducerFencedError as error:
            self._outcome = error
        except KafkaError as error:
            self._outcome = error
            try:
                self._producer.abort_transaction()
            except KafkaError as failure:
                logger.debug("the transaction could not be aborted (%s)", type(failure).__name__)

    def _require_no_members(self) -> None:
        """Raise UnknownMemberIdError if the group has any: what is committed for these is theirs."""
        if self._is_ours:
            return
        try:
            (found,) = self._admin.describe_groups([self._settings.group_id]).values()
        except KafkaConnectionError:  # away, which the commit tells, or a broker that hangs up on what it does not know
            return
        if found["members"]:
            raise UnknownMemberIdError(f"{len(found['members'])} members")
        self._is_ours = True


def _claim(settings: KafkaSettings, client_id: str) -> Any:
    """A producer that owns our transactional id from now on; None where the brokers do not let us."""
    name = f"{settings.group_id}-{settings.topic}"
    producer = connect(
        KafkaProducer,
        settings,
        f"{client_id}-fence",
        transactional_id=name,
        max_block_ms=CLAIM_TIMEOUT_MS,
        request_timeout_ms=REQUEST_TIMEOUT_MS,
    )
    try:
        producer.init_transactions()
    except KafkaError as error:
        remedy = (
            f"grant Write on the transactional id {name}"
            if isinstance(error, AuthorizationError)
            else ("use brokers with transactions")
        )
        logger.warning(
            "a second trainer of topic %s would not be noticed by the brokers (%s); %s, or set "
            "source.kafka.fencing=off",
            settings.topic,
            type(error).__name__,
            remedy,
        )
        producer.close(timeout=0)
        return None
    return producer

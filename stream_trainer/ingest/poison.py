"""Tells a stream with some bad records from one that is poisoned: a wrong topic, a wire format, a broken producer.

The last records of each partition are looked at, in the order in which they were read. What is stored with a cursor is
the part of them below it, and which of those above are letters already: a restart reads on from the cursor and passes
these again, so that it counts each record once and ends at the same state as a run that was never stopped.
"""

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stream_trainer.errors import PoisonError
from stream_trainer.records import Partition
from stream_trainer.settings.schema import DeadLetterSettings

HINTS = {
    "no_schema_id": "set source.kafka.format to json, or have the producer write with a schema registry",
    "unknown_schema": "set source.kafka.schema_registry.url to the registry that the producer uses",
    "schema_mismatch": "set source.kafka.format to what the producer writes, and see the detail of the letters",
    "bad_utf8": "write UTF-8, or set source.kafka.format for what a schema registry has packed",
    "bad_json": "write one JSON object a record",
    "not_an_object": "write a JSON object, not a list, a string or a number",
    "missing_fields": "give text, or prompt and response, or messages",
    "ambiguous_fields": "give one of text, prompt and response, messages",
    "wrong_type": "correct the type of the field",
    "empty": "leave records without a value or a text out",
    "too_large": "split the records, or raise samples.max_bytes",
    "too_long": "raise samples.max_tokens, or set samples.too_long to truncate",
    "too_deep": "flatten the records",
    "bad_number": "write finite numbers",
    "lone_surrogate": "write whole characters",
    "bad_messages": "correct the roles and contents of the messages",
    "chat_template": "set the tokenizer of the model that the messages are for",
    "unread_field": "map the field by samples.fields, or name it in samples.ignore",
    "formatted_text": "send messages in place of text that a template wrote, or set samples.formatted_text",
    "no_loss_tokens": "shorten the prompts, or raise samples.max_tokens",
    "tokenizer": "remove odd characters",
    "undecodable": "see what the producer writes as headers",
    "step_failed": "see the detail of the letters, and try the model on such a record by itself",
    "out_of_memory": "lower samples.max_tokens or selection.micro_tokens",
    "killed": "lower samples.max_tokens or selection.micro_tokens, or give the process more memory",
    "feature_failed": "correct the function that selection.learned.features names",
    "unexpected": "report this error, please",
}


@dataclass(slots=True)
class _Recent:
    """The last records of a partition: offset and reason, None for a usable one."""

    records: deque[tuple[int, str | None]]
    bad: int = 0
    in_a_row: int = 0

    def add(self, offset: int, reason: str | None) -> None:
        if len(self.records) == self.records.maxlen:
            self.bad -= self.records[0][1] is not None
        self.records.append((offset, reason))
        self.bad += reason is not None
        self.in_a_row = self.in_a_row + 1 if reason is not None else 0


class PoisonWatch:
    """Counts unusable records among the last ones. Not thread-safe."""

    def __init__(self, limits: DeadLetterSettings) -> None:
        self._limits = limits
        self._recent: dict[Partition, _Recent] = {}
        self._ahead: dict[Partition, dict[int, str]] = {}

    def note(self, partition: Partition, offset: int, reason: str | None) -> None:
        """A record was read and judged; `reason` is None if it can be used."""
        recent = self._recent.get(partition)
        if recent is None:
            recent = self._recent[partition] = _Recent(deque(maxlen=self._limits.window))
        recent.add(offset, reason)

    def note_again(self, partition: Partition, offset: int) -> None:
        """A record was read that was decided before a restart."""
        self.note(partition, offset, self._ahead.get(partition, {}).pop(offset, None))

    @property
    def ratio(self) -> float:
        """Share of unusable records among the last ones of all partitions."""
        return self._bad / max(1, self._known)

    def check(self) -> None:
        """Raises PoisonError if a limit is passed, naming the commonest reason and what to do about it."""
        limits, in_a_row = self._limits, sum(recent.in_a_row for recent in self._recent.values())
        if limits.max_in_a_row is not None and in_a_row >= limits.max_in_a_row:
            raise self._poisoned(f"max_in_a_row={limits.max_in_a_row}", f"{in_a_row} records in a row")
        if limits.max_ratio is not None and self._known >= limits.window and self.ratio > limits.max_ratio:
            raise self._poisoned(f"max_ratio={limits.max_ratio:g}", f"{self._bad} of the last {self._known} records")

    def check_end(self) -> None:
        """Raises PoisonError if all of the last records of a stream that has ended are unusable, and there is a limit.

        A finite run of nothing but such records is too short for the limits, and would look like a success.
        """
        limited = self._limits.max_in_a_row is not None or self._limits.max_ratio is not None
        if limited and self._bad == self._known > 0:
            raise self._poisoned("max_ratio", f"all {self._bad} last records of the stream")

    def state_dict(self, positions: Mapping[Partition, int]) -> dict[str, Any]:
        """JSON, to be stored with a cursor whose lowest undecided positions are these."""
        return {
            str(partition): _to_json(recent, positions.get(partition, 0))
            for partition, recent in sorted(self._recent.items())
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`, to be followed by reading from those positions."""
        for name, stored in state.items():
            partition, reasons = Partition.parse(name), dict(stored["bad"])
            for index in range(stored["records"]):
                self.note(partition, -1, reasons.get(index))
            self._ahead[partition] = dict(stored["ahead"])

    @property
    def _known(self) -> int:
        return sum(len(recent.records) for recent in self._recent.values())

    @property
    def _bad(self) -> int:
        return sum(recent.bad for recent in self._recent.values())

    def _poisoned(self, limit: str, what: str) -> PoisonError:
        reasons = Counter(reason for recent in self._recent.values() for _, reason in recent.records if reason)
        reason, count = reasons.most_common(1)[0]
        return PoisonError(
            f"dead_letters.{limit}: {what} cannot be used, {count} of them for {reason} ({HINTS[reason]}); mend that "
            "and start again, or raise the limit to read past them"
        )


def _to_json(recent: _Recent, position: int) -> dict[str, Any]:
    below = [reason for offset, reason in recent.records if offset < position]
    return {
        "records": len(below),
        "bad": [[index, reason] for index, reason in enumerate(below) if reason],
        "ahead": [[offset, reason] for offset, reason in recent.records if offset >= position and reason],
    }

"""Stand-ins at the service's own seams: a source of records in memory, dead letters in a list, ready-made samples."""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from gradient_selectors import Decision

from stream_trainer.ingest.letter import DeadLetter
from stream_trainer.records import Partition, Record, Sample
from stream_trainer.training.step import APPLIED, StepReport

LOG = Partition("log", 0)


def sample(offset: int, size: int = 10, num_tokens: int = 3) -> Sample:
    """A sample from `LOG`."""
    ids = tuple(range(num_tokens))
    return Sample(input_ids=ids, labels=ids, partition=LOG, offset=offset, size=size)


def varied(offset: int) -> Sample:
    """A sample from `LOG` whose tokens and source depend on its offset."""
    ids = tuple((offset * 31 + i * (3 + offset % 5)) % 290 for i in range(12 + offset % 4))
    fields = (("source", f"s{offset % 3}"),)
    return Sample(input_ids=ids, labels=ids, partition=LOG, offset=offset, size=10, fields=fields)


def step_report(losses: Sequence[float], utilities: Sequence[float] | None = None) -> StepReport:
    """Of a step that trained on its whole pool."""
    coefficients = (1 / max(1, len(losses)),) * len(losses)
    known = None if utilities is None else tuple(utilities)
    return StepReport(APPLIED, tuple(losses), coefficients, Decision(torch.tensor(coefficients)), known)


def records_of(values: Iterable[bytes | None], partition: Partition = LOG, first: int = 0) -> list[Record]:
    """Records with these values at consecutive offsets."""
    return [Record(partition, offset, offset + 1, value) for offset, value in enumerate(values, start=first)]


class ListSource:
    """A source of the records it is given; see `sources.base.Source`.

    Attributes:
        batch: records a poll returns at most.
        finite: whether the stream ends with its last record.
        hidden: positions after the last record that hold none (control records).
        commits: what was committed, in order.
        fail_with: raised by the next poll.
        fail_commits: raised by commits.
        fail_ends: whether looks at the ends raise.
        calls: the order in which the methods that change something were called.
    """

    def __init__(self, records: Sequence[Record], batch: int = 500, finite: bool = True, hidden: int = 0) -> None:
        self.records = list(records)
        self.batch = batch
        self.finite = finite
        self.hidden = hidden
        self.commits: list[tuple[dict[Partition, int], int]] = []
        self.fail_with: BaseException | None = None
        self.fail_commits: Exception | None = None
        self.fail_ends = False
        self.calls: list[str] = []
        self.paused = False
        self.records_lost = 0
        self.retention_s: float | None = None
        self.replaced: dict[Partition, int] = {}
        self.fences = False
        self.held: frozenset[Partition] = frozenset()
        self.reachable = True
        self.identity_at_start: dict[str, str] = {}
        self._at: dict[Partition, int] = {}

    def start(
        self,
        cursor: Mapping[Partition, int],
        identity: Mapping[str, str],
        marks: Mapping[Partition, tuple[int, str]],
    ) -> None:
        self.marks_at_start = dict(marks)
        self.calls.append("start")
        self.identity_at_start = dict(identity)
        self._at = {p: cursor.get(p, 0) for p in sorted({record.partition for record in self.records})}

    def poll(self, timeout_s: float) -> list[Record]:
        if self.fail_with is not None:
            raise self.fail_with
        if self.paused:
            return []
        ready = [record for record in self.records if record.offset >= self._at[record.partition]][: self.batch]
        for record in ready:
            self._at[record.partition] = record.next_offset
        if not ready:
            time.sleep(timeout_s)
        return ready

    @property
    def drained(self) -> frozenset[Partition]:
        return frozenset(p for p, at in self._at.items() if at >= self._last(p))

    def hold(self, partitions: frozenset[Partition]) -> None:
        self.held = partitions

    def held_back(self) -> Mapping[Partition, int]:
        return {}

    def without_leader(self) -> frozenset[Partition]:
        return frozenset()

    def pause(self) -> None:
        self.calls.append("pause")
        self.paused = True

    def resume(self) -> None:
        self.calls.append("resume")
        self.paused = False

    def commit(self, positions: Mapping[Partition, int], step: int) -> None:
        if self.fail_commits is not None:
            raise self.fail_commits
        self.calls.append("commit")
        self.commits.append((dict(positions), step))

    def positions(self) -> Mapping[Partition, int]:
        return {p: at + self.hidden if at == self._last(p) else at for p, at in self._at.items()}

    def end_positions(self) -> Mapping[Partition, int]:
        if self.fail_ends:
            raise RuntimeError("no broker answers")
        return {p: self._last(p) + self.hidden for p in self._at}

    def identity(self) -> Mapping[str, str]:
        return {"log": "id-1"}

    @property
    def exhausted(self) -> bool:
        return self.finite and all(at >= self._last(p) for p, at in self._at.items())

    def close(self) -> None:
        self.calls.append("close")

    def _last(self, partition: Partition) -> int:
        return max(record.next_offset for record in self.records if record.partition == partition)


@dataclass
class ListDeadLetters:
    """Dead letters in memory; see `dead_letters.DeadLetters`.

    Attributes:
        sent: all that were sent; `waiting` those of them that are held.
        refusing: whether what is sent is held.
        full: whether too much is held.
    """

    sent: list[DeadLetter] = field(default_factory=list)
    waiting: list[DeadLetter] = field(default_factory=list)
    refusing: bool = False
    full: bool = False
    fail_with: BaseException | None = None

    def send(self, letter: DeadLetter) -> None:
        if self.fail_with is not None:
            raise self.fail_with
        self.sent.append(letter)
        self.waiting.append(letter)

    def settled(self) -> list[DeadLetter]:
        if self.refusing:
            return []
        kept, self.waiting = self.waiting, []
        return kept

    def wait(self) -> None:
        pass

    def flush(self) -> None:
        pass

    @property
    def held(self) -> int:
        return len(self.waiting)

    def state_dict(self) -> dict[str, Any]:
        return {"sent": len(self.sent)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        del self.sent[state["sent"] :]

    def close(self) -> None:
        pass

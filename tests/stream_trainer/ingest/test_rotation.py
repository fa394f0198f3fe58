"""The order of samples from several partitions is that of the logs, whatever the fetches bring, restarts included."""

import random
import time
from collections.abc import Mapping

import pytest

from stream_trainer.ingest import arrivals
from stream_trainer.ingest.cursor import Cursor
from stream_trainer.ingest.rotation import MAX_RECORDS, PATIENCE_S, PLAN_PATIENCE_S, Rotation
from stream_trainer.records import Outcome, Partition, Record
from tests.helpers.fakes import ListSource, records_of
from tests.stream_trainer.ingest.service import Service, good, running

A, B, C = PARTITIONS = [Partition("log", number) for number in range(3)]


class FetchingSource(ListSource):
    """Brings records as brokers do: at random moments, random runs of one partition or another."""

    def __init__(self, logs: Mapping[Partition, list[Record]], seed: int, finite: bool = True) -> None:
        super().__init__([record for log in logs.values() for record in log], finite=finite)
        self.chance = random.Random(seed)

    def poll(self, timeout_s: float) -> list[Record]:  # noqa: ARG002
        if self.paused:
            return []
        time.sleep(self.chance.choice((0, 0, 0.001)))
        open_ones = [p for p in self._at if p not in self.held]
        partition = self.chance.choice(open_ones)
        ready = [r for r in self.records if r.partition == partition and r.offset >= self._at[partition]]
        ready = ready[: self.chance.randint(0, 60)]
        for record in ready:
            self._at[partition] = record.next_offset
        return ready


def logs(lengths: tuple[int, ...]) -> dict[Partition, list[Record]]:
    """Of good samples, with a record now and then that is none."""
    made = {}
    for partition, length in zip(PARTITIONS, lengths, strict=True):
        values = [b"{" if n % 11 == 5 else good(1000 * partition.number + n) for n in range(length)]
        made[partition] = records_of(values, partition)
    return made


LOGS = logs((300, 170, 260))


def order_of(service: Service, counts: list[int], decide: bool = True) -> list[tuple[int, int]]:
    """Partition and offset of the samples that are taken in these numbers."""
    taken = []
    for count in counts:
        for sample in service.take(count):
            taken.append((sample.partition.number, sample.offset))
            if decide:
                service.cursor.resolve(sample.partition, sample.offset, Outcome.TRAINED)
    return taken


def whole_order(seed: int) -> list[tuple[int, int]]:
    with running(Service(FetchingSource(LOGS, seed), max_records=64)) as service:
        return order_of(service, [10] * 80)


def test_the_order_of_samples_is_that_of_the_logs_whatever_the_fetches_bring() -> None:
    expected = []
    for n in range(300):
        expected += [(p.number, n) for p in PARTITIONS if n < len(LOGS[p]) and n % 11 != 5]
    for seed in range(5):
        assert whole_order(seed) == expected


@pytest.mark.parametrize("seed", range(8))
def test_the_order_goes_on_after_restarts_at_any_moment(seed: int) -> None:
    """Samples are decided out of order, as a waiting room does; those that wait come again, in the same order."""
    chance = random.Random(seed)
    arrived = whole_order(0)
    cursor, waiting = Cursor(), list[tuple[int, int]]()
    rest = list(arrived)
    while rest or waiting:
        with running(Service(FetchingSource(LOGS, chance.randrange(10**6)), cursor, max_records=48)) as service:
            assert order_of(service, [len(waiting)] if waiting else [], decide=False) == waiting
            for _ in range(chance.randint(1, 12)):
                come = order_of(service, [chance.randint(1, 40)], decide=False)
                assert come == rest[: len(come)]
                waiting, rest = waiting + come, rest[len(come) :]
                leaving = [place for i, place in enumerate(waiting) if chance.random() < 0.7 or i < len(waiting) - 40]
                for number, offset in leaving:
                    cursor.resolve(PARTITIONS[number], offset, Outcome.NOT_SELECTED)
                waiting = [place for place in waiting if place not in set(leaving)]
                if chance.random() < 0.3:
                    snapshot, then = service.cursor.state_dict(), (list(waiting), list(rest))
            snapshot, then = service.cursor.state_dict(), (list(waiting), list(rest))
        cursor, (waiting, rest) = Cursor.restore(snapshot), then
    assert sum(cursor.counts.values()) == sum(map(len, LOGS.values()))


def test_a_snapshot_in_the_middle_of_reading_again_keeps_the_order() -> None:
    cursor = Cursor()
    for partition, offset in [(A, 0), (B, 0), (C, 0), (A, 1), (B, 1)]:
        cursor.fetched(partition, offset, offset + 1)
    cursor.resolve(B, 0, Outcome.TRAINED)
    again = Cursor.restore(cursor.state_dict())
    again.begin({A: 0, B: 1, C: 0})
    assert again.fetched(A, 0, 1)
    for restored in (Cursor.restore(again.state_dict()), Cursor.restore(cursor.state_dict())):
        restored.begin({A: 0, B: 1, C: 0})
        assert handed(restored, {A: 4, B: 4, C: 4}, 8) == ["A0", "C0", "A1", "B1", "C1", "A2", "B2", "C2"]


def handed(cursor: Cursor, lengths: Mapping[Partition, int], count: int) -> list[str]:
    rotation = Rotation(cursor)
    positions = cursor.positions()
    for partition, length in lengths.items():
        start = positions.get(partition, 0)
        rotation.put(records_of([b""] * (length - start), partition, start))
    rotation.know(lengths, set(lengths), finite=True)
    found = list(iter(rotation.next, None))
    undecided = [record for record, is_fresh in filter(None, found) if is_fresh]
    return [f"{'ABC'[r.partition.number]}{r.offset}" for r in undecided[:count]]


def test_a_finite_run_waits_for_a_partition_that_has_more() -> None:
    rotation = Rotation(Cursor())
    rotation.put(records_of([b"", b""], A))
    rotation.know([A, B], [], finite=True)
    assert rotation.next() is not None
    assert rotation.next() is None
    rotation.know([A, B], [B], finite=True)
    assert rotation.next() is not None
    assert rotation.passes == 0


def test_a_live_stream_passes_over_a_partition_at_its_end_at_once_and_a_late_one_after_a_while() -> None:
    now = [0.0]
    rotation = Rotation(Cursor(), clock=lambda: now[0])
    rotation.put(records_of([b""] * 4, A))
    rotation.know([A, B, C], [B], finite=False)
    assert rotation.next() is not None
    assert rotation.next() is None
    assert rotation.passes == 1
    now[0] = PATIENCE_S
    assert rotation.next() is not None
    assert rotation.next() is not None
    assert rotation.passes == 2
    rotation.put(records_of([b""], C))
    third = rotation.next()
    assert third is not None
    assert third[0].partition == C


def test_what_is_held_for_a_partition_that_is_waited_for_is_bounded() -> None:
    rotation = Rotation(Cursor())
    rotation.know([A, B], [], finite=True)
    rotation.put(records_of([b""] * MAX_RECORDS, A))
    assert rotation.to_hold() == {A}
    rotation.put(records_of([b""] * MAX_RECORDS, B))
    while rotation.next() is not None:
        pass
    assert rotation.to_hold() == frozenset()


def test_a_live_stream_comes_in_the_order_that_was_planned() -> None:
    """Whatever is here first. Then the turn goes on from there: C is waited for as it always is."""
    cursor = Cursor()
    order = [(B, 0), (B, 1), (A, 0), (C, 0), (C, 1), (C, 2), (A, 1)]
    cursor.follow(order)
    cursor.begin(dict.fromkeys(PARTITIONS, 0))
    rotation = Rotation(cursor, clock=lambda: 0.0)
    rotation.know(PARTITIONS, (), finite=False)
    found = []
    for partition in (A, C, B):
        rotation.put(LOGS[partition][:3])
        while (turn := rotation.next()) is not None:
            found.append((turn[0].partition, turn[0].offset))
    assert found[: len(order)] == order
    assert found[len(order) :] == [(B, 2)]
    assert cursor.arrived_to(C, 2) == order[:6]
    assert cursor.arrived_to(A, 1) == order[6:]
    assert not cursor.plan_broken


def test_records_that_were_read_already_are_not_waited_for_again() -> None:
    before = Cursor()
    before.begin(dict.fromkeys(PARTITIONS, 0))
    for offset in range(4):
        before.fetched(A, offset, offset + 1)
    before.resolve(A, 1, Outcome.TRAINED)
    cursor = Cursor.restore(before.state_dict())
    cursor.follow([(A, 1), (A, 2), (A, 3), (B, 0), (A, 4), (A, 4), (B, 0)])
    cursor.begin(cursor.positions() | {B: 0})
    rotation = Rotation(cursor, clock=lambda: 0.0)
    rotation.know([A, B], (), finite=False)
    rotation.put(LOGS[A][:6])
    turns = [rotation.next() for _ in range(5)]
    assert [turn and (turn[0].offset, turn[1]) for turn in turns] == [(0, True), (1, False), (2, True), (3, True), None]
    rotation.put(LOGS[B][:1])
    assert [turn and turn[0].partition for turn in (rotation.next(), rotation.next())] == [B, A]
    assert not cursor.plan_broken


@pytest.mark.parametrize("drained", [True, False])
def test_a_planned_record_that_does_not_come_is_waited_for_in_vain_only_so_long(drained: bool) -> None:
    now, cursor = [0.0], Cursor()
    cursor.follow([(A, 0), (B, 0), (A, 1)])
    cursor.begin({A: 0, B: 0})
    rotation = Rotation(cursor, clock=lambda: now[0])
    rotation.know([A, B], [B] if drained else [], finite=False)
    rotation.put(LOGS[A][:3])
    assert rotation.next() is not None
    if not drained:
        now[0] = 10 * PATIENCE_S
        assert rotation.next() is None
        assert not cursor.plan_broken
        now[0] += PLAN_PATIENCE_S
    turn = rotation.next() or rotation.next()
    assert turn is not None
    assert turn[0].offset == 1
    assert cursor.plan_broken == "log:1 does not give offset 0 any more"


def test_a_planned_record_that_the_log_has_lost_is_told() -> None:
    cursor = Cursor()
    cursor.follow([(A, 0), (A, 5)])
    cursor.begin({A: 3})
    assert cursor.plan_broken == "log:0 does not hold offset 0 any more"
    cursor.follow(())
    assert not cursor.plan_broken


def test_what_no_step_takes_fills_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrivals, "MAX_RECORDS", 50)
    cursor = Cursor()
    cursor.begin({A: 0, B: 0})
    cursor.fetched(B, 7, 8)
    for offset in range(500):
        cursor.fetched(A, offset, offset + 1)
        if offset < 490:
            cursor.resolve(A, offset, Outcome.FILTERED)
    found = cursor.arrived_to(A, 499)
    assert found[0] == (B, 7)
    assert found[-10:] == [(A, offset) for offset in range(490, 500)]
    assert len(found) < 150

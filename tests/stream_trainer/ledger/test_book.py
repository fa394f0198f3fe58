"""One row for each decision, whatever happens between two checkpoints, and whichever of them is resumed from."""

import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pytest

from stream_trainer.checkpoints.ownership import claim
from stream_trainer.errors import CheckpointError, FencedError, SettingsError
from stream_trainer.ingest.cursor import Cursor
from stream_trainer.ledger.book import Ledger
from stream_trainer.ledger.files import put, read, rows_of, table_of
from stream_trainer.ledger.names import FOLDER, IDS, Segment, all_in, name_of, segments_in
from stream_trainer.ledger.opening import open_ledger
from stream_trainer.ledger.query import rows_where
from stream_trainer.ledger.tidy import FAN, choose
from stream_trainer.records import Decided, Outcome, Partition
from stream_trainer.settings.sections.ledger import LedgerSettings
from tests.helpers.ledgers import output_beside_pandas

LOG = Partition("samples", 3)
T, N, D = Outcome.TRAINED, Outcome.NOT_SELECTED, Outcome.DEAD_LETTERED


@dataclass
class Trainer:
    """Decides and makes checkpoints as the service does, of which only the counts are written."""

    directory: Path
    resumed: int = 0
    keep_days: float | None = None
    step: int = 0
    decided: int = 0
    cursor: Cursor = field(default_factory=Cursor)

    def __post_init__(self) -> None:
        self.step = self.decided = self.resumed
        self.ledger = Ledger(self.directory, claim(self.directory), self.resumed, self.keep_days)
        self.ledger.begin()
        self.cursor._counts[T] = self.resumed
        self.cursor.ledger = self.ledger

    def decide(self, *outcomes: Outcome) -> None:
        for outcome in outcomes:
            self.step += 1
            self.cursor.fetched(LOG, self.decided, self.decided + 1)
            told = {"reason": "bad_json"} if outcome is D else {}
            more = {} if outcome is D else {"id": f"id-{self.decided}", "step": self.step}
            coefficient = {T: 0.25, N: 0.0}.get(outcome)
            self.cursor.resolve(LOG, self.decided, outcome, coefficient=coefficient, **told, **more)  # type: ignore[arg-type]
            self.decided += 1

    def save(self, *, fails: bool = False) -> dict[str, int]:
        counts: dict[str, int] = self.cursor.state_dict()["counts"]
        total = sum(counts.values())
        self.ledger.write(total, self.step)
        if not fails:
            path = self.directory / f"step-{self.step:08d}.e{self.ledger.owner.epoch}"
            path.mkdir(exist_ok=True)
            (path / "trainer.json").write_text(json.dumps({"cursor": {"counts": counts}}))
            self.ledger.saved()
        return counts


def rows(directory: Path) -> dict[int, Decided]:
    found = [row for segment in segments_in(directory / FOLDER) for row in rows_of(read(segment.path))]
    assert len({row.offset for row in found}) == len(found), "an offset has two rows"
    return {row.offset: row for row in found}


def outcomes(directory: Path) -> list[Outcome]:
    found = rows(directory)
    return [found[offset].outcome for offset in sorted(found)]


def test_a_checkpoint_writes_what_was_decided_before_it(tmp_path: Path) -> None:
    trainer, before = Trainer(tmp_path), time.time()
    trainer.decide(T, N, D)
    trainer.save()
    trainer.decide(T)
    found = rows(tmp_path)
    assert list(found) == [0, 1, 2]
    assert found[0][:3] + found[0][4:] == (LOG, 0, T, "id-0", 1, 0.25, None)
    assert found[1][:3] + found[1][4:] == (LOG, 1, N, "id-1", 2, 0.0, None)
    assert found[2][:3] + found[2][4:] == (LOG, 2, D, None, None, None, "bad_json")
    assert all(before - 1 <= row.time <= time.time() for row in found.values())
    trainer.save()
    trainer.save()  # of the same step, with nothing new
    assert outcomes(tmp_path) == [T, N, D, T]
    assert [(s.first, s.end) for s in segments_in(tmp_path / FOLDER)] == [(0, 3), (3, 4)]


def test_a_resume_drops_what_its_checkpoint_does_not_hold(tmp_path: Path) -> None:
    first = Trainer(tmp_path)
    first.decide(T, T)
    first.save()
    first.decide(N, N, N)
    first.save(fails=True)  # killed between the segment and the rename
    assert outcomes(tmp_path) == [T, T, N, N, N]
    second = Trainer(tmp_path, resumed=2)
    assert outcomes(tmp_path) == [T, T]
    assert not list((tmp_path / FOLDER / IDS).glob(f"{2:012d}-*"))
    second.decide(T, N)
    second.save()
    assert outcomes(tmp_path) == [T, T, T, N]


def test_a_checkpoint_that_fails_leaves_no_second_row(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path)
    trainer.decide(T)
    trainer.save(fails=True)
    trainer.decide(N)
    trainer.save(fails=True)
    trainer.decide(T)
    trainer.save()
    assert outcomes(tmp_path) == [T, N, T]
    trainer.decide(N)
    trainer.save(fails=True)
    Trainer(tmp_path, resumed=3)
    assert outcomes(tmp_path) == [T, N, T]


def test_a_rollback_after_a_checkpoint_that_failed_discards_what_it_wrote(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path)
    trainer.decide(T)
    counts = trainer.save()
    trainer.decide(T, D)
    trainer.save(fails=True)
    trainer.decide(N)
    trainer.cursor.discard(counts)
    trainer.save()
    assert outcomes(tmp_path) == [T, Outcome.DISCARDED, D, Outcome.DISCARDED]


def test_a_rollback_discards_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path)
    trainer.decide(T, N)
    counts = trainer.save()
    trainer.decide(T, N, D)
    trainer.cursor.discard(counts)
    trainer.decide(T)
    trainer.save()
    assert outcomes(tmp_path) == [T, N, Outcome.DISCARDED, Outcome.DISCARDED, D, T]
    assert rows(tmp_path)[2].coefficient == 0.25  # what it had been trained with
    counted = {outcome: n for outcome, n in trainer.cursor.counts.items() if n}
    assert counted == {T: 2, N: 1, D: 1, Outcome.DISCARDED: 2}


def test_a_rollback_past_a_damaged_checkpoint_discards_written_rows(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path)
    trainer.decide(T)
    counts = trainer.save()
    trainer.decide(T, D)
    trainer.save()
    trainer.decide(N)
    trainer.cursor.discard(counts)
    assert outcomes(tmp_path) == [T]  # a crash now resumes from there
    trainer.decide(T)
    trainer.save()
    assert outcomes(tmp_path) == [T, Outcome.DISCARDED, D, Outcome.DISCARDED, T]


def test_small_segments_are_merged_once_every_checkpoint_holds_them(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path)
    for _ in range(FAN):
        trainer.decide(T, D)
        trainer.save()
    assert len(segments_in(tmp_path / FOLDER)) == FAN  # the oldest checkpoint holds one of them
    for checkpoint in sorted(tmp_path.glob("step-*"))[:-1]:
        (checkpoint / "trainer.json").unlink()
        checkpoint.rmdir()
    trainer.decide(N)
    trainer.save()
    spans = [(s.first, s.end) for s in segments_in(tmp_path / FOLDER)]
    assert spans == [(0, 2 * FAN), (2 * FAN, 2 * FAN + 1)]
    assert outcomes(tmp_path) == [T, D] * FAN + [N]
    assert {path.name for path in (tmp_path / FOLDER / IDS).iterdir()} == {
        s.path.name for s in all_in(tmp_path / FOLDER)
    }
    assert [row["offset"] for row in rows_where(tmp_path, {"id": "id-6"}, 9).rows] == [6]


def test_a_merge_that_was_broken_off_counts_no_row_twice(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path)
    for _ in range(3):
        trainer.decide(T, N)
        trainer.save()
    parts = all_in(tmp_path / FOLDER)
    merged = name_of(0, 6, 1)
    everything = table_of([row for part in parts for row in rows_of(read(part.path))], 1, 6, 6)
    kept = {path: path.read_bytes() for part in parts for path in (part.path, part.ids)}
    put(tmp_path, trainer.ledger.owner, 0, 6, everything)
    assert all(path.read_bytes() == content for path, content in kept.items())
    assert outcomes(tmp_path) == [T, N] * 3
    parts[1].path.unlink()  # deleting has begun
    assert outcomes(tmp_path) == [T, N] * 3
    Trainer(tmp_path, resumed=6)
    assert [s.path.name for s in all_in(tmp_path / FOLDER)] == [merged]
    assert [path.name for path in (tmp_path / FOLDER / IDS).iterdir()] == [merged]


def test_an_older_checkpoint_cuts_a_merged_segment(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path)
    trainer.decide(T, T)
    trainer.save()
    trainer.decide(N, N)
    trainer.save()
    tables = [read(s.path) for s in all_in(tmp_path / FOLDER)]
    put(tmp_path, trainer.ledger.owner, 0, 4, pa.concat_tables(tables))
    Trainer(tmp_path, resumed=2)  # brought back from a backup
    assert outcomes(tmp_path) == [T, T]
    assert [(s.first, s.end, s.epoch) for s in all_in(tmp_path / FOLDER)] == [(0, 2, 2)]


def test_old_rows_are_pruned_a_segment_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(tmp_path, keep_days=2.5)
    now = time.time()
    for day in (0, 1, 2, 3):
        monkeypatch.setattr(time, "time", lambda at=now + day * 86400.0: at)
        trainer.decide(T)
        trainer.save()
    assert sorted(rows(tmp_path)) == [1, 2, 3]
    assert len(list((tmp_path / FOLDER / IDS).iterdir())) == 3


def test_a_trainer_that_was_taken_over_writes_nothing(tmp_path: Path) -> None:
    first = Trainer(tmp_path)
    first.decide(T)
    Trainer(tmp_path)
    with pytest.raises(FencedError):
        first.save()
    assert not all_in(tmp_path / FOLDER)
    assert not list(tmp_path.glob(".tmp-*"))


def test_a_disk_that_takes_no_ledger_is_one_line(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path)
    trainer.decide(T)
    (tmp_path / FOLDER).write_text("in the way")
    with pytest.raises(CheckpointError, match=r"^checkpoint.dir: writing the ledger to .*; ") as caught:
        trainer.save()
    assert "\n" not in str(caught.value)
    (tmp_path / FOLDER).unlink()
    trainer.save()  # what was noted is not lost
    assert outcomes(tmp_path) == [T]


def test_what_cannot_be_tidied_does_not_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = Trainer(tmp_path, keep_days=1)
    trainer.decide(T)
    trainer.save()
    segment = all_in(tmp_path / FOLDER)[0]
    segment.path.unlink()
    segment.path.mkdir()
    trainer.decide(T)
    trainer.save()
    assert "cannot be tidied" in caplog.text


def test_segments_of_like_size_are_chosen_and_large_ones_left(tmp_path: Path) -> None:
    def segments(*sizes: int) -> list[Segment]:
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        return [Segment(end - size, end, 1, tmp_path) for size, end in zip(sizes, ends, strict=True)]

    assert choose(segments(*[100] * 15)) == []
    sixteen = segments(*[100, 300] * 8)  # either side of a power of 16
    assert choose(sixteen) == sixteen
    large = segments(1 << 21, *[10] * 16, 5000)
    assert choose(large) == large[1:17]
    assert choose(segments(*[1 << 21] * 20)) == []
    gap = segments(*[10] * 20)
    assert choose([*gap[:8], *gap[9:]]) == []  # decided while there was no ledger


def test_a_missing_package_is_one_line_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "stream_trainer.ledger.book", None)
    owner = claim(tmp_path)
    assert open_ledger(LedgerSettings(), owner, 0) is None
    with pytest.raises(SettingsError, match=r"^ledger.enabled=true needs .*stream-trainer\[ledger\]"):
        open_ledger(LedgerSettings(enabled=True), owner, 0)


def test_what_pyarrow_loads_is_loaded_before_the_first_step(tmp_path: Path) -> None:
    code = (
        "from tests.stream_trainer.ledger.test_book import T, Path, Trainer\n"
        f"trainer = Trainer(Path({str(tmp_path)!r}))\n"
        "print('begun'); trainer.decide(T, T); trainer.save(); print('saved')"
    )
    lines = output_beside_pandas(tmp_path, code).splitlines()
    assert lines[0] == "pandas"
    assert lines[-2:] == ["begun", "saved"]

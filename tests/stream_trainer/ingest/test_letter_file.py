"""A file of dead letters is cut back to the checkpoint that a run resumes from: exactly once, and nobody else's go."""

from pathlib import Path

import pytest

from stream_trainer.ingest.letter import DeadLetter, read_dead_letters
from stream_trainer.ingest.letter_file import FileDeadLetters
from stream_trainer.ingest.letter_mark import rotated
from stream_trainer.records import Partition, Record

LOG = Partition("samples", 0)
MINE, OTHER = "0a1b2c3d", "ffffffff"


def letter(offset: int) -> DeadLetter:
    return DeadLetter(Record(LOG, offset, offset + 1, b"%03d" % offset), "bad_json", "")


def send(letters: FileDeadLetters, *offsets: int) -> None:
    for offset in offsets:
        letters.send(letter(offset))
    assert [kept.record.offset for kept in letters.settled()] == list(offsets)


def offsets(path: Path) -> list[int]:
    """Of all files, oldest first."""
    files = [path.with_name(f"{path.name}.{number}") for number in rotated(path)] + [path]
    return [found.record.offset for file in files for found in read_dead_letters(file)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "dead.jsonl"


LINE = 280  # more than the bytes of one letter, less than those of two


def test_letters_after_the_checkpoint_are_cut_and_written_again(path: Path) -> None:
    first = FileDeadLetters(path, MINE)
    send(first, 1, 2)
    stored = first.state_dict()
    send(first, 3, 4)
    first.close()
    second = FileDeadLetters(path, MINE)
    second.load_state_dict(stored)
    assert offsets(path) == [1, 2]
    assert second.state_dict() == stored
    send(second, 3, 5)
    second.close()
    assert offsets(path) == [1, 2, 3, 5]


def test_a_checkpoint_before_the_first_letter_cuts_all(path: Path) -> None:
    first = FileDeadLetters(path, MINE)
    stored = first.state_dict()
    assert stored == {"generation": 1, "length": 0, "last": None}
    send(first, 1)
    first.close()
    second = FileDeadLetters(path, MINE)
    second.load_state_dict(stored)
    second.close()
    assert offsets(path) == []


def test_letters_of_others_are_never_cut(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, other = FileDeadLetters(path, MINE), FileDeadLetters(path, OTHER)
    send(first, 1)
    stored = first.state_dict()
    send(other, 100)
    send(first, 2)
    first.close()
    for _ in range(2):
        second = FileDeadLetters(path, MINE)
        second.load_state_dict(stored)
        second.close()
    other.close()
    assert offsets(path) == [1, 100, 2]
    assert caplog.text.count("has letters of others behind the checkpoint") == 2  # once a start


@pytest.mark.parametrize("kind", ["shorter", "replaced", "no letters", "gone"])
def test_another_file_of_that_name_is_left_alone(path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    first = FileDeadLetters(path, MINE)
    send(first, 1, 2)
    stored = first.state_dict()
    first.close()
    line = path.read_bytes().splitlines(keepends=True)[0]
    content = {"shorter": line, "replaced": line * 3, "no letters": b"{}\n" * 1000, "gone": b""}[kind]
    path.unlink()
    if kind != "gone":
        path.write_bytes(content)
    second = FileDeadLetters(path, MINE)
    second.load_state_dict(stored)
    assert path.read_bytes() == content
    assert caplog.text.count("is not the file of the checkpoint") == 1
    send(second, 7)
    second.close()
    assert path.read_bytes().startswith(content)


def test_a_file_that_is_moved_away_is_begun_anew(path: Path) -> None:
    letters = FileDeadLetters(path, MINE)
    send(letters, 1)
    path.rename(path.with_name("archive.jsonl"))
    send(letters, 2)
    letters.close()
    assert offsets(path) == [2]
    assert offsets(path.with_name("archive.jsonl")) == [1]


def test_the_file_is_put_aside_at_its_bound_and_none_goes_missing(path: Path) -> None:
    letters = FileDeadLetters(path, MINE, max_bytes=3 * LINE)
    send(letters, *range(10))
    letters.close()
    assert offsets(path) == list(range(10))
    assert len(rotated(path)) >= 3
    assert all(file.stat().st_size <= 3 * LINE for file in path.parent.iterdir())


@pytest.mark.parametrize("before", range(8))
def test_a_cut_goes_back_over_files_that_were_put_aside(path: Path, before: int) -> None:
    whole, first = path.with_name("whole.jsonl"), FileDeadLetters(path, MINE, max_bytes=2 * LINE)
    send(first, *range(before))
    stored = first.state_dict()
    send(first, *range(before, 8))
    first.close()
    second = FileDeadLetters(path, MINE, max_bytes=2 * LINE)
    second.load_state_dict(stored)
    assert offsets(path) == list(range(before))
    assert second.state_dict() == stored
    send(second, *range(before, 8))
    undisturbed = FileDeadLetters(whole, MINE, max_bytes=2 * LINE)
    send(undisturbed, *range(8))
    assert second.state_dict() == undisturbed.state_dict()
    second.close()
    undisturbed.close()
    assert offsets(path) == offsets(whole) == list(range(8))


def test_old_files_are_deleted_but_none_that_a_resumed_run_would_cut(path: Path) -> None:
    letters = FileDeadLetters(path, MINE, max_bytes=LINE, keep=2)
    for offset in range(8):
        send(letters, offset)
    letters.flush()
    assert offsets(path) == list(range(8))  # no checkpoint refers to a later one
    for _ in range(2):
        letters.state_dict()
        letters.flush()
    assert offsets(path) == [5, 6, 7]
    letters.close()


def test_a_crash_in_the_middle_of_a_cut_is_made_good_by_the_next(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = FileDeadLetters(path, MINE, max_bytes=LINE)
    send(first, 0)
    stored = first.state_dict()
    send(first, *range(1, 5))
    first.close()
    for method in ("unlink", "rename"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, method, lambda *_: (_ for _ in ()).throw(OSError("killed")))
            broken = FileDeadLetters(path, MINE, max_bytes=LINE)
            broken.load_state_dict(stored)
            broken.close()
    second = FileDeadLetters(path, MINE, max_bytes=LINE)
    second.load_state_dict(stored)
    second.close()
    assert offsets(path) == [0]


def test_a_state_that_is_none_is_refused(path: Path) -> None:
    letters = FileDeadLetters(path, MINE)
    with pytest.raises(ValueError, match="is no place in a file of dead letters"):
        letters.load_state_dict({"length": 3})
    letters.close()

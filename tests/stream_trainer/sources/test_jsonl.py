"""The file source: positions are bytes, lines are never split, joined or lost."""

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from stream_trainer.errors import DataLossError, SettingsError, SourceError
from stream_trainer.records import Partition, Record
from stream_trainer.settings.sections.source import JsonlSettings, SourceSettings
from stream_trainer.sources import jsonl, open_source
from stream_trainer.sources.jsonl import JsonlSource
from tests.stream_trainer.formats.writing import FORMS, REFUSED, write


@contextmanager
def started(path: Path | str, at: int = 0, follow: bool = False) -> Iterator[JsonlSource]:
    source = JsonlSource(JsonlSettings(path=str(path), follow=follow))
    source.start({Partition(str(path), 0): at} if at else {}, {}, {})
    try:
        yield source
    finally:
        source.close()


def read_all(source: JsonlSource) -> list[Record]:
    records: list[Record] = []
    while not source.exhausted:
        records += source.poll(1.0)
    return records


def values(records: list[Record]) -> list[bytes | None]:
    return [record.value for record in records]


def test_every_line_is_a_record_at_its_byte(samples_file: Path) -> None:
    samples_file.write_bytes(b'{"text": "\xe9"}\n\n  \r\n\x00\xff\nlast')
    with started(samples_file) as source:
        records = read_all(source)
        assert source.positions() == source.end_positions() == {Partition(str(samples_file), 0): 26}
    assert [(r.value, r.offset, r.next_offset) for r in records] == [
        (b'{"text": "\xe9"}', 0, 14),
        (b"", 14, 15),
        (b"  \r", 15, 19),
        (b"\x00\xff", 19, 22),
        (b"last", 22, 26),
    ]
    assert {(r.partition, r.key, r.headers, r.timestamp) for r in records} == {
        (Partition(str(samples_file), 0), None, (), None)
    }


def test_offsets_tile_the_file_and_every_offset_resumes(samples_file: Path) -> None:
    lines = [b"a" * n for n in (0, 1, 70_000, 3, 200_000, 0, 5)]
    samples_file.write_bytes(b"\n".join(lines) + b"\n")
    with started(samples_file) as source:
        records = read_all(source)
    assert values(records) == list(lines)
    assert [r.offset for r in records] == [0, *(r.next_offset for r in records[:-1])]
    assert records[-1].next_offset == samples_file.stat().st_size
    for i, record in enumerate(records):
        with started(samples_file, at=record.offset) as source:
            assert read_all(source) == records[i:]


def test_a_poll_returns_a_bounded_part(samples_file: Path) -> None:
    samples_file.write_bytes(b"0123456789\n" * 100_000)
    with started(samples_file) as source:
        first = source.poll(1.0)
        assert 0 < len(first) < 10_000
        assert source.positions() == {Partition(str(samples_file), 0): first[-1].next_offset}


def test_an_empty_file_is_exhausted(samples_file: Path) -> None:
    samples_file.write_bytes(b"")
    with started(samples_file) as source:
        assert read_all(source) == []


def test_following_waits_for_the_end_of_a_line(samples_file: Path) -> None:
    samples_file.write_bytes(b"one\ntw")
    with started(samples_file, follow=True) as source, samples_file.open("ab") as writer:
        assert values(source.poll(5.0)) == [b"one"]
        assert source.poll(0.1) == []
        writer.write(b"o\nthree\n")
        writer.flush()
        assert values(source.poll(5.0)) == [b"two", b"three"]
        assert not source.exhausted


def test_a_cursor_knows_its_file_however_it_is_spelled(samples_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples_file.write_bytes(b"a\nb\n")
    monkeypatch.chdir(samples_file.parent)
    for spelled in (samples_file.name, f"./{samples_file.name}", f"../{samples_file.parent.name}/{samples_file.name}"):
        source = JsonlSource(JsonlSettings(path=spelled))
        source.start({Partition(str(samples_file), 0): 2}, {}, {})
        assert values(read_all(source)) == [b"b"]
        source.close()


def test_pausing_returns_nothing_and_resuming_goes_on(samples_file: Path) -> None:
    samples_file.write_bytes(b"one\ntwo\n")
    with started(samples_file) as source:
        source.pause()
        assert source.poll(0.01) == []
        source.resume()
        assert values(source.poll(1.0)) == [b"one", b"two"]


def test_a_file_that_ends_before_the_cursor_is_data_loss(samples_file: Path) -> None:
    samples_file.write_bytes(b"one\n")
    with pytest.raises(DataLossError, match="ends at byte 4, but the cursor is 9"), started(samples_file, at=9):
        pass


def test_a_file_without_a_line_at_the_cursor_is_data_loss(samples_file: Path) -> None:
    samples_file.write_bytes(b"another file\n")
    with pytest.raises(DataLossError, match="no line starting at the cursor, byte 4"), started(samples_file, at=4):
        pass


def test_a_last_line_that_got_its_newline_later_is_not_read_twice(samples_file: Path) -> None:
    samples_file.write_bytes(b"one\ntwo")
    with started(samples_file) as source:
        cursor = read_all(source)[-1].next_offset
    samples_file.write_bytes(b"one\ntwo\nthree\n")
    with started(samples_file, at=cursor) as source:
        assert values(read_all(source)) == [b"three"]


def test_cutting_a_followed_file_is_data_loss(samples_file: Path) -> None:
    samples_file.write_bytes(b"one\ntwo\n")
    with started(samples_file, follow=True) as source:
        source.poll(1.0)
        os.truncate(samples_file, 4)
        with pytest.raises(DataLossError, match="cut to 4 bytes, of which 8 had been read"):
            source.poll(1.0)


def test_replacing_a_followed_file_is_data_loss(samples_file: Path) -> None:
    samples_file.write_bytes(b"one\n")
    with started(samples_file, follow=True) as source:
        source.poll(1.0)
        samples_file.rename(samples_file.with_suffix(".1"))
        samples_file.write_bytes(b"new\n")
        with pytest.raises(DataLossError, match="moved or replaced"):
            source.poll(1.0)


def test_an_endless_line_is_kept_in_part_and_positions_stay_right(
    samples_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 100_000)
    samples_file.write_bytes(b"x" * 500_000 + b"\nnext\n")
    with started(samples_file) as source:
        long, after = read_all(source)
    assert long.value == b"x" * 100_000
    assert (after.value, after.offset) == (b"next", 500_001)


@pytest.mark.parametrize("name", ["missing.jsonl", "."])
def test_a_path_that_is_no_file_is_a_setting_to_correct(tmp_path: Path, name: str) -> None:
    with pytest.raises(SettingsError, match=r"source\.jsonl\.path="), started(tmp_path / name):
        pass


def test_a_pipe_is_read_as_it_comes_and_ends_with_its_writer() -> None:
    reader, writer = os.pipe()
    with started(f"/dev/fd/{reader}") as source:
        assert source.poll(0.01) == []
        os.write(writer, b"one\ntw")
        assert values(source.poll(5.0)) == [b"one"]
        assert source.poll(0.01) == []
        os.write(writer, b"o")
        os.close(writer)
        assert values(read_all(source)) == [b"two"]
    os.close(reader)


def test_piping_the_same_bytes_again_resumes_at_the_cursor() -> None:
    reader, writer = os.pipe()
    os.write(writer, b"one\ntwo\nthree\n")
    os.close(writer)
    with started(f"/dev/fd/{reader}", at=4) as source:
        records = read_all(source)
    os.close(reader)
    assert [(r.value, r.offset) for r in records] == [(b"two", 4), (b"three", 8)]


def test_a_pipe_that_ends_before_the_cursor_is_data_loss() -> None:
    reader, writer = os.pipe()
    os.write(writer, b"one\n")
    os.close(writer)
    with (
        started(f"/dev/fd/{reader}", at=9) as source,
        pytest.raises(DataLossError, match="ended 5 bytes before the cursor, 9"),
    ):
        source.poll(1.0)
    os.close(reader)


def test_standard_input() -> None:
    program = (
        "from stream_trainer.settings.sections.source import *; from stream_trainer.sources import open_source\n"
        "source = open_source(SourceSettings(kind='jsonl', jsonl=JsonlSettings(path='-')))\n"
        "source.start({}, {}, {})\n"
        "while not source.exhausted:\n"
        "    for record in source.poll(1.0): print(record.offset, record.value)\n"
        "source.close()\n"
    )
    run = subprocess.run([sys.executable, "-c", program], input=b"one\ntwo", capture_output=True, check=True)
    assert run.stdout.decode().splitlines() == ["0 b'one'", "4 b'two'"]


def test_the_kind_decides_which_source_is_opened(samples_file: Path) -> None:
    settings = SourceSettings(kind="jsonl", jsonl=JsonlSettings(path=str(samples_file)))
    assert isinstance(open_source(settings), JsonlSource)


def test_reading_a_file_needs_no_kafka_client() -> None:
    program = "import sys, stream_trainer.sources; sys.exit('kafka' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


ROWS = [{"id": number, "text": f"stone {number}"} for number in range(150)]


@pytest.mark.parametrize("form", FORMS)
def test_a_file_of_another_format_is_read_by_number(form: str, tmp_path: Path) -> None:
    path = write(form, tmp_path, ROWS)
    with started(path) as source:
        records = read_all(source)
        assert source.positions() == source.end_positions() == {Partition(str(path), 0): 150}
        assert source.exhausted
        assert source.finite
    assert [json.loads(record.value or b"") for record in records] == ROWS
    assert [(record.offset, record.next_offset) for record in records] == [(n, n + 1) for n in range(150)]
    for at in (1, 64, 149, 150):
        with started(path, at) as source:
            assert read_all(source) == records[at:]
    with started(path, 151) as source, pytest.raises(DataLossError, match="ends before record 151"):
        read_all(source)


@pytest.mark.parametrize("form", FORMS)
def test_another_format_is_not_followed(form: str, tmp_path: Path) -> None:
    path = write(form, tmp_path, ROWS)
    with pytest.raises(SettingsError, match="cannot be followed; set it to false"), started(path, follow=True):
        pass


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_read_ends_with_an_error(kind: str, samples_file: Path) -> None:
    content, words = REFUSED[kind]
    samples_file.write_bytes(content)
    with pytest.raises((SettingsError, SourceError), match=words), started(samples_file) as source:
        read_all(source)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (gzip.compress(b'{"text": "a"}\n', mtime=0), "is a gzip file; pipe one JSON object a line"),
        (b'[{"text": "a"}]', "is a JSON array; pipe one JSON object a line"),
        ('{"text": "a"}'.encode("utf-16"), "is a text in UTF-16 or UTF-32; pipe"),
        (b"PK\x03\x04", "is a zip archive"),
    ],
)
def test_a_stream_must_be_lines(content: bytes, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = os.pipe()
    with os.fdopen(theirs, "wb") as writer:
        writer.write(content)
    with os.fdopen(ours, "rb") as reader:
        monkeypatch.setattr(sys, "stdin", reader)
        with started("-") as source, pytest.raises(SourceError, match=words):
            read_all(source)

"""One reader: the same records whatever the format of the file, and what is none of them is named."""

import json
import os
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from stream_trainer.errors import SettingsError
from stream_trainer.formats.array import FIRST_CHARS, FormError, elements
from stream_trainer.formats.as_json import as_json
from stream_trainer.formats.files import LINES, form_of, form_of_bytes, look, records_in
from stream_trainer.formats.tables import EndsBeforeError
from tests.stream_trainer.formats.writing import FORMS, REFUSED, write

ROWS = [{"id": number, "text": f"é {number}", "weight": 0.5} for number in range(10)]


@pytest.mark.parametrize("form", ["lines", *FORMS])
def test_every_format_gives_the_same_records(form: str, tmp_path: Path) -> None:
    path = write(form, tmp_path, ROWS)
    assert (look(path, "x") == LINES) == (form == "lines")
    assert [json.loads(value) for value in records_in(path, "x")] == ROWS
    for start in (1, 4, 10):
        assert [json.loads(value) for value in records_in(path, "x", start)] == ROWS[start:]
    with pytest.raises(EndsBeforeError):
        list(records_in(path, "x", 11))


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_read_is_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    content, words = REFUSED[kind]
    path = tmp_path / "samples.jsonl"
    path.write_bytes(content)
    with pytest.raises(SettingsError, match=words) as raised:
        list(records_in(path, f"target.path={path}"))
    assert str(raised.value).startswith(f"target.path={path} ")
    assert "\n" not in str(raised.value)


def test_folders(tmp_path: Path) -> None:
    import datasets

    with pytest.raises(SettingsError, match=r"x is a directory; name a file"):
        form_of(tmp_path, "x")
    split = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": split, "test": split}).save_to_disk(tmp_path / "both")
    with pytest.raises(SettingsError, match=r"x is a dataset of several splits \(train, test\)"):
        form_of(tmp_path / "both", "x")
    assert len(list(records_in(tmp_path / "both" / "test", "x"))) == 10


@pytest.mark.parametrize("form", ["parquet", "dataset"])
def test_without_pyarrow_the_extra_is_named(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(form, tmp_path, ROWS)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(SettingsError, match=r"x needs the module pyarrow; pip install 'stream-trainer\[files\]'"):
        look(path, "x")


def test_what_a_table_lacks_is_absent_and_typed_values_are_as_json_has_them(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "a", "name": None}], "timestamp": datetime(2026, 1, 2, tzinfo=UTC)},
        {"messages": [{"role": "user", "content": "b", "name": "me"}], "timestamp": None},
    ]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows")
    assert [json.loads(value) for value in records_in(tmp_path / "rows", "x")] == [
        {"messages": [{"role": "user", "content": "a"}], "timestamp": "2026-01-02T00:00:00+00:00"},
        {"messages": [{"role": "user", "content": "b", "name": "me"}]},
    ]
    assert as_json({"text": b"caf\xc3\xa9"}) == '{"text": "café"}'.encode()
    assert as_json({"text": b"\xff"}) == b'{"text": "\\udcff"}', "the decoder refuses it by name"


@pytest.mark.parametrize(
    ("head", "is_array"),
    [
        (b'[{"text": "a"}]', True),
        (b'\xef\xbb\xbf [\n{"text": "a"}]', True),
        (b'[{"text": "a"}]\n', True),
        (b'["a"]\n{"text": "a"}\n', False),
        (b'[{"text": "a"},\n{"text": "b"}]', True),
        (b"", False),
    ],
)
def test_an_array_is_told_from_lines_that_begin_with_one(head: bytes, is_array: bool) -> None:
    assert (form_of_bytes(head) != LINES) == is_array


def reader_of(text: str, chunk: int | None = None) -> Callable[[int], str]:
    """Gives a text in pieces, of a size that may be small."""
    at = 0

    def read(size: int) -> str:
        nonlocal at
        piece = text[at : at + (chunk or size)]
        at += len(piece)
        return piece

    return read


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@given(values=st.lists(JSON, max_size=5), chunk=st.integers(1, 9), indent=st.sampled_from([None, 0, 2]))
def test_elements_of_an_array_however_it_is_cut(values: list[object], chunk: int, indent: int | None) -> None:
    text = json.dumps(values, indent=indent) + " \n"
    assert [json.loads(found) for found in elements(reader_of(text, chunk))] == values


def test_an_element_keeps_its_own_spelling() -> None:
    text = '[ {"a": 1, "a": 2} , 1e3,"\\u00e9"]'
    assert list(elements(reader_of(text))) == ['{"a": 1, "a": 2}', "1e3", '"\\u00e9"']


def test_an_element_may_be_longer_than_what_is_read_at_once() -> None:
    long = json.dumps({"text": "x" * (5 * FIRST_CHARS)})
    assert list(elements(reader_of(f"[{long},\n{long}]"))) == [long, long]


@pytest.mark.parametrize("text", ["[", "[1", "[1,", "[1,]", "[1 2]", "[1]]", "[}", "{}"])
def test_what_is_no_array(text: str) -> None:
    with pytest.raises(FormError):
        list(elements(reader_of(text)))


@pytest.mark.parametrize("form", ["lines", "gzip", "array"])
def test_a_pipe_is_read_once(form: str, tmp_path: Path) -> None:
    content, pipe = write(form, tmp_path, ROWS).read_bytes(), tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(content))
    writer.start()
    assert [json.loads(value) for value in records_in(pipe, "x")] == ROWS
    writer.join()


@pytest.mark.parametrize("first", [b"[1, 2]", b"[1, 2", b'[{"text": "a"}]', b'[{"text": "a"', b"[", b"[]"])
def test_a_first_line_that_begins_like_an_array_costs_no_other_line(first: bytes, tmp_path: Path) -> None:
    """Unless it is the bracket alone, all else that follows is one JSON object a line."""
    path = tmp_path / "samples.jsonl"
    path.write_bytes(first + b'\n{"text": "b"}\n{"text": "c"}\n')
    if first == b"[":
        with pytest.raises(SettingsError, match="JSON array"):
            list(records_in(path, "--pool=samples.jsonl"))
    else:
        assert list(records_in(path, "--pool=samples.jsonl")) == [first, b'{"text": "b"}', b'{"text": "c"}']

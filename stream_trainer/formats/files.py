"""The one reader of files of samples: whatever reads one (`run`, `produce`, `select`, targets, evaluation sets) does so
here.

A file of one JSON object a line is the usual. Told by their beginning, these are read too: gzip, UTF-16 and UTF-32, one
JSON array of all samples, Parquet, and a folder that the `datasets` library saved. Of these a record is known by its
number, from 0, and not by its byte. What else is known by its beginning is refused by name.
"""

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stream_trainer.errors import SettingsError
from stream_trainer.formats.array import FormError, elements
from stream_trainer.formats.tables import SPLITS, STATE, EndsBeforeError, after, rows_of_dataset, rows_of_parquet

LINES, GZIP, UTF, ARRAY = "lines of JSON", "a gzip file", "a text in UTF-16 or UTF-32", "a JSON array"
PARQUET, DATASET = "a Parquet file", "a dataset on disk"
EXTRA = "needs the module pyarrow; pip install 'stream-trainer[files]', or write it as one JSON object a line"

_LOOKED_AT = 1024 * 1024
_GZIP = b"\x1f\x8b"
_PARQUET = b"PAR1"
# The longer ones first: one begins like another.
_ENCODINGS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (b"{\x00\x00\x00", "utf-32-le"),
    (b"[\x00\x00\x00", "utf-32-le"),
    (b"{\x00", "utf-16-le"),
    (b"[\x00", "utf-16-le"),
    (b"\x00{", "utf-16-be"),
    (b"\x00[", "utf-16-be"),
)
_OTHERS = (
    (b"PK\x03\x04", "a zip archive"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd"),
    (b"\x04\x22\x4d\x18", "compressed with lz4"),
    (b"\xff\x06\x00\x00sNaPpY", "compressed with snappy"),
    (b"BZh", "compressed with bzip2"),
    (b"\xfd7zXZ\x00", "compressed with xz"),
    (b"Obj\x01", "an Avro file"),
    (b"ARROW1", "an Arrow file"),
    (b"ORC", "an ORC file"),
    (b"\x89HDF", "an HDF5 file"),
    (b"SQLite format 3", "an SQLite database"),
    (b"GGUF", "a model in GGUF"),
    (b"%PDF", "a PDF"),
    (b"\x80\x04\x95", "a Python pickle"),
    (b"\x80\x05\x95", "a Python pickle"),
)


def form_of(path: Path, label: str) -> str:
    """What a file is, one of the names above. `label` names it in errors, as `target.path=FILE`.

    Raises SettingsError if it cannot be read, or is known to be something else.
    """
    with _named(label):
        if path.is_dir():
            return _form_of_folder(path)
        with path.open("rb") as file:
            head = file.read(_LOOKED_AT)
        return form_of_bytes(head)


def form_of_bytes(head: bytes) -> str:
    """What begins like this. Raises FormError, with what it is, if that cannot be read."""
    if head.startswith(_GZIP):
        return GZIP
    if head.startswith(_PARQUET):
        return PARQUET
    if _encoding(head) is not None:
        return UTF
    for magic, name in _OTHERS:
        if head.startswith(magic):
            raise FormError(f"is {name}; write it as one JSON object a line")
    return ARRAY if _is_array(head) else LINES


def records_in(path: Path, label: str, start: int = 0) -> Iterator[bytes]:
    """Values of all records, or from number `start` on, without the ends of their lines.

    Raises SettingsError, naming `label`, if the file cannot be read to its end, and EndsBeforeError if it has fewer.
    """
    with _named(label):
        form = _form_of_folder(path) if path.is_dir() else ""
        if form == DATASET:
            yield from rows_of_dataset(path, start)
            return
        # Looked at without going back, for it may be a pipe.
        with io.BufferedReader(io.FileIO(path), _LOOKED_AT) as file:
            head = file.peek(_LOOKED_AT)
            if form_of_bytes(head) == PARQUET:
                yield from rows_of_parquet(path, start)
            elif head.startswith(_GZIP):
                with io.BufferedReader(gzip.GzipFile(fileobj=file), _LOOKED_AT) as unpacked:
                    yield from after(_records(unpacked), start)
            else:
                yield from after(_records(file), start)


def look(path: Path, label: str) -> str:
    """What a file is, its first record included. Raises SettingsError as `records_in` does."""
    form = form_of(path, label)
    if form != LINES:
        next(records_in(path, label), None)
    return form


def main_file(path: Path) -> Path:
    """The file that tells one content from another: of a dataset on disk the one with its fingerprint."""
    return path / STATE if path.is_dir() else path


def _records(file: Any) -> Iterator[bytes]:
    head = file.peek(_LOOKED_AT)
    encoding = _encoding(head)
    text = head if encoding is None else head.decode(encoding, "ignore").encode(errors="ignore")
    if encoding is None and not _is_array(text):
        for line in file:
            yield line.removesuffix(b"\n")
        return
    # Bytes that are not UTF-8 come out as they went in: the record is refused, and not the file.
    errors = "surrogateescape" if encoding is None else "strict"
    with io.TextIOWrapper(file, encoding or "utf-8", errors, newline="\n") as characters:
        found = elements(characters.read) if _is_array(text) else (line.removesuffix("\n") for line in characters)
        for record in found:
            yield record.encode("utf-8", errors)


def _encoding(head: bytes) -> str | None:
    return next((name for magic, name in _ENCODINGS if head.startswith(magic)), None)


def _is_array(head: bytes) -> bool:
    """Whether this begins one array of samples, and not lines the first of which is an array, or was to be one."""
    text = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if not text.startswith(b"[") or text[1:].lstrip()[:1] not in (b"", b"{", b"]"):
        return False
    first, _, rest = text.partition(b"\n")
    second = rest.lstrip().partition(b"\n")[0]
    return not second or not (_is_json(first) or (first.strip() != b"[" and _is_json(second)))


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _form_of_folder(path: Path) -> str:
    if (path / STATE).is_file():
        return DATASET
    if (path / SPLITS).is_file():
        splits = ", ".join(json.loads((path / SPLITS).read_text())["splits"])
        raise FormError(f"is a dataset of several splits ({splits}); name the folder of one of them")
    raise FormError("is a directory; name a file")


@contextmanager
def _named(label: str) -> Iterator[None]:
    """Whatever is wrong with a file in one line that names it."""
    try:
        yield
    except (EndsBeforeError, SettingsError):
        raise
    except ImportError:
        raise SettingsError(f"{label} {EXTRA}") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise SettingsError(f"{label} is no whole gzip file ({type(error).__name__}); make it again") from None
    except OSError as error:
        why = error.strerror or " ".join(str(error).split())
        raise SettingsError(f"{label} cannot be read ({why}); name a readable file") from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"{label} is no {error.encoding} to its end; write it as UTF-8") from None
    except FormError as error:
        raise SettingsError(f"{label} {error}") from None
    except (ValueError, KeyError, TypeError) as error:  # whatever a library says of a file that is damaged
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise SettingsError(f"{label} cannot be read ({why}); make it again") from None

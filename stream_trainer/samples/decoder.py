r"""Bytes to token ids: the one way from a `Record` to a `Sample`.

A record's value is one JSON object in UTF-8 with exactly one form:

- `text`: every token carries loss;
- `prompt` and `response`: tokenised as `prompt + "\n"` and `response`, each by itself, loss on the response only;
- `messages`: a list of `{"role", "content"}`, written by the tokenizer's chat template, loss on the assistant's turns.

Optional: `id` (string or integer), `weight` (a finite number above 0), `timestamp` (seconds since the epoch, or
ISO 8601, UTC unless it says otherwise) and `domain` (string). Other fields are ignored; null is the same as absent.
A key that appears twice and NaN or Infinity are errors, as in strict JSON. Texts and responses end with the
tokenizer's end token, and begin with its start token if it adds one by itself. Control tokens spelled out in a record
are text like any other: a producer cannot inject them.

Whatever a record contains, decoding it returns a sample or a SampleError whose reason is one of `REASONS`. Details
never quote the record.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tokenizers import Tokenizer

from stream_trainer.errors import SampleError, SettingsError
from stream_trainer.formats.files import records_in
from stream_trainer.records import Partition, Record, Sample
from stream_trainer.samples.chat import Piece, chat_pieces
from stream_trainer.samples.encoding import Encode, backend_encoder, byte_encoder, word_encoder
from stream_trainer.samples.fields import Fields, parse_fields, text_of
from stream_trainer.settings.schema import SampleSettings

logger = logging.getLogger(__name__)

REASONS = (
    "undecodable",
    # Those of a schema registry.
    "no_schema_id",
    "unknown_schema",
    "schema_mismatch",
    "bad_utf8",
    "bad_json",
    "not_an_object",
    "missing_fields",
    "ambiguous_fields",
    "wrong_type",
    "empty",
    "too_large",
    "too_long",
    "too_deep",
    "bad_number",
    "lone_surrogate",
    "bad_messages",
    "chat_template",
    "no_loss_tokens",
    "tokenizer",
    "unexpected",
    # Those of a step that failed on a sample, which the trainer finds out.
    "step_failed",
    "out_of_memory",
    "killed",
    # That of features of the user's own.
    "feature_failed",
)

NO_LOSS = -100  # the label that torch's cross entropy ignores

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Draft:
    """A record that is parsed and checked, but not tokenised."""

    record: Record
    fields: Fields
    pieces: list[Piece]


@dataclass(frozen=True)
class Decoder:
    """Turns records into samples.

    It works on copies of the tokenizer's backend, so that no other thread's use of the tokenizer interferes.

    Attributes:
        tokenizer: a fast tokenizer of transformers.
        max_positions: tokens the model can take, or None if there is no limit.
        field_names: fields of the record that a sample keeps, `key` and `header:NAME` included.
        unpack: gives the JSON of a record that is in another format. Raises SampleError.
    """

    tokenizer: Any
    settings: SampleSettings
    max_positions: int | None = None
    field_names: tuple[str, ...] = ()
    unpack: Callable[[Record], bytes] | None = None
    _plain: Encode = field(init=False, repr=False)
    _native: Encode = field(init=False, repr=False)
    _control: tuple[str, ...] = field(init=False, repr=False)
    _forbidden: frozenset[int] = field(init=False, repr=False)
    _start: list[int] = field(init=False, repr=False)
    _end: list[int] = field(init=False, repr=False)
    _limit: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Raises SettingsError if the tokenizer has no fast form."""
        if not getattr(self.tokenizer, "is_fast", False):
            raise SettingsError(
                f"model.tokenizer={self.tokenizer.name_or_path} has no fast (tokenizer.json) form; name one that has"
            )
        added = self.tokenizer.added_tokens_decoder.items()
        control = {number: token.content for number, token in added if token.special}
        start, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        adds_start = start is not None and self.tokenizer("")["input_ids"][:1] == [start]
        limit = min(self.settings.max_tokens, self.max_positions or self.settings.max_tokens)
        only_first = limit if self.settings.too_long == "truncate" else None  # else the length counts
        plain, native = (_backend(self.tokenizer, plain) for plain in (True, False))
        fast = byte_encoder(plain, only_first) or word_encoder(plain, only_first)
        forbidden = () if fast else control.keys() - {self.tokenizer.unk_token_id}  # a fast one gives none of them
        object.__setattr__(self, "_plain", fast or backend_encoder(plain))
        object.__setattr__(self, "_native", word_encoder(native, only_first) or backend_encoder(native))
        object.__setattr__(self, "_control", tuple(control.values()))
        object.__setattr__(self, "_forbidden", frozenset(forbidden))
        object.__setattr__(self, "_start", [start] if adds_start else [])
        object.__setattr__(self, "_end", [] if end is None else [end])
        object.__setattr__(self, "_limit", limit)

    def decode(self, record: Record) -> Sample | None:
        """The sample, or None for a tombstone (a record without a value). Raises SampleError and nothing else."""
        (result,) = self.decode_batch([record])
        if isinstance(result, SampleError):
            raise result
        return result

    def decode_batch(self, records: Sequence[Record]) -> list[Sample | SampleError | None]:
        """What `decode` returns or raises for each record. Tokenises all in one go, on as many cores as there are."""
        drafts = [_guarded("unexpected", self._parse, record) for record in records]
        good = [draft for draft in drafts if isinstance(draft, _Draft)]
        ids: list[Any] | SampleError = _guarded("tokenizer", self._encode, good)
        if isinstance(ids, SampleError):  # one record spoils a batch, so find out which
            ids = [_guarded("tokenizer", lambda d: self._encode([d])[0], draft) for draft in good]
        encoded = iter(ids)
        return [self._finished(draft, next(encoded)) if isinstance(draft, _Draft) else draft for draft in drafts]

    def _finished(self, draft: _Draft, ids: list[list[int]] | SampleError) -> Sample | SampleError:
        return ids if isinstance(ids, SampleError) else _guarded("unexpected", self._assemble, draft, ids)

    def _parse(self, record: Record) -> _Draft | None:
        if record.damage:
            raise SampleError("undecodable", record.damage)
        if record.value is None:
            return None
        value = self.unpack(record) if self.unpack and record.value else record.value
        fields = parse_fields(value, self.settings.max_bytes, self.field_names)
        return _Draft(record, fields, self._pieces(fields.form))

    def _pieces(self, form: Mapping[str, Any]) -> list[Piece]:
        if "messages" in form:
            return chat_pieces(self.tokenizer, self._control, form["messages"])
        texts = [text_of(name, value) for name, value in form.items()]
        if "text" in form:
            return [Piece(texts[0], loss=True, plain=True)]
        prompt, response = texts
        return [Piece(prompt + "\n", loss=False, plain=True), Piece(response, loss=True, plain=True)]

    def _encode(self, drafts: Sequence[_Draft]) -> list[list[list[int]]]:
        """Token ids of every piece of every draft."""
        pieces = [piece for draft in drafts for piece in draft.pieces]
        plain = iter(self._plain([piece.text for piece in pieces if piece.plain]))
        native = iter(self._native([piece.text for piece in pieces if not piece.plain]))
        return [[next(plain if piece.plain else native) for piece in draft.pieces] for draft in drafts]

    def _assemble(self, draft: _Draft, encoded: list[list[int]]) -> Sample:
        """The sample of a draft whose pieces have these token ids."""
        record, fields, limit = draft.record, draft.fields, self._limit
        framed = "messages" not in fields.form  # a chat template writes its own start and end tokens
        ids = list(self._start) if framed else []
        labels = [NO_LOSS] * len(ids)
        for piece, piece_ids in zip(draft.pieces, encoded, strict=True):
            if piece.plain and self._forbidden and not self._forbidden.isdisjoint(piece_ids):
                # Some vocabularies (Unigram) build control tokens out of plain text, whatever they are asked.
                raise SampleError("tokenizer", "the tokenizer makes a control token out of plain text")
            ids += piece_ids
            labels += piece_ids if piece.loss else [NO_LOSS] * len(piece_ids)
        if framed:
            ids += self._end
            labels += self._end
        if len(ids) > limit and self.settings.too_long == "dead_letter":
            raise SampleError("too_long", f"{len(ids)} tokens are more than {limit}")
        predicted = labels[1:limit]
        if predicted.count(NO_LOSS) == len(predicted):
            raise SampleError("no_loss_tokens", f"none of the first {limit} tokens carries loss")
        return Sample(
            input_ids=tuple(ids[:limit]),
            labels=tuple(labels[:limit]),
            partition=record.partition,
            offset=record.offset,
            size=len(record.value or b""),
            weight=fields.weight,
            timestamp=record.timestamp if fields.timestamp is None else fields.timestamp,
            id=fields.id,
            domain=fields.domain,
            fields=fields.named + _outside(record, self.field_names) if self.field_names else (),
            record=record,
        )


def read_samples(path: Path, decoder: Decoder, limit: int, setting: str) -> list[Sample]:
    """The first `limit` samples of a file that the user keeps (target, retention). Blank lines are skipped.

    Samples that do not fit `samples.max_tokens` are left out with a warning: the file may serve several settings.
    `setting` is the setting that names the file. Raises SettingsError if the file cannot be read, a line is no
    sample, or there is none.
    """
    lines = _numbered_lines(path, limit, setting)
    samples = []
    too_long: list[int] = []
    for number, result in zip(lines, decoder.decode_batch(list(lines.values())), strict=True):
        if isinstance(result, Sample):
            samples.append(result)
        elif isinstance(result, SampleError) and result.reason in ("too_long", "no_loss_tokens"):
            too_long.append(number)
        else:
            reason = f"{result.reason}: {result}" if isinstance(result, SampleError) else "empty"
            raise SettingsError(f"{setting}={path} line {number} is not a sample ({reason}); correct or remove it")
    if too_long:
        misfit = f"{len(too_long)} samples do not fit samples.max_tokens={decoder.settings.max_tokens}"
        if not samples:
            raise SettingsError(f"{setting}={path}: all {misfit}; raise samples.max_tokens")
        logger.warning("%s=%s: %s, first line %d", setting, path, misfit, too_long[0])
    elif not samples:
        raise SettingsError(f"{setting}={path} holds no samples; add at least one line")
    return samples


def _outside(record: Record, names: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """What was asked for of a record's key and headers, as text."""
    found = {f"header:{name}": value for name, value in record.headers} | {"key": record.key}
    known = ((name, found.get(name)) for name in names)
    return tuple((name, value.decode("utf-8", "replace")) for name, value in known if value is not None)


def _numbered_lines(path: Path, limit: int, setting: str) -> dict[int, Record]:
    """The first `limit` records that are not blank, by number: of a file of lines, that of the line."""
    partition, offset = Partition(str(path), 0), 0
    records: dict[int, Record] = {}
    for number, value in enumerate(records_in(path, f"{setting}={path}"), start=1):
        if len(records) == limit:
            break
        size = len(value) + 1
        if value.strip():
            records[number] = Record(partition, offset, offset + size, value)
        offset += size
    return records


def _guarded(reason: str, function: Callable[..., T], *args: Any) -> T | SampleError:
    """The result, or what went wrong as a SampleError: the one place where the unforeseen is caught."""
    try:
        return function(*args)
    except SampleError as error:
        return error
    except Exception as error:
        return SampleError(reason, type(error).__name__)
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # a bug in the Rust backend; its type cannot be imported
            raise
        return SampleError(reason, "the tokenizer's backend panicked")


def _backend(tokenizer: Any, plain: bool) -> Tokenizer:
    """A copy of the backend that neither pads nor cuts; `plain` makes it blind to control tokens."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = plain
    return backend

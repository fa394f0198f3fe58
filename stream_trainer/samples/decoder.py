r"""Bytes to token ids: the one way from a `Record` to a `Sample`.

A record's value is one JSON object in UTF-8 with exactly one form:

- `text`: every token carries loss;
- `prompt` and `response`: tokenised as `prompt + "\n" + response`, loss on the response;
- `messages`: a conversation, written by the tokenizer's chat template, loss on the assistant's turns. `system`, `tools`
  and `chat_template_kwargs` may stand beside them. Where `samples.fields` maps `prompt` or `response`, both may be the
  two parts of a conversation.

Optional: `id` (string or integer), `weight` (a finite number above 0), `timestamp` (seconds since the epoch, or
ISO 8601, UTC unless it says otherwise) and `domain` (string). Other fields are ignored, but for those that look as if
they said how to train; null is the same as absent. A key that appears twice and NaN or Infinity are errors, as in
strict JSON. Texts and responses end with an end token, and begin with the tokenizer's start token if it adds one by
itself. Control tokens spelled out in a record are text like any other: a producer cannot inject them.

Whatever a record contains, decoding it returns a sample or a SampleError whose reason is one of `REASONS`. Details
never quote the record.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from stream_trainer.errors import SampleError, SettingsError
from stream_trainer.formats.files import records_in
from stream_trainer.records import Partition, Record, Sample
from stream_trainer.samples.chat.written import CONTROL_IN_MESSAGE, LOST_TURN, Chats
from stream_trainer.samples.fields import Fields, is_talk, parse_fields
from stream_trainer.samples.formatted import FORMATTED, Markers
from stream_trainer.samples.framing import Framing, framing_of
from stream_trainer.samples.others import Others, others_of
from stream_trainer.samples.tokens.controls import Controls, controls_of
from stream_trainer.samples.tokens.slow import slow_encoder
from stream_trainer.samples.tokens.whole import EncodeMarked, Marked, Tokens, whole_encoder
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
    "unread_field",
    "formatted_text",
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

TRUNCATED = "truncated"
# What is counted of samples, and what is said of the first.
NOTES = {
    LOST_TURN: "the chat template does not show where a turn of the assistant is: that turn carries no loss",
    CONTROL_IN_MESSAGE: "messages spell out control tokens of the tokenizer: they are taken as text",
    FORMATTED: "texts or messages carry the control tokens of a chat template already: see samples.formatted_text",
    TRUNCATED: "samples have more tokens than samples.max_tokens or the model take: what is beyond is cut off",
}
NO_LOSS = -100  # the label that torch's cross entropy ignores

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Draft:
    """A record that is parsed and checked, but not tokenised.

    Attributes:
        weight: of its messages, beside that of the record.
        frame: ids that come before and after the text.
        notes: what is to be counted of it, in `NOTES`.
    """

    record: Record
    fields: Fields
    marked: Marked
    weight: float = 1.0
    frame: tuple[list[int], list[int]] = ([], [])
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Decoder:
    """Turns records into samples.

    It works on copies of the tokenizer's backend, so that no other thread's use of the tokenizer interferes.

    Attributes:
        tokenizer: one of transformers.
        max_positions: tokens the model can take, or None if there is no limit.
        field_names: fields of the record that a sample keeps, `key` and `header:NAME` included.
        unpack: gives the JSON of a record that is in another format. Raises SampleError.
    """

    tokenizer: Any
    settings: SampleSettings
    max_positions: int | None = None
    field_names: tuple[str, ...] = ()
    unpack: Callable[[Record], bytes] | None = None
    _controls: Controls = field(init=False, repr=False)
    _encoder: EncodeMarked = field(init=False, repr=False)
    _chats: Chats = field(init=False, repr=False)
    _others: Others = field(init=False, repr=False)
    _framing: Framing = field(init=False, repr=False)
    _limit: int = field(init=False, repr=False)
    _noted: set[str] = field(init=False, repr=False, default_factory=set, compare=False)

    def __post_init__(self) -> None:
        """Raises SettingsError if the tokenizer cannot be used, or the template does not read an argument."""
        settings = self.settings
        limit = min(settings.max_tokens, self.max_positions or settings.max_tokens)
        only_first = limit + 1 if settings.too_long == "truncate" else None  # else the length counts
        controls = controls_of(self.tokenizer)
        object.__setattr__(self, "_controls", controls)
        is_fast = getattr(self.tokenizer, "is_fast", False)
        encoder = (
            whole_encoder(self.tokenizer, controls, only_first) if is_fast else slow_encoder(self.tokenizer, controls)
        )
        object.__setattr__(self, "_encoder", encoder)
        markers = Markers(self.tokenizer, controls)
        chats = Chats(self.tokenizer, controls, markers, settings.template_arguments, settings.ignore)
        object.__setattr__(self, "_chats", chats)
        object.__setattr__(self, "_others", others_of(settings.fields, settings.ignore))
        object.__setattr__(self, "_framing", framing_of(self.tokenizer, controls, markers, settings.formatted_text))
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
        tokens: list[Any] | SampleError = _guarded("tokenizer", self._encode, good)
        if isinstance(tokens, SampleError):  # one record spoils a batch, so find out which
            tokens = [_guarded("tokenizer", lambda d: self._encode([d])[0], draft) for draft in good]
        encoded = iter(tokens)
        return [self._finished(draft, next(encoded)) if isinstance(draft, _Draft) else draft for draft in drafts]

    def _encode(self, drafts: Sequence[_Draft]) -> list[Tokens]:
        return self._encoder([draft.marked for draft in drafts])

    def _finished(self, draft: _Draft, tokens: Tokens | SampleError) -> Sample | SampleError:
        return tokens if isinstance(tokens, SampleError) else _guarded("unexpected", self._assemble, draft, tokens)

    def _parse(self, record: Record) -> _Draft | None:
        if record.damage:
            raise SampleError("undecodable", record.damage)
        if record.value is None:
            return None
        value = self.unpack(record) if self.unpack and record.value else record.value
        fields = parse_fields(value, self.settings.max_bytes, self.field_names, self._others)
        if is_talk(fields.form):
            marked, weight, notes = self._chats.read(fields.form)
            draft = _Draft(record, fields, marked, weight, notes=notes)
        else:
            framed = self._framing.read(fields.form)
            draft = _Draft(record, fields, framed.marked, frame=framed.frame, notes=framed.notes)
        for note in draft.notes:
            self._note(note)
        return draft

    def _note(self, note: str) -> None:
        """Say once what is counted from then on."""
        if note not in self._noted:
            self._noted.add(note)
            logger.warning("%s; further records are only counted (%s)", NOTES[note], note)

    def _assemble(self, draft: _Draft, tokens: Tokens) -> Sample:
        """The sample of a draft whose text has these tokens."""
        record, fields, limit = draft.record, draft.fields, self._limit
        (before, after), (own, spans) = draft.frame, tokens
        ids = before + own
        labels = [NO_LOSS] * len(ids)
        for start, end in spans:
            labels[len(before) + start : len(before) + end] = own[start:end]
        if after:
            ids += after
            labels += after
        if len(ids) > limit and self.settings.too_long == "dead_letter":
            raise SampleError("too_long", f"{len(ids)} tokens are more than {limit}")
        notes = draft.notes
        if len(ids) > limit:
            self._note(TRUNCATED)
            notes += (TRUNCATED,)
        predicted = labels[1:limit]
        if predicted == [NO_LOSS] * len(predicted):  # which stops at the first that differs
            raise SampleError("no_loss_tokens", f"none of the first {limit} tokens carries loss")
        return Sample(
            input_ids=tuple(ids[:limit]),
            labels=tuple(labels[:limit]),
            partition=record.partition,
            offset=record.offset,
            size=len(record.value or b""),
            weight=fields.weight * draft.weight,
            timestamp=record.timestamp if fields.timestamp is None else fields.timestamp,
            id=fields.id,
            domain=fields.domain,
            fields=fields.named + _outside(record, self.field_names) if self.field_names else (),
            record=record,
            notes=notes,
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
    except RecursionError:
        return SampleError("too_deep", "nested too deeply")
    except Exception as error:
        return SampleError(reason, type(error).__name__)
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # a bug in the Rust backend; its type cannot be imported
            raise
        return SampleError(reason, "the tokenizer's backend panicked")

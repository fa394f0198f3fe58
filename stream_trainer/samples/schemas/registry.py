"""A Schema Registry: which schema a record was written with, and its value as JSON.

A record names its schema as Confluent's serialisers do: a zero byte and the schema's number in four bytes before the
value, or the same in the header `__value_schema_id`, or there a one and the schema's GUID. `ready` fetches the schemas
of some records before they are decoded, and `to_json` then asks nobody. So while the registry is away records wait, and
none of them is taken for unusable. A schema that is new while the service runs is fetched like any other.
"""

import logging
import random
import struct
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from stream_trainer.errors import SampleError, SettingsError, SourceAwayError, SourceError
from stream_trainer.records import Record
from stream_trainer.samples.schemas.readers import Reader, Schema, UnfitError, avro_reader, json_reader
from stream_trainer.settings.secrets import secret_of
from stream_trainer.settings.sections.registry import RegistrySettings
from stream_trainer.settings.sections.source import KafkaSettings

WHERE, HEADER = "source.kafka.schema_registry", "__value_schema_id"
NO_SCHEMA_ID, UNKNOWN_SCHEMA, SCHEMA_MISMATCH = "no_schema_id", "unknown_schema", "schema_mismatch"
NOT_FOUND = (40401, 40402, 40403)  # no such subject, version or schema; a 404 without one is another server's
REFUSED = (401, 403)
UNKNOWN_FOR_S = 30.0  # a schema that is registered late is found after this
MAX_UNKNOWN = 10_000
FIRST_BACKOFF_S, MAX_BACKOFF_S = 0.5, 30.0

_KINDS = {"avro": "AVRO", "json_schema": "JSON", "protobuf": "PROTOBUF"}
_Name = int | str

logger = logging.getLogger(__name__)


class Registry:
    """Used by one thread alone.

    Attributes:
        away: why schemas cannot be had at present; empty if they can.
    """

    def __init__(
        self,
        settings: KafkaSettings,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        """Connects to nobody. Raises SettingsError if the extra is missing, or a file does not fit."""
        self._client = _client(settings.schema_registry)
        self._url = settings.schema_registry.url
        self._wanted = settings.format
        self._clock, self._jitter = clock, jitter
        self._readers: dict[_Name, Reader | SampleError] = {}
        self._unknown: dict[_Name, float] = {}
        self._backoff_s, self._again_at = FIRST_BACKOFF_S, 0.0
        self.away = ""

    @property
    def waits(self) -> bool:
        """Whether it is too early to ask again."""
        return self._clock() < self._again_at

    def ready(self, records: Sequence[Record]) -> bool:
        """Whether these can be decoded now: their schemas are here, or are known not to exist.

        Raises SourceError if the registry refuses us.
        """
        if len(self._unknown) > MAX_UNKNOWN:  # random bytes may name any number
            self._unknown.clear()
        try:
            for record in records:
                self._fetch_for(record)
        except SourceAwayError as error:
            if not self.away:
                logger.warning("%s; reading pauses until it does", error)
            self.away = str(error)
            self._again_at = self._clock() + self._backoff_s * (0.5 + self._jitter())
            self._backoff_s = min(2 * self._backoff_s, MAX_BACKOFF_S)
            return False
        if self.away:
            logger.info("the schema registry answers")
        self.away, self._backoff_s, self._again_at = "", FIRST_BACKOFF_S, 0.0
        return True

    def to_json(self, record: Record) -> bytes:
        """The value as JSON. Raises SampleError, and asserts that `ready` was called with the record."""
        name, payload = _framed(record)
        reader = self._readers.get(name)
        if reader is None:
            assert name in self._unknown, f"schema {name} was not asked for"
            raise SampleError(UNKNOWN_SCHEMA, f"the registry has no schema {name}")
        if isinstance(reader, SampleError):
            raise SampleError(reader.reason, str(reader))
        try:
            return reader(payload)
        except SampleError:
            raise
        except Exception as error:  # whatever a library raises at bytes that do not fit
            why = str(error) if isinstance(error, UnfitError) else type(error).__name__
            raise SampleError(SCHEMA_MISMATCH, f"it does not fit its schema {name} ({why})") from error

    def probe(self) -> None:
        """Ask for a schema that does not exist, as a record would. Raises SourceAwayError or SourceError."""
        self._ask(lambda: self._client.get_schema(0))

    def _fetch_for(self, record: Record) -> None:
        if not record.value or record.damage:
            return
        try:
            name, _ = _framed(record)
        except SampleError:
            return
        if name in self._readers or self._clock() < self._unknown.get(name, 0.0):
            return
        schema = self._ask(lambda: self._schema(name))
        if schema is not None:
            self._readers[name] = self._reader(name, schema)
        else:
            self._unknown[name] = self._clock() + UNKNOWN_FOR_S

    def _ask(self, question: Callable[[], Schema]) -> Schema | None:
        """The answer, None if there is no such schema. Raises SourceAwayError, and SourceError if we are refused."""
        from confluent_kafka.schema_registry.error import SchemaRegistryError

        where = f"{WHERE}.url={self._url}"
        try:
            return question()
        except SchemaRegistryError as error:
            if error.error_code in NOT_FOUND:
                return None
            what = f"answers with HTTP status {error.http_status_code}"
            if error.http_status_code in REFUSED:
                raise SourceError(f"{where} {what}; correct {WHERE}.username and its password") from None
            raise SourceAwayError(f"{where} {what}; check the registry") from None
        except Exception as error:  # of the connection, or an answer that is no registry's
            raise SourceAwayError(
                f"{where} does not answer as a registry ({type(error).__name__}: {error}); check that it runs"
            ) from None

    def _schema(self, name: _Name) -> Schema:
        """A schema and all that it refers to."""
        form = "serialized" if self._wanted == "protobuf" else None
        get = self._client.get_schema_by_guid if isinstance(name, str) else self._client.get_schema
        found = get(name, fmt=form)
        references: dict[str, str] = {}
        self._collect(found, references, form)
        return Schema(found.schema_type, found.schema_str, tuple(references.items()))

    def _collect(self, schema: Any, references: dict[str, str], form: str | None) -> None:
        for reference in schema.references or ():
            if reference.name not in references:
                found = self._client.get_version(reference.subject, reference.version, deleted=True, fmt=form).schema
                self._collect(found, references, form)
                references[reference.name] = found.schema_str

    def _reader(self, name: _Name, schema: Schema) -> Reader | SampleError:
        """A reader, or why no record of this schema can be read."""
        if schema.kind != _KINDS[self._wanted]:
            return SampleError(SCHEMA_MISMATCH, f"its schema {name} is {schema.kind}, not {_KINDS[self._wanted]}")
        try:
            return _makers()[schema.kind](schema)
        except Exception as error:  # whatever a library raises at a schema that it cannot use
            return SampleError(SCHEMA_MISMATCH, f"its schema {name} cannot be used ({type(error).__name__})")


def _makers() -> dict[str, Callable[[Schema], Reader]]:
    from stream_trainer.samples.schemas.protobuf import protobuf_reader  # it takes time to load

    return {"AVRO": avro_reader, "JSON": json_reader, "PROTOBUF": protobuf_reader}


def _framed(record: Record) -> tuple[_Name, bytes]:
    """What a record calls its schema, and its value without that. Raises SampleError if it names none."""
    value = record.value or b""
    named = next((content for name, content in reversed(record.headers) if name == HEADER and content), None)
    head = value if named is None else named
    if head[:1] == b"\x00" and len(head) >= 5:
        (number,) = struct.unpack(">I", head[1:5])
        return number, head[5:] if named is None else named[5:] + value
    if head[:1] == b"\x01" and len(head) >= 17:
        guid = str(uuid.UUID(bytes=head[1:17]))
        return guid, head[17:] if named is None else named[17:] + value
    raise SampleError(NO_SCHEMA_ID, "it begins with no number of a schema, as source.kafka.format wants it")


def _client(settings: RegistrySettings) -> Any:
    try:
        from confluent_kafka.schema_registry import SchemaRegistryClient
    except ImportError as error:
        raise SettingsError(f"{WHERE} needs the module {error.name}; pip install 'stream-trainer[schema]'") from None
    options: dict[str, Any] = {"url": settings.url, "timeout": settings.timeout_s, "max.retries": 0}
    if settings.username is not None:
        options["basic.auth.user.info"] = f"{settings.username}:{secret_of(settings, WHERE, 'password')}"
    files = {
        "ssl.ca.location": "ssl_cafile",
        "ssl.certificate.location": "ssl_certfile",
        "ssl.key.location": "ssl_keyfile",
    }
    for option, name in files.items():
        path = getattr(settings, name)
        if path is None:
            continue
        if not path.is_file():
            raise SettingsError(f"{WHERE}.{name}={path} is no file; correct the path")
        options[option] = str(path)
    if (password := secret_of(settings, WHERE, "ssl_password")) is not None:
        options["ssl.key.password"] = password
    try:
        return SchemaRegistryClient(options)
    except (OSError, ValueError) as error:
        raise SettingsError(f"{WHERE}: its files for TLS do not fit ({type(error).__name__}); correct them") from None

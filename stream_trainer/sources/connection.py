"""How any part of the service reaches the brokers: one set of options, one-line errors, topics looked up by name.

kafka-python ships without type information, so its clients are `Any` here and in the modules that use them.
"""

import difflib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kafka.codec import has_lz4, has_snappy, has_zstd
from kafka.errors import KafkaError, for_code
from kafka.net.compat import KafkaNetClient

from stream_trainer.errors import SettingsError, SourceError
from stream_trainer.settings.source import KafkaSettings

UNKNOWN_TOPIC = 3  # Kafka's error code UNKNOWN_TOPIC_OR_PARTITION
RECONNECT_BACKOFF_MAX_MS = 2_000  # the client's own 30 s would add to every outage


@dataclass(frozen=True, slots=True)
class Topic:
    """A topic as the brokers describe it.

    Attributes:
        id: what tells it from an earlier topic of the same name; None where the broker gives none.
        partitions: their numbers, ascending.
    """

    name: str
    id: str | None
    partitions: tuple[int, ...]


def connect(client: Callable[..., Any], settings: KafkaSettings, client_id: str, **options: Any) -> Any:
    """`client(**options)` of kafka-python, connected.

    Waits up to `bootstrap_timeout_s` for a broker. Raises SettingsError for an address or a file that cannot be used,
    SourceError if no broker can be reached.
    """
    options = {**connection_options(settings, client_id), **options}
    networks: list[Any] = []

    def open_network(**configs: Any) -> Any:
        networks.append(KafkaNetClient(**configs))
        return networks[-1]

    with _last_error() as heard:
        try:
            return client(kafka_client=open_network, **options)
        except (KafkaError, ValueError) as error:
            for network in networks:
                network.close()  # a client that failed to start would leave its thread and sockets behind
            if isinstance(error, ValueError):
                raise SettingsError(
                    f"source.kafka.bootstrap_servers={settings.bootstrap_servers} is not a list of host:port "
                    f"({_one_line(error)}); correct it"
                ) from None
            raise SourceError(
                f"source.kafka.bootstrap_servers={settings.bootstrap_servers} could not be reached over "
                f"{settings.security_protocol} within {settings.bootstrap_timeout_s:g} s "
                f"({heard.message or _one_line(error)}); check that the broker runs, and the address, the protocol and "
                "the credentials"
            ) from None


def connection_options(settings: KafkaSettings, client_id: str) -> dict[str, Any]:
    """The options that every client of kafka-python needs to reach the brokers.

    Raises SettingsError if a file named by the TLS settings is missing.
    """
    for name in ("ssl_cafile", "ssl_certfile", "ssl_keyfile"):
        path = getattr(settings, name)
        if path is not None and not path.is_file():
            raise SettingsError(f"source.kafka.{name}={path} is not a file; correct the path")
    return {
        "bootstrap_servers": settings.bootstrap_servers.split(","),
        "client_id": client_id,
        "bootstrap_timeout_ms": int(settings.bootstrap_timeout_s * 1000),
        "reconnect_backoff_max_ms": RECONNECT_BACKOFF_MAX_MS,
        "security_protocol": settings.security_protocol,
        "ssl_cafile": _text(settings.ssl_cafile),
        "ssl_certfile": _text(settings.ssl_certfile),
        "ssl_keyfile": _text(settings.ssl_keyfile),
        "ssl_password": settings.ssl_password.get_secret_value() if settings.ssl_password else None,
        "ssl_check_hostname": settings.ssl_check_hostname,
        "sasl_mechanism": settings.sasl_mechanism,
        "sasl_plain_username": settings.sasl_username,
        "sasl_plain_password": settings.sasl_password.get_secret_value() if settings.sasl_password else None,
    }


def describe_topic(admin: Any, name: str) -> Topic | None:
    """The topic, or None if the brokers know none of that name. Never creates it.

    Raises KafkaError if the brokers cannot be asked, or refuse.
    """
    (found,) = admin.describe_topics([name])
    if found["error_code"] == UNKNOWN_TOPIC:
        return None
    if found["error_code"]:
        raise for_code(found["error_code"])(name)
    topic_id = found["topic_id"]
    return Topic(
        name=name,
        id=str(topic_id) if topic_id else None,
        partitions=tuple(sorted(partition["partition_index"] for partition in found["partitions"])),
    )


def require_topic(admin: Any, name: str) -> Topic:
    """The topic. Raises SettingsError if there is none, naming the nearest that exists; KafkaError as above."""
    topic = describe_topic(admin, name)
    if topic is None:
        near = difflib.get_close_matches(name, admin.list_topics(), n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise SettingsError(f"source.kafka.topic={name} does not exist; {hint}correct the name or create the topic")
    return topic


def require_codecs() -> None:
    """Raise SettingsError unless every compression that a producer may have used can be undone.

    Without its library a compressed batch fails to decode, after which the client's poll never returns.
    """
    for codec, present in (("lz4", has_lz4()), ("zstd", has_zstd()), ("snappy", has_snappy())):
        if not present:
            raise SettingsError(
                f"source.kind=kafka needs the library for {codec} compression, which is not installed; "
                f"run pip install 'kafka-python[lz4,zstd,snappy]'"
            )


class _LastError(logging.Handler):
    """Keeps the last error: a failed bootstrap says why in its log only."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.message = ""

    def emit(self, record: logging.LogRecord) -> None:
        message = _one_line(record.getMessage()).rpartition(">: ")[2]  # without the name of the connection
        # A broker that refuses a password closes the connection at once: some tries hear no more than that.
        if "Authentication" in self.message:
            return
        explains = not message.startswith("Bootstrap failed") and "socket disconnected" not in message
        if explains or not self.message:
            self.message = message


@contextmanager
def _last_error() -> Iterator[_LastError]:
    """Keep the client's complaints while it connects; the one that counts ends up in our own error."""
    logger = logging.getLogger("kafka")
    handler, level, propagate = _LastError(), logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.ERROR)
    logger.propagate = False
    try:
        yield handler
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _one_line(what: object) -> str:
    return " ".join(str(what).split())

"""How any part of the service reaches the brokers: one set of options, one-line errors, topics looked up by name.

kafka-python ships without type information, so its clients are `Any` here and in the modules that use them.
"""

import difflib
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

from kafka import KafkaAdminClient, KafkaProducer
from kafka.codec import has_lz4, has_snappy, has_zstd
from kafka.errors import KafkaConnectionError, KafkaError, for_code
from kafka.net.compat import KafkaNetClient

from stream_trainer.errors import SettingsError, SourceAwayError, SourceError
from stream_trainer.settings.sections.source import KafkaSettings
from stream_trainer.sources.security import security_options
from stream_trainer.sources.topic_log import REQUEST_TIMEOUT_MS

UNKNOWN_TOPIC = 3  # Kafka's error code UNKNOWN_TOPIC_OR_PARTITION
RECONNECT_BACKOFF_MAX_MS = 2_000  # the client's own 30 s would add to every outage
# Of the brokers' own addresses this many are tried at the start, until one answers.
MAX_ADDRESSES = 5
ADDRESS_TIMEOUT_S = 3.0
ABANDON_TIMEOUT_S = 2.0
_CONNECTING = threading.Lock()  # while the client's logger, of which each process has one, is changed
REFUSALS = ("Authentication", "SSL", "CERTIFICATE", "Sasl")  # waiting mends none of these


@dataclass(frozen=True, slots=True)
class Topic:
    """A topic as the brokers describe it.

    Attributes:
        id: what tells it from an earlier topic of the same name; None where the broker gives none.
        partitions: their numbers, ascending.
        leaderless: those that no broker serves.
        elsewhere: those that another process of this run reads.
    """

    name: str
    id: str | None
    partitions: tuple[int, ...]
    leaderless: frozenset[int] = frozenset()
    elsewhere: frozenset[int] = frozenset()

    def shared(self, owned: Callable[[int], bool]) -> "Topic":
        """The same, for a process that reads the partitions that it owns."""
        elsewhere = frozenset(number for number in self.partitions if not owned(number))
        return replace(self, elsewhere=elsewhere, leaderless=self.leaderless - elsewhere)

    @property
    def read(self) -> tuple[int, ...]:
        """Partitions that this process reads."""
        return tuple(number for number in self.partitions if number not in self.elsewhere)


def connect(client: Callable[..., Any], settings: KafkaSettings, client_id: str, **options: Any) -> Any:
    """`client(**options)` of kafka-python, connected.

    Waits up to `bootstrap_timeout_s` for a broker. Raises SettingsError for an address or a file that cannot be used,
    SourceAwayError if nobody answers, SourceError if we are refused, or if the addresses that the brokers give for
    themselves lead nowhere.
    """
    options = {**connection_options(settings, client_id), **options}
    networks: list[Any] = []

    def open_network(**configs: Any) -> Any:
        networks.append(KafkaNetClient(**configs))
        return networks[-1]

    with last_error(client_id) as heard:
        try:
            if settings.api_version:
                _require_answer(settings)
            connected = client(kafka_client=open_network, **options)
        except (KafkaError, ValueError) as error:
            for network in networks:
                network.close()  # a client that failed to start would leave its thread and sockets behind
            if isinstance(error, ValueError):
                raise SettingsError(
                    f"source.kafka.bootstrap_servers={settings.bootstrap_servers} is not a list of host:port "
                    f"({_one_line(error)}); correct it"
                ) from None
            why = heard.message or _one_line(error)
            kind = SourceError if any(word in why for word in REFUSALS) else SourceAwayError
            raise kind(
                f"source.kafka.bootstrap_servers={settings.bootstrap_servers} could not be reached over "
                f"{settings.security_protocol} within {settings.bootstrap_timeout_s:g} s ({why}); check that the "
                "broker runs, and the address, the protocol and the credentials"
            ) from None
    try:
        for network in networks:
            _require_advertised(network, settings)
    except SourceError:
        abandon(connected) if isinstance(connected, KafkaProducer) else connected.close()
        raise
    return connected


def abandon(producer: Any) -> None:
    """Close a producer at once: what it has not sent is never sent, and a transaction that is open comes to nothing.

    Its own `close(timeout=0)` fails where something is unsent. Then its thread lives on, and sends that when the
    brokers are back.
    """
    producer._sender.force_close()
    with suppress(KafkaError):
        producer.close(timeout=ABANDON_TIMEOUT_S)


def connection_options(settings: KafkaSettings, client_id: str) -> dict[str, Any]:
    """The options that every client of kafka-python needs to reach the brokers.

    Raises SettingsError if a file named by the settings for TLS or SASL is missing or does not fit.
    """
    return {
        "bootstrap_servers": settings.bootstrap_servers.split(","),
        "client_id": client_id,
        "bootstrap_timeout_ms": int(settings.bootstrap_timeout_s * 1000),
        "reconnect_backoff_max_ms": RECONNECT_BACKOFF_MAX_MS,
        "api_version": tuple(map(int, settings.api_version.split("."))) if settings.api_version else None,
        **security_options(settings),
    }


def _require_answer(settings: KafkaSettings) -> None:
    """Raise KafkaConnectionError unless an address can be reached in time.

    A client that is told the brokers' version asks nothing at its start, and its first question then waits for ever.
    """
    deadline, why = time.monotonic() + settings.bootstrap_timeout_s, "no address"
    while True:
        for address in settings.bootstrap_servers.split(","):
            host, _, port = address.strip().rpartition(":")
            try:
                socket.create_connection((host.strip("[]"), int(port)), timeout=ADDRESS_TIMEOUT_S).close()
            except OSError as error:
                why = _one_line(error)
            else:
                return
        if time.monotonic() > deadline:
            raise KafkaConnectionError(why)
        time.sleep(0.1)


def _require_advertised(network: Any, settings: KafkaSettings) -> None:
    """Raise SourceError unless one of the addresses that the brokers give for themselves can be reached.

    From here on the client uses these and no longer the bootstrap address. What it says when they lead nowhere names
    none of them.
    """
    given = {(broker.host, broker.port) for broker in network.cluster.bootstrap_brokers()}
    advertised = sorted((broker.host, broker.port) for broker in network.cluster.brokers())
    if given & set(advertised):
        return
    problems = []
    for host, port in advertised[:MAX_ADDRESSES]:
        try:
            socket.create_connection((host, port), timeout=ADDRESS_TIMEOUT_S).close()
        except OSError as error:
            problems.append(f"{host}:{port} ({_one_line(error)})")
        else:
            return
    if problems:
        raise SourceError(
            f"source.kafka.bootstrap_servers={settings.bootstrap_servers} answers, but the brokers call themselves "
            f"{', '.join(problems)}, which cannot be reached from here; correct advertised.listeners of the brokers, "
            "or make that address known here"
        )


def describe_topic(admin: Any, name: str) -> Topic | None:
    """The topic, or None if the brokers know none of that name. Never creates it.

    Raises KafkaError if the brokers cannot be asked, or refuse.
    """
    (found,) = admin.describe_topics([name])
    if found["error_code"] == UNKNOWN_TOPIC:
        return None
    if found["error_code"]:
        raise for_code(found["error_code"])(name)
    topic_id = found.get("topic_id")  # brokers before Kafka 2.8 know of none
    return Topic(
        name=name,
        id=str(topic_id) if topic_id else None,
        partitions=tuple(sorted(partition["partition_index"] for partition in found["partitions"])),
        leaderless=frozenset(p["partition_index"] for p in found["partitions"] if p["leader_id"] < 0),
    )


def require_topic(admin: Any, name: str) -> Topic:
    """The topic. Raises SettingsError if there is none, naming the nearest that exists; KafkaError as above."""
    topic = describe_topic(admin, name)
    if topic is None:
        near = difflib.get_close_matches(name, admin.list_topics(), n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise SettingsError(f"source.kafka.topic={name} does not exist; {hint}correct the name or create the topic")
    return topic


def probe(settings: KafkaSettings) -> None:
    """Connect and look the topic up. Raises SettingsError or SourceError with what is wrong."""
    require_codecs()
    admin = connect(KafkaAdminClient, settings, "stream-trainer-check", request_timeout_ms=REQUEST_TIMEOUT_MS)
    try:
        require_topic(admin, settings.topic or "")
    except KafkaError as error:
        raise SourceError(f"source.kafka.topic={settings.topic} cannot be described ({error}); check access") from error
    finally:
        admin.close()


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


class LastError(logging.Handler):
    """Keeps the last error of one client: a failed bootstrap says why in its log only.

    Attributes:
        before: level and propagation of the client's logger while no client connects.
    """

    def __init__(self, client_id: str, before: tuple[int, bool]) -> None:
        super().__init__(logging.ERROR)
        self.message, self.before = "", before
        self._threads = {threading.current_thread().name, f"kafka-io-{client_id}"}

    def emit(self, record: logging.LogRecord) -> None:
        if record.threadName not in self._threads:
            return
        message = _one_line(record.getMessage()).rpartition(">: ")[2]  # without the name of the connection
        # A broker that refuses a password closes the connection at once: some tries hear no more than that.
        if "Authentication" in self.message:
            return
        explains = not message.startswith("Bootstrap failed") and "socket disconnected" not in message
        if explains or not self.message:
            self.message = message


@contextmanager
def last_error(client_id: str) -> Iterator[LastError]:
    """Keep a client's complaints while it connects; the one that counts ends up in our own error.

    Several may connect at a time, the stream's, the target's and the dead letters': the last one to be done lets the
    client's logger be heard again.
    """
    logger = logging.getLogger("kafka")
    with _CONNECTING:
        others = _hearing(logger)
        handler = LastError(client_id, others[0].before if others else (logger.level, logger.propagate))
        logger.addHandler(handler)
        logger.setLevel(logging.ERROR)
        logger.propagate = False
    try:
        yield handler
    finally:
        with _CONNECTING:
            logger.removeHandler(handler)
            if not _hearing(logger):
                level, logger.propagate = handler.before
                logger.setLevel(level)


def _hearing(logger: logging.Logger) -> list[LastError]:
    return [handler for handler in logger.handlers if isinstance(handler, LastError)]


def _one_line(what: object) -> str:
    return " ".join(str(what).split())

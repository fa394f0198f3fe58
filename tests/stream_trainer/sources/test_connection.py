"""Clients that connect at the same time: each hears its own complaints, and then the log hears them again."""

import logging
import threading
from collections.abc import Iterator

import pytest
from kafka import KafkaAdminClient

from stream_trainer.demo.broker import free_port
from stream_trainer.errors import SourceAwayError
from stream_trainer.settings.sections.source import KafkaSettings
from stream_trainer.sources.connection import connect, last_error


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    found = logging.getLogger("kafka")
    level = found.level
    found.setLevel(logging.WARNING)
    yield found
    found.setLevel(level)


@pytest.mark.parametrize("first_ends_first", [True, False])
def test_the_log_hears_the_client_again_when_the_last_one_is_done(
    first_ends_first: bool, logger: logging.Logger
) -> None:
    first, second = last_error("one"), last_error("two")
    first.__enter__()
    second.__enter__()
    for one in (first, second) if first_ends_first else (second, first):
        assert (logger.level, logger.propagate) == (logging.ERROR, False)
        one.__exit__(None, None, None)
    assert (logger.level, logger.propagate) == (logging.WARNING, True)


def test_each_hears_what_its_own_threads_say(logger: logging.Logger) -> None:
    def say(text: str, name: str) -> None:
        thread = threading.Thread(target=logger.error, args=(text,), name=name)
        thread.start()
        thread.join()

    with last_error("one") as one, last_error("two") as two:
        say("<client one>: the password is wrong", "kafka-io-one")
        say("<client two>: nobody is there", "kafka-io-two")
        say("something else", "another")
        assert (one.message, two.message) == ("the password is wrong", "nobody is there")


def test_clients_that_find_nobody_at_the_same_time_say_so_of_their_own_address(logger: logging.Logger) -> None:
    ports, said = [free_port() for _ in range(3)], dict[int, str]()

    def find(port: int) -> None:
        servers = f"127.0.0.1:{port}"
        settings = KafkaSettings(bootstrap_servers=servers, topic="t", bootstrap_timeout_s=0.5 + ports.index(port))
        try:
            connect(KafkaAdminClient, settings, f"client-{port}")
        except SourceAwayError as error:
            said[port] = str(error)

    threads = [threading.Thread(target=find, args=(port,)) for port in ports]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for port in ports:
        assert f"127.0.0.1:{port} could not be reached" in said[port]
        assert "ECONNREFUSED" in said[port]
    assert (logger.level, logger.propagate) == (logging.WARNING, True)

"""Orders over a real socket: only with the token, answered soon, and obeyed by whoever takes them."""

import json
import logging
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stream_trainer.errors import SettingsError
from stream_trainer.monitoring import control
from stream_trainer.monitoring.control import ControlServer, is_loopback
from stream_trainer.monitoring.orders import MAX_WAITING, Orders, Outcome
from stream_trainer.settings.sections.control import ControlSettings
from tests.helpers.service import obey

TOKEN = "a-token-that-nobody-guesses"


class Desk:
    """A server, and what tests do in the trainer's place."""

    def __init__(self, **settings: Any) -> None:
        self.orders = Orders()
        given = ControlSettings(**{"enabled": True, "port": 0, "token": TOKEN} | settings)
        self.server = ControlServer(given, self.orders, lambda: {"state": "training"})
        self.host, self.port = self.server.start()

    def ask(self, path: str, method: str = "POST", token: str | None = TOKEN) -> tuple[int, dict[str, Any]]:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", method=method, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            with error:
                body = error.read().decode()
            return error.code, json.loads(body) if body.startswith("{") else {"text": body}


@pytest.fixture
def desk() -> Iterator[Desk]:
    desk = Desk()
    yield desk
    desk.server.stop()


@pytest.mark.parametrize(("outcome", "status"), [(Outcome.DONE, 200), (Outcome.REFUSED, 409)])
def test_an_order_is_answered_once_it_is_obeyed(outcome: Outcome, status: int, desk: Desk) -> None:
    thread = obey(desk.orders, outcome, "as it went")
    found = desk.ask("/reload-target")
    thread.join()
    expected = {"order": 1, "action": "reload-target", "outcome": outcome.value, "detail": "as it went"}
    assert found == (status, expected)
    assert desk.ask("/orders/1", "GET")[1] == expected


def test_an_order_that_takes_long_has_a_number_to_ask_for(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "WAIT_S", 0.05)
    status, found = desk.ask("/pause")
    assert (status, found["outcome"]) == (202, "waiting")
    obey(desk.orders, Outcome.DONE, "paused after step 3").join()
    assert desk.ask(f"/orders/{found['order']}", "GET")[1]["detail"] == "paused after step 3"


@pytest.mark.parametrize("token", [None, "", "wrong", TOKEN + "x", TOKEN[:-1], "\u00e9\u00e9"])
@pytest.mark.parametrize(("method", "path"), [("POST", "/pause"), ("GET", "/status"), ("GET", "/nowhere")])
def test_without_the_token_there_is_no_answer_and_no_order(
    method: str, path: str, token: str | None, desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert desk.ask(path, method, token)[0] == 401
        assert desk.ask(path, method, token)[0] == 401
    assert not desk.orders.waiting
    assert [record.message for record in caplog.records] == ["an order from 127.0.0.1 without the token is refused"]
    assert TOKEN not in caplog.text


def test_paths_that_are_no_order(desk: Desk) -> None:
    assert desk.ask("/status", "GET") == (200, {"state": "training"})
    for method, path in (
        ("POST", "/"),
        ("POST", "/stop"),
        ("GET", "/pause"),
        ("GET", "/orders/9"),
        ("GET", "/orders/x"),
    ):
        assert desk.ask(path, method)[0] == 404
    assert not desk.orders.waiting


def test_more_orders_than_anyone_means_are_turned_away(desk: Desk) -> None:
    for _ in range(MAX_WAITING):
        desk.orders.give("checkpoint")
    assert desk.ask("/checkpoint")[0] == 503


def test_when_the_run_ends_what_waits_is_refused_and_so_is_what_comes(desk: Desk) -> None:
    order = desk.orders.give("pause")
    assert order is not None
    desk.orders.close()
    assert (order.outcome, order.detail) == (Outcome.REFUSED, "the run ends")
    assert desk.ask("/pause")[0] == 409


@pytest.mark.parametrize("method", ["PUT", "HEAD", "DELETE"])
def test_other_methods_are_not_there(method: str, desk: Desk) -> None:
    request = urllib.request.Request(f"http://127.0.0.1:{desk.port}/pause", method=method)
    with pytest.raises(urllib.error.HTTPError) as raised:
        urllib.request.urlopen(request, timeout=30)
    with raised.value:
        assert raised.value.code == 501


def test_the_token_may_come_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(TOKEN + "\n")
    desk = Desk(token=None, token_file=file)
    assert desk.ask("/status", "GET")[0] == 200
    desk.server.stop()
    file.write_text("short")
    with pytest.raises(
        SettingsError, match=r"control.token_file=.* needs 16 to 512 .*; write the token alone"
    ) as raised:
        Desk(token=None, token_file=file)
    assert "short" not in str(raised.value)
    with pytest.raises(SettingsError, match=r"control.token_file=.*missing cannot be read"):
        Desk(token=None, token_file=tmp_path / "missing")


def test_an_address_that_others_can_reach_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        Desk().server.stop()
        assert caplog.text == ""
        Desk(host="0.0.0.0").server.stop()
    assert "control.host=0.0.0.0: the token travels unencrypted there; put TLS in front of it" in caplog.text


def test_a_port_in_use_is_one_line_with_the_setting(desk: Desk) -> None:
    with pytest.raises(
        SettingsError, match=rf"^control.port={desk.port} cannot be listened on at control.host=127.0.0.1"
    ):
        Desk(port=desk.port)


def test_what_is_loopback() -> None:
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "127.9.9.9")] == [True] * 4
    assert [is_loopback(host) for host in ("0.0.0.0", "::", "192.0.2.1", "trainer.example", "")] == [False] * 5

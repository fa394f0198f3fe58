"""Every page over a real socket."""

import errno
import http.client
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any

import pytest

from stream_trainer.errors import SettingsError
from stream_trainer.monitoring import bounded_http
from stream_trainer.monitoring.bounded_http import MAX_CONNECTIONS, MAX_THREADS
from stream_trainer.monitoring.metrics import Metrics
from stream_trainer.monitoring.pages import Condition, Health
from stream_trainer.monitoring.server import Server
from stream_trainer.records import Outcome
from stream_trainer.settings.schema import ServerSettings


class Service:
    """What the callbacks of a server report; tests change it."""

    def __init__(self) -> None:
        self.health = Health("training", ok=True, ready=True)
        self.status: dict[str, Any] = {"state": "training", "step": 7, "loss": 1.25, "records": {"trained": 3}}
        self.metrics = Metrics()
        self.server = Server(
            ServerSettings(port=0), self.metrics.registry, lambda: self.health, lambda: dict(self.status)
        )
        self.host, self.port = self.server.start()

    def request(self, path: str, method: str = "GET", **headers: str) -> tuple[int, str, str]:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=30)
        connection.request(method, path, headers=headers)
        response = connection.getresponse()
        result = response.status, response.getheader("Content-Type", ""), response.read().decode()
        connection.close()
        return result


@pytest.fixture
def service() -> Iterator[Service]:
    service = Service()
    yield service
    service.server.stop()


def test_metrics_in_the_format_that_is_asked_for(service: Service) -> None:
    service.metrics.count_outcomes(lambda: {Outcome.TRAINED: 3})
    status, kind, text = service.request("/metrics")
    assert (status, kind.partition(";")[0]) == (200, "text/plain")
    assert 'stream_trainer_records_total{outcome="trained"} 3.0' in text
    _, kind, text = service.request("/metrics", Accept="application/openmetrics-text; version=1.0.0")
    assert kind.startswith("application/openmetrics-text")
    assert text.endswith("# EOF\n")


def test_health_and_readiness_follow_the_callback(service: Service) -> None:
    assert service.request("/healthz")[0] == 200
    assert service.request("/readyz")[0] == 200
    service.health = Health("loading", ok=True, ready=False)
    assert service.request("/healthz")[0] == 200
    status, _, text = service.request("/readyz")
    assert (status, json.loads(text)) == (503, {"ready": False, "health": "healthy", "state": "loading", "detail": ""})
    service.health = Health("training", ok=False, ready=True, detail="no step for 700 s", health=Condition.STUCK)
    status, kind, text = service.request("/healthz")
    assert (status, kind) == (503, "application/json")
    assert json.loads(text) == {"ok": False, "health": "stuck", "state": "training", "detail": "no step for 700 s"}


def test_the_page_is_made_of_files_and_loads_nothing_from_elsewhere(service: Service) -> None:
    service.status["topic"] = "<script>alert(1)</script>"
    status, kind, text = service.request("/?refresh=1")
    assert (status, kind) == (200, "text/html; charset=utf-8")
    assert "alert" not in text
    named = re.findall(r'(?:src|href)="([^"]+)"', text)
    assert {"page.js", "page.css", "uPlot.iife.min.js"} <= set(named)
    for name in set(named) - {"data:,"}:
        status, kind, text = service.request(f"/{name}")
        assert status == 200, name
        assert "//" not in name
        assert kind == "text/javascript; charset=utf-8" or not name.endswith(".js")
    for name in ("shapes.js", "charts.js", "panels.js", "page.js"):
        text = service.request(f"/{name}")[2]
        assert "innerHTML" not in text
        assert all(service.request(f"/{other}")[0] == 200 for other in re.findall(r'from "\./([^"]+)"', text))


def test_a_browser_is_told_to_trust_nothing_else(service: Service) -> None:
    connection = http.client.HTTPConnection(service.host, service.port, timeout=30)
    for path in ("/", "/page.js", "/status", "/nowhere"):
        connection.request("GET", path)
        response = connection.getresponse()
        response.read()
        assert response.headers["Content-Security-Policy"].startswith("default-src 'self';")
        assert response.headers["X-Content-Type-Options"] == "nosniff"


def test_history_and_panels_are_what_the_callbacks_return(service: Service) -> None:
    asked: list[int] = []

    def history(since: int) -> dict[str, Any]:
        asked.append(since)
        return {"rows": [float("nan")]}

    pages = service.server._pages
    service.server._pages = replace(pages, history=history, panels=lambda: {"arms": []})
    service.server.stop()
    service.host, service.port = service.server.start()
    assert json.loads(service.request("/history?since=7")[2]) == {"rows": [None]}
    for odd in ("", "?since=", "?since=-1", "?since=x", "?since=" + "9" * 99):
        assert service.request(f"/history{odd}")[0] == 200
    assert asked == [7, 0, 0, 0, 0, 0]
    assert json.loads(service.request("/panels")[2]) == {"arms": []}


def test_status_is_json_even_where_a_loss_is_not_finite(service: Service) -> None:
    service.status["loss"] = float("nan")
    _, _, text = service.request("/status")
    assert json.loads(text) == {"state": "training", "step": 7, "loss": None, "records": {"trained": 3}}
    assert "NaN" not in text


def test_head_and_unknown_paths(service: Service) -> None:
    status, _, text = service.request("/metrics", "HEAD")
    assert (status, text) == (200, "")
    assert service.request("/favicon.ico")[0] == 404
    assert service.request("/metrics/../etc/passwd")[0] == 404
    assert service.request("/metrics", "POST")[0] == 501


def test_a_failing_callback_fails_the_probe_but_not_the_server(service: Service) -> None:
    service.status = None  # type: ignore[assignment]
    with pytest.raises((http.client.HTTPException, ConnectionError)):
        service.request("/status")
    assert service.request("/healthz")[0] == 200


def test_a_slow_client_does_not_hold_up_others(service: Service) -> None:
    with socket.create_connection((service.host, service.port)) as slow:
        slow.sendall(b"GET /metrics HT")
        assert service.request("/healthz")[0] == 200


def test_clients_that_drip_do_not_exhaust_the_server(service: Service) -> None:
    threads = threading.active_count()
    with ExitStack() as stack:
        clients = []
        for _ in range(3 * MAX_THREADS):
            client = stack.enter_context(socket.create_connection((service.host, service.port)))
            client.sendall(b"G")
            clients.append(client)
            if len(clients) % MAX_CONNECTIONS == 0:
                assert service.request("/healthz")[0] == 200
        assert threading.active_count() - threads <= MAX_THREADS + 1
        ended = sum(is_ended(client) for client in clients)
        assert ended >= len(clients) - MAX_THREADS
        assert service.request("/metrics")[0] == 200


def is_ended(client: socket.socket) -> bool:
    """Whether the server has let go of it."""
    client.settimeout(0.05)
    try:
        return client.recv(1) == b""
    except TimeoutError:
        return False
    except ConnectionError:
        return True


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\n", b"GET / HTTP/1.1\r\nX: "])
def test_a_header_must_be_complete_in_time(sent: bytes, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_http, "HEADER_S", 0.3)
    with socket.create_connection((service.host, service.port)) as client:
        client.sendall(sent)
        deadline = time.monotonic() + 30
        while not is_ended(client):
            assert time.monotonic() < deadline, "not dropped"
            with suppress(ConnectionError):
                client.sendall(b"a")  # each byte would renew a limit that counts from the last one


def test_an_answer_that_nobody_takes_is_given_up(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_http, "REQUEST_S", 0.3)
    service.status["long"] = "x" * 50_000_000
    with socket.create_connection((service.host, service.port)) as client:
        client.sendall(b"GET /status HTTP/1.0\r\n\r\n")
        deadline = time.monotonic() + 30
        while http_server(service).connections:
            assert time.monotonic() < deadline, "not dropped"
            time.sleep(0.05)


def test_no_descriptor_left_is_waited_out(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    tries = 0
    accept = socket.socket.accept

    def none_left(listening: socket.socket) -> tuple[socket.socket, Any]:
        nonlocal tries
        tries += 1
        if tries <= 5:
            raise OSError(errno.EMFILE, "Too many open files")
        return accept(listening)

    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    monkeypatch.setattr(socket.socket, "accept", none_left)
    assert service.request("/healthz")[0] == 200
    assert pauses.count(bounded_http.BACK_OFF_S) == 5


def test_stopping_ends_what_is_open(service: Service) -> None:
    threads = threading.active_count()
    with socket.create_connection((service.host, service.port)) as client:
        client.sendall(b"G")
        assert service.request("/healthz")[0] == 200
        service.server.stop()
        deadline = time.monotonic() + 30
        while not is_ended(client) or threading.active_count() >= threads:
            assert time.monotonic() < deadline, "still open"


def http_server(service: Service) -> bounded_http.BoundedServer:
    server = service.server._http
    assert server is not None
    return server


def test_a_port_in_use_is_one_line_with_the_setting(service: Service) -> None:
    other = Server(ServerSettings(port=service.port), service.metrics.registry, lambda: service.health, dict)
    with pytest.raises(SettingsError) as raised:
        other.start()
    assert str(raised.value) == (
        f"server.port={service.port} cannot be listened on at server.host=127.0.0.1 (Address already in use); "
        "choose another port, or 0 for a free one"
    )


def test_a_host_that_is_not_ours_is_one_line_with_the_setting() -> None:
    server = Server(
        ServerSettings(host="192.0.2.1", port=0), Metrics().registry, lambda: Health("idle", True, True), dict
    )
    with pytest.raises(SettingsError, match=r"server.host=192.0.2.1"):
        server.start()


def test_stopping_releases_the_port_and_may_be_repeated(service: Service) -> None:
    service.server.stop()
    service.server.stop()
    again = Server(ServerSettings(port=service.port), service.metrics.registry, lambda: service.health, dict)
    assert again.start() == (service.host, service.port)
    again.stop()

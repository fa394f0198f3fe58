"""HTTP on threads of its own: `/metrics`, `/healthz`, `/readyz`, `/status` and a page for people at `/`.

It reads what callbacks return and never waits for a training step, and clients cannot exhaust it (`bounded_http`).
"""

import json
import logging
import math
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from html import escape
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from stream_trainer.errors import SettingsError
from stream_trainer.monitoring.bounded_http import REQUEST_S, BoundedServer
from stream_trainer.settings.schema import ServerSettings

logger = logging.getLogger(__name__)

STOP_POLL_S = 0.1  # how long `stop` may have to wait


@dataclass(frozen=True, slots=True)
class Health:
    """How the service is.

    Attributes:
        state: what it is doing, one of `metrics.State`.
        ok: whether it is alive; False has an orchestrator restart it.
        ready: whether it has begun its work: catching up, training or idle.
        detail: why it is not, for people.
    """

    state: str
    ok: bool
    ready: bool
    detail: str = ""


class Server:
    """Serves until `stop`. The callbacks run on the server's threads, so they must not block."""

    def __init__(
        self,
        settings: ServerSettings,
        registry: CollectorRegistry,
        health: Callable[[], Health],
        status: Callable[[], dict[str, Any]],
    ) -> None:
        self._settings = settings
        self._pages = _Pages(registry, health, status)
        self._http: _HttpServer | None = None

    def start(self) -> tuple[str, int]:
        """Listen, and return the host and port. Raises SettingsError if that address cannot be used."""
        host, port = self._settings.host, self._settings.port
        try:
            self._http = _HttpServer(host, port, self._pages)
        except OSError as error:
            raise SettingsError(listen_problem(self._settings, error)) from None
        threading.Thread(target=self._http.serve_forever, args=(STOP_POLL_S,), name="http", daemon=True).start()
        return host, self._http.server_address[1]

    def stop(self) -> None:
        """Release the port. Idempotent."""
        if self._http is not None:
            self._http.shutdown()
            self._http.server_close()
            self._http = None


def listen_problem(settings: ServerSettings, error: OSError) -> str:
    """The line for an address that cannot be listened on."""
    if isinstance(error, socket.gaierror):
        return f"server.host={settings.host} is no address of this machine; set it to 127.0.0.1 or 0.0.0.0"
    return (
        f"server.port={settings.port} cannot be listened on at server.host={settings.host} ({error.strerror}); "
        "choose another port, or 0 for a free one"
    )


@dataclass(frozen=True)
class _Response:
    status: int
    content_type: str
    body: bytes


@dataclass(frozen=True)
class _Pages:
    """What each path answers."""

    registry: CollectorRegistry
    health: Callable[[], Health]
    status: Callable[[], dict[str, Any]]

    def respond(self, path: str, accept: str) -> _Response:
        """The answer to GET `path`; `accept` is the request's header, which decides the format of the metrics."""
        match path:
            case "/metrics":
                encode, content_type = choose_encoder(accept)
                return _Response(200, content_type, encode(self.registry))
            case "/healthz":
                health = self.health()
                return _json(200 if health.ok else 503, {"ok": health.ok} | _reason(health))
            case "/readyz":
                health = self.health()
                return _json(200 if health.ready else 503, {"ready": health.ready} | _reason(health))
            case "/status":
                return _json(200, self.status())
            case "/":
                return _Response(200, "text/html; charset=utf-8", _page(self.status()).encode())
        return _Response(
            404, "text/plain; charset=utf-8", b"not found; there are / /status /healthz /readyz /metrics\n"
        )


def _reason(health: Health) -> dict[str, str]:
    return {"state": health.state, "detail": health.detail}


def _json(status: int, content: dict[str, Any]) -> _Response:
    return _Response(status, "application/json", json.dumps(_finite(content), default=str).encode() + b"\n")


def _finite(value: Any) -> Any:
    """JSON has no NaN or infinity; they become null."""
    if isinstance(value, dict):
        return {str(name): _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _page(status: dict[str, Any]) -> str:
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>\n" for name, text in _rows(status))
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta http-equiv="refresh" content="5"><title>Stream Trainer</title>
<style>body {{ font: 16px/1.5 system-ui; margin: 2em }} th {{ text-align: left; padding-right: 2em }}</style>
</head><body><h1>Stream Trainer</h1>
<table>
{rows}</table>
<p><a href="/status">status as JSON</a> <a href="/healthz">health</a> <a href="/metrics">metrics</a></p>
</body></html>
"""


def _rows(status: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Name and text of every value; nested ones under their dotted name."""
    for name, value in status.items():
        if isinstance(value, dict):
            yield from _rows(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", f"{value:.6g}" if isinstance(value, float) else str(value)


class _HttpServer(BoundedServer):
    # Not http.server.HTTPServer: that looks up its own host name while binding, which can hang on a bad resolver.
    def __init__(self, host: str, port: int, pages: _Pages) -> None:
        self.pages = pages
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), _Handler)


class _Handler(BaseHTTPRequestHandler):
    timeout = REQUEST_S
    server: _HttpServer

    def do_GET(self) -> None:
        self.server.header_is_complete(self.connection)
        self._send(self.server.pages.respond(urlsplit(self.path).path, self.headers.get("Accept", "")))

    do_HEAD = do_GET

    def handle(self) -> None:
        try:
            super().handle()
        except (ConnectionError, TimeoutError) as error:
            logger.debug("a client went away: %s", error)

    def finish(self) -> None:
        with suppress(OSError):  # what is left to send, and nobody there to take it
            super().finish()

    def _send(self, response: _Response) -> None:
        self.send_response(response.status)
        self.send_header("Content-Type", response.content_type)
        self.send_header("Content-Length", str(len(response.body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(response.body)

    def version_string(self) -> str:
        return "stream-trainer"

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug(format, *args)

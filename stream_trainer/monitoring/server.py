"""HTTP on threads of its own: `/metrics`, `/healthz`, `/readyz`, `/status` and a page for people at `/`.

It reads what callbacks return and never waits for a training step, and clients cannot exhaust it (`bounded_http`).
"""

import logging
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry

from stream_trainer.errors import SettingsError
from stream_trainer.monitoring.bounded_http import REQUEST_S, BoundedServer
from stream_trainer.monitoring.pages import Health, Pages, Response, Values, page_files
from stream_trainer.settings.schema import ServerSettings

logger = logging.getLogger(__name__)

STOP_POLL_S = 0.1  # how long `stop` may have to wait

# The page loads nothing from elsewhere, sends nothing anywhere, and stands in nobody's frame.
POLICY = (
    "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)


class Server:
    """Serves until `stop`. The callbacks run on the server's threads, so they must not block."""

    def __init__(
        self,
        settings: ServerSettings,
        registry: CollectorRegistry,
        health: Callable[[], Health],
        status: Callable[[], Values],
        history: Callable[[int], Values] = lambda _: {},
        panels: Callable[[], Values] = dict,
    ) -> None:
        self._settings = settings
        self._pages = Pages(registry, health, status, history, panels, page_files())
        self._http: HttpServer | None = None

    def start(self) -> tuple[str, int]:
        """Listen, and return the host and port. Raises SettingsError if that address cannot be used."""
        host, port = self._settings.host, self._settings.port
        self._http = listen("server", host, port, lambda: _PageServer(host, port, self._pages))
        return host, self._http.server_address[1]

    def stop(self) -> None:
        """Release the port. Idempotent."""
        if self._http is not None:
            self._http.stop()
            self._http = None


def listen_problem(section: str, host: str, port: int, error: OSError) -> str:
    """The line for an address of a section of the settings that cannot be listened on."""
    if isinstance(error, socket.gaierror):
        return f"{section}.host={host} is no address of this machine; set it to 127.0.0.1 or 0.0.0.0"
    return (
        f"{section}.port={port} cannot be listened on at {section}.host={host} ({error.strerror}); "
        "choose another port, or 0 for a free one"
    )


class HttpServer(BoundedServer):
    """Listens at a host, IPv4 or IPv6."""

    # Not http.server.HTTPServer: that looks up its own host name while binding, which can hang on a bad resolver.
    def __init__(self, host: str, port: int, handler: type["Handler"]) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), handler)

    def stop(self) -> None:
        """Serve no more, and release the port."""
        self.shutdown()
        self.server_close()


Listening = TypeVar("Listening", bound=HttpServer)


def listen(section: str, host: str, port: int, open_server: Callable[[], Listening]) -> Listening:
    """Open a server, and serve on a thread of its own.

    Raises SettingsError if the address, that of a section of the settings, cannot be listened on.
    """
    try:
        server = open_server()
    except OSError as error:
        raise SettingsError(listen_problem(section, host, port, error)) from None
    threading.Thread(target=server.serve_forever, args=(STOP_POLL_S,), name=section, daemon=True).start()
    return server


class Handler(BaseHTTPRequestHandler):
    """What all requests have in common: limits, headers, and a log that only `DEBUG` shows."""

    timeout = REQUEST_S
    server: HttpServer

    def handle(self) -> None:
        try:
            super().handle()
        except (ConnectionError, TimeoutError) as error:
            logger.debug("a client went away: %s", error)

    def finish(self) -> None:
        with suppress(OSError):  # what is left to send, and nobody there to take it
            super().finish()

    def send(self, response: Response, **headers: str) -> None:
        """Send a response; `headers` are those beyond the usual ones."""
        self.send_response(response.status)
        self.send_header("Content-Type", response.content_type)
        self.send_header("Content-Length", str(len(response.body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("Referrer-Policy", "no-referrer")
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(response.body)

    def version_string(self) -> str:
        return "stream-trainer"

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug(format, *args)


class _PageServer(HttpServer):
    def __init__(self, host: str, port: int, pages: Pages) -> None:
        self.pages = pages
        super().__init__(host, port, _PageHandler)


class _PageHandler(Handler):
    server: _PageServer

    def do_GET(self) -> None:
        self.server.header_is_complete(self.connection)
        self.send(self.server.pages.respond(self.path, self.headers.get("Accept", "")))

    do_HEAD = do_GET

"""A server of TCP connections that no client can exhaust: so many connections at once, so long for each, no more.

Whoever connects to a full server takes the place of the connection that is open longest: a probe takes milliseconds,
so what is open longest waits for nothing good.
"""

import errno
import logging
import socket
import threading
import time
from contextlib import suppress
from socketserver import BaseRequestHandler, ThreadingTCPServer
from typing import Any

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 32
MAX_THREADS = 2 * MAX_CONNECTIONS  # those that were dropped may take a moment to end
HEADER_S = 5.0  # from the connection's beginning to the end of the request's header
REQUEST_S = 10.0  # for a connection, from its beginning to its end
BACKLOG = 128
BACK_OFF_S = 0.2  # where the process has no descriptor left, the waiting connection would be tried again without end


class Connection:
    """One that is open. Times are those of `time.monotonic()`."""

    def __init__(self) -> None:
        self.opened = time.monotonic()
        self.header_is_complete = False
        self.dropped = False

    def expired(self, now: float) -> bool:
        return now - self.opened > (REQUEST_S if self.header_is_complete else HEADER_S)


class BoundedServer(ThreadingTCPServer):
    """A thread for each connection, within the limits above. Handlers tell `header_is_complete`."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = BACKLOG

    def __init__(self, address: tuple[str, int], handler: type[BaseRequestHandler]) -> None:
        self._lock = threading.Lock()
        self._open: dict[Any, Connection] = {}
        super().__init__(address, handler)

    @property
    def connections(self) -> int:
        """How many are open."""
        return len(self._open)

    def header_is_complete(self, request: Any) -> None:
        """Grant the connection the time that an answer takes."""
        with self._lock:
            if request in self._open:
                self._open[request].header_is_complete = True

    def get_request(self) -> tuple[Any, Any]:
        try:
            return super().get_request()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                self._drop_oldest(0)  # all: their descriptors are what is missing
                time.sleep(BACK_OFF_S)
            raise

    def verify_request(self, request: Any, client_address: Any) -> bool:  # noqa: ARG002
        self._drop_oldest(MAX_CONNECTIONS - 1)
        return len(self._open) < MAX_THREADS

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self._open[request] = Connection()
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:  # so that nobody drops a descriptor that is by now another one's
            self._open.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Called several times a second: end what has taken too long."""
        now = time.monotonic()
        with self._lock:
            for request, connection in self._open.items():
                if connection.expired(now):
                    _drop(request, connection)

    def server_close(self) -> None:
        super().server_close()
        with self._lock:
            for request, connection in self._open.items():
                _drop(request, connection)

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        logger.warning("a request from %s failed", client_address, exc_info=True)

    def _drop_oldest(self, allowed: int) -> None:
        """End the oldest connections until `allowed` are left, not counting those that were told to end."""
        with self._lock:
            living = [item for item in self._open.items() if not item[1].dropped]
            for request, connection in living[: max(0, len(living) - allowed)]:
                _drop(request, connection)


def _drop(request: Any, connection: Connection) -> None:
    """Wake the connection's thread: its next read or write ends at once, and with it the thread."""
    connection.dropped = True
    with suppress(OSError):  # the client was faster
        request.shutdown(socket.SHUT_RDWR)

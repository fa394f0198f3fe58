"""A small Schema Registry of the tests' own: its HTTP interface as far as readers use it."""

import base64
import json
import ssl
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass
class SmallRegistry:
    """Schemas by number and by subject.

    Attributes:
        credentials: `user:password` that is asked for; None if anybody may ask.
        answer: an HTTP status that every request gets, with a body that is no registry's; 0 for real answers.
        requests: paths that were asked for.
    """

    credentials: str | None = None
    answer: int = 0
    url: str = ""
    requests: list[str] = field(default_factory=list)
    _schemas: dict[int, dict[str, Any]] = field(default_factory=dict)

    def register(
        self, kind: str, text: str, subject: str = "s", references: tuple[tuple[str, str, int], ...] = ()
    ) -> int:
        """A number for a schema. A text of Protobuf is its serialized descriptor, in base64."""
        number = len(self._schemas) + 1
        version = 1 + sum(schema["subject"] == subject for schema in self._schemas.values())
        named = [{"name": name, "subject": of, "version": at} for name, of, at in references]
        self._schemas[number] = {
            **{"id": number, "guid": str(uuid.UUID(int=number)), "subject": subject, "version": version},
            **{"schema": text, "schemaType": kind, "references": named},
        }
        return number

    def find(self, path: str) -> tuple[int, dict[str, Any]]:
        """Status and body."""
        parts = [unquote(part) for part in urlsplit(path).path.strip("/").split("/")]
        asked = parse_qs(urlsplit(path).query)
        match parts:
            case ["schemas", "ids", number]:
                found = self._schemas.get(int(number))
            case ["schemas", "guids", guid]:
                found = next((schema for schema in self._schemas.values() if schema["guid"] == guid), None)
            case ["subjects", subject, "versions", version]:
                wanted = (subject, int(version))
                found = next((s for s in self._schemas.values() if (s["subject"], s["version"]) == wanted), None)
            case _:
                return 404, {"error": "no such page"}
        if found is None:
            return 404, {"error_code": 40403, "message": "Schema not found"}
        if found["schemaType"] == "PROTOBUF" and asked.get("format") != ["serialized"]:
            return 200, found | {"schema": 'syntax = "proto3";'}
        return 200, found


def handler_of(registry: SmallRegistry) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            registry.requests.append(self.path)
            expected = registry.credentials and base64.b64encode(registry.credentials.encode()).decode()
            if registry.answer:
                self._send(registry.answer, b"<html>busy</html>")
            elif expected and self.headers.get("Authorization") != f"Basic {expected}":
                self._send(401, b'{"error_code": 40101, "message": "Unauthorized"}')
            else:
                status, body = registry.find(self.path)
                self._send(status, json.dumps(body).encode())

        def _send(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    return Handler


@contextmanager
def serving(registry: SmallRegistry, port: int = 0, certificate: Path | None = None) -> Iterator[SmallRegistry]:
    """The registry on a port of this machine; with TLS if a PEM file of certificate and key is given."""
    server = ThreadingHTTPServer(("127.0.0.1", port), handler_of(registry))
    server.daemon_threads = True
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    scheme = "http" if certificate is None else "https"
    registry.url = f"{scheme}://localhost:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield registry
    finally:
        server.shutdown()
        thread.join()
        server.server_close()

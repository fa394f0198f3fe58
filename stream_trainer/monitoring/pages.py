"""What each path of the HTTP server answers. Nothing here waits: callbacks return what is ready."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

PAGE = Path(__file__).parent / "page"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}

Values = dict[str, Any]


class Condition(StrEnum):
    """How a service is, in one word."""

    STARTING = "starting"  # it has not begun its work
    HEALTHY = "healthy"
    DEGRADED = "degraded"  # it goes on although something fails, and recovers by itself
    STUCK = "stuck"  # nothing comes of it: it hangs, or has failed


@dataclass(frozen=True, slots=True)
class Health:
    """How the service is.

    Attributes:
        state: what it is doing, one of `metrics.State`.
        ok: whether it is alive; False has an orchestrator restart it.
        ready: whether it has begun its work: catching up, training or idle.
        detail: why it is not, for people.
        health: all of that in one word.
    """

    state: str
    ok: bool
    ready: bool
    detail: str = ""
    health: Condition = Condition.HEALTHY


@dataclass(frozen=True)
class Response:
    """What goes back to a client."""

    status: int
    content_type: str
    body: bytes


@dataclass(frozen=True)
class Pages:
    """The answers to GET.

    Attributes:
        status: the report of the service, small enough for scripts.
        history: what the charts show, from a number on.
        panels: what else the page shows.
        files: of the page, by path.
    """

    registry: CollectorRegistry
    health: Callable[[], Health]
    status: Callable[[], Values]
    history: Callable[[int], Values]
    panels: Callable[[], Values]
    files: Mapping[str, Response]

    def respond(self, target: str, accept: str) -> Response:
        """The answer to GET; `accept` is the request's header, which decides the format of the metrics."""
        path = urlsplit(target).path
        match path:
            case "/metrics":
                encode, content_type = choose_encoder(accept)
                return Response(200, content_type, encode(self.registry))
            case "/healthz":
                health = self.health()
                return json_response(200 if health.ok else 503, {"ok": health.ok} | _reason(health))
            case "/readyz":
                health = self.health()
                return json_response(200 if health.ready else 503, {"ready": health.ready} | _reason(health))
            case "/status":
                return json_response(200, self.status())
            case "/history":
                return json_response(200, self.history(_since(target)))
            case "/panels":
                return json_response(200, self.panels())
        return self.files.get(path) or text_response(
            404, "not found; there are / /status /healthz /readyz /metrics /history /panels"
        )


def page_files() -> dict[str, Response]:
    """The files of the page, read once: no request names a file."""
    found = {f"/{path.name}": path for path in PAGE.iterdir() if path.suffix in TYPES}
    found["/"] = PAGE / "index.html"
    return {
        name: Response(200, f"{TYPES[path.suffix]}; charset=utf-8", path.read_bytes()) for name, path in found.items()
    }


def json_response(status: int, content: Values) -> Response:
    """Values as JSON."""
    return Response(status, "application/json", json.dumps(_finite(content), default=str).encode() + b"\n")


def text_response(status: int, text: str) -> Response:
    """A line for people."""
    return Response(status, "text/plain; charset=utf-8", text.encode() + b"\n")


def _since(target: str) -> int:
    given = parse_qs(urlsplit(target).query).get("since", ["0"])[0]
    return int(given) if given.isascii() and given.isdigit() and len(given) < 16 else 0


def _reason(health: Health) -> dict[str, str]:
    return {"health": health.health.value, "state": health.state, "detail": health.detail}


def _finite(value: Any) -> Any:
    """JSON has no NaN or infinity; they become null."""
    if isinstance(value, dict):
        return {str(name): _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

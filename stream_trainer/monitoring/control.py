"""The address that takes orders. Every request must bring the token, and is answered soon, obeyed or not.

POST /pause, /resume, /checkpoint, /reload-target: 200 once it is done, 409 with the reason if it is refused, 202 with
its number if the step takes longer. GET /orders/NUMBER tells what came of it, GET /status what the service does.
"""

import hmac
import ipaddress
import logging
import re
import time
from collections.abc import Callable
from urllib.parse import urlsplit

from stream_trainer.errors import SettingsError
from stream_trainer.monitoring.orders import ACTIONS, Order, Orders, Outcome
from stream_trainer.monitoring.pages import Response, Values, json_response, text_response
from stream_trainer.monitoring.server import Handler, HttpServer, listen
from stream_trainer.settings.secrets import read_secret
from stream_trainer.settings.sections.control import TOKEN, TOKEN_RULE, ControlSettings

WAIT_S = 5.0  # for an order to be obeyed; half of what a connection has
WARN_EVERY_S = 60.0
STATUS = {Outcome.DONE: 200, Outcome.WAITING: 202, Outcome.REFUSED: 409}

logger = logging.getLogger(__name__)


class ControlServer:
    """Takes orders until `stop`."""

    def __init__(self, settings: ControlSettings, orders: Orders, status: Callable[[], Values]) -> None:
        """Raises SettingsError if the token's file cannot be used."""
        self._settings = settings
        self._desk = Desk(token_of(settings), orders, status)
        self._http: _Server | None = None

    def start(self) -> tuple[str, int]:
        """Listen, and return the host and port. Raises SettingsError if that address cannot be used."""
        host, port = self._settings.host, self._settings.port
        if not is_loopback(host):
            logger.warning("control.host=%s: the token travels unencrypted there; put TLS in front of it", host)
        self._http = listen("control", host, port, lambda: _Server(host, port, self._desk))
        return host, self._http.server_address[1]

    def stop(self) -> None:
        """Release the port. Idempotent."""
        if self._http is not None:
            self._http.stop()
            self._http = None


class Desk:
    """Who may give orders, and what is answered."""

    def __init__(self, token: str, orders: Orders, status: Callable[[], Values]) -> None:
        self._token = f"Bearer {token}".encode()
        self._orders = orders
        self._status = status
        self._warn_at = 0.0

    def admits(self, authorization: str, client: str) -> bool:
        """Whether a request brings the token; how long the comparison takes tells nothing of it."""
        if hmac.compare_digest(authorization.encode("utf-8", "surrogateescape"), self._token):
            return True
        if time.monotonic() >= self._warn_at:
            self._warn_at = time.monotonic() + WARN_EVERY_S
            logger.warning("an order from %s without the token is refused", client)
        return False

    def get(self, target: str) -> Response:
        """The answer to GET."""
        path = urlsplit(target).path
        if path == "/status":
            return json_response(200, self._status())
        number = re.fullmatch(r"/orders/([0-9]{1,12})", path)
        order = None if number is None else self._orders.find(int(number[1]))
        return text_response(404, "not found; there are /status and /orders/NUMBER") if order is None else _told(order)

    def post(self, target: str) -> Response:
        """The answer to POST; waits a little for the order to be obeyed."""
        action = urlsplit(target).path.removeprefix("/")
        if action not in ACTIONS:
            return text_response(404, f"not found; there are {' '.join(f'/{name}' for name in ACTIONS)}")
        order = self._orders.give(action)
        if order is None:
            return text_response(503, "too many orders wait already; try again later")
        order.wait(WAIT_S)
        return _told(order)


def token_of(settings: ControlSettings) -> str:
    """The token. Raises SettingsError if there is none, or its file does not hold one."""
    if settings.token is not None:
        return settings.token.get_secret_value()
    if settings.token_file is None:
        raise SettingsError("control.token is unset; set STREAM_TRAINER_CONTROL__TOKEN")
    token = read_secret("control.token_file", settings.token_file)
    if not TOKEN.fullmatch(token):
        raise SettingsError(f"control.token_file={settings.token_file} {TOKEN_RULE}; write the token alone into it")
    return token


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _told(order: Order) -> Response:
    outcome = order.outcome
    content = {"order": order.number, "action": order.action, "outcome": outcome.value, "detail": order.detail}
    return json_response(STATUS[outcome], content)


class _Server(HttpServer):
    def __init__(self, host: str, port: int, desk: Desk) -> None:
        self.desk = desk
        super().__init__(host, port, _Handler)


class _Handler(Handler):
    server: _Server

    def do_GET(self) -> None:
        self._answer(self.server.desk.get)

    def do_POST(self) -> None:
        self._answer(self.server.desk.post)

    def _answer(self, find: Callable[[str], Response]) -> None:
        self.server.header_is_complete(self.connection)
        if self.server.desk.admits(self.headers.get("Authorization", ""), self.client_address[0]):
            self.send(find(self.path))
        else:
            self.send(
                text_response(401, "this needs the token: Authorization: Bearer TOKEN"), WWW_Authenticate="Bearer"
            )

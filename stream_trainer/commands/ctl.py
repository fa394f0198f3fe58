"""`stream-trainer ctl`: pause, resume, checkpoint, reload the target, or ask, at the address that takes orders."""

import argparse
import http.client
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from pydantic import SecretStr, ValidationError

from stream_trainer.errors import ControlError, SettingsError
from stream_trainer.monitoring.control import is_loopback, token_of
from stream_trainer.monitoring.orders import ACTIONS
from stream_trainer.settings.loading import CONFIG_VARIABLE, load_settings
from stream_trainer.settings.schema import ENVIRONMENT_PREFIX
from stream_trainer.settings.sections.control import ControlSettings

TIMEOUT_S = 30.0
ASK_EVERY_S = 0.5

EXAMPLES = """\
The token comes from the settings, or without a settings file from STREAM_TRAINER_CONTROL__TOKEN or
STREAM_TRAINER_CONTROL__TOKEN_FILE.

examples:
  stream-trainer ctl pause --config stream-trainer.yaml
  stream-trainer ctl reload-target --url http://127.0.0.1:9465
  stream-trainer ctl status
"""


@dataclass(frozen=True)
class Address:
    """Where orders go, and the token they need."""

    url: str
    token: str

    def ask(self, method: str, path: str) -> tuple[int, str]:
        """Status and body. Follows no redirect and uses no proxy: the token goes there or nowhere.

        Raises ControlError if nobody answers.
        """
        parts = urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.hostname or "", parts.port, timeout=TIMEOUT_S)
        try:
            connection.request(method, parts.path.rstrip("/") + path, headers={"Authorization": f"Bearer {self.token}"})
            response = connection.getresponse()
            return response.status, response.read().decode("utf-8", "replace")
        except (OSError, http.client.HTTPException) as error:
            why = str(error) or type(error).__name__
            raise ControlError(
                f"{self.url} does not answer ({why}); is control.enabled set, and --url right?"
            ) from None
        finally:
            connection.close()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument(
        "action", choices=(*ACTIONS, "status"), metavar="ACTION", help=f"{', '.join(ACTIONS)} or status"
    )
    parser.add_argument("--url", metavar="URL", help="address of the trainer; else that of the settings")
    parser.add_argument("--wait", type=float, default=60.0, metavar="S", help="seconds to wait for the step (60)")


def run(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Give an order and say what came of it. Raises ControlError if it is refused, or not obeyed in time."""
    settings = _settings(args, overrides)
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    address = Address(args.url or f"http://{host}:{settings.port}", token_of(settings))
    if urlsplit(address.url).scheme != "https" and not is_loopback(urlsplit(address.url).hostname or ""):
        print(f"warning: the token travels unencrypted to {address.url}", file=sys.stderr)
    if args.action == "status":
        print(json.dumps(_understood(*address.ask("GET", "/status")), indent=2))
        return 0
    found = _understood(*address.ask("POST", f"/{args.action}"))
    deadline = time.monotonic() + args.wait
    while found["outcome"] == "waiting":
        if time.monotonic() >= deadline:
            raise ControlError(f"{args.action} still waits for the end of the step; it will be obeyed then")
        time.sleep(ASK_EVERY_S)
        found = _understood(*address.ask("GET", f"/orders/{found['order']}"))
    if found["outcome"] == "refused":
        raise ControlError(f"{args.action} is refused: {found['detail']}")
    print(f"{args.action}: {found['detail']}")
    return 0


def _understood(status: int, body: str) -> dict[str, Any]:
    if status == 401:
        raise ControlError("the token is not the trainer's; set STREAM_TRAINER_CONTROL__TOKEN to that")
    if status not in (200, 202, 409):
        raise ControlError(f"the trainer answered {status}: {body.strip()[:200]}")
    try:
        found: dict[str, Any] = json.loads(body)
    except ValueError:
        raise ControlError("what answered is no trainer; check --url") from None
    return found


def _settings(args: argparse.Namespace, overrides: Sequence[str]) -> ControlSettings:
    """From the settings, or from the environment alone where no file is named."""
    if args.config is not None or os.environ.get(CONFIG_VARIABLE) or overrides:
        return load_settings(args.config, overrides).control
    given: dict[str, Any] = {
        name: value
        for name in ControlSettings.model_fields
        if (value := os.environ.get(f"{ENVIRONMENT_PREFIX}CONTROL__{name.upper()}")) is not None
    }
    if "token" in given:
        given["token"] = SecretStr(given["token"])
    try:
        return ControlSettings(**given | {"enabled": True})
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        raise SettingsError(f"control: {first['msg'].removeprefix('Value error, ')}") from None

"""What follows when a version becomes the current one: copies elsewhere, and servers and commands that are told."""

import json
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from stream_trainer.models.refusals import first_line
from stream_trainer.publishing.held import HeldFiles
from stream_trainer.publishing.making import ADAPTER_DIRECTORY
from stream_trainer.publishing.stores import StoreError, hub_uploader, open_store, upload, upload_current
from stream_trainer.publishing.versions import ABOUT
from stream_trainer.settings.sections.publish import PublishSettings, VllmSettings

Hook = Callable[[Path], None]
"""Called with the directory of a version. Raises HookError or StoreError."""

UPLOAD = "publish.upload"
FAILURES = (StoreError, OSError)


class HookError(OSError):
    """A server or a command refused; one line."""


def make_hooks(settings: PublishSettings) -> dict[str, Hook]:
    """All hooks by their stage (`metrics.PUBLISH_STAGES`), copies first. Raises SettingsError."""
    hooks: dict[str, Hook] = {}
    if settings.upload is not None:
        open_store(UPLOAD, settings.upload)  # for a package that is missing
        hooks["upload"] = partial(_upload, settings.upload)
    if settings.hub is not None:
        hooks["hub"] = hub_uploader(settings.hub)
    return hooks | telling_hooks(settings)


def telling_hooks(settings: PublishSettings) -> dict[str, Hook]:
    """Those that only tell others of the current version: also after somebody has moved it."""
    hooks: dict[str, Hook] = {}
    if settings.vllm is not None:
        hooks["vllm"] = partial(_load_adapter, settings.vllm, settings.hook_timeout_s)
    if settings.command:
        hooks["command"] = partial(_run, settings.command, settings.hook_timeout_s)
    return hooks


def _upload(url: str, path: Path) -> None:
    with HeldFiles(path) as files:
        upload(UPLOAD, url, path.name, files, last=ABOUT)
    upload_current(UPLOAD, url, path.name)


def _run(command: Sequence[str], timeout_s: float, path: Path) -> None:
    """The words as they are, without a shell. What it prints goes to the service's own log."""
    words = [word.replace("{path}", str(path)).replace("{version}", path.name) for word in command]
    try:
        done = subprocess.run(words, stdin=subprocess.DEVNULL, timeout=timeout_s, check=False)  # noqa: S603
    except subprocess.TimeoutExpired:
        raise HookError(f"publish.command: {words[0]} took longer than publish.hook_timeout_s={timeout_s:g}") from None
    except OSError as error:
        raise HookError(f"publish.command: {words[0]} cannot be run ({error.strerror})") from error
    if done.returncode != 0:
        raise HookError(f"publish.command: {words[0]} ended with exit code {done.returncode}")


def _load_adapter(settings: VllmSettings, timeout_s: float, path: Path) -> None:
    """Put the adapter in the place of the one before. Servers that cannot do that at once unload it first."""
    load = {"lora_name": settings.name, "lora_path": str(path / ADAPTER_DIRECTORY), "load_inplace": True}
    try:
        _post(settings, "/v1/load_lora_adapter", load, timeout_s)
    except HookError as error:
        if "already" not in str(error):
            raise
        _post(settings, "/v1/unload_lora_adapter", {"lora_name": settings.name}, timeout_s)
        _post(settings, "/v1/load_lora_adapter", load, timeout_s)


def _post(settings: VllmSettings, page: str, content: Mapping[str, object], timeout_s: float) -> None:
    headers = {"Content-Type": "application/json"}
    if settings.api_key is not None:
        headers["Authorization"] = f"Bearer {settings.api_key.get_secret_value()}"
    address = f"{settings.url.rstrip('/')}{page}"
    request = urllib.request.Request(address, json.dumps(content).encode(), headers)  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:  # noqa: S310
            answer.read()
    except urllib.error.HTTPError as error:
        with error:
            said = " ".join(error.read(1000).decode(errors="replace").split())
        raise HookError(f"publish.vllm.url={settings.url}: {page} answered {error.code}: {said}") from error
    except (OSError, ValueError) as error:
        raise HookError(f"publish.vllm.url={settings.url}: {page} failed ({first_line(error)})") from error

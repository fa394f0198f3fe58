"""A headless Chromium, driven over its own protocol: open a page, click, ask, and take pictures."""

import base64
import json
import os
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
LONG_S = 120.0


class Page:
    """One tab.

    Attributes:
        problems: what the console reported as an error or a warning, exceptions and refused loads included.
    """

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._number = 0
        self.problems: list[str] = []
        for domain in ("Runtime", "Log", "Page", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol; what happens meanwhile is noted."""
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            message: dict[str, Any] = json.loads(self._socket.recv(timeout=LONG_S))
            self._note(message)
            if message.get("id") == self._number:
                assert "error" not in message, message
                result: dict[str, Any] = message["result"]
                return result

    def _note(self, message: dict[str, Any]) -> None:
        details = message.get("params", {})
        match message.get("method"):
            case "Runtime.exceptionThrown":
                self.problems.append(json.dumps(details["exceptionDetails"]))
            case "Runtime.consoleAPICalled" if details["type"] in ("error", "warning", "assert"):
                self.problems.append(json.dumps(details["args"]))
            case "Log.entryAdded" if details["entry"]["level"] in ("error", "warning"):
                self.problems.append(json.dumps(details["entry"]))

    def show(self, url: str, width: int, *, dark: bool) -> None:
        """Open an address in a window of some width, in light or dark."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=url)

    def ask(self, expression: str) -> Any:
        """The value of an expression of JavaScript."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, userGesture=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait_for(self, expression: str) -> None:
        """Until it is true."""
        deadline = time.monotonic() + LONG_S
        while not self.ask(f"Boolean({expression})"):
            assert time.monotonic() < deadline, f"waited in vain for {expression}: {self.problems}"
            time.sleep(0.1)

    def picture(self, path: Path, height: int | None = None) -> None:
        """The whole page, or its beginning, as a PNG or JPEG."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": height or size["height"], "scale": 1}
        kind = "png" if path.suffix == ".png" else "jpeg"
        options: dict[str, Any] = {} if kind == "png" else {"quality": 80}
        shot = self.call("Page.captureScreenshot", format=kind, clip=clip, captureBeyondViewport=True, **options)
        path.write_bytes(base64.b64decode(shot["data"]))


@contextmanager
def browser(folder: Path) -> Iterator[Page]:
    """A browser with one tab and a profile of its own below `folder`."""
    options = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--hide-scrollbars",
    ]
    options += ["--remote-debugging-port=0", f"--user-data-dir={folder}", "--disable-background-networking"]
    process = subprocess.Popen(
        [BROWSER, *options, "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"HOME": str(folder)},
    )
    try:
        with connect(_address(folder), max_size=None, compression=None) as socket:
            yield Page(socket)
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _address(folder: Path) -> str:
    """Of the tab's socket, as soon as the browser has one."""
    deadline = time.monotonic() + LONG_S
    while True:
        assert time.monotonic() < deadline, "the browser does not start"
        time.sleep(0.1)
        try:
            port = (folder / "DevToolsActivePort").read_text().splitlines()[0]
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=LONG_S) as answer:
                tabs = [tab for tab in json.load(answer) if tab["type"] == "page"]
        except (OSError, IndexError):
            continue
        if tabs:
            address: str = tabs[0]["webSocketDebuggerUrl"]
            return address

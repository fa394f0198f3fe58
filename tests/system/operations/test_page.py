"""The page in a real browser, fed by a real run: every panel shown and clicked, nothing wrong on the console."""

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.browser import BROWSER, Page, browser
from tests.helpers.service import ALL_ON, WORDS, configuration, get, jsonl, on_free_port, serving, wait_for, write_lines

needs_browser = pytest.mark.skipif(not BROWSER, reason="no Chromium on the PATH")

CHARTS = ("losses", "training", "speed", "lag", "ratio")
PANELS = ("overview", *CHARTS, "pool", "layers", "mask", "arms", "mix", "time", "events")
PICTURES = os.environ.get("STREAM_TRAINER_TEST_PICTURES")
"""Where to keep the pictures, for a person to look at."""


def record(number: int) -> bytes:
    """Of one of three kinds; every fifth says the same."""
    generator = random.Random(number)
    words = [generator.choice(WORDS) for _ in range(6)] if number % 5 else list(WORDS[:6])
    values = {"id": f"r{number}", "text": " ".join(words), "domain": ("news", "code", "<b>chat</b>")[number % 3]}
    return json.dumps(values).encode()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A run with everything on, some steps old, that waits for more."""
    folder = tmp_path_factory.mktemp("page")
    write_lines(folder / "in.jsonl", [record(number) for number in range(400)])
    write_lines(folder / "kept.jsonl", [record(number) for number in range(1000, 1004)])
    config = on_free_port(
        configuration(
            folder,
            jsonl(folder / "in.jsonl", follow=True),
            selection=ALL_ON,
            buffer={"wait_s": 0.1},
            evaluation={"every_steps": 5, "retention_path": str(folder / "kept.jsonl")},
        )
    )
    config["server"]["show_text"] = True
    with serving(config):
        wait_for(lambda: '"lag": 0.0' in get(config, "/status")[1])
        yield config


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("browser")) as page:
        yield page


@needs_browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_every_panel_is_there_and_can_be_clicked(width: int, dark: bool, run: dict[str, Any], page: Page) -> None:
    page.show(f"http://127.0.0.1:{run['server']['port']}/", width, dark=dark)
    page.wait_for("document.querySelector('#events li')")
    visible = page.ask("[...document.querySelectorAll('section')].filter((one) => !one.hidden).map((one) => one.id)")
    assert visible == list(PANELS)
    assert page.ask("[...document.querySelectorAll('section')].every((one) => one.hidden || one.offsetHeight > 40)")
    assert page.ask("document.querySelectorAll('.chart canvas').length") == len(CHARTS)
    assert page.ask("document.documentElement.scrollWidth") <= width
    for what in ("h2", "#candidates th", ".tabs button:last-child", "summary", *2 * [".u-series:not(:first-child) th"]):
        page.ask(f"document.querySelectorAll('{what}').forEach((one) => one.click())")
    assert page.ask("document.querySelectorAll('.u-legend .u-off').length") == 0
    page.wait_for("document.querySelector('#arm-list details').open")
    page.wait_for("document.querySelector('.tabs button:last-child').ariaSelected == 'true'")
    text = page.ask("document.body.innerText")
    assert "<b>chat</b>" in text, "what a producer writes is text"
    assert "NaN" not in text
    assert "undefined" not in text
    background = page.ask("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(15, 19, 25)" if dark else "rgb(246, 247, 249)")
    assert page.problems == []
    if PICTURES:
        page.picture(Path(PICTURES) / f"page-{width}-{'dark' if dark else 'light'}.png")


@needs_browser
def test_the_page_says_so_when_the_service_is_gone_and_when_it_is_back(run: dict[str, Any], page: Page) -> None:
    page.show(f"http://127.0.0.1:{run['server']['port']}/", 1280, dark=False)
    page.wait_for("document.querySelector('#badge')?.textContent == 'idle'")
    page.ask("window.ask = window.fetch")
    page.ask("window.fetch = (path) => (window.away ? Promise.reject(new Error('away')) : window.ask(path)); 0")
    page.ask("window.away = true")
    page.wait_for("document.querySelector('#badge').textContent == 'not reachable'")
    page.ask("window.away = false")
    page.wait_for("document.querySelector('#badge').textContent == 'idle'")
    assert page.problems == []

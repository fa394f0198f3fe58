"""Whoever asks how a run is gets an answer, whatever the run is doing."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from stream_trainer.training.faults.steps import Steps
from tests.helpers.service import (
    configuration,
    get,
    goods,
    jsonl,
    metrics,
    on_free_port,
    serving,
    wait_for,
    write_lines,
)

PAGES = ("/metrics", "/healthz", "/readyz", "/status", "/panels", "/history", "/")


def test_everything_answers_while_a_step_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No page waits for the step: with one that does, this would wait for ever."""
    hangs, goes_on, make = threading.Event(), threading.Event(), Steps.make

    def hanging(steps: Steps, drawn: Any, step: int, *rest: Any, **options: Any) -> Any:
        if step == 3:
            hangs.set()
            assert goes_on.wait(240)
        return make(steps, drawn, step, *rest, **options)

    monkeypatch.setattr(Steps, "make", hanging)
    write_lines(tmp_path / "samples.jsonl", goods(80))
    source = jsonl(tmp_path / "samples.jsonl")
    config = on_free_port(configuration(tmp_path, source, buffer={"wait_s": 0.0}))
    config["server"]["stall_s"] = 0.2
    with serving(config) as ended:
        try:
            assert hangs.wait(240)
            wait_for(lambda: get(config, "/healthz")[0] == 503)
            answers = {page: get(config, page) for page in PAGES}
            assert metrics(config)['steps_total{result="applied"}'] == 2
        finally:
            goes_on.set()
        wait_for(lambda: bool(ended))
    assert {page: status for page, (status, _) in answers.items() if page != "/healthz"} == dict.fromkeys(
        (page for page in PAGES if page != "/healthz"), 200
    )
    health = json.loads(answers["/healthz"][1])
    assert health["health"] == "stuck"
    assert health["detail"].startswith("no progress for")
    assert ended[0].step == 10

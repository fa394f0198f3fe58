"""Orders to a run that works: they take effect between steps, and change nothing but what they say."""

import json
import math
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from stream_trainer.checkpoints.fingerprint import digest_of_file
from stream_trainer.demo.broker import free_port
from stream_trainer.records import Sample
from stream_trainer.service import Summary, serve
from stream_trainer.settings.schema import Settings
from stream_trainer.training.control import watched
from stream_trainer.training.step import StepReport
from stream_trainer.training.watchers import Watcher
from tests.helpers.service import (
    ALL_ON,
    LONG_S,
    Step,
    checkpoints,
    configuration,
    get,
    good,
    goods,
    hashes,
    jsonl,
    metrics,
    on_free_port,
    serve_until,
    serving,
    step_of,
    trainer_json,
    wait_for,
    write_lines,
)

TOKEN = "a-token-that-nobody-guesses"
NEW_TARGET = [json.dumps({"text": f"another target {number}"}).encode() for number in range(3)]


@dataclass
class Orders:
    """Gives orders to a run."""

    port: int

    def ask(self, method: str, path: str) -> tuple[int, dict[str, Any]]:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", method=method)
        request.add_header("Authorization", f"Bearer {TOKEN}")
        try:
            with urllib.request.urlopen(request, timeout=LONG_S) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            with error:
                body = error.read().decode()
            return error.code, json.loads(body) if body.startswith("{") else {}

    def give(self, action: str) -> dict[str, Any]:
        """Until it is settled."""
        _, found = self.ask("POST", f"/{action}")
        wait_for(lambda: self.ask("GET", f"/orders/{found['order']}")[1]["outcome"] != "waiting")
        return self.ask("GET", f"/orders/{found['order']}")[1]


@dataclass
class Run:
    """What came of a run."""

    steps: list[Step] = field(default_factory=list)
    events: list[tuple[int, str]] = field(default_factory=list)
    evaluations: list[tuple[int, float]] = field(default_factory=list)
    summary: Summary | None = None


def serve_with(config: dict[str, Any], at: int, then: Callable[[Orders], None]) -> Run:
    """Run to the end of the stream; after step `at` another thread does `then`, whose first order is waited for."""
    orders, run, failures = Orders(config["control"]["port"]), Run(), list[BaseException]()

    def work() -> None:
        try:
            then(orders)
        except BaseException as error:
            failures.append(error)
            orders.give("resume")

    thread = threading.Thread(target=work)

    def on_step(number: int, pool: Sequence[Sample], report: StepReport) -> None:
        run.steps.append(step_of(number, pool, report))
        if number == at:
            thread.start()
            wait_for(lambda: orders.ask("GET", "/orders/1")[0] != 404)

    watcher = Watcher(
        on_step,
        on_evaluation=lambda step, losses, _: run.evaluations.append((step, losses["target"])),
        on_event=lambda step, kind, _: run.events.append((step, kind)),
    )
    run.summary = serve(Settings(**config), threading.Event(), watcher)
    thread.join(LONG_S)
    assert not failures, failures
    return run


def controlled(folder: Path, **sections: Any) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    write_lines(folder / "in.jsonl", goods(80))
    control = {"enabled": True, "port": free_port(), "token": TOKEN}
    return on_free_port(configuration(folder, jsonl(folder / "in.jsonl"), **sections, control=control))


def test_a_run_that_was_paused_is_bit_for_bit_the_one_that_was_not(tmp_path: Path) -> None:
    plain = controlled(tmp_path / "plain", selection=ALL_ON)
    _, steps = serve_until(plain)
    config = controlled(tmp_path / "paused", selection=ALL_ON)

    def then(orders: Orders) -> None:
        assert orders.give("pause")["detail"] == "paused after step 2"
        status = json.loads(get(config, "/status")[1])
        assert (status["state"], status["step"], status["doing"]) == ("paused", 2, "paused by an order")
        assert status["health"]["ok"]
        assert status["health"]["ready"]
        assert status["health"]["detail"].startswith("paused by an order")
        assert get(config, "/healthz")[0] == 200
        assert orders.give("checkpoint")["detail"] == "checkpoint of step 2"
        assert orders.give("checkpoint")["detail"] == "nothing is new since the checkpoint of step 2"
        assert trainer_json(config)["step"] == 2
        found = metrics(config)
        assert found['state{stream_trainer_state="paused"}'] == 1
        assert found['orders_total{action="checkpoint",result="done"}'] == 2
        assert json.loads(get(config, "/status")[1])["step"] == 2
        assert orders.give("resume")["detail"] == "goes on after step 2"

    run = serve_with(config, 2, then)
    assert run.steps == steps
    assert run.events == [(2, "paused"), (2, "resumed")]
    paused, unpaused = (hashes(checkpoints(found)[-1]) for found in (config, plain))
    names = [name for name in paused if name.endswith(".safetensors")]
    assert names
    assert {name: paused[name] for name in names} == {name: unpaused[name] for name in names}


def test_a_paused_run_can_be_stopped_and_reads_no_more_than_the_buffer_holds(tmp_path: Path) -> None:
    config = controlled(tmp_path / "run", buffer={"wait_s": 60.0, "max_records": 8})
    stop = threading.Event()

    def on_step(number: int, *_: object) -> None:
        if number == 1:
            threading.Thread(target=work).start()
            wait_for(lambda: orders.ask("GET", "/orders/1")[0] != 404)

    orders, seen = Orders(config["control"]["port"]), list[dict[str, Any]]()

    def work() -> None:
        orders.give("pause")
        wait_for(lambda: metrics(config)["reading_paused"] == 1)
        seen.append(json.loads(get(config, "/status")[1]))
        stop.set()

    summary = serve(Settings(**config), stop, Watcher(on_step))
    assert summary.step == 1
    assert seen[0]["buffer_records"] < 80 - 8
    assert trainer_json(config)["step"] == 1


@pytest.mark.parametrize("selection", [ALL_ON, {"weigh": "equal", "batch_size": 4}], ids=["all", "plain"])
def test_another_target_takes_over_and_no_record_is_lost(selection: dict[str, Any], tmp_path: Path) -> None:
    config = controlled(tmp_path / "run", selection=selection)
    target = Path(config["target"]["path"])

    def then(orders: Orders) -> None:
        orders.give("pause")
        assert "is the target already" in orders.give("reload-target")["detail"]
        write_lines(target, NEW_TARGET)
        assert orders.give("reload-target")["detail"].startswith(f"3 samples of {target}, loss ")
        saved = trainer_json(config)
        assert (saved["step"], saved["fingerprint"]["target.path_contents"]) == (2, digest_of_file(target))
        orders.give("resume")

    run = serve_with(config, 2, then)
    assert [kind for _, kind in run.events] == ["paused", "target_replaced", "resumed"]
    assert [step for step, _ in run.evaluations][:2] == [0, 2]
    assert run.summary is not None
    assert sum(run.summary.counts.values()) == 80
    ids = [name for step in run.steps for name in step.ids]
    assert len(ids) == len(set(ids)), "nothing is trained on twice"
    write_lines(tmp_path / "run" / "in.jsonl", goods(96))
    again = Run()
    watcher = Watcher(on_event=lambda step, kind, text: again.events.append((step, f"{kind} {text}")))
    summary = serve(Settings(**config), threading.Event(), watcher)
    assert sum(summary.counts.values()) == 96
    assert again.events == [], "the checkpoint knows the new target"
    assert math.isfinite(summary.losses["target"])


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        ([], "holds no samples; add at least one line"),
        ([b"garbage"], "line 1 is not a sample"),
        (None, "is no file"),
    ],
)
def test_a_broken_target_is_refused_and_the_old_one_stays(lines: list[bytes] | None, why: str, tmp_path: Path) -> None:
    plain = controlled(tmp_path / "plain")
    _, steps = serve_until(plain)
    config = controlled(tmp_path / "run")
    target = Path(config["target"]["path"])

    def then(orders: Orders) -> None:
        if lines is None:
            target.unlink()
        else:
            write_lines(target, lines)
        status, found = orders.ask("POST", "/reload-target")
        wait_for(lambda: orders.ask("GET", f"/orders/{found['order']}")[1]["outcome"] != "waiting")
        found = orders.ask("GET", f"/orders/{found['order']}")[1]
        assert status in (202, 409)
        assert found["outcome"] == "refused"
        assert found["detail"].startswith(f"target.path={target}")
        assert why in found["detail"]
        assert found["detail"].endswith("; the target before stays")
        assert metrics(config)['orders_total{action="reload-target",result="refused"}'] == 1

    run = serve_with(config, 2, then)
    assert run.events == [(2, "target_refused")]
    assert run.steps == steps


def test_a_watched_target_is_taken_over_while_the_stream_is_idle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watched, "LOOK_S", 0.05)
    config = controlled(tmp_path / "run", target={"watch": True}, buffer={"wait_s": 0.1})
    config["source"] = jsonl(tmp_path / "run" / "in.jsonl", follow=True)
    target, stop, events = Path(config["target"]["path"]), threading.Event(), list[str]()
    watcher = Watcher(on_event=lambda _step, kind, text: events.append(f"{kind}: {text}"))
    thread = threading.Thread(target=lambda: serve(Settings(**config), stop, watcher))
    thread.start()
    try:
        wait_for(lambda: '"state": "idle"' in get(config, "/status")[1])
        target.write_bytes(b"garbage")
        wait_for(lambda: len(events) == 1)
        target.write_bytes(good(77) + b"\n")
        wait_for(lambda: len(events) == 2)
        wait_for(lambda: trainer_json(config)["fingerprint"]["target.path_contents"] == digest_of_file(target))
    finally:
        stop.set()
        thread.join(LONG_S)
    assert [event.partition(":")[0] for event in events] == ["target_refused", "target_replaced"]


def test_a_watched_target_that_is_refused_degrades_until_the_old_one_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A restart with the broken file would end at once: that must not stay unseen until there is one."""
    monkeypatch.setattr(watched, "LOOK_S", 0.05)
    config = controlled(tmp_path / "run", target={"watch": True}, buffer={"wait_s": 0.1})
    config["source"] = jsonl(tmp_path / "run" / "in.jsonl", follow=True)
    target, name = Path(config["target"]["path"]), 'degraded{cause="target_reload"}'
    before = target.read_bytes()
    with serving(config):
        wait_for(lambda: '"state": "idle"' in get(config, "/status")[1])
        target.write_bytes(b"garbage")
        wait_for(lambda: metrics(config)[name] == 1)
        status, page = get(config, "/healthz")
        assert (status, json.loads(page)["health"]) == (200, "degraded")
        target.write_bytes(before)
        wait_for(lambda: metrics(config)[name] == 0)
        assert json.loads(get(config, "/healthz")[1])["health"] == "healthy"

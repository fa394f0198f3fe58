"""What the page is told of a run: everything that is on, nothing that is off, and no text unless it is asked for."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stream_trainer.monitoring.metrics import Metrics
from stream_trainer.records import Partition
from stream_trainer.settings.schema import Settings
from stream_trainer.training.live.pools import label_of, near_copies, shown_pool, shown_text
from stream_trainer.training.live.watch import Live, value_of
from tests.helpers.fakes import sample, step_report, varied
from tests.helpers.service import (
    ALL_ON,
    SELECTION,
    configuration,
    get,
    goods,
    jsonl,
    on_free_port,
    serving,
    wait_for,
    write_lines,
)


def labelled(count: int) -> list[bytes]:
    values = [json.loads(value) for value in goods(count)]
    return [json.dumps(value | {"domain": ("news", "code")[i % 2]}).encode() for i, value in enumerate(values)]


def drained(status: dict[str, Any]) -> bool:
    return status.get("lag") == 0 and status["state"] == "idle"


def status_of(config: dict[str, Any]) -> dict[str, Any]:
    status, page = get(config, "/status")
    found: dict[str, Any] = json.loads(page) if status == 200 else {}
    return found


def panels_of(
    folder: Path, selection: dict[str, Any], until: Callable[[dict[str, Any]], bool] = drained, **server: Any
) -> dict[str, dict[str, Any]]:
    """What each path answers as soon as the status is as it should be: by default, all is decided."""
    write_lines(folder / "in.jsonl", labelled(120))
    config = on_free_port(
        configuration(folder, jsonl(folder / "in.jsonl", follow=True), selection=selection, buffer={"wait_s": 0.1})
    )
    config["server"] |= server
    with serving(config):
        wait_for(lambda: until(status_of(config)))
        return {path: json.loads(get(config, path)[1]) for path in ("/status", "/history", "/panels")}


def test_all_stages_are_there_when_all_are_on_and_no_text_is(tmp_path: Path) -> None:
    found = panels_of(tmp_path, ALL_ON)
    panels = found["/panels"]
    assert {"arms", "mask", "layers", "pools", "mix", "time"} <= panels.keys()
    assert "learned" not in panels
    assert [arm["arm"] for arm in panels["arms"]] == [0, 1, 2, 3]
    assert sum(arm["pulls"] for arm in panels["arms"]) > 0
    mask = panels["mask"]
    assert mask["overall"] == pytest.approx(0.3, abs=0.01)
    assert len(mask["density"]) == len(mask["layers"])
    pool = panels["pools"][0]
    assert len(pool["by_layer"]) == len(panels["layers"])
    assert len(pool["by_layer"][0]) == len(pool["candidates"])
    assert max(abs(one["alignment"]) for one in pool["candidates"]) == pytest.approx(1)
    assert {one["label"] for one in panels["mix"]} == {"news", "code"}
    assert sum(one["stream"] for one in panels["mix"]) >= sum(one["trained"] for one in panels["mix"]) > 0
    assert "river" not in json.dumps(found)
    assert "text" not in pool["candidates"][0]
    status = found["/status"]
    assert (status["doing"], status["health"]["ok"], status["lag"]) == ("waiting for samples", True, 0)
    assert status["seconds_to_drain"] == 0
    history = found["/history"]
    assert history["start"].keys() == {"target"}
    assert [event["kind"] for event in history["events"]] == ["checkpoint"]


def test_plain_training_shows_no_stage_and_texts_only_where_asked(tmp_path: Path) -> None:
    selection = {**SELECTION, "weigh": "equal", "profile": "thorough"}
    panels = panels_of(tmp_path, selection, show_text=True)["/panels"]
    assert not {"arms", "mask", "layers", "learned"} & panels.keys()
    candidate = panels["pools"][0]["candidates"][0]
    assert any(word in candidate["text"] for word in ("river", "stone", "light", "apple", "north", "under", "glass"))
    assert candidate["alignment"] is None
    assert panels["pools"][0]["by_layer"] is None


def test_the_learned_draw_shows_what_it_believes(tmp_path: Path) -> None:
    selection = {"pool_size": 8, "batch_size": 3, "waiting": 24, "intake": 12, "draw": "learned"}
    selection |= {"learned": {"probe_every": 2}}
    learned = panels_of(tmp_path, selection, until=lambda status: status.get("step", 0) >= 3)["/panels"]["learned"]
    assert len(learned["features"]) > 3
    assert all(one["deviation"] > 0 for one in learned["features"])


def test_a_run_without_a_server_gathers_nothing(tmp_path: Path) -> None:
    settings = Settings(**configuration(tmp_path, jsonl(tmp_path / "in.jsonl")))
    live = Live(settings, Metrics())
    assert live.panels() == {}
    assert live.to_drain() is None


def test_what_cannot_be_shown_ends_no_run_and_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    live = Live(Settings(**configuration(tmp_path, jsonl(tmp_path / "in.jsonl"))), Metrics())
    on_step = live.watcher.on_step
    assert on_step is not None
    for step in (1, 2):
        on_step(step, [sample(1)], step_report([1.0]))  # there is no trainer yet
    assert [record.message.partition(" cannot")[0] for record in caplog.records] == ["step 1"]


def test_near_copies_are_found_and_common_phrases_are_none() -> None:
    copy = (1, 2, 3, 4, 5, 6, 7, 8)
    pool = [copy, (9, *copy[:6]), (20, 21, 22, 23, 24), (), (30,)]
    found = near_copies(pool)
    assert found.keys() == {0, 1}
    assert found[0] == (1, 3 / 4)
    assert near_copies([copy] * 20) == {}, "what all begin with tells nothing apart"


def test_a_label_is_the_domain_or_else_the_source() -> None:
    assert label_of(sample(1)) is None
    assert label_of(varied(1)) == "s1"


def test_a_pool_keeps_no_record(tmp_path: Path) -> None:
    report = step_report([1.0, 2.0], utilities=[0.5, -2.0])
    shown = shown_pool(3, [sample(1), sample(2)], report, arms=())
    assert [one.alignment for one in shown.candidates] == [0.25, -1]
    assert [one.arm for one in shown.candidates] == [None, None]
    assert shown.candidates[0].partition == Partition("log", 0)
    assert not hasattr(shown.candidates[0], "record")


def test_texts_are_short_and_on_one_line() -> None:
    text = shown_text(range(500), lambda tokens: "a\nb " * len(tokens))
    assert len(text) == 201
    assert text.startswith("a b a b")
    assert shown_text((1,), lambda _: "short") == "short"


def test_a_gauge_without_a_value_is_unknown() -> None:
    metrics = Metrics()
    assert value_of(metrics.selection_advantage) is None
    metrics.selection_advantage.set(2)
    assert value_of(metrics.selection_advantage) == 2

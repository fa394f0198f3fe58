"""The whole service on a file: every record decided, every number it shows true, every error one line."""

import math
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stream_trainer import assembly, service
from stream_trainer.errors import CheckpointError, SourceError
from stream_trainer.ingest.letter import read_dead_letters
from stream_trainer.ingest.letter_file import FileDeadLetters
from stream_trainer.models.loading import LoadedModel, load_model
from stream_trainer.monitoring.metrics import EVENTS
from stream_trainer.samples.decoder import Decoder, read_samples
from stream_trainer.service import serve
from stream_trainer.settings.schema import SampleSettings, Settings
from stream_trainer.training import saver
from stream_trainer.training.step import StepReport
from stream_trainer.training.watchers import Watcher
from tests.helpers.malformed import malformed_values
from tests.helpers.service import (
    MODEL,
    checkpoints,
    configuration,
    counts,
    decided,
    fifo,
    get,
    good,
    goods,
    jsonl,
    metrics,
    on_free_port,
    run_main,
    serve_until,
    serving,
    state_of,
    wait_for,
    write_lines,
)

MAX_BYTES = 10_000
ALL_ALIKE = {"weigh": "equal", "batch_size": 8}

METHODS = [
    ("all", "filter_then_weight"),
    ("all", "greedy"),
    ("all", "top_k"),
    ("all", "equal"),
    ("uniform", "equal"),
    ("uniform", "top_k"),
]

Stream = Callable[..., dict[str, Any]]


@pytest.fixture
def stream(tmp_path: Path) -> Stream:
    """Writes a stream; returns settings of a run on it."""

    def write(values: Sequence[bytes], **sections: dict[str, Any]) -> dict[str, Any]:
        write_lines(tmp_path / "samples.jsonl", values)
        return configuration(tmp_path, jsonl(tmp_path / "samples.jsonl"), **sections)

    return write


def test_ten_thousand_malformed_records_among_as_many_good_ones(tmp_path: Path, stream: Stream) -> None:
    usable = [value for _, value in malformed_values(MAX_BYTES)]
    short = [value for value in usable if len(value) <= MAX_BYTES]
    assert len(short) >= 20
    # Every kind in turn; the few long ones, nested 50,000 deep, once each.
    bad = [value for value in usable if len(value) > MAX_BYTES]
    bad += [short[number % len(short)] for number in range(10_000 - len(bad))]
    values = [value for number, value in enumerate(bad) for value in (value, good(number))]
    selection = {"weigh": "equal", "batch_size": 128}
    config = stream(values, selection=selection, samples={"max_bytes": MAX_BYTES})
    summary, steps = serve_until(config)
    assert summary.counts == {
        "trained": 10_000,
        "not_selected": 0,
        "filtered": 0,
        "dead_lettered": 10_000,
        "discarded": 0,
        "duplicate": 0,
    }
    assert counts(config) == summary.counts
    assert [name for step in steps for name in step.selected] == [str(number) for number in range(10_000)]
    kept = Counter(letter.record.value for letter in read_dead_letters(tmp_path / "dead-letters.jsonl"))
    assert kept == Counter(bad)


@pytest.mark.parametrize("lora", [None, {"rank": 4}], ids=["full", "lora"])
def test_the_model_of_a_checkpoint_has_the_loss_that_was_reported(
    lora: dict[str, int] | None, tmp_path: Path, stream: Stream
) -> None:
    config = stream(goods(160), model={"config": MODEL, "tokenizer": "bytes", "lora": lora})
    summary, _ = serve_until(config)
    saved = checkpoints(config)[-1] / "model"
    model = AutoModelForCausalLM.from_pretrained(saved).eval()
    decoder = Decoder(AutoTokenizer.from_pretrained(saved), SampleSettings())
    losses = []
    for sample in read_samples(tmp_path / "target.jsonl", decoder, 64, "target.path"):
        with torch.no_grad():
            labels = torch.tensor([sample.labels])
            losses.append(float(model(input_ids=torch.tensor([sample.input_ids]), labels=labels).loss))
    assert sum(losses) / len(losses) == pytest.approx(summary.losses["target"], abs=1e-5)
    assert summary.losses["target"] < 5.6  # ln(300) = 5.7 is where random weights begin


def test_what_it_shows_while_it_works(tmp_path: Path) -> None:
    """Loading, then training, then idle; the counters are those of the checkpoint, and no lag remains."""
    stream, target = tmp_path / "samples.jsonl", tmp_path / "target.fifo"
    write_lines(stream, [*goods(20), b"not JSON"])
    buffer = {"wait_s": 0.1}
    config = on_free_port(configuration(tmp_path, jsonl(stream, follow=True), buffer=buffer))
    config["target"] = {"path": str(target)}
    with fifo(target) as write, serving(config) as ended:
        wait_for(lambda: state_of(config) == "loading")
        assert (get(config, "/healthz")[0], get(config, "/readyz")[0]) == (200, 503)
        write(good(0) + b"\n")
        wait_for(lambda: state_of(config) == "idle" and decided(config) == 21)
        assert (get(config, "/healthz")[0], get(config, "/readyz")[0]) == (200, 200)
        wait_for(lambda: metrics(config)[f'lag_records{{partition="0",topic="{stream}"}}'] == 0)
        shown = metrics(config)
    assert {name: shown[f'records_total{{outcome="{name}"}}'] for name in counts(config)} == counts(config)
    assert counts(config) == ended[0].counts
    assert shown["records_read_total"] == 21
    assert shown['dead_letters_total{reason="bad_json"}'] == 1
    assert shown["read_bytes_total"] == stream.stat().st_size - 21
    assert shown['steps_total{result="applied"}'] == ended[0].step
    assert shown['evaluation_loss{set="target"}'] > 0
    assert shown["buffer_records"] == 0


def test_what_a_burst_taught_is_durable_while_nothing_more_comes(tmp_path: Path) -> None:
    """And what a restart shows of its checkpoint is true at once."""
    write_lines(tmp_path / "samples.jsonl", goods(20))
    source = jsonl(tmp_path / "samples.jsonl", follow=True)
    checkpoint = {"dir": str(tmp_path / "c"), "every_seconds": 0.2}
    config = on_free_port(configuration(tmp_path, source, buffer={"wait_s": 0.1}, checkpoint=checkpoint))
    with serving(config) as ended:
        wait_for(lambda: bool(checkpoints(config)) and sum(counts(config).values()) == 20)
        written = (checkpoints(config)[-1] / "manifest.json").stat().st_mtime_ns
        wait_for(lambda: metrics(config)["checkpoint_seconds_count"] > 0 and state_of(config) == "idle")
        time.sleep(0.5)  # twice as long as a checkpoint would take to be due again
    assert (checkpoints(config)[-1] / "manifest.json").stat().st_mtime_ns == written, "nothing new to keep"
    with serving(config):
        wait_for(lambda: state_of(config) == "idle")
        shown = metrics(config)
    assert {name: shown[f'records_total{{outcome="{name}"}}'] for name in counts(config)} == counts(config)
    assert shown["checkpoint_step"] == ended[0].step
    assert shown["checkpoint_timestamp_seconds"] == pytest.approx(written / 1e9, abs=2.0)
    assert shown["checkpoint_bytes"] == sum(f.stat().st_size for f in checkpoints(config)[-1].rglob("*") if f.is_file())


def test_a_checkpoint_that_fails_does_not_hide_why_the_run_ends(
    stream: Stream, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A full disk stops both."""

    def fail(*_: object, **__: object) -> None:
        raise CheckpointError("checkpoint.dir is full")

    def lose(*_: object, **__: object) -> None:
        raise SourceError("dead_letters.path cannot be written")

    monkeypatch.setattr(saver, "save_checkpoint", fail)
    monkeypatch.setattr(FileDeadLetters, "send", lose)
    with pytest.raises(SourceError, match=r"^dead_letters.path cannot be written"):
        serve_until(stream([*goods(200), b"not JSON"], buffer={"max_records": 8, "wait_s": 60.0}))
    assert "checkpoint.dir is full" in caplog.text


def test_what_it_shows_in_the_middle_of_training(tmp_path: Path) -> None:
    write_lines(tmp_path / "samples.jsonl", goods(80))
    config = on_free_port(configuration(tmp_path, jsonl(tmp_path / "samples.jsonl")))
    seen: list[tuple[str | None, int, float, float]] = []

    def on_step(number: int, *_: object) -> None:
        seen.append(
            (state_of(config), get(config, "/readyz")[0], decided(config), metrics(config)["step_seconds_count"])
        )

    serve(Settings(**config), threading.Event(), Watcher(on_step))
    assert seen == [("training", 200, 8.0 * number, float(number)) for number in range(1, 11)]


@pytest.mark.parametrize("weigh", ["filter_then_weight", "equal"])
def test_a_step_that_is_not_finite_is_skipped_and_the_service_goes_on(
    weigh: str, stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One weight of the live model is spoilt for one step, as a fault of memory would."""
    loaded: list[LoadedModel] = []

    def load(*arguments: Any) -> LoadedModel:
        loaded.append(load_model(*arguments))
        return loaded[0]

    monkeypatch.setattr(assembly, "load_model", load)
    config = on_free_port(stream(goods(80), selection={"weigh": weigh, "batch_size": 3 if weigh != "equal" else 8}))
    results: list[str] = []
    kept: list[torch.Tensor] = []

    def on_step(number: int, _: object, report: StepReport) -> None:
        results.append(report.result)
        weight = loaded[0].model.get_parameter("model.layers.1.mlp.down_proj.weight").data
        if number == 2:
            kept.append(weight.clone())
            weight[0, 0] = math.inf
        elif number == 3:
            assert torch.equal(weight[1:], kept[0][1:])
            assert metrics(config)['steps_total{result="skipped_nonfinite"}'] == 1
            weight.copy_(kept[0])

    summary = serve(Settings(**config), threading.Event(), Watcher(on_step))
    assert results == ["applied"] * 2 + ["skipped_nonfinite"] + ["applied"] * 7
    assert sum(summary.counts.values()) == 80
    assert summary.counts["not_selected"] >= 8  # those of the skipped step
    assert math.isfinite(summary.losses["target"])


def test_no_weight_that_a_producer_states_spoils_its_pool(stream: Stream) -> None:
    stated = [1e300, 1e-300, 3e38, 1e39, 5e-324, 1.7e308, 1.7e308, 1.0]
    values = [b'{"weight": %s, %s' % (repr(stated[n % 8]).encode(), good(n)[1:]) for n in range(32)]
    _, steps = serve_until(stream(values, selection={"weigh": "equal", "batch_size": 8}))
    assert [step.result for step in steps] == ["applied"] * 4
    assert [step.coefficients[5:7] for step in steps] == [(0.5, 0.5)] * 4


@pytest.mark.parametrize(
    ("remedy", "result", "trained"), [("skip", "skipped_none_helps", 0), ("uniform", "applied", 12)]
)
def test_when_no_candidate_helps(remedy: str, result: str, trained: int, tmp_path: Path, stream: Stream) -> None:
    """Once a model gives `x` one of two answers, a sample of the one points away from a target of the other."""
    a, b = (b'{"prompt": "x", "response": "%c"}' % letter for letter in b"ab")
    write_lines(tmp_path / "target.jsonl", [a])
    samples = {"max_tokens": 3}  # the answer is the last token
    both = stream([a, b] * 160 + [b] * 32, samples=samples, optimizer={"learning_rate": 1e-2})
    serve_until(both | {"selection": both["selection"] | ALL_ALIKE, "training": {"max_steps": 40}})
    before = counts(both)
    selection = both["selection"] | {"when_none_helps": remedy}
    summary, steps = serve_until(both | {"selection": selection})
    assert [step.result for step in steps] == [result] * 4
    assert summary.counts["trained"] - before["trained"] == trained
    assert summary.counts["not_selected"] - before["not_selected"] == 32 - trained


@pytest.mark.parametrize("lora", [None, {"rank": 2}], ids=["full", "lora"])
@pytest.mark.parametrize(("draw", "weigh"), METHODS)
def test_every_method_trains_every_kind_of_model(
    draw: str, weigh: str, lora: dict[str, int] | None, stream: Stream
) -> None:
    """In bfloat16, with gradient checkpointing, resumed once."""
    model = {"config": MODEL, "tokenizer": "bytes", "dtype": "bfloat16", "gradient_checkpointing": True, "lora": lora}
    config = stream(goods(44), model=model, selection={"draw": draw, "weigh": weigh})
    _, first = serve_until(config, last_step=3)
    summary, second = serve_until(config)
    steps = first + second
    drawn = [name for step in steps for name in step.ids]
    assert len(drawn) == len(set(drawn))
    if draw == "all":
        assert drawn == [str(number) for number in range(44)]
    else:
        assert len(drawn) == 3 * len(steps)
    assert {step.result for step in steps} == {"applied"}
    assert all(0 < len(step.selected) <= 3 for step in steps)
    assert summary.counts["trained"] == sum(len(step.selected) for step in steps)
    assert sum(summary.counts.values()) == 44
    assert summary.losses["target"] < 5.7  # ln(300), which is where random weights begin


def test_a_checkpoint_of_another_model_is_one_line(
    tmp_path: Path, stream: Stream, capsys: pytest.CaptureFixture[str]
) -> None:
    config = stream(goods(8))
    serve_until(config)
    config["model"] = {"config": MODEL | {"hidden_size": 16}, "tokenizer": "bytes"}
    capsys.readouterr()
    assert run_main(tmp_path, config) == 5
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: checkpoint {checkpoints(config)[-1]}")
    assert "with shape" in line
    assert "set another checkpoint.dir" in line


def test_a_line_of_the_target_that_is_no_sample_is_one_line(
    tmp_path: Path, stream: Stream, capsys: pytest.CaptureFixture[str]
) -> None:
    config = stream(goods(8))
    write_lines(tmp_path / "target.jsonl", [good(0), b'{"text": 7}'])
    assert run_main(tmp_path, config) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: target.path={tmp_path}/target.jsonl line 2 is not a sample (wrong_type")


def test_the_phases_of_the_main_thread_sum_to_wall_time(stream: Stream) -> None:
    """Whatever is done between two steps, evaluations and checkpoints too, is in one phase, and in no other."""
    often = {"every_steps": 2}
    config = on_free_port(stream(goods(160), evaluation=often, checkpoint=often))
    seen: list[tuple[float, float]] = []

    def look(*_: object) -> None:
        shown = metrics(config)
        seen.append((time.perf_counter(), sum(shown[name] for name in shown if name.startswith("phase_seconds_total"))))

    serve(Settings(**config), threading.Event(), Watcher(on_step=look))
    (begun, before), (ended, after) = seen[1], seen[-1]
    assert len(seen) > 10
    assert (after - before) / (ended - begun) == pytest.approx(1, abs=0.02)


def test_what_may_end_a_run_and_what_happened_is_shown(stream: Stream) -> None:
    config = on_free_port(stream(goods(16)))
    shown: dict[str, float] = {}

    def look(step: int, *_: object) -> None:
        if step == 2:
            shown.update(metrics(config))

    serve(Settings(**config), threading.Event(), Watcher(on_step=look))
    assert 0 < shown["disk_free_bytes"] < 1e18
    assert shown["memory_limit_bytes"] > 1e8
    assert shown["owner_epoch"] == 1
    assert shown["fenced"] == 0
    assert shown['forgetting_ratio{set="target"}'] == 1
    assert shown['unselected_total{why="low_scored"}'] >= 5
    assert shown['unselected_total{why="undrawn"}'] == 0
    assert shown['gpu_memory_bytes{kind="allocated"}'] >= 0
    assert {kind for kind in EVENTS if shown[f'last_event_timestamp_seconds{{kind="{kind}"}}'] != 0} == set()


def test_forgetting_is_told_from_the_first_loss_of_all_over_restarts(stream: Stream) -> None:
    first, _ = serve_until(stream(goods(40)))
    config = on_free_port(stream(goods(80), evaluation={"every_steps": 1}))
    ratios: list[float] = []
    look = Watcher(on_step=lambda *_: ratios.append(metrics(config)['forgetting_ratio{set="target"}']))
    serve(Settings(**config), threading.Event(), look)
    assert ratios[0] < 0.999
    assert first.losses["target"] > 0


def test_every_kind_of_event_is_known() -> None:
    root = Path(service.__file__).parent
    code = " ".join(" ".join(path.read_text().split()) for path in root.rglob("*.py"))
    events = r"(?:watchers\.event\((?:(?:self|trainer|state)\.)?step|_events\.put\(\((?:candidate\.)?step), (.{0,80})"
    told = {kind for call in re.findall(events, code) for kind in re.findall(r'"([a-z_]+)"', call.split(", ")[0])}
    assert told | {"selection_pays", "selection_does_not_pay"} == set(EVENTS)

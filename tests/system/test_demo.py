"""The demo: its stream is what it says, and the real command ends with figures that add up."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from stream_trainer.cli import main
from stream_trainer.demo import run as demo
from stream_trainer.demo.broker import has_mock_cluster
from stream_trainer.demo.display import SELECTION, UNIFORM, Check, Display, Watch, print_report
from stream_trainer.demo.run import INTAKE, MODEL_CONFIG
from stream_trainer.demo.stream import (
    HELD_OUT_SAMPLES,
    MALFORMED,
    MALFORMED_LINES,
    SHARES,
    TARGET,
    TARGET_SAMPLES,
    WRONG,
    DemoStream,
    spell,
    write_stream,
)
from stream_trainer.errors import SampleError
from stream_trainer.records import Partition, Record, Sample
from stream_trainer.samples.byte_tokenizer import byte_tokenizer
from stream_trainer.samples.decoder import Decoder
from stream_trainer.settings.schema import SampleSettings


@pytest.fixture
def stream(tmp_path: Path) -> DemoStream:
    return write_stream(tmp_path, 800, seed=3)


def test_a_summary_that_cannot_be_written_is_refused_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = tmp_path / "none" / "summary.json"
    assert main(["demo", f"--summary={figures}"]) == 2
    assert f"--summary {figures} cannot be written (No such file or directory); name another file" in (
        capsys.readouterr().err
    )


def start(*arguments: str, first: str = "") -> "subprocess.Popen[str]":
    """The real command, in a process that executes `first` before it."""
    code = f"import sys; {first}\nfrom stream_trainer.cli import main; sys.exit(main())"
    paths = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, "demo", *arguments]
    return subprocess.Popen(
        command,
        env=os.environ | paths,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run(directory: Path, steps: int, source: str) -> tuple[dict[str, Any], str]:
    """Figures and output of the real command."""
    figures = directory / "summary.json"
    process = start(f"--steps={steps}", f"--source={source}", f"--summary={figures}", f"--dir={directory / 'demo'}")
    out, err = process.communicate(timeout=240)
    assert (process.returncode, err) == (0, "")
    summary: dict[str, Any] = json.loads(figures.read_text())
    return summary, out


def parsed(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines() if line not in MALFORMED_LINES]


def test_the_stream_holds_the_stated_shares(stream: DemoStream) -> None:
    domains = [record["domain"] for record in parsed(stream.records)]
    assert len(domains) == 800
    for domain, share in SHARES.items():
        assert domains.count(domain) == stream.counts[domain]
        assert domains.count(domain) / 800 == pytest.approx(share, abs=0.005)
    assert sum(SHARES.values()) == pytest.approx(1)


def test_the_target_is_spread_over_the_stream(stream: DemoStream) -> None:
    domains = [record["domain"] for record in parsed(stream.records)]
    for quarter in range(4):
        assert 25 <= domains[200 * quarter : 200 * (quarter + 1)].count(TARGET) <= 75


def test_broken_records_are_dead_lettered_and_all_others_are_samples(stream: DemoStream) -> None:
    decoder = Decoder(byte_tokenizer(), SampleSettings(), int(str(MODEL_CONFIG["max_position_embeddings"])))
    lines = stream.records.read_bytes().splitlines()
    results = decoder.decode_batch(
        [Record(Partition("stream", 0), number, number + 1, line) for number, line in enumerate(lines)]
    )
    broken = [result for result in results if isinstance(result, SampleError)]
    assert len(broken) == stream.counts[MALFORMED] == 12
    assert len({error.reason for error in broken}) >= 3
    good = [result for result in results if isinstance(result, Sample)]
    assert len(good) == 800
    assert max(sample.num_tokens for sample in good) < decoder.settings.max_tokens


def test_no_prompt_of_the_target_or_the_held_out_set_is_in_the_stream(stream: DemoStream) -> None:
    streamed = [record["prompt"] for record in parsed(stream.records) if record["domain"] in (TARGET, WRONG)]
    target = [record["prompt"] for record in parsed(stream.target)]
    held_out = [record["prompt"] for record in parsed(stream.held_out)]
    assert (len(target), len(held_out)) == (TARGET_SAMPLES, HELD_OUT_SAMPLES)
    everything = streamed + target + held_out
    assert len(set(everything)) == len(everything)


def test_only_wrong_spellings_are_wrong(stream: DemoStream) -> None:
    for record in parsed(stream.records):
        if record["domain"] in (TARGET, WRONG):
            right = spell(int(record["prompt"].removeprefix("Spell "))) == record["response"]
            assert right == (record["domain"] == TARGET)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "zero"),
        (13, "thirteen"),
        (40, "forty"),
        (700, "seven hundred"),
        (100_001, "one hundred thousand one"),
        (342_015, "three hundred forty-two thousand fifteen"),
        (999_999, "nine hundred ninety-nine thousand nine hundred ninety-nine"),
    ],
)
def test_numbers_are_spelled_right(number: int, words: str) -> None:
    assert spell(number) == words


def test_the_seed_decides_the_stream(tmp_path: Path) -> None:
    contents = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        (tmp_path / name).mkdir()
        stream = write_stream(tmp_path / name, 160, seed)
        contents.append([path.read_bytes() for path in (stream.records, stream.target, stream.held_out)])
    assert contents[0] == contents[1]
    assert all(one != other for one, other in zip(contents[0], contents[2], strict=True))


@pytest.mark.parametrize("source", ["kafka", pytest.param("jsonl", marks=pytest.mark.slow)])
def test_a_short_demo_ends_with_figures_that_add_up(source: str, tmp_path: Path) -> None:
    if source == "kafka" and not has_mock_cluster():
        pytest.skip("confluent-kafka is not installed: pip install 'stream-trainer[demo]'")
    steps = 6
    figures, out = run(tmp_path, steps, source)
    outcomes = figures["outcomes"]
    lines = (tmp_path / "demo" / "stream.jsonl").read_bytes().splitlines()
    assert figures["source"] == source
    assert figures["records_consumed"] == sum(outcomes.values()) <= len(lines)
    assert outcomes["trained"] + outcomes["not_selected"] == steps * INTAKE
    assert 0 < outcomes["dead_lettered"] <= sum(line in MALFORMED_LINES for line in lines)
    assert figures["records_trained"] == outcomes["trained"] > 0
    assert 0 <= figures["uniform_records_trained"] - figures["records_trained"] < 4
    assert figures["target_share_stream"] == pytest.approx(0.25)
    trained = figures["target_share_trained"] * figures["records_trained"]
    assert trained == pytest.approx(round(trained))
    losses = ("target_loss_before", "target_loss_after", "uniform_target_loss_after")
    for name in (*losses, "seconds", "seconds_trained", "uniform_seconds_trained"):
        assert figures[name] > 0
    assert figures["target_loss_after"] != figures["uniform_target_loss_after"]
    assert "/metrics" in out
    assert re.search(r"^Page: http://127\.0\.0\.1:\d+/ ", out, flags=re.MULTILINE)
    for row in (
        "loss after",
        "seconds of training",
        "samples to uniform's last loss",
        "seconds to uniform's last loss",
    ):
        assert row in out
    dead = (tmp_path / "demo" / "selection" / "dead-letters.jsonl").read_bytes().splitlines()
    assert len(dead) == outcomes["dead_lettered"]


@pytest.mark.slow
def test_selection_finds_the_target(tmp_path: Path) -> None:
    figures, _ = run(tmp_path, 40, "jsonl")
    assert figures["target_share_trained"] > 1.5 * figures["target_share_stream"]
    assert figures["target_loss_after"] < figures["target_loss_before"]
    assert figures["target_loss_after"] < figures["uniform_target_loss_after"]
    assert figures["samples_to_uniform_loss"] < figures["uniform_records_trained"]


def test_the_picture_and_the_report_fit_80_columns() -> None:
    console = Console(width=80, force_terminal=True, soft_wrap=True, highlight=False, color_system=None, record=True)
    display = Display(console, "http://127.0.0.1:1")
    status = {"records": {"trained": 123_456, "dead_lettered": 1234}, "evaluation_loss": {"target": 5.55}}
    watches = [
        Watch(method, 1000, 1000, 5.55, Counter({TARGET: 1000}), [Check(0, 0.0, 5.5), Check(4000, 999.9, 1.5)], status)
        for method in (SELECTION, UNIFORM)
    ]
    for watch in watches:
        display.begin(watch)
    console.print(display._picture())
    print_report(console, dict.fromkeys([*SHARES, MALFORMED], 100_000), *watches)
    lines = console.export_text().splitlines()
    assert len(lines) > 30
    assert max(len(line) for line in lines) <= 80
    assert any("on target" in line for line in lines)


def test_a_plain_line_fits_80_columns() -> None:
    status = {"records": {"trained": 30_000, "dead_lettered": 999}, "evaluation_loss": {"target": 5.55}}
    line = Watch(SELECTION, 999, 999, 5.55, Counter({TARGET: 1000}), status=status).line()
    assert line == "selection 999: read 30999, loss 5.55, target loss 5.55, on target 100%, dead 999"
    assert len(line) <= 80


def test_what_it_took_lies_between_two_checks() -> None:
    watch = Watch("selection", 3, curve=[Check(0, 0.0, 4.0), Check(10, 2.0, 3.0), Check(20, 6.0, 1.0)])
    assert watch.took(2.0) == Check(15, 4.0, 2.0)
    assert watch.took(3.0) == Check(10, 2.0, 3.0)
    assert watch.took(0.5) is None


def test_a_stream_that_the_mock_cluster_would_forget_is_read_from_a_file(
    stream: DemoStream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "CAPACITY_BYTES", stream.records.stat().st_size - 1)
    monkeypatch.setattr(demo, "has_mock_cluster", lambda: True)
    console = Console(record=True, quiet=True)
    setup = demo._Demo(tmp_path, 1, 0, 1, stream, Display(console, "http://127.0.0.1:1"), threading.Event())
    with ExitStack() as stack:
        assert demo._publish(setup, None, console, stack).kind == "jsonl"


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_to_the_whole_group_ends_the_demo_in_order(number: signal.Signals, code: int, tmp_path: Path) -> None:
    log, checkpoints = tmp_path / "service.log", tmp_path / "selection" / "checkpoints"
    with start("--steps=100", f"--dir={tmp_path}") as process:
        deadline = time.monotonic() + 200
        while not (log.exists() and "step 8: target" in log.read_text()) and time.monotonic() < deadline:
            time.sleep(0.1)
        os.killpg(process.pid, number)  # as Ctrl-C does
        out, err = process.communicate(timeout=90)
    assert (process.returncode, err) == (code, "")
    assert f"Stopped by {number.name}" in out
    assert "could not be committed" not in log.read_text()
    assert len(list(checkpoints.glob("step-*"))) == 2  # before the first step, and at the end


@pytest.mark.slow
def test_without_a_broker_the_demo_reads_a_file_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    figures = tmp_path / "summary.json"
    process = start("--steps=1", f"--summary={figures}", first="sys.modules['confluent_kafka'] = None")
    out, err = process.communicate(timeout=240)
    assert (process.returncode, err) == (0, "")
    assert "confluent-kafka) is not installed: the stream is read from a file" in out
    assert json.loads(figures.read_text())["source"] == "jsonl"
    assert list(tmp_path.glob("stream-trainer-demo-*")) == []


@pytest.mark.parametrize("arguments", [["--steps=0"], ["--dir=."], ["--source=pigeons"]])
def test_arguments_that_cannot_be_used(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kept").touch()
    assert main(["demo", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert arguments[0].partition("=")[0] in line

"""The whole service on a tiny model: its settings, what a run decided step by step, and what it left behind."""

import gc
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from stream_trainer import assembly
from stream_trainer.checkpoints.directory import checkpoints_in
from stream_trainer.cli import main
from stream_trainer.demo.broker import free_port
from stream_trainer.monitoring.orders import Orders, Outcome
from stream_trainer.records import Sample
from stream_trainer.service import Summary, run, serve
from stream_trainer.settings.schema import Settings
from stream_trainer.training.step import StepReport
from stream_trainer.training.trainer import Trainer
from stream_trainer.training.watchers import Watcher
from tests.helpers.brokers import how_to_reach

LONG_S = 240.0  # for what takes seconds: a busy machine is no failure
MAIN = "import sys; from stream_trainer.cli import main; sys.exit(main())"
MODEL = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
SELECTION: dict[str, Any] = {
    "profile": "thorough",  # what comes is scored in its order and exactly, which most tests count on
    "pool_size": 8,
    "batch_size": 3,
    "preconditioner_warmup_steps": 2,
}
ALL_ON: dict[str, Any] = {
    "draw": "cluster_ucb",
    "weigh": "filter_then_weight",
    "route": "gast",
    "mask": "dual_sft",
    "pool_size": 8,
    "batch_size": 3,
    "preconditioner_warmup_steps": 2,
    "waiting": 24,
    "intake": 12,
    "cluster_ucb": {"clusters": 4},
    "gast": {"per_layer": 2},
    "dual_sft": {"density": 0.3, "refresh_steps": 3},
}
WORDS = ("river", "stone", "light", "seven", "apple", "north", "under", "glass")


def good(number: int) -> bytes:
    """A sample whose id is its number."""
    text = " ".join(WORDS[(number * step + step) % len(WORDS)] for step in (1, 3))
    return json.dumps({"id": number, "text": f"{number % 10} {text}"}).encode()


def goods(count: int) -> list[bytes]:
    return [good(number) for number in range(count)]


def write_lines(path: Path, values: Sequence[bytes]) -> None:
    path.write_bytes(b"".join(value + b"\n" for value in values))


def configuration(folder: Path, source: dict[str, Any], **sections: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a small, deterministic run below `folder`, as in a settings file; `sections` are laid over it.

    No wait and no time limit is short enough to change what is decided on a slow machine.
    """
    target = folder / "target.jsonl"
    if not target.exists():
        write_lines(target, goods(4))
    base: dict[str, dict[str, Any]] = {
        "model": {"config": MODEL, "tokenizer": "bytes"},
        "target": {"path": str(target), "refresh_steps": 4},
        "selection": SELECTION,
        "optimizer": {"learning_rate": 1e-3},
        "buffer": {"wait_s": 60.0},
        "training": {"seed": 5, "threads": 1},
        "evaluation": {"every_steps": 1000},
        "checkpoint": {"dir": str(folder / "checkpoints"), "every_steps": 1000},
        "dead_letters": {"path": str(folder / "dead-letters.jsonl")},
        "server": {"enabled": False},
    }
    merged = {name: {**base.get(name, {}), **sections.get(name, {})} for name in base | sections}
    return merged | {"source": source}


def jsonl(path: Path, follow: bool = False) -> dict[str, Any]:
    return {"kind": "jsonl", "jsonl": {"path": str(path), "follow": follow}}


def kafka(servers: str, topic: str, **others: Any) -> dict[str, Any]:
    """A run that ends with what is in the topic at its start, unless told otherwise."""
    named = {"bootstrap_servers": servers, "topic": topic, "group_id": f"{topic}-group", "stop_at_end": True}
    named |= how_to_reach()
    return {"kind": "kafka", "kafka": named | others}


def on_free_port(config: dict[str, Any]) -> dict[str, Any]:
    return config | {"server": {"enabled": True, "port": free_port()}}


@dataclass(frozen=True)
class Step:
    """What one step decided, all in the pool's order."""

    number: int
    result: str
    ids: tuple[str | None, ...]
    coefficients: tuple[float, ...]
    losses: tuple[float, ...]
    selected: tuple[str | None, ...]


def step_of(number: int, pool: Sequence[Sample], report: StepReport) -> Step:
    ids = tuple(sample.id for sample in pool)
    return Step(number, report.result, ids, report.coefficients, report.losses, tuple(ids[i] for i in report.selected))


def serve_until(config: dict[str, Any], last_step: int | None = None) -> tuple[Summary, list[Step]]:
    """Run the service here, up to a step or to the end of its stream."""
    stop = threading.Event()
    steps: list[Step] = []

    def on_step(number: int, pool: Sequence[Sample], report: StepReport) -> None:
        steps.append(step_of(number, pool, report))
        if number == last_step:
            stop.set()

    return serve(Settings(**config), stop, Watcher(on_step)), steps


class CrashError(Exception):
    """Stands for a kill: nothing is saved."""


def serve_with_crashes(config: dict[str, Any], crashes: list[int]) -> Summary:
    """A run that ends after each of these steps as if it was killed, is started again, and goes on to its end."""
    for last in crashes:

        def crash(number: int, *_: object, last: int = last) -> None:
            if number == last:
                raise CrashError

        with pytest.raises(CrashError):
            serve(Settings(**config), threading.Event(), Watcher(crash))
    return serve(Settings(**config), threading.Event())


def obey(orders: Orders, outcome: Outcome, detail: str) -> threading.Thread:
    """Settle the next order on a thread of its own, which is to be joined."""

    def work() -> None:
        while (order := orders.take()) is None:
            orders.wait(30)
        order.settle(outcome, detail)

    thread = threading.Thread(target=work)
    thread.start()
    return thread


@contextmanager
def serving(config: dict[str, Any]) -> Iterator[list[Summary]]:
    """The service in a thread, stopped at the end; what it came to is then in the list."""
    stop, summaries = threading.Event(), list[Summary]()
    thread = threading.Thread(target=lambda: summaries.append(serve(Settings(**config), stop)))
    thread.start()
    try:
        yield summaries
    finally:
        stop.set()
        thread.join(LONG_S)
    assert not thread.is_alive()
    assert summaries, "the service failed"


def run_and_terminate(config: dict[str, Any], ready: Callable[[], bool], then: Callable[[], None] | None = None) -> int:
    """What `stream-trainer run` does, in this process, with a real SIGTERM once `ready`. Returns the exit code."""
    waited: list[BaseException] = []

    def terminate() -> None:
        try:
            wait_for(ready)
        except BaseException as error:
            waited.append(error)
        os.kill(os.getpid(), signal.SIGTERM)
        if then is not None:
            then()

    previous = signal.signal(signal.SIGTERM, lambda *_: None)  # should the run end before its SIGTERM comes
    thread = threading.Thread(target=terminate)
    thread.start()
    try:
        code = run(Settings(**config))
    finally:
        thread.join(LONG_S)
        signal.signal(signal.SIGTERM, previous)
    assert not waited, waited
    return code


def run_main(folder: Path, config: dict[str, Any]) -> int:
    """`stream-trainer run` in this process, to its end, logging errors only. Returns the exit code."""
    file = folder / "settings.yaml"
    file.write_text(yaml.safe_dump(config | {"log": {"level": "ERROR"}}))
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        return main(["run", f"--config={file}"])
    finally:
        gc.unfreeze()
        root.handlers[:], root.level = handlers, level
        logging.captureWarnings(False)


@contextmanager
def command(folder: Path, config: dict[str, Any]) -> Iterator[subprocess.Popen[bytes]]:
    """`stream-trainer run` as a process, with its log in `folder/log`; killed if it still runs at the end."""
    file = folder / "settings.yaml"
    file.write_text(yaml.safe_dump(config | {"log": {"level": "DEBUG"}}))
    with (folder / "log").open("wb") as log, start_command(file, log) as process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def start_python(folder: Path, code: str, config: dict[str, Any]) -> Iterator[subprocess.Popen[bytes]]:
    """Code of a test's own in place of the command, whose arguments it gets; its log is in `folder/log`."""
    file = folder / "settings.yaml"
    file.write_text(yaml.safe_dump(config))
    with (folder / "log").open("wb") as log, start_command(file, log, code) as process:
        yield process


def start_command(config: Path, stderr: Any, code: str = MAIN) -> subprocess.Popen[bytes]:
    paths = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    arguments = [sys.executable, "-c", code, "run", f"--config={config}"]
    return subprocess.Popen(arguments, env=os.environ | paths, stdin=subprocess.DEVNULL, stderr=stderr)


def run_command(folder: Path, config: dict[str, Any]) -> int:
    """Run to the end; returns the exit code."""
    with command(folder, config) as process:
        return process.wait(LONG_S)


def interrupt_command(folder: Path, config: dict[str, Any], number: signal.Signals, step: int) -> int:
    """Run, send the signal as soon as `step` is made, and return the exit code."""
    with command(folder, config) as process:
        wait_for(lambda: f": step {step}: " in (folder / "log").read_text() or process.poll() is not None)
        process.send_signal(number)
        return process.wait(LONG_S)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LONG_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def get(config: dict[str, Any], path: str) -> tuple[int, str]:
    """Status and body of a page of the service; status 0 while it does not listen."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{config['server']['port']}{path}", timeout=LONG_S) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()
    except (urllib.error.URLError, ConnectionError):
        return 0, ""


def metrics(config: dict[str, Any]) -> dict[str, float]:
    """Values by `name{labels}` as `/metrics` spells it, without the common prefix."""
    _, page = get(config, "/metrics")
    lines = [line.rpartition(" ") for line in page.splitlines() if not line.startswith("#")]
    return {name.removeprefix("stream_trainer_"): float(value) for name, _, value in lines}


def decided(config: dict[str, Any]) -> float:
    """Records decided over the life of the model, as `/metrics` has it."""
    return sum(value for name, value in metrics(config).items() if name.startswith("records_total"))


def state_of(config: dict[str, Any]) -> str | None:
    status, page = get(config, "/status")
    state: str | None = json.loads(page)["state"] if status == 200 else None
    return state


def checkpoints(config: dict[str, Any]) -> list[Path]:
    """Oldest first."""
    return [found.path for found in reversed(checkpoints_in(Path(config["checkpoint"]["dir"])))]


def trainer_json(config: dict[str, Any]) -> dict[str, Any]:
    """What the newest checkpoint says of step, cursor and source."""
    state: dict[str, Any] = json.loads((checkpoints(config)[-1] / "trainer.json").read_text())
    return state


def counts(config: dict[str, Any]) -> dict[str, int]:
    """Records by outcome, of the newest checkpoint."""
    found: dict[str, int] = trainer_json(config)["cursor"]["counts"]
    return found


def hashes(checkpoint: Path) -> dict[str, str]:
    """SHA-256 of every file of a checkpoint but the manifest, which holds the time."""
    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    return {name: file["sha256"] for name, file in files.items()}


@contextmanager
def fifo(path: Path) -> Iterator[Callable[[bytes], None]]:
    """A pipe that holds its reader up until the yielded function writes to it."""
    os.mkfifo(path)

    def write(content: bytes) -> None:
        path.write_bytes(content)

    try:
        yield write
    finally:
        with suppress(OSError):  # a reader that is still held up sees an empty file
            os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))


def note_trainers(monkeypatch: pytest.MonkeyPatch) -> list[Trainer]:
    """Those that the service puts together from now on, as it does so."""
    made: list[Trainer] = []

    class Noted(Trainer):
        def __init__(self, *arguments: Any, **parts: Any) -> None:
            super().__init__(*arguments, **parts)
            made.append(self)

    monkeypatch.setattr(assembly, "Trainer", Noted)
    return made

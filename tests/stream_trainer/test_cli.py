"""Every mistake, through the real command: one line on standard error, exit code 2, no traceback."""

import gc
import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import pytest

from stream_trainer.cli import main
from stream_trainer.commands import check as checks
from stream_trainer.errors import DataLossError
from stream_trainer.settings.loading import load_settings
from stream_trainer.settings.mistakes import fields, section_of
from stream_trainer.settings.schema import Settings


@dataclass(frozen=True)
class Mistake:
    """A command line with one thing wrong, and what the line must say of it."""

    name: str
    says: Sequence[str]
    options: Sequence[str] = ()
    environment: dict[str, str] = field(default_factory=dict)
    file: str | None = None
    command: Sequence[str] = ("run",)


def option(text: str, *says: str, command: Sequence[str] = ("run",)) -> Mistake:
    return Mistake(text, (text.removeprefix("--").partition("=")[0], *says), [text], command=command)


def in_file(text: str, *says: str) -> Mistake:
    return Mistake(f"file {text!r}", says, file=text)


def variable(name: str, value: str, *says: str) -> Mistake:
    return Mistake(f"{name}={value}", says, environment={name: value})


MISTAKES = [
    # Names
    option("--sorce.kind=jsonl", "did you mean source.kind?"),
    option("--selection.pool=8", "did you mean selection.pool_size?"),
    option("--learning_rate=1", "did you mean optimizer.learning_rate?"),
    option("--verbose=1", "unknown setting", "the top level has source"),
    variable("STREAM_TRAINER_SORCE__KIND", "jsonl", "sorce.kind (environment)", "did you mean source.kind?"),
    variable("STREAM_TRAINER_LOGLEVEL", "INFO", "loglevel (environment)"),
    variable("STREAM_TRAINER_SERVER__PROT", "1", "server.prot (environment)", "did you mean server.port?"),
    in_file("bufer: {max_records: 5}", "bufer", "did you mean buffer?"),
    in_file("model: {lora: {rnak: 4}}", "model.lora.rnak", "did you mean model.lora.rank?"),
    option("--selection.chosen=4", "is now selection.batch_size; rename it"),
    option("--selection.solver_time_limit_s=1", "is gone", "or limit iterations by"),
    in_file(
        "selection: {filter_then_weight: {solver_time_limit_s: 60.0}}",
        "selection.filter_then_weight.solver_time_limit_s",
        "is gone, for a limit in seconds made results depend on the machine's load; leave it out",
    ),
    in_file("selection: {survivors: 2}", "selection.survivors", "is now selection.filter_then_weight.keep_ratio"),
    # Values
    option("--selection.weigh=uniform", "is now selection.draw=uniform with selection.weigh=equal"),
    option("--selection.weigh=full", "is now selection.weigh=equal"),
    option("--selection.profile=cheap", "=cheap", "'thrifty', 'auto', 'thorough' or 'plain'"),
    option("--training.max_steps=ten", "=ten", "is no whole number"),
    option("--training.max_steps=1.5", "=1.5", "is no whole number"),
    option("--optimizer.learning_rate=0", "=0", "more than 0"),
    option("--optimizer.learning_rate=nan", "=nan", "must be"),
    option("--optimizer.betas=[0.9]", "betas[1]", "needs a value"),
    option("--optimizer.betas=0.9", "=0.9", "is no list"),
    option("--server.port=65536", "=65536", "at most 65535"),
    option("--server.enabled=maybe", "=maybe", "neither true nor false"),
    option("--log.level=verbose", "=verbose", "'DEBUG', 'INFO', 'WARNING' or 'ERROR'"),
    option("--source.kafka.topic=my topic", "'my topic'", "does not match"),
    option("--checkpoint.keep=1", "=1", "at least 2"),
    option("--buffer=small", "=small", "is no mapping"),
    variable("STREAM_TRAINER_CHECKPOINT__EVERY_SECONDS", "0", "checkpoint.every_seconds=0 (environment)"),
    variable("STREAM_TRAINER_MODEL__LORA__RANK", "-1", "model.lora.rank=-1 (environment)", "at least 1"),
    in_file("log: {level: on}", "log.level=True", "must be"),
    in_file("model: {dtype: float16}", "model.dtype=float16", "did you mean"),
    in_file("source: {kafka: {sasl_password: 12345}}", "source.kafka.sasl_password=**********", "is no text"),
    # Files of settings
    in_file("log:\n  level: INFO\n level: x", "line 3"),
    in_file("log: {}\nlog: {}", "line 2: log is set twice"),
    in_file("- log", "no mapping at its top level"),
    in_file("", "is empty"),
    Mistake("no such file", ("/no/such.yaml", "cannot be read"), ["--config=/no/such.yaml"]),
    variable("STREAM_TRAINER_CONFIG", "/no/such.yaml", "/no/such.yaml", "cannot be read"),
    # What does not go together
    option("--selection.batch_size=99", "=99", "selection.pool_size=6"),
    option("--selection.waiting=600", "waiting=600", "buffer.max_records=512"),
    Mistake("a large pool", ("intake=128 is less than the 600",), ["--selection.pool_size=600"]),
    option("--optimizer.schedule=cosine", "=cosine", "needs optimizer.decay_steps"),
    option("--dead_letters.kind=topic", "dead_letters.kind=topic", "source.kind=kafka"),
    option("--source.kafka.sasl_mechanism=PLAIN", "=PLAIN", "source.kafka.security_protocol=PLAINTEXT"),
    option("--source.kind=kafka", "needs source.kafka.topic"),
    Mistake(
        "two models", ("model: exactly one of name and config", "both are"), ["--model.config={model_type: llama}"]
    ),
    # What is not there
    option("--target.path=none.jsonl", "=none.jsonl", "No such file"),
    option("--evaluation.retention_path=none.jsonl", "=none.jsonl", "No such file"),
    option("--source.jsonl.path=none.jsonl", "=none.jsonl", "No such file"),
    option("--model.name=./none", "=./none", "is not a directory"),
    option("--model.tokenizer=./none", "=./none", "is not a directory"),
    option("--model.gguf_file=none.gguf", "none.gguf", "No such file"),
    option("--model.gguf_file=../none.gguf", "=../none.gguf leads out of its directory"),
    option("--model.device=cuda:9999", "=cuda:9999", "is not available"),
    option("--model.device=gpu", "=gpu", "set it to cpu, cuda or cuda:N"),
    option("--checkpoint.dir=target.jsonl/x", "=target.jsonl/x", "no directory"),
    option("--dead_letters.path=model", "=model", "is a directory"),
    option("--server.host=192.0.2.1", "server.host=192.0.2.1", "cannot be listened on", command=("config", "check")),
    # The command line itself
    Mistake("stray word", ("unexpected argument stray",), ["stray"]),
    Mistake("no value", ("--log.level has no value",), ["--log.level"]),
    Mistake("no such command", ("invalid choice: 'rum'",), command=("rum",)),
    Mistake("no such action", ("invalid choice: 'shwo'",), command=("config", "shwo")),
]

BASE = {
    "STREAM_TRAINER_SOURCE__KIND": "jsonl",
    "STREAM_TRAINER_SOURCE__JSONL__PATH": "-",
    "STREAM_TRAINER_MODEL__NAME": "model",
    "STREAM_TRAINER_TARGET__PATH": "target.jsonl",
    "STREAM_TRAINER_SERVER__PORT": "0",
}


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory and an environment in which `config check` succeeds."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").touch()
    (tmp_path / "target.jsonl").write_text('{"text": "a"}\n')
    for name, value in BASE.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_a_mistake_is_one_line_and_exit_code_2(
    mistake: Mistake, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in mistake.environment.items():
        monkeypatch.setenv(name, value)
    options = list(mistake.options)
    if mistake.file is not None:
        Path("settings.yaml").write_text(mistake.file)
        options.append("--config=settings.yaml")
    assert main([*mistake.command, *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    for words in mistake.says:
        assert words in line
    assert ";" in line  # what is wrong; what to do


@pytest.mark.parametrize("extra", ["lora.rank=4", "gguf_file=target.gguf"])
def test_an_extra_that_is_not_installed(
    extra: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("model/target.gguf").touch()
    monkeypatch.setattr(checks, "find_spec", lambda _: None)
    assert main(["run", f"--model.{extra}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"error: model.{extra} needs the module" in line
    assert "pip install 'stream-trainer[" in line


def test_a_port_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["config", "check", f"--server.port={port}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"error: server.port={port} cannot be listened on" in line


def test_several_mistakes_are_as_many_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--sorce.kind=x", "--server.port=-1", "--log.format=xml"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_check_says_what_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "check"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert "ok: target.path: target.jsonl, 1 samples" in out
    assert all(line.startswith("ok: ") for line in out)


def test_show_prints_what_loads_again(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", "--training.seed=7"]) == 0
    Path("shown.yaml").write_text(capsys.readouterr().out)
    assert load_settings(Path("shown.yaml"), []).training.seed == 7


def test_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "schema"]) == 0
    assert "selection" in json.loads(capsys.readouterr().out)["properties"]


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Stands in for the service, which other tests run for real."""
    module = ModuleType("stream_trainer.service")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr("stream_trainer.monitoring.logs.configure_logging", lambda _: None)
    return module


def test_run_hands_over_the_settings_and_returns_the_exit_code(service: ModuleType) -> None:
    seen: list[Settings] = []

    def run(settings: Settings) -> int:
        assert gc.isenabled()  # which it is not while libraries are loaded
        seen.append(settings)
        return 0

    service.run = run  # type: ignore[attr-defined]
    assert main(["run", "--training.seed", "7"]) == 0
    assert [settings.training.seed for settings in seen] == [7]


@pytest.mark.parametrize(("error", "code"), [(DataLossError("offsets 3 to 9 are gone"), 4), (KeyboardInterrupt(), 130)])
def test_what_ends_a_run_becomes_its_exit_code(
    error: BaseException, code: int, service: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(settings: Settings) -> int:
        raise error

    service.run = run  # type: ignore[attr-defined]
    assert main(["run"]) == code
    assert capsys.readouterr().err == ("error: offsets 3 to 9 are gone\n" if code == 4 else "")


def test_a_fault_of_ours_is_not_hidden(service: ModuleType) -> None:
    def run(settings: Settings) -> int:
        raise ZeroDivisionError

    service.run = run  # type: ignore[attr-defined]
    with pytest.raises(ZeroDivisionError):
        main(["run"])


@pytest.mark.parametrize("command", ["", "run", "produce", "config"])
def test_help_teaches(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command.split(), "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: stream-trainer")
    if command in ("run", "config"):
        assert "--selection.batch_size=INTEGER  (default 4; >= 1)" in out
        assert "--selection.pool_size" not in out, "only what matters first"
        assert "--help-all" in out
    else:
        assert "examples:" in out


@pytest.mark.parametrize("command", ["run", "config"])
def test_help_all_lists_every_setting(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help-all"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "--selection.pool_size=INTEGER  (default 6; >= 1)" in out
    assert "STREAM_TRAINER_SOURCE__KAFKA__TOPIC=samples" in out
    missing = [name for name, field in fields() if section_of(field) is None and f"--{name}=" not in out]
    assert missing == []


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("stream-trainer ")


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    code = "import sys; from stream_trainer.cli import main; sys.exit(main())"
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-c", code, "config", "schema"]
    paths = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    ended = subprocess.run(
        command, env=os.environ | paths, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60
    )
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize("method", ["dual-sft", "cluster-ucb"])
def test_select_passes_its_options_on(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model=model", "--pool=nowhere.jsonl", "--target=target.jsonl", "--out=chosen"]
    assert main(["select", method, *options]) == 2
    assert "nowhere.jsonl" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(["select", method, "--help"])
    assert ended.value.code == 0
    assert "--pool" in capsys.readouterr().out


def test_select_knows_its_methods(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["select", "best"]) == 2
    assert "invalid choice: 'best'" in capsys.readouterr().err

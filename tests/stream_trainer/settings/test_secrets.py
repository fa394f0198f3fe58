"""A password that stands in a wrong place, in a wrong form or under a wrong name appears in no output."""

import itertools
import json
import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import pytest

from stream_trainer.cli import main
from stream_trainer.settings.secrets import MASK, shown_name, shown_usage, shown_value

PLANTED = "hunter2Zq9"

NAMES = (
    *("source.kafka.sasl_password", "source.kafka.ssl_password"),
    # misspelt
    *("source.kafka.sasl_pasword", "source.kafka.sasl_pwd", "source.kafka.saslpassword", "source.kafka.sasl-password"),
    *("source.kafka.SASL_PASSWORD", "source.kafka.password", "source.kafka.sasl_jaas_config"),
    # in another setting, a line too high or too low
    *("source.kafka.sasl_mechanism", "source.kafka.security_protocol", "source.kafka.ssl_check_hostname"),
    *("source.kafka.bootstrap_servers", "source.kafka.sasl_password_file", "source.kafka.sasl_token_file"),
    # nested too deep, not deep enough, or as the whole section
    *("sasl_password", "kafka.sasl_password", "source.sasl_password", "source.kafka.sasl.password"),
    *("source.kafka.sasl_password.value", "source.kafka", "source", "dead_letters.sasl_password"),
)
VALUES = (
    f"[{PLANTED}]",
    f"[{PLANTED}, [1]]",
    f"{{a: {PLANTED}}}",
    f'{{"{PLANTED}": 1}}',
    f'{{"sasl_password": "{PLANTED}"',
    f'{{"kafka": {{"sasl_password": "{PLANTED}"',
    f"{{sasl_pasword: {PLANTED}}}",
    f"{{kafka: {{sasl_password: {PLANTED}, sasl_password: {PLANTED}}}}}",
    f"sasl_password={PLANTED}",
    f"user:{PLANTED}@broker:9092",
    f"SASL_SSL://user:{PLANTED}@broker:9092",
    f"*{PLANTED}",
    f"!{PLANTED}'s",
    f"'{PLANTED}",
    f"--{PLANTED}",
    f"{PLANTED}: {PLANTED}",
)


@dataclass(frozen=True)
class Spelling:
    """One way to get it wrong."""

    arguments: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    file: str | None = None


def spellings(name: str, value: str) -> list[Spelling]:
    parts = name.split(".")
    nested = "".join(f"{'  ' * depth}{part}:\n" for depth, part in enumerate(parts))
    return [
        Spelling((f"--{name}={value}",)),
        Spelling((f"--{name}", value)),
        Spelling((f"--{name}", *value.split(), PLANTED)),
        Spelling((name, value)),
        Spelling(environment={"STREAM_TRAINER_" + name.upper().replace(".", "__"): value}),
        Spelling(file=f"{nested[:-1]} {value}\n"),
    ]


ODD = [
    Spelling(environment={"STREAM_TRAINER_CONFIG": f"{{sasl_password: {PLANTED}}}"}),
    Spelling(environment={"stream_trainer_source__kafka__sasl_pasword": PLANTED}),
    Spelling(environment={f"STREAM_TRAINER_SOURCE__KAFKA__{PLANTED}": "1"}),
    Spelling(environment={f"STREAM_TRAINER_{PLANTED}": "1"}),
    Spelling(environment={"STREAM_TRAINER_SOURCE__KAFKA__SASL_PASSWORD": "null", "STREAM_TRAINER_SOURCE": PLANTED}),
    Spelling((f"--source.kafka.sasl_password:{PLANTED}=1",)),
    Spelling((f"--source.kafka.sasl_password.{PLANTED}=1",)),
    Spelling((f"--source.kafka.sasl_password={PLANTED}", "two", "words")),
    Spelling((f"--selection.weigh_options={{password: {PLANTED}}}",)),
    Spelling((f"--model.config={{api_key: {PLANTED}}}",)),
    Spelling(file=f"source:\n  kafka:\n    sasl_password:{PLANTED}\n"),
    Spelling(file=f"source:\n  kafka:\n    sasl_password {PLANTED}:\n"),
    Spelling(file=f"source:\n  kafka:\n    sasl_password: a\n    {PLANTED}\n"),
    Spelling(file=f"source:\n  kafka:\n    sasl_password: {PLANTED}\n    sasl_password: {PLANTED}\n"),
    Spelling(file=f"{PLANTED}: 1\n{PLANTED}: 2\n"),
    Spelling(file=f"sasl_password: {PLANTED}: x\n"),
    Spelling(file=f"{PLANTED}"),
]

WRONG = [
    spelling
    for name, value in itertools.product(NAMES, VALUES)
    if "bootstrap_servers" not in name or "@" in value  # any other text may be an address
    for spelling in spellings(name, value)
]
PARTS = 4

BASE = {
    "STREAM_TRAINER_SOURCE__KIND": "jsonl",
    "STREAM_TRAINER_SOURCE__JSONL__PATH": "-",
    "STREAM_TRAINER_MODEL__NAME": "model",
    "STREAM_TRAINER_TARGET__PATH": "target.jsonl",
}


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in BASE.items():
        monkeypatch.setenv(name, value)


def output(command: tuple[str, ...], spelling: Spelling, capsys: pytest.CaptureFixture[str]) -> str:
    """All that the command says, and how it ended."""
    arguments = list(spelling.arguments)
    if spelling.file is not None:
        Path("settings.yaml").write_text(spelling.file)
        arguments.append("--config=settings.yaml")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in spelling.environment.items():
            patch.setenv(name, value)
        try:
            ended = str(main([*command, *arguments]))
        except SystemExit as error:
            ended = str(error.code)
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return said.out + said.err + ended


def test_there_are_many_of_them() -> None:
    assert len(WRONG) > 1000


@pytest.mark.parametrize("part", range(PARTS))
def test_no_wrong_spelling_shows_a_password(part: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Many in one test, for a fixture takes longer than a command; every fifth, and each kind among them."""
    commands = itertools.cycle([("config", "show"), ("config",), ("run",), ()])
    leaks = [
        (command, spelling, said)
        for command, spelling in zip(commands, [*WRONG[part :: 5 * PARTS], *ODD[part::PARTS]], strict=False)
        if PLANTED.lower() in (said := output(command, spelling, capsys)).lower()
    ]
    assert leaks[:3] == []


@pytest.mark.parametrize("options", [["--sasl-password", PLANTED], [f"--sasl-pasword={PLANTED}"], ["--sasl", PLANTED]])
def test_produce_quotes_no_password(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["produce", "none.jsonl", "--topic=t", *options]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: unrecognized arguments; see ")
    assert PLANTED not in said


def test_a_password_in_the_right_place_is_in_no_output_either(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    module = ModuleType("stream_trainer.service")
    module.run = lambda settings: print(settings, repr(settings)) or 0  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr("stream_trainer.monitoring.logs.configure_logging", lambda _: None)
    caplog.set_level(logging.DEBUG)
    Path("target.jsonl").write_text('{"text": "a"}\n')
    Path("model").mkdir()
    Path("model/config.json").write_text("{}")
    Path("model/model.safetensors").touch()
    sasl = {"security_protocol": "SASL_SSL", "sasl_mechanism": "PLAIN", "sasl_username": "u", "sasl_password": PLANTED}
    options = [f"--source.kafka.{name}={value}" for name, value in sasl.items()]
    kafka = ["--source.kind=kafka", "--source.kafka.topic=t", "--source.kafka.bootstrap_servers=127.0.0.1:1"]
    assert main(["run", *options]) == 0
    assert main(["config", "show", *options]) == 0
    assert main(["config", "check", *options, *kafka, "--source.kafka.bootstrap_timeout_s=0.3"]) == 2
    said = capsys.readouterr()
    assert MASK in said.out
    assert PLANTED not in said.out + said.err + caplog.text


def test_what_is_no_password_is_still_named() -> None:
    assert shown_value("log.level", "verbose", private=False) == "verbose"
    assert shown_value("source.kafka.bootstrap_timeout_s", -1, private=True) == "-1"
    assert shown_name("source.kafka.sasl_pasword") == "source.kafka.sasl_pasword"
    assert shown_usage("invalid choice: 'rum'", ["rum"]) == "invalid choice: 'rum'"
    assert json.loads(shown_value("x", [1, 2], private=False)) == [1, 2]

"""Files for TLS and SASL that are there and do not fit are named before anything connects."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kafka.net.sasl.oauth import SaslMechanismOAuth
from pydantic import ValidationError

from stream_trainer.cli import main
from stream_trainer.errors import SettingsError
from stream_trainer.settings.secrets import MAX_SECRET_BYTES
from stream_trainer.settings.sections.source import KafkaSettings
from stream_trainer.sources.connection import probe
from stream_trainer.sources.security import security_options

PASSWORD = "right-password"
needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a certificate and its key, the key under a password, another key, and files that hold none."""
    folder = tmp_path_factory.mktemp("tls")
    for name in ("client", "other"):
        make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={name}"]
        subprocess.run(
            [*make, "-keyout", f"{name}.key", "-out", f"{name}.pem"], cwd=folder, check=True, capture_output=True
        )
    lock = ["openssl", "rsa", "-aes256", "-passout", f"pass:{PASSWORD}", "-in", "client.key", "-out", "locked.key"]
    subprocess.run(lock, cwd=folder, check=True, capture_output=True)
    (folder / "both.pem").write_text((folder / "client.key").read_text() + (folder / "client.pem").read_text())
    (folder / "garbage.pem").write_text("-----BEGIN CERTIFICATE-----\nno\n-----END CERTIFICATE-----\n")
    (folder / "garbage.key").write_text("-----BEGIN PRIVATE KEY-----\nno\n-----END PRIVATE KEY-----\n")
    (folder / "empty.pem").touch()
    return folder


def settings(folder: Path, **values: str) -> KafkaSettings:
    """TLS, with a port where nobody answers: what connects to it would wait for long."""
    paths = {name: folder / value if name.endswith("file") else value for name, value in values.items()}
    given: dict[str, Any] = {"topic": "t", "security_protocol": "SSL", "bootstrap_servers": "127.0.0.1:1"} | paths
    return KafkaSettings.model_validate(given)


MISFITS = [
    ({"ssl_cafile": "garbage.pem"}, "ssl_cafile={}/garbage.pem holds no certificate"),
    ({"ssl_cafile": "empty.pem"}, "ssl_cafile={}/empty.pem holds no certificate"),
    ({"ssl_certfile": "garbage.pem", "ssl_keyfile": "client.key"}, "ssl_certfile={}/garbage.pem holds no certificate"),
    ({"ssl_certfile": "client.pem", "ssl_keyfile": "other.key"}, "ssl_keyfile={}/other.key is the key of another"),
    (
        {"ssl_certfile": "client.pem", "ssl_keyfile": "locked.key", "ssl_password": "wrong-password"},
        "ssl_password does not open source.kafka.ssl_keyfile={}/locked.key",
    ),
    (
        {"ssl_certfile": "client.pem", "ssl_keyfile": "locked.key"},
        "ssl_password is unset but needed for source.kafka.ssl_keyfile={}/locked.key",
    ),
    ({"ssl_certfile": "client.pem"}, "ssl_certfile={}/client.pem holds no private key"),
    ({"ssl_certfile": "client.pem", "ssl_keyfile": "client.pem"}, "ssl_keyfile={}/client.pem holds no private key"),
    ({"ssl_certfile": "client.pem", "ssl_keyfile": "garbage.key"}, "ssl_keyfile={}/garbage.key holds a private key"),
    ({"ssl_keyfile": "client.key"}, "ssl_keyfile={}/client.key has no effect without"),
    ({"ssl_cafile": "missing.pem"}, "ssl_cafile={}/missing.pem cannot be read"),
]


@needs_openssl
@pytest.mark.parametrize(("wrong", "line"), MISFITS, ids=str)
def test_tls_files_that_do_not_fit(tls: Path, wrong: dict[str, str], line: str) -> None:
    with pytest.raises(SettingsError) as raised:
        probe(settings(tls, **wrong))
    assert str(raised.value).startswith("source.kafka." + line.format(tls))
    assert "wrong-password" not in str(raised.value)


@needs_openssl
@pytest.mark.parametrize("command", [["run"], ["config", "check"]])
def test_they_end_a_command_with_exit_code_2(
    tls: Path, command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("target.jsonl").write_text('{"text": "a"}\n')
    Path("model").mkdir()
    Path("model/config.json").write_text("{}")
    Path("model/model.safetensors").touch()
    options = {f"source.kafka.{name}": value for name, value in {"topic": "t", "security_protocol": "SSL"}.items()}
    options |= {"source.kafka.ssl_cafile": f"{tls}/garbage.pem", "model.name": "model", "target.path": "target.jsonl"}
    options |= {
        "source.kafka.bootstrap_servers": "127.0.0.1:1",
        "source.kafka.bootstrap_timeout_s": "0.3",
        "server.port": "0",
    }
    assert main([*command, *(f"--{name}={value}" for name, value in options.items())]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: source.kafka.ssl_cafile={tls}/garbage.pem holds no certificate")


@needs_openssl
@pytest.mark.parametrize(
    "right",
    [
        {"ssl_cafile": "client.pem"},
        {"ssl_certfile": "client.pem", "ssl_keyfile": "client.key"},
        {"ssl_certfile": "both.pem"},
        {"ssl_certfile": "client.pem", "ssl_keyfile": "locked.key", "ssl_password": PASSWORD},
        {"ssl_certfile": "client.pem", "ssl_keyfile": "locked.key", "ssl_password_file": "password"},
    ],
    ids=str,
)
def test_tls_files_that_fit(tls: Path, right: dict[str, str]) -> None:
    (tls / "password").write_text(f"{PASSWORD}\n")
    options = security_options(settings(tls, **right))
    assert options["ssl_password"] == (PASSWORD if "locked.key" in right.values() else None)


SASL = {"security_protocol": "SASL_SSL", "sasl_mechanism": "PLAIN", "sasl_username": "u"}
OAUTH = {"security_protocol": "SASL_SSL", "sasl_mechanism": "OAUTHBEARER"}


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (SASL, "needs sasl_password or sasl_password_file; set it"),
        ({**SASL, "sasl_password": "hunter2", "sasl_password_file": "/f"}, "exclude each other"),
        ({"ssl_password": "hunter2", "ssl_password_file": "/f"}, "exclude each other"),
        ({**SASL, "sasl_password_file": "hunter2"}, "sasl_password_file is no absolute path"),
        ({**OAUTH, "sasl_token_file": "hunter2"}, "sasl_token_file is no absolute path"),
        (OAUTH, "needs sasl_token_file; set it"),
        (
            {**SASL, "sasl_password": "p", "bootstrap_servers": "u:hunter2@h:1"},
            "bootstrap_servers takes host:port only",
        ),
    ],
    ids=str,
)
def test_credentials_that_are_not_complete(given: dict[str, str], line: str) -> None:
    with pytest.raises(ValidationError) as raised:
        KafkaSettings.model_validate(given)
    assert line in str(raised.value)
    assert "hunter2" not in str(raised.value)


def test_a_password_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("p\u00e4ss word\r\n")
    options = security_options(KafkaSettings.model_validate({**SASL, "sasl_password_file": file}))
    assert options["sasl_plain_password"] == "p\u00e4ss word"


@pytest.mark.parametrize(
    ("write", "problem"),
    [
        (Path.exists, "={path} cannot be read (No such file or directory)"),
        (lambda path: path.mkdir(), "={path} cannot be read (Is a directory)"),
        (lambda path: path.write_text("\n"), "={path} is empty"),
        (lambda path: path.write_bytes(b"\xff\xfe"), "={path} is not UTF-8"),
        (lambda path: path.write_bytes(b"x" * (MAX_SECRET_BYTES + 1)), f"={{path}} is larger than {MAX_SECRET_BYTES}"),
    ],
)
@pytest.mark.parametrize("name", ["sasl_password_file", "sasl_token_file"])
def test_a_file_that_holds_no_secret(tmp_path: Path, write: Callable[[Path], Any], problem: str, name: str) -> None:
    path = tmp_path / "secret"
    write(path)
    given = {**(SASL if name == "sasl_password_file" else OAUTH), name: path}
    with pytest.raises(SettingsError) as raised:
        security_options(KafkaSettings.model_validate(given))
    assert str(raised.value).startswith(f"source.kafka.{name}" + problem.format(path=path))


def test_a_password_given_as_a_path_is_not_quoted() -> None:
    with pytest.raises(SettingsError) as raised:
        security_options(KafkaSettings.model_validate({**SASL, "sasl_password_file": "/hunter/2"}))
    assert "hunter" not in str(raised.value)


def test_a_token_is_read_anew_for_every_connection(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("first.token\n")
    options = security_options(KafkaSettings.model_validate({**OAUTH, "sasl_token_file": file}))
    assert options["sasl_mechanism"] == "OAUTHBEARER"
    assert SaslMechanismOAuth(**options).auth_bytes() == b"n,,\x01auth=Bearer first.token\x01\x01"
    file.write_text("second.token\n")
    assert SaslMechanismOAuth(**options).auth_bytes() == b"n,,\x01auth=Bearer second.token\x01\x01"
    file.write_text("two tokens")
    with pytest.raises(SettingsError, match="holds no token") as raised:
        SaslMechanismOAuth(**options).auth_bytes()
    assert "two" not in str(raised.value)

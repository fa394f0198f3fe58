"""`stream-trainer models`: what is there, and which version servers are to use."""

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml

from stream_trainer.cli import main
from tests.helpers.publishing import Run


def published(folder: Path, count: int = 3) -> Path:
    with Run(folder) as run:
        for step in range(1, count + 1):
            run.checkpoint(step, target=2.0 - step / 10, retention=1.0 + step / 10)
    return run.versions


def models(directory: Path, *words: str) -> int:
    return main(["models", *words, f"--dir={directory}"])


def current(directory: Path) -> str:
    return os.readlink(directory / "current")


def test_the_list_says_what_is_there_and_what_is_current(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = published(tmp_path)
    (directory / "v000001-step-1" / "version.json").write_text("broken")
    (directory / "v000002-step-2.pin").touch()
    assert models(directory, "list") == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["version", "published", "target", "loss", "largest", "forgetting"]
    assert [line.split()[0] for line in lines] == ["*", "v000002-step-2", "v000001-step-1"]
    assert lines[0].split()[-2:] == ["1.7000", "0.2000"]
    assert lines[1].endswith("pinned")
    assert "unreadable" in lines[2]


def test_show_prints_the_card_or_all_that_is_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = published(tmp_path)
    assert models(directory, "show") == 0
    assert "# v000003-step-3" in capsys.readouterr().out
    assert models(directory, "show", "v000002-step-2", "--json") == 0
    assert json.loads(capsys.readouterr().out)["step"] == 2


def test_verify_finds_every_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = published(tmp_path)
    version = directory / "v000003-step-3"
    assert models(directory, "verify") == 0
    (version / "config.json").write_text("{}")
    (version / "model.safetensors").unlink()
    (version / "pytorch_model.bin").write_text("somebody else's")
    about = json.loads((version / "version.json").read_text())
    (version / "version.json").write_text(json.dumps({**about, "step": 4}))
    capsys.readouterr()
    assert models(directory, "verify") == 1
    assert capsys.readouterr().out.splitlines() == [
        "v000003-step-3: version.json is not as it was written",
        "v000003-step-3: model.safetensors is missing",
        "v000003-step-3: pytorch_model.bin is not of its files",
        "v000003-step-3: config.json has other contents than were published",
    ]


def test_after_a_rollback_the_trainer_leaves_current_alone_until_a_promotion(tmp_path: Path) -> None:
    directory = published(tmp_path)
    assert models(directory, "rollback") == 0
    assert current(directory) == "v000002-step-2"
    with Run(tmp_path) as run:
        run.checkpoint(4, target=1.0, retention=1.0)
        assert current(directory) == "v000002-step-2"
        assert run.names[-1] == "v000004-step-4"
        assert models(directory, "rollback") == 0  # one further
        assert current(directory) == "v000001-step-1"
        assert models(directory, "promote", "v000003-step-3") == 0
        assert current(directory) == "v000003-step-3"
        assert (directory / "v000003-step-3.pin").exists()
        run.checkpoint(5, target=1.0, retention=1.0)
        assert current(directory) == "v000005-step-5"
        assert models(directory, "promote", "v000004-step-4", "--hold") == 0
        run.checkpoint(6, target=1.0, retention=1.0)
        assert current(directory) == "v000004-step-4"


def test_a_rollback_while_versions_are_published_is_never_undone(tmp_path: Path) -> None:
    with Run(tmp_path) as run:
        for step in (1, 2, 3):
            run.checkpoint(step)
        roll = threading.Timer(0.05, models, (run.versions, "rollback"))
        roll.start()
        for step in range(4, 10):
            run.checkpoint(step)
        roll.join()
        _, _, to = (run.versions / "held").read_text().strip().rpartition(" to ")
        assert current(run.versions) == to
        run.checkpoint(10)
        assert current(run.versions) == to


def test_servers_are_told_of_another_current_version(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory, out = published(tmp_path), tmp_path / "told"
    code = f"import sys; open({str(out)!r}, 'a').write(sys.argv[1])"
    settings: dict[str, Any] = {
        "source": {"kafka": {"topic": "samples"}},
        "model": {"name": "model"},
        "target": {"path": "target.jsonl"},
        "publish": {"dir": str(directory), "command": [sys.executable, "-c", code, "{version}"]},
    }
    config = tmp_path / "settings.yaml"
    config.write_text(yaml.safe_dump(settings))
    assert main(["models", "rollback", f"--config={config}"]) == 0
    assert out.read_text() == "v000002-step-2"
    word = '--publish.command=["/no/such/command"]'
    assert main(["models", "promote", "v000003-step-3", f"--config={config}", word]) == 2
    assert current(directory) == "v000003-step-3"
    assert capsys.readouterr().err.startswith("error: current has moved, but publish.command: /no/such/command")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["list", "--dir=/no/such/place"], "publish.dir=/no/such/place cannot be used"),
        (["show", "v9", "--dir={dir}"], "version v9 is not in {dir}; stream-trainer models list shows what is there"),
        (["promote", "--dir={dir}"], "promote needs a version; stream-trainer models list shows what is there"),
        (["promote", "../other", "--dir={dir}"], "version ../other is not in {dir}"),
        (["rollback", "v1", "--dir={dir}"], "rollback goes to the version before; for v1 use promote --hold"),
        (["rollback", "--dir={dir}"], "there is no version before v000001-step-1 in {dir}"),
        (["rollback", "--dir={dir}", "--config=x.yaml"], "--dir names the directory already"),
        (["undo", "--dir={dir}"], "argument ACTION: invalid choice: 'undo'"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = published(tmp_path, count=1)
    capsys.readouterr()
    assert main(["models", *(word.replace("{dir}", str(directory)) for word in words)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {said.replace('{dir}', str(directory))}")
    assert error.count("\n") == 1
    assert current(directory) == "v000001-step-1"
    assert not (directory / "held").exists()


def test_nothing_published_yet_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert models(tmp_path, "show") == 2
    assert capsys.readouterr().err == (
        f"error: no version is current in {tmp_path}; stream-trainer models list shows what is there\n"
    )

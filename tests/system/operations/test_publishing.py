"""A run that publishes: what servers get is what was trained, and nothing that fails there stops it."""

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from stream_trainer.cli import main
from stream_trainer.service import serve
from stream_trainer.settings.schema import Settings
from stream_trainer.training.watchers import Watcher
from tests.helpers.service import checkpoints, configuration, get, goods, jsonl, on_free_port, serve_until, write_lines
from tests.stream_trainer.publishing.test_hooks import http_server


def publishing(folder: Path, records: int = 40, **sections: Any) -> dict[str, Any]:
    write_lines(folder / "stream.jsonl", goods(records))
    base: dict[str, dict[str, Any]] = {
        "evaluation": {"every_steps": 1, "retention_path": str(folder / "target.jsonl")},
        "checkpoint": {"every_steps": 2, "dir": str(folder / "checkpoints")},
        "publish": {"dir": str(folder / "published")},
    }
    merged = {name: {**base.get(name, {}), **sections.get(name, {})} for name in base | sections}
    return configuration(folder, jsonl(folder / "stream.jsonl"), **merged)


def version_of(folder: Path) -> dict[str, Any]:
    about: dict[str, Any] = json.loads((folder / "published" / "current" / "version.json").read_text())
    return about


def test_what_is_published_is_the_last_checkpoint(tmp_path: Path) -> None:
    events: list[tuple[int, str, str]] = []
    config = publishing(tmp_path)
    watcher = Watcher(on_event=lambda *event: events.append(event))
    summary = serve(Settings(**config), threading.Event(), watcher)
    current, checkpoint = tmp_path / "published" / "current", checkpoints(config)[-1]
    about = version_of(tmp_path)
    assert (about["step"], about["checkpoint"]) == (summary.step, checkpoint.name)
    assert about["records"] == {name: count for name, count in summary.counts.items()}
    assert about["positions"] == {f"{tmp_path / 'stream.jsonl'}:0": (tmp_path / "stream.jsonl").stat().st_size}
    assert about["losses"] == summary.losses
    assert about["start_losses"]["target"] > about["losses"]["target"], "it learned something"
    ours = AutoModelForCausalLM.from_pretrained(current).state_dict()
    saved = AutoModelForCausalLM.from_pretrained(checkpoint / "model").state_dict()
    assert all(weight.equal(saved[name]) for name, weight in ours.items())
    assert AutoTokenizer.from_pretrained(current)("a")["input_ids"]
    assert main(["models", "verify", f"--dir={tmp_path / 'published'}"]) == 0
    assert {kind for _, kind, _ in events} == {"published"}


def test_adapters_go_to_a_vllm_server(tmp_path: Path) -> None:
    with http_server(lambda _, __: (200, "ok")) as (url, asked):
        config = publishing(
            tmp_path,
            model={"config": configuration(tmp_path, {})["model"]["config"], "tokenizer": "bytes", "lora": {"rank": 2}},
            publish={"dir": str(tmp_path / "published"), "merged": False, "vllm": {"url": url}},
        )
        serve_until(config)
    page, _, body = asked[-1]
    path = Path(json.loads(body)["lora_path"])
    assert page == "/v1/load_lora_adapter"
    assert path.parent.name == os.readlink(tmp_path / "published" / "current")
    assert sorted(file.name for file in path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_a_run_goes_on_while_publishing_fails(tmp_path: Path) -> None:
    """The directory vanishes, and hooks fail; every record is decided all the same."""
    code = "import sys; sys.exit(1)"
    publish = {"dir": str(tmp_path / "published"), "command": [sys.executable, "-c", code]}
    config = on_free_port(publishing(tmp_path, 80, publish=publish))
    pages: list[str] = []

    def on_step(step: int, *_: object) -> None:
        if step == 3:  # at once, whatever is being written there
            (tmp_path / "published").rename(tmp_path / "elsewhere")
        if step == 9:
            pages.append(get(config, "/metrics")[1])

    summary = serve(Settings(**config), threading.Event(), Watcher(on_step))
    assert sum(summary.counts.values()) == 80
    assert summary.step == 10
    assert 'stream_trainer_degraded{cause="publish"} 1.0' in pages[0]
    assert not (tmp_path / "published").exists()


def test_a_missing_package_ends_the_start_with_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import yaml

    from stream_trainer.commands import check

    monkeypatch.setattr(check, "find_spec", lambda name: None if name in ("mlflow", "wandb", "fsspec") else object())
    tracking = {"report_to": ["mlflow", "wandb"]}
    config = publishing(tmp_path, tracking=tracking, checkpoint={"upload": "memory://checkpoints"})
    config["publish"]["command"] = ["/no/such/command"]
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(config))
    assert main(["run", f"--config={tmp_path / 'settings.yaml'}"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: publish.command=/no/such/command is no command here; correct its first word",
        "error: tracking.report_to=mlflow needs the module mlflow; pip install 'stream-trainer[mlflow]'",
        "error: tracking.report_to=wandb needs the module wandb; pip install 'stream-trainer[wandb]'",
        "error: checkpoint.upload=memory://checkpoints needs the module fsspec; pip install 'stream-trainer[upload]'",
    ]

"""What has changed since a checkpoint is reported once, shown in the metrics, and refused where it would be wrong."""

from pathlib import Path
from typing import Any

import pytest

from stream_trainer.errors import CheckpointError
from tests.helpers.service import (
    checkpoints,
    configuration,
    counts,
    get,
    good,
    goods,
    jsonl,
    metrics,
    on_free_port,
    serve_until,
    serving,
    trainer_json,
    wait_for,
    write_lines,
)


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    """A run that was stopped after two of ten steps."""
    write_lines(tmp_path / "samples.jsonl", goods(80))
    made = on_free_port(configuration(tmp_path, jsonl(tmp_path / "samples.jsonl")))
    serve_until(made, 2)
    return made


def test_another_run_is_a_warning_and_a_mark(config: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    config["optimizer"] |= {"learning_rate": 0.5}
    config["training"] |= {"seed": 7}
    config["source"]["jsonl"]["follow"] = True
    config["buffer"] |= {"wait_s": 0.1}
    with serving(config):
        wait_for(lambda: get(config, "/readyz")[0] == 200)
        shown, page = metrics(config), get(config, "/status")[1]
    marks = {name: value for name, value in shown.items() if name.startswith("resume_differences") and value}
    kinds = {"optimizer": 1, "training": 1, "buffer": 1}
    assert marks == {f'resume_differences{{kind="{kind}"}}': value for kind, value in kinds.items()}
    assert '"optimizer.learning_rate"' in page
    assert "optimizer.learning_rate: 0.001, now 0.5" in caplog.text
    assert trainer_json(config)["fingerprint"]["optimizer.learning_rate"] == 0.5


def test_a_file_that_was_replaced_is_refused_unless_accepted(config: dict[str, Any], tmp_path: Path) -> None:
    write_lines(tmp_path / "samples.jsonl", [good(number + 1) for number in range(9)] + goods(80)[9:])
    left = checkpoints(config)
    with pytest.raises(CheckpointError, match=r"source.jsonl.contents was \w+, now \w+\); restore that"):
        serve_until(config)
    assert checkpoints(config) == left
    config["checkpoint"] |= {"on_mismatch": "accept"}
    serve_until(config)
    assert sum(counts(config).values()) == 80

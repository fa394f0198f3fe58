"""Files of other formats in all five places: read as meant, or refused in one line with an exit code that is not 0."""

import json
from pathlib import Path
from typing import Any

import pytest

from stream_trainer.cli import main
from stream_trainer.ingest.letter import read_dead_letters
from stream_trainer.models.loading import load_model
from stream_trainer.models.saving import save_model
from stream_trainer.settings.schema import ModelSettings
from tests.helpers.service import (
    MODEL,
    configuration,
    counts,
    good,
    jsonl,
    run_main,
    serve_until,
    trainer_json,
    write_lines,
)
from tests.stream_trainer.commands.test_produce import broker, read_topic, settings_of  # noqa: F401 - a fixture
from tests.stream_trainer.formats.writing import FORMS, REFUSED, write

ROWS = [json.loads(good(number)) for number in range(40)]
SOME_REFUSED = ("zip", "cut gzip", "cut array")


def refused_file(kind: str, folder: Path) -> tuple[Path, str]:
    content, words = REFUSED[kind]
    path = folder / "refused.jsonl"
    path.write_bytes(content)
    return path, words


@pytest.mark.parametrize("form", ["gzip", "dataset"])
def test_a_run_that_is_stopped_equals_one_that_was_not_and_one_on_lines(form: str, tmp_path: Path) -> None:
    decided = []
    for name, kind, stops in (("lines", "lines", [None]), ("whole", form, [None]), ("stopped", form, [2, 4, None])):
        folder = tmp_path / name
        folder.mkdir()
        config = configuration(folder, jsonl(write(kind, folder, ROWS)))
        decided.append([step for last in stops for step in serve_until(config, last)[1]])
        assert sum(counts(config).values()) == 40
    assert decided[0] == decided[1] == decided[2]
    assert len(decided[0]) == 5


def test_another_file_under_the_same_name_is_found_at_the_resume(tmp_path: Path, capsys: Any) -> None:
    path = write("gzip", tmp_path, ROWS)
    config = configuration(tmp_path, jsonl(path))
    serve_until(config, 2)
    write("gzip", tmp_path, list(reversed(ROWS)))
    assert run_main(tmp_path, config) == 5
    assert "source.jsonl.contents was" in capsys.readouterr().err
    assert trainer_json(config)["step"] == 2


@pytest.mark.parametrize("form", ["utf-16", "parquet"])
def test_targets_and_evaluation_sets(form: str, tmp_path: Path) -> None:
    write_lines(tmp_path / "samples.jsonl", [good(number) for number in range(16)])
    other = write(form, tmp_path, ROWS[:4])
    config = configuration(tmp_path, jsonl(tmp_path / "samples.jsonl"), target={"path": str(other)})
    config["evaluation"] = {"every_steps": 1000, "retention_path": str(other), "sets": {"news": str(other)}}
    summary, steps = serve_until(config)
    assert len(steps) == 2
    assert summary.losses["target"] == summary.losses["retention"] == summary.losses["news"]


@pytest.mark.parametrize("kind", SOME_REFUSED)
@pytest.mark.parametrize("place", ["source", "target", "evaluation"])
def test_what_cannot_be_read_ends_a_run(place: str, kind: str, tmp_path: Path, capsys: Any) -> None:
    path, words = refused_file(kind, tmp_path)
    write_lines(tmp_path / "samples.jsonl", [good(number) for number in range(16)])
    sections: dict[str, dict[str, Any]]
    sections = {"target": {"target": {"path": str(path)}}, "evaluation": {"evaluation": {"sets": {"x": str(path)}}}}
    source = path if place == "source" else tmp_path / "samples.jsonl"
    config = configuration(tmp_path, jsonl(source), **sections.get(place, {}))
    assert run_main(tmp_path, config) in (2, 3)
    error = capsys.readouterr().err.splitlines()[-1]
    assert words in error
    assert f"={path} " in error


def test_a_run_of_nothing_that_can_be_used_is_no_success(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "samples.csv"
    path.write_text("prompt,response\n1+1,2\n2+2,4\n")
    config = configuration(tmp_path, jsonl(path))
    assert run_main(tmp_path, config) == 8
    assert "all 3 last records of the stream cannot be used, 3 of them for bad_json" in capsys.readouterr().err
    assert len(list(read_dead_letters(tmp_path / "dead-letters.jsonl"))) == 3
    unlimited = {"dead_letters": config["dead_letters"] | {"max_ratio": None, "max_in_a_row": None}}
    assert run_main(tmp_path, config | unlimited) == 0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model on disk."""
    folder = tmp_path_factory.mktemp("model")
    save_model(load_model(ModelSettings(config=MODEL, tokenizer="bytes"), seed=1), folder)
    return folder


@pytest.mark.parametrize("form", ["array", "dataset"])
def test_select(form: str, tmp_path: Path, model: Path, capsys: Any) -> None:
    results = []
    for kind in ("lines", form):
        folder = tmp_path / kind.replace(" ", "-")
        folder.mkdir()
        pool, target = write(kind, folder, ROWS), write(kind, folder, ROWS[:4], "target")
        options = [f"--model={model}", f"--pool={pool}", f"--target={target}", f"--out={folder / 'out'}"]
        assert main(["select", "cluster-ucb", *options, "--data=25%", "--budget=50%", "--max-tokens=32"]) == 0
        lines = (folder / "out" / "subset.jsonl").read_text().splitlines()
        results.append([json.loads(line) for line in lines])
        assert sorted(path.name for path in (folder / "out").iterdir()) == [
            *("rejected.jsonl", "scores.jsonl", "subset.jsonl")
        ]
    assert results[0] == results[1]
    assert len(results[0]) == 10
    assert "reading: " in capsys.readouterr().err, "progress in plain lines"


@pytest.mark.parametrize("kind", SOME_REFUSED)
@pytest.mark.parametrize("place", ["pool", "target"])
def test_select_refuses(place: str, kind: str, tmp_path: Path, model: Path, capsys: Any) -> None:
    good_file = write("lines", tmp_path, ROWS)
    path, words = refused_file(kind, tmp_path)
    files = {"pool": good_file, "target": good_file, place: path}
    options = [f"--{name}={file}" for name, file in files.items()]
    assert main(["select", "cluster-ucb", f"--model={model}", *options, f"--out={tmp_path / 'out'}"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert words in error
    assert f"--{place}={path} " in error


@pytest.mark.parametrize("form", FORMS)
def test_produce(form: str, tmp_path: Path, broker: str, topic: str) -> None:  # noqa: F811 - the fixture
    from stream_trainer.commands.produce import produce

    files = [write(form, tmp_path, ROWS[:7]), write("lines", tmp_path, ROWS[7:9])]
    for _ in range(2):  # the second time there is nothing left
        report = produce(files, None, settings_of(broker, topic))
    assert report.before == 9
    values = [json.loads(record.value or b"") for record in read_topic(settings_of(broker, topic))]
    assert sorted(values, key=lambda row: int(row["id"])) == ROWS[:9]


@pytest.mark.parametrize("kind", REFUSED)
def test_produce_refuses(kind: str, tmp_path: Path, capsys: Any) -> None:
    path, words = refused_file(kind, tmp_path)
    assert main(["produce", str(path), "--topic=x", "--bootstrap-servers=127.0.0.1:1"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert words in error
    assert f"file {path} " in error

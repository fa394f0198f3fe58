"""A selector from a file outside the repository, through the whole service."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.service import (
    checkpoints,
    configuration,
    goods,
    hashes,
    jsonl,
    run_command,
    run_main,
    serve_until,
    trainer_json,
    write_lines,
)

# What a user writes: the hardest samples, or with a probability of `chance` any; it remembers how often it did what.
FILE = """
import torch
from gradient_selectors import Decision


class Hardest:
    needs_target = False

    def __init__(self, batch_size, generator, chance=0.0):
        if not 0 <= chance <= 1:
            raise ValueError(f"chance={chance} is no probability")
        self.batch_size, self.generator, self.chance, self.guesses = batch_size, generator, chance, 0

    def decide(self, interaction):
        losses_N = interaction.gradients.losses_N
        if float(torch.rand((), generator=self.generator)) < self.chance:
            self.guesses += 1
            losses_N = torch.rand(len(losses_N), generator=self.generator)
        coefficients_N = torch.zeros(len(losses_N))
        coefficients_N[losses_N.topk(self.batch_size).indices] = 1 / self.batch_size
        return Decision(coefficients_N)

    def state_dict(self):
        return {"generator": self.generator.get_state(), "guesses": self.guesses}

    def load_state_dict(self, state):
        self.generator.set_state(state["generator"])
        self.guesses = state["guesses"]


class Broken:
    needs_target = False

    def __init__(self, early=False):
        if early:
            raise KeyError("no table\\nand a second line")

    def decide(self, interaction):
        raise KeyError("no table")
"""


@pytest.fixture(autouse=True)
def _package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`own_selectors.hard`, which Python finds but nothing knows of."""
    package = tmp_path / "plugins" / "own_selectors"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "hard.py").write_text(FILE)
    monkeypatch.syspath_prepend(tmp_path / "plugins")
    for name in ("own_selectors", "own_selectors.hard"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def config_of(folder: Path, weigh: str = "own_selectors.hard:Hardest", **options: Any) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    write_lines(folder / "samples.jsonl", goods(160))
    return configuration(folder, jsonl(folder / "samples.jsonl"), selection={"weigh": weigh, "weigh_options": options})


def test_it_decides_every_step(tmp_path: Path) -> None:
    summary, steps = serve_until(config_of(tmp_path / "run"))
    assert len(steps) == 20
    for step in steps:
        best = torch.tensor(step.losses).topk(3).indices.tolist()
        assert set(step.selected) == {step.ids[i] for i in best}
    assert summary.counts["trained"] == 60


def test_it_is_resumed_as_it_was(tmp_path: Path) -> None:
    whole, resumed = (config_of(tmp_path / name, chance=0.5) for name in ("whole", "resumed"))
    _, expected = serve_until(whole)
    assert [step for last in (4, 11, None) for step in serve_until(resumed, last)[1]] == expected
    ours, theirs = (hashes(checkpoints(config)[-1]) for config in (resumed, whole))
    assert ours["state.safetensors"] == theirs["state.safetensors"]
    assert 0 < trainer_json(whole)["parts"]["engine"]["selector"]["guesses"] < 20


@pytest.mark.parametrize(
    "selection", [{"draw": "cluster_ucb"}, {"route": "gast"}, {"mask": "dual_sft"}, {"when_none_helps": "uniform"}]
)
def test_it_goes_together_with_the_other_three(selection: dict[str, Any], tmp_path: Path) -> None:
    config = config_of(tmp_path / "run")
    room = {"waiting": 24, "intake": 12, "cluster_ucb": {"clusters": 4}}
    _, steps = serve_until(config | {"selection": config["selection"] | room | selection}, 5)
    assert {step.result for step in steps} == {"applied"}


def test_the_command_finds_it_on_the_pythonpath(tmp_path: Path) -> None:
    config = config_of(tmp_path / "run", chance=0.5)
    assert run_command(tmp_path / "run", config) == 0
    here = config_of(tmp_path / "here", chance=0.5)
    serve_until(here)
    ours, theirs = (hashes(checkpoints(config)[-1]) for config in (config, here))
    assert ours["model/model.safetensors"] == theirs["model/model.safetensors"]


def test_the_state_of_another_selector_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of(tmp_path / "run")
    serve_until(config | {"selection": config["selection"] | {"when_none_helps": "uniform"}}, 2)
    capsys.readouterr()
    assert run_main(tmp_path / "run", config) == 5
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: the state of the selection does not fit (")
    assert line.endswith("; restore the settings it was made with, or set another checkpoint.dir")


@pytest.mark.parametrize(
    ("weigh", "options", "says"),
    [
        ("own_selector.hard:Hardest", {}, "cannot be imported (No module named 'own_selector')"),
        ("own_selectors.soft:Hardest", {}, "cannot be imported (No module named 'own_selectors.soft')"),
        ("own_selectors.hard:Softest", {}, "has no attribute 'Softest'); put it on the PYTHONPATH as module:Class"),
        (
            "own_selectors.hard:Hardest",
            {"chances": 1},
            "unexpected keyword argument 'chances'); correct ",
        ),
        (
            "own_selectors.hard:Hardest",
            {"chance": 2},
            "made (chance=2 is no probability); correct ",
        ),
        ("own_selectors.hard:torch", {}, "; "),
        ("own_selectors.hard:Broken", {"early": True}, "cannot be made (KeyError: 'no table"),
    ],
)
def test_what_is_wrong_with_it_is_one_line(
    weigh: str, options: dict[str, Any], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(tmp_path / "run", weigh, **options)
    capsys.readouterr()
    assert run_main(tmp_path / "run", config) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: selection.weigh={weigh} ")
    assert says in line


def test_one_that_raises_at_every_step_ends_the_run_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(tmp_path / "run", "own_selectors.hard:Broken")
    capsys.readouterr()
    assert run_main(tmp_path / "run", config) == 7
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(
        "error: step 1 failed, and no sample is to blame (KeyError: 'no table'); correct the model or "
    )
    assert "selection.weigh=own_selectors.hard:Broken" in line

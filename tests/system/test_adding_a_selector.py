"""The page on adding a selector, followed to the letter: its file, its settings, its command, in the whole service."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from gradient_selectors import Gast, SelectionEngine
from gradient_selectors.examples import tiny_batch, tiny_model

from tests.helpers.pools import block_pool, written_pool
from tests.helpers.service import LONG_S, configuration, goods, jsonl, write_lines

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "add-a-selector.md"
RUN = "import sys; from stream_trainer.cli import main; sys.exit(main())"  # what `stream-trainer` on the PATH does


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)


@pytest.fixture(scope="module")
def softmax_draw() -> Any:
    (code,) = blocks("python")
    namespace: dict[str, Any] = {"__name__": "my_selectors"}
    exec(compile(code, str(PAGE), "exec"), namespace)
    return namespace["SoftmaxDraw"]


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_it_fits_on_a_page() -> None:
    (code,) = blocks("python")
    assert len(code.splitlines()) < 80


def test_the_steps_of_the_page_end_in_a_run_that_trains(tmp_path: Path) -> None:
    """The file under the name the page gives it, in a folder outside of the project; the command that it prints."""
    (code,), (settings,) = blocks("python"), blocks("yaml")
    (name,) = re.findall(r"as\s+`(\w+\.py)`", PAGE.read_text())
    (command,) = re.findall(r"^    PYTHONPATH=\. stream-trainer (.+)$", PAGE.read_text(), flags=re.MULTILINE)
    (tmp_path / name).write_text(code)
    write_lines(tmp_path / "samples.jsonl", goods(48))
    config = configuration(tmp_path, jsonl(tmp_path / "samples.jsonl"))
    config["selection"] |= yaml.safe_load(settings)["selection"]
    (tmp_path / "stream-trainer.yaml").write_text(yaml.safe_dump(config))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([".", *(path for path in sys.path if path)])}
    arguments = [sys.executable, "-c", RUN, *command.split()]
    done = subprocess.run(
        arguments, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=LONG_S, check=False
    )
    assert done.returncode == 0, done.stderr
    checkpoint = max((tmp_path / "checkpoints").glob("step-*"))
    counts = json.loads((checkpoint / "trainer.json").read_text())["cursor"]["counts"]
    assert counts["trained"] > 0
    assert counts["trained"] + counts["not_selected"] == 48
    assert "generator" in json.dumps(sorted(list_of_tensors(checkpoint)))


def list_of_tensors(checkpoint: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(checkpoint / "state.safetensors", framework="pt") as file:
        return [key for key in file.keys() if "selector" in key]  # noqa: SIM118


def test_it_draws_the_better_ones_more_often(softmax_draw: Any) -> None:
    pool = written_pool([[3.0], [1.0], [-1.0], [2.0], [float("nan")]], [1.0])
    selector, counts = softmax_draw(1, seeded()), [0] * 5
    for _ in range(600):
        (selected,) = selector.decide(pool).selected
        counts[selected] += 1
    assert counts[0] > counts[3] > counts[1] > 0
    assert counts[2] == counts[4] == 0


def test_it_selects_nothing_where_nothing_helps(softmax_draw: Any) -> None:
    decision = softmax_draw(2, seeded()).decide(written_pool([[-1.0], [0.0]], [1.0]))
    assert decision.selected == []


def test_the_engine_runs_it_and_keeps_its_state(softmax_draw: Any) -> None:
    def engine_of() -> SelectionEngine:
        model = tiny_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        return SelectionEngine(model, optimizer, softmax_draw(2, seeded()), target=[tiny_batch(seed=1)])

    first, second = engine_of(), engine_of()
    first.backward(tiny_batch(6))
    state = first.state_dict()
    second.load_state_dict(state)
    assert torch.equal(second.state_dict()["selector"]["generator"], state["selector"]["generator"])
    assert first.backward(tiny_batch(6)).selected == second.backward(tiny_batch(6)).selected


def test_it_composes_with_routing(softmax_draw: Any) -> None:
    pool = block_pool(torch.rand(4, 6) + 1)
    decision = Gast(1, seeded()).route(softmax_draw(3, seeded()).decide(pool), pool)
    assert decision.coefficients_LN is not None
    assert decision.coefficients_LN.sum(1).tolist() == pytest.approx([1.0] * 4)

"""A run whose model lies in rows on two processes decides as one process does, and anybody takes up its checkpoint."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from gradient_selectors.mask.cohorts import FIELDS, joined
from gradient_selectors.views.interaction import Interaction
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.gradient_selectors.world.processes import run_to_end
from tests.gradient_selectors.world.threads import without_locks
from tests.helpers.service import (
    LONG_S,
    SELECTION,
    Step,
    checkpoints,
    configuration,
    counts,
    goods,
    hashes,
    jsonl,
    write_lines,
)
from tests.system.ranks.runs import saved_model, serve_on_ranks

PROGRAM = "tests.system.ranks.sharded_program"
CLOSE = 1e-5
RECORDS = 48
MOMENTS = ("exp_avg", "exp_avg_sq")
FULL: dict[str, Any] = {}
LORA = {"lora": {"rank": 3, "alpha": 6.0}, "gradient_checkpointing": True}
LEARNED = {"profile": "thrifty", "pool_size": 8, "batch_size": 3, "learned": {"probe_every": 2}}
MASKED = SELECTION | {"mask": "dual_sft", "dual_sft": {"density": 0.3, "refresh_steps": 2}}

pytestmark = pytest.mark.timeout(LONG_S * 2)


@pytest.fixture(autouse=True)
def _no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    without_locks(Interaction, monkeypatch)


def settings(folder: Path, model: dict[str, Any], mode: str = "fsdp2", **sections: Any) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    stream = folder.parent / "samples.jsonl"
    if not stream.exists():
        write_lines(stream, [distinct(value) for value in goods(RECORDS)])
    # In rows nothing is kept for the update; else everything is.
    base: dict[str, Any] = {
        "memory": {"factors_gb": 0 if mode == "fsdp2" else None},
        "optimizer": {"learning_rate": 1e-3, "eps": 1e-4},
    }
    model = {**saved_model(folder.parent), **model}
    return configuration(folder, jsonl(stream), model=model, distributed={"mode": mode}, **(base | sections))


def distinct(value: bytes) -> bytes:
    """Of two samples with the same text either may be chosen: which one is, is a matter of rounding."""
    record = json.loads(value)
    return json.dumps(record | {"text": f"{record['id']} {record['text']}"}).encode()


def on_processes(
    config: dict[str, Any], size: int, last_step: int = 0, told: int = 0, program: str = PROGRAM
) -> list[dict[str, Any]]:
    """What each rank says: its steps, or what it failed with."""
    folder = Path(config["checkpoint"]["dir"]).parent
    (folder / "settings.yaml").write_text(yaml.safe_dump(config))
    run_to_end(program, [str(folder), str(last_step), str(told)], size, LONG_S)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(size)]


def agrees(found: dict[str, Any], wanted: Step) -> None:
    assert tuple(found["ids"]) == wanted.ids
    assert found["coefficients"] == pytest.approx(wanted.coefficients, abs=CLOSE)
    assert found["losses"] == pytest.approx(wanted.losses, abs=1e-4)


@pytest.mark.parametrize(
    ("model", "selection"),
    [
        pytest.param(FULL, SELECTION, id="full"),
        pytest.param(LORA, SELECTION | {"scoring": "sketched"}, id="lora", marks=pytest.mark.slow),
        pytest.param(FULL, LEARNED, id="learned", marks=pytest.mark.slow),
        pytest.param(FULL, MASKED, id="mask", marks=pytest.mark.slow),
    ],
)
def test_a_run_in_rows_is_that_of_one_process_and_goes_on_anyhow(
    model: dict[str, Any], selection: dict[str, Any], tmp_path: Path
) -> None:
    sections: dict[str, Any] = {"selection": selection}
    config = settings(tmp_path / "rows", model, **sections)
    first, second = on_processes(config, 2, 3, told=1)
    assert (first["failure"], second["failure"], first["size"]) == ("", "", 2)
    assert first["steps"] == second["steps"]
    plain = settings(tmp_path / "alone", model, "none", **sections)
    _, (alone,) = serve_on_ranks(plain, 1, 3)
    for found, wanted in zip(first["steps"], alone, strict=True):
        agrees(found, wanted)
    same_files(config, plain, lora="lora" in model)
    # The same next step, whoever makes it.
    for name, mode in (("plain", "none"), ("replicated", "replicated")):
        other = moved_to(tmp_path / name, config, mode)
        _, ranks = serve_on_ranks(other, 1 if mode == "none" else 2, 4)
        if mode == "none":
            next_step = ranks[0][0]
        agrees(json.loads(json.dumps(ranks[0][0].__dict__)), next_step)
    third, _ = on_processes(config, 2)
    agrees(third["steps"][0], next_step)
    assert sum(counts(config).values()) == RECORDS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "selection", "ends"),
    [
        pytest.param(FULL, MASKED, [0], id="mask"),
        pytest.param(FULL, MASKED, [3, 0], id="mask resumed"),
        pytest.param(LORA, SELECTION, [3, 0], id="lora resumed"),
        pytest.param(FULL, LEARNED, [3, 0], id="learned resumed"),
    ],
)
def test_every_checkpoint_is_the_one_that_training_would_have_waited_for(
    model: dict[str, Any], selection: dict[str, Any], ends: list[int], tmp_path: Path
) -> None:
    """Bit for bit, although all ranks write it while training goes on, and so is what follows from it.

    `ends`: steps after which the run is stopped, and resumed; 0 is the stream's end.
    """
    found = list[dict[str, dict[str, str]]]()
    for name, asynchronous in (("waiting", False), ("going on", True)):
        checkpoint = {"every_steps": 2, "keep": 10, "asynchronous": asynchronous}
        config = settings(tmp_path / name, model, selection=selection, checkpoint=checkpoint)
        for last_step in ends:
            assert [rank["failure"] for rank in on_processes(config, 2, last_step)] == ["", ""]
        found.append({path.name.partition(".")[0]: hashes(path) for path in checkpoints(config)})
        assert sum(counts(config).values()) == RECORDS
    assert found[0] == found[1]
    assert len(found[0]) > 3


@pytest.mark.slow
@pytest.mark.parametrize("patience_s", [900.0, 0.0])
def test_what_one_rank_could_not_write_all_give_up_and_try_again(patience_s: float, tmp_path: Path) -> None:
    checkpoint = {"every_steps": 2, "keep": 10, "asynchronous": True, "max_failing_s": patience_s}
    config = settings(tmp_path / "rows", FULL, selection=SELECTION, checkpoint=checkpoint)
    ranks = on_processes(config, 2, program="tests.system.ranks.failing_program")
    there = [int(path.name[5:13]) for path in checkpoints(config)]
    assert not list(Path(config["checkpoint"]["dir"]).glob(".tmp-*"))
    assert there[0] == 0
    if patience_s:
        assert [rank["failure"] for rank in ranks] == ["", ""]
        assert there[-1] == ranks[0]["steps"][-1]["number"]
        assert 2 not in there
        assert sum(counts(config).values()) == RECORDS
    else:
        assert ranks[0]["failure"].startswith("CheckpointError: checkpoint.dir is full; this lasts longer than")
        assert ranks[0]["failure"] == ranks[1]["failure"]
        assert there == [0]


@pytest.mark.slow
def test_a_run_goes_on_at_any_size(tmp_path: Path) -> None:
    """One process, two, three, and one again: each step is that of a run which one process makes to the end."""
    config = settings(tmp_path / "rows", FULL, selection=MASKED)
    (tmp_path / "alone").mkdir()
    _, (alone,) = serve_on_ranks(settings(tmp_path / "alone", FULL, "none", selection=MASKED), 1)
    made: list[Any] = []
    for size, last_step in ((1, 1), (2, 2), (3, 4), (1, 0)):
        ranks = on_processes(config, size, last_step)
        assert [rank["failure"] for rank in ranks] == [""] * size
        assert all(rank["steps"] == ranks[0]["steps"] for rank in ranks)
        assert len(list(checkpoints(config)[-1].glob("optimizer*.safetensors"))) == size
        made += ranks[0]["steps"]
    for found, wanted in zip(made, alone, strict=True):
        agrees(found, wanted)
    assert sum(counts(config).values()) == RECORDS


def moved_to(folder: Path, config: dict[str, Any], mode: str) -> dict[str, Any]:
    """The settings of a run in another mode that goes on from a copy of the checkpoints."""
    folder.mkdir()
    subprocess.run(["cp", "-r", config["checkpoint"]["dir"], str(folder / "checkpoints")], check=True)
    places = {"checkpoint": {**config["checkpoint"], "dir": str(folder / "checkpoints")}}
    places["dead_letters"] = {"path": str(folder / "dead-letters.jsonl")}
    return config | places | {"distributed": {"mode": mode}}


def same_files(ours: dict[str, Any], wanted: dict[str, Any], *, lora: bool) -> None:
    """Weights that transformers loads, and moments by the same names."""
    found, other = checkpoints(ours)[-1], checkpoints(wanted)[-1]
    models = [AutoModelForCausalLM.from_pretrained(path / "model").state_dict() for path in (found, other)]
    assert models[0].keys() == models[1].keys()
    for name, weight in models[1].items():
        torch.testing.assert_close(models[0][name], weight, rtol=0, atol=CLOSE)
    assert not (found / "optimizer.safetensors").exists()
    state = load_file(found / "state.safetensors")
    assert not [path for path in state if path.startswith(("engine/target/gradient", "engine/mask/average"))]
    pairs = [(joined_moments(found), load_file(other / "optimizer.safetensors"))]
    pairs += [(state | joined_state(found), load_file(other / "state.safetensors"))]
    if lora:
        pairs += [(load_file(found / "adapter.safetensors"), load_file(other / "adapter.safetensors"))]
    for tensors, theirs in pairs:
        assert {key: (t.shape, t.dtype) for key, t in tensors.items()} == {
            key: (t.shape, t.dtype) for key, t in theirs.items()
        }
        for key, tensor in theirs.items():
            if tensor.is_floating_point():
                torch.testing.assert_close(tensors[key], tensor, rtol=1e-3, atol=CLOSE)
            elif key.endswith(".kept"):
                assert torch.equal(tensors[key], tensor)  # the mask


def joined_moments(checkpoint: Path) -> dict[str, Tensor]:
    """The moments in the files of all ranks, each of which has its own rows, made one."""
    parts = [load_file(path) for path in sorted(checkpoint.glob("optimizer-*.safetensors"))]
    assert len(parts) == 2
    found = dict(parts[0])
    for name in dict.fromkeys(key.rpartition(".")[0] for key in parts[0]):
        if f"{name}.kept" in found:
            states = [{field: part[f"{name}.{field}"] for field in FIELDS} for part in parts]
            found |= {f"{name}.{field}": values for field, values in joined(states).items()}
        else:
            found |= {f"{name}.{field}": torch.cat([part[f"{name}.{field}"] for part in parts]) for field in MOMENTS}
    return found


def joined_state(checkpoint: Path) -> dict[str, Tensor]:
    """What of other state lies in rows."""
    first, second = (load_file(path) for path in sorted(checkpoint.glob("state-*.safetensors")))
    return {path: torch.cat([values, second[path]]) for path, values in first.items()}

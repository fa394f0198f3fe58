import json
import os
import resource
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from gradient_selectors.state import flatten

from stream_trainer.checkpoints import checkpoint
from stream_trainer.checkpoints.checkpoint import TrainerState, load_latest, restore, save_checkpoint, write_first
from stream_trainer.errors import CheckpointError, FencedError, NotFiniteError
from stream_trainer.models.loading import LoadedModel, load_model
from stream_trainer.settings.schema import LoraSettings
from stream_trainer.training.optimizer import NamedAdamW
from tests.helpers.tiny_models import CONFIGS, INPUT, overwrite, settings_of

LORA = LoraSettings(rank=2)


class Trained(NamedTuple):
    """A model and its optimizer."""

    loaded: LoadedModel
    optimizer: NamedAdamW


def fresh(kind: str = "llama", seed: int = 1, lora: LoraSettings | None = None) -> Trained:
    loaded = load_model(settings_of(kind, lora=lora), seed)
    return Trained(loaded, optimizer_of(loaded))


def optimizer_of(loaded: LoadedModel, learning_rate: float = 0.01) -> NamedAdamW:
    trainable = [(name, p) for name, p in loaded.model.named_parameters() if p.requires_grad]
    return NamedAdamW([{"params": trainable}], lr=learning_rate, amsgrad=True)


def train(loaded: LoadedModel, optimizer: torch.optim.Optimizer, steps: int, generator: torch.Generator) -> None:
    for _ in range(steps):
        tokens = torch.randint(256, INPUT.shape, generator=generator)
        loaded.model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def state_at(step: int, generator: torch.Generator | None = None) -> TrainerState:
    return TrainerState(
        step=step,
        cursor={"events:0": {"next": 17, "decided": [19, 23]}},
        source_identity={"topic_id": "abc"},
        version="1.2.3",
        parts={
            "engine": {
                "target": {"gradient": {"a.weight": torch.arange(6.0).reshape(2, 3).T}, "age": 3},
                "scoring": {"generator": (generator or torch.Generator()).get_state(), "projections": {}},
                "mask": {"average": {"b": torch.ones(2).bfloat16()}, "since_refresh": None, "share": 0.1 + 0.2},
            },
            "sampler": {"count": torch.tensor(7)},
        },
    )


def assert_equal_tensors(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype is theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name


def assert_same_parts(ours: TrainerState, theirs: TrainerState) -> None:
    (tensors, rest), (their_tensors, their_rest) = flatten(ours.parts), flatten(theirs.parts)
    assert_equal_tensors(tensors, their_tensors)
    assert rest == their_rest


def latest_step(directory: Path) -> int:
    found = load_latest(directory)
    assert found is not None
    return found.step


@pytest.fixture(scope="module")
def trained() -> Trained:
    made = fresh()
    train(*made, 2, torch.Generator().manual_seed(0))
    return made


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_training_goes_on_bit_for_bit_after_a_restore(kind: str, lora: LoraSettings | None, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(9)
    loaded, optimizer = fresh(kind, lora=lora)
    train(loaded, optimizer, 3, generator)
    saved = save_checkpoint(tmp_path, loaded, optimizer, state_at(3, generator), keep=2)
    train(loaded, optimizer, 3, generator)

    again, its_optimizer = fresh(kind, seed=1 if lora else 2, lora=lora)
    found = load_latest(tmp_path)
    assert found is not None
    assert (found.path, found.step) == (saved.path, 3)
    state = restore(found, again, its_optimizer)
    its_generator = torch.Generator()
    its_generator.set_state(state.parts["engine"]["scoring"]["generator"])
    train(again, its_optimizer, 3, its_generator)

    assert_equal_tensors(again.model.state_dict(), loaded.model.state_dict())
    names = [name for name, parameter in loaded.model.named_parameters() if parameter.requires_grad]
    assert {key.rpartition(".")[0] for key in optimizer.state_dict()} == set(names)
    assert_equal_tensors(its_optimizer.state_dict(), optimizer.state_dict())


def test_state_of_the_trainer_is_read_back_exactly(trained: Trained, tmp_path: Path) -> None:
    state = state_at(5)
    saved = save_checkpoint(tmp_path / "new" / "directory", *trained, state, keep=2)
    assert saved.path.name == "step-00000005"
    assert saved.bytes == sum(path.stat().st_size for path in saved.path.rglob("*") if path.is_file())
    found = load_latest(tmp_path / "new" / "directory")
    assert found is not None
    back = restore(found, *fresh())
    assert (back.step, back.cursor, back.source_identity) == (5, state.cursor, state.source_identity)
    assert back.version == "1.2.3"
    assert_same_parts(back, state)


def test_optimizer_state_goes_by_name_and_settings_keep_the_learning_rate(trained: Trained, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, *trained, state_at(1), keep=2)
    loaded, _ = fresh()
    reversed_order = list(loaded.model.named_parameters())[::-1]
    optimizer = NamedAdamW([{"params": reversed_order}], lr=0.5, amsgrad=True)
    found = load_latest(tmp_path)
    assert found is not None
    restore(found, loaded, optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert_equal_tensors(optimizer.state_dict(), trained.optimizer.state_dict())
    expected = dict(trained.loaded.model.named_parameters())
    for name, parameter in loaded.model.named_parameters():
        assert_equal_tensors(optimizer.state[parameter], trained.optimizer.state[expected[name]])


def test_restored_state_does_not_depend_on_the_files(trained: Trained, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, *trained, state_at(1), keep=2).path
    loaded, optimizer = fresh()
    found = load_latest(tmp_path)
    assert found is not None
    state = restore(found, loaded, optimizer)
    for file in path.rglob("*.safetensors"):
        overwrite(file)
    assert_equal_tensors(loaded.model.state_dict(), trained.loaded.model.state_dict())
    assert_equal_tensors(optimizer.state_dict(), trained.optimizer.state_dict())
    assert_same_parts(state, state_at(1))


def test_optimizer_without_state_is_restored_without_state(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, *fresh(), state_at(0), keep=2)
    loaded, optimizer = fresh()
    train(loaded, optimizer, 1, torch.Generator())
    found = load_latest(tmp_path)
    assert found is not None
    restore(found, loaded, optimizer)
    assert not optimizer.state


def test_no_directory_and_an_empty_one_hold_no_checkpoint(tmp_path: Path) -> None:
    assert load_latest(tmp_path / "none") is None
    assert load_latest(tmp_path) is None
    (tmp_path / ".tmp-step-00000001").mkdir()
    (tmp_path / "notes").mkdir()
    assert load_latest(tmp_path) is None


def test_every_bit_of_the_manifest_is_verified(trained: Trained, tmp_path: Path) -> None:
    manifest = save_checkpoint(tmp_path, *trained, state_at(1), keep=2).path / "manifest.json"
    content = manifest.read_bytes()
    for position in range(0, len(content), 7):
        manifest.write_bytes(content[:position] + bytes([content[position] ^ 2]) + content[position + 1 :])
        with pytest.raises(CheckpointError):
            load_latest(tmp_path)


def test_only_damaged_checkpoints_are_an_error_not_a_fresh_start(trained: Trained, tmp_path: Path) -> None:
    for step in (1, 2):
        (save_checkpoint(tmp_path, *trained, state_at(step), keep=2).path / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"^checkpoint.dir=.* holds 2 checkpoints and none is whole; restore one"):
        load_latest(tmp_path)


def test_checkpoint_of_a_later_format_is_named_not_passed_over(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, *trained, state_at(1), keep=2)
    monkeypatch.setattr("stream_trainer.checkpoints.manifest.FORMAT_VERSION", 4)
    save_checkpoint(tmp_path, *trained, state_at(2), keep=2)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="format_version=4, this version reads up to 3; use the version"):
        load_latest(tmp_path)


@pytest.mark.parametrize("stage", ["save_model", "write_manifest", "put_in_place"])
def test_interrupted_save_leaves_the_old_checkpoint(
    stage: str, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, *trained, state_at(1), keep=2)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, stage, interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, *trained, state_at(2), keep=2)
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-00000001"]
    assert latest_step(tmp_path) == 1


def test_a_trainer_that_is_fenced_before_the_rename_changes_nothing(trained: Trained, tmp_path: Path) -> None:
    def fence() -> None:
        assert latest_step(tmp_path) == 1
        raise FencedError("another trainer has taken over")

    save_checkpoint(tmp_path, *trained, state_at(1), keep=2)
    with pytest.raises(FencedError):
        save_checkpoint(tmp_path, *trained, state_at(2), keep=2, before_rename=fence)
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-00000001"]


def test_what_a_crash_left_behind_is_removed_at_the_next_save(trained: Trained, tmp_path: Path) -> None:
    first = save_checkpoint(tmp_path, *trained, state_at(1), keep=2).path
    shutil.copytree(first, tmp_path / ".tmp-step-00000002")
    assert latest_step(tmp_path) == 1
    save_checkpoint(tmp_path, *trained, state_at(2), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


def test_same_step_once_more_lies_beside_the_first_and_goes_before_it(trained: Trained, tmp_path: Path) -> None:
    """Nothing that is whole is ever moved, so each of the two can be read at every moment."""
    first = save_checkpoint(tmp_path, *trained, state_at(1), keep=2).path
    for number in (2, 3):
        saved = save_checkpoint(tmp_path, *trained, state_at(1), keep=2).path
        assert saved.name == f"step-00000001.e0-{number}"
        found = load_latest(tmp_path)
        assert found is not None
        assert found.path == saved
    assert not first.exists()
    assert len(list(tmp_path.iterdir())) == 2


def test_what_earlier_versions_replaced_is_read_and_deleted_in_time(trained: Trained, tmp_path: Path) -> None:
    """They had moved it away when they crashed."""
    replaced = tmp_path / ".replaced-step-00000001"
    save_checkpoint(tmp_path, *trained, state_at(1), keep=2).path.rename(replaced)
    found = load_latest(tmp_path)
    assert found is not None
    assert restore(found, *fresh()).step == 1
    save_checkpoint(tmp_path, *trained, state_at(1), keep=2)
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-00000001"]


def test_epochs_go_before_steps_and_later_ones_are_left_alone(trained: Trained, tmp_path: Path) -> None:
    """A trainer that lost the directory deletes nothing of its successor, which deletes what it left."""
    save_checkpoint(tmp_path, *trained, state_at(20), keep=2)
    save_checkpoint(tmp_path, *trained, state_at(30), keep=2, epoch=1)
    save_checkpoint(tmp_path, *trained, state_at(25), keep=2, epoch=2)
    assert latest_step(tmp_path) == 25
    save_checkpoint(tmp_path, *trained, state_at(40), keep=2, epoch=1)
    assert latest_step(tmp_path) == 25
    names = {"step-00000020", "step-00000025.e2", "step-00000040.e1"}
    assert {path.name for path in tmp_path.iterdir()} == names  # step 30 was passed over: it is being done again
    save_checkpoint(tmp_path, *trained, state_at(35), keep=2, epoch=2)
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000025.e2", "step-00000035.e2"}


def test_only_the_newest_are_kept(trained: Trained, tmp_path: Path) -> None:
    for step in range(5):
        save_checkpoint(tmp_path, *trained, state_at(step), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]


def test_later_checkpoints_do_not_displace_the_one_just_written(trained: Trained, tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save_checkpoint(tmp_path, *trained, state_at(step), keep=3)
    for step in (20, 30):
        (tmp_path / f"step-{step:08d}" / "trainer.json").write_text("damaged")
    assert latest_step(tmp_path) == 10
    save_checkpoint(tmp_path, *trained, state_at(15), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000015"]


def test_old_checkpoint_that_cannot_be_deleted_does_not_stop_the_run(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save_checkpoint(tmp_path, *trained, state_at(1), keep=1)

    def refuse(path: Path, **_: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("shutil.rmtree", refuse)
    assert save_checkpoint(tmp_path, *trained, state_at(2), keep=1).step == 2
    assert "cannot be deleted" in caplog.text
    save_checkpoint(tmp_path, *trained, state_at(3), keep=1)
    assert latest_step(tmp_path) == 3


def test_full_disk_is_one_line_and_leaves_the_old_checkpoint(trained: Trained, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, *trained, state_at(1), keep=2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # bytes a file may have: the nearest to a full disk
    try:
        with pytest.raises(
            CheckpointError, match=r"^checkpoint.dir: writing the model to .*; raise the limit of a file"
        ) as caught:
            save_checkpoint(tmp_path, *trained, state_at(2), keep=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-00000001"]


def test_directory_that_cannot_be_made_is_one_line(trained: Trained) -> None:
    with pytest.raises(
        CheckpointError, match=rf"writing the directory to {os.devnull}/run failed .*; name a place where a directory"
    ):
        save_checkpoint(Path(os.devnull) / "run", *trained, state_at(1), keep=2)
    with pytest.raises(CheckpointError, match=rf"^checkpoint.dir={os.devnull} cannot be read .*name a place"):
        load_latest(Path(os.devnull))


@pytest.mark.parametrize("place", ["weight", "optimizer"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_never_written(place: str, value: float, tmp_path: Path) -> None:
    made = fresh()
    train(*made, 1, torch.Generator())
    save_checkpoint(tmp_path, *made, state_at(1), keep=2)
    weight = made.loaded.model.get_parameter("model.layers.1.mlp.up_proj.weight")
    spoilt = weight.data if place == "weight" else made.optimizer.state[weight]["exp_avg_sq"]
    spoilt[3, 2] = value
    with pytest.raises(NotFiniteError, match=r"mlp.up_proj.weight.* is not finite, so nothing is written; lower"):
        save_checkpoint(tmp_path, *made, state_at(2), keep=2)
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-00000001"]


def test_great_numbers_whose_sum_is_not_finite_are_written(tmp_path: Path) -> None:
    made = fresh()
    made.loaded.model.get_parameter("lm_head.weight").data.fill_(3e38)
    assert save_checkpoint(tmp_path, *made, state_at(1), keep=2).step == 1


def test_files_are_json_and_safetensors_only(trained: Trained, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, *trained, state_at(1), keep=2).path
    files = [file for file in path.rglob("*") if file.is_file()]
    assert {file.suffix for file in files} == {".json", ".safetensors", ".jinja"}
    manifest = json.loads((path / "manifest.json").read_text())
    listed = {file.relative_to(path).as_posix() for file in files} - {"manifest.json"}
    assert set(manifest["files"]) == listed


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_whoever_may_read_one_file_may_read_all(umask: int, mode: int, trained: Trained, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        path = save_checkpoint(tmp_path, *trained, state_at(1), keep=2).path
    finally:
        os.umask(before)
    files = [file for file in path.rglob("*") if file.is_file()]
    assert {file.stat().st_mode & 0o777 for file in files} == {mode}


@pytest.mark.parametrize("lora", [None, LORA])
def test_what_others_write_meanwhile_is_not_of_the_first(lora: LoraSettings | None, tmp_path: Path) -> None:
    made = fresh(lora=lora)
    alone = save_checkpoint(tmp_path, *made, state_at(1), keep=2).path
    shared = tmp_path / "shared"
    shared.mkdir()
    theirs = (".tmpa1B2c3", "state-00002-of-00002.safetensors", "optimizer-00002-of-00002.safetensors")
    for name in (*theirs, "optimizer.index.json"):
        (shared / name).touch()
    wanted = set(json.loads((alone / "manifest.json").read_text())["files"]) - {"optimizer.safetensors"}
    assert write_first(shared, made.loaded, state_at(1)).keys() == wanted | {"optimizer.index.json"}

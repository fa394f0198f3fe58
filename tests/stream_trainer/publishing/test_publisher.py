"""What a run publishes, what it holds back, and that nothing which fails there stops it."""

import logging
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from stream_trainer.checkpoints.manifest import verify
from stream_trainer.checkpoints.provenance import read_provenance
from stream_trainer.errors import FencedError
from stream_trainer.publishing.hooks import HookError
from stream_trainer.publishing.versions import hold, point_at, problems_of, read_about, release
from tests.helpers.publishing import Run, read_version, write_checkpoint
from tests.helpers.service import wait_for


def test_a_checkpoint_becomes_a_version_that_says_what_it_is(tmp_path: Path) -> None:
    with Run(tmp_path) as run:
        path = run.checkpoint(7, target=2.0, retention=1.0)
    version = run.versions / "v000001-step-7"
    assert os.readlink(run.versions / "current") == version.name
    about = read_about(version)
    assert (about["step"], about["checkpoint"], about["base_model"]) == (7, path.name, "tiny/base")
    assert about["positions"] == {"samples:0": 70}
    assert about["records"] == {"trained": 7}
    assert about["losses"] == {"target": 2.0, "retention": 1.0}
    assert len(about["settings"]) == 16
    assert about["settings"] == read_provenance(path)["settings_hash"]
    assert sorted(file.name for file in version.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "version.json",
    ]
    assert problems_of(version) == []
    assert run.value("publish_step") == 7
    assert run.value("publish_timestamp_seconds") > 0
    assert run.events == [(7, "published", version.name)]


def test_a_checkpoint_that_was_written_while_training_went_on_has_the_losses_of_its_own_step(tmp_path: Path) -> None:
    with Run(tmp_path) as run:
        assert run.watcher.on_evaluation is not None
        assert run.watcher.on_checkpoint is not None
        for step in (6, 8):
            run.watcher.on_evaluation(step, {"target": 10.0 - step}, 0.0)
        run.watcher.on_checkpoint(7, write_checkpoint(tmp_path / "checkpoints", 7))
        wait_for(lambda: run.decided == 1)
        assert read_about(run.versions / "v000001-step-7")["losses"] == {"target": 4.0}
        run.watcher.on_checkpoint(9, write_checkpoint(tmp_path / "checkpoints", 9))
        wait_for(lambda: run.decided == 2)
        assert read_about(run.versions / "v000002-step-9")["losses"] == {"target": 2.0}


def test_a_version_is_for_the_group_and_shares_nothing_with_its_checkpoint(tmp_path: Path) -> None:
    old = os.umask(0o077)
    try:
        with Run(tmp_path) as run:
            path = run.checkpoint(3)
    finally:
        os.umask(old)
    version = run.versions / "v000001-step-3"
    assert {oct(file.stat().st_mode & 0o777) for file in version.rglob("*")} == {"0o640"}
    assert version.stat().st_mode & 0o777 == 0o750
    assert all(file.stat().st_nlink == 1 for file in version.rglob("*"))
    (version / "model.safetensors").write_bytes(b"changed by somebody")
    verify(path, 3)
    assert problems_of(version) == ["model.safetensors has other contents than were published"]


def test_the_checkpoint_may_be_deleted_while_it_is_published(tmp_path: Path) -> None:
    entered, go = threading.Event(), threading.Event()

    def wait(_: Path) -> None:
        entered.set()
        assert go.wait(60)

    run = Run(tmp_path, {"command": wait})
    assert run.watcher.on_evaluation is not None
    assert run.watcher.on_checkpoint is not None
    run.watcher.on_evaluation(1, {"target": 1.0}, 0.0)
    paths = [write_checkpoint(tmp_path / "checkpoints", step) for step in (1, 2, 3)]
    run.watcher.on_checkpoint(1, paths[0])
    assert entered.wait(60)  # nothing waits for the hook: two more checkpoints come, and the newer takes the place
    run.watcher.on_checkpoint(2, paths[1])
    run.watcher.on_checkpoint(3, paths[2])
    shutil.rmtree(tmp_path / "checkpoints")
    go.set()
    run.publisher.end(None)
    assert run.names == ["v000001-step-1", "v000002-step-3"]
    assert read_version(run.versions / "current") == 3


def test_a_damaged_checkpoint_is_not_published(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Run(tmp_path) as run:
        run.checkpoint(1)
        path = write_checkpoint(tmp_path / "checkpoints", 2)
        (path / "model" / "model.safetensors").write_bytes(b"bit rot")
        assert run.watcher.on_checkpoint is not None
        run.watcher.on_checkpoint(2, path)
        wait_for(lambda: run.value("publish_failures_total", stage="version") == 1)
    assert run.names == ["v000001-step-1"]
    assert "model/model.safetensors of the checkpoint has other contents" in caplog.text
    assert not list(run.versions.glob(".new-*"))


@pytest.mark.parametrize(
    ("losses", "reason", "said"),
    [
        ({"target": 2.2, "retention": 1.0}, "target_loss", "0.2000 above that of the current version"),
        ({"target": float("nan"), "retention": 1.0}, "target_loss", "loss is nan"),
        ({"target": 1.0, "retention": 1.6}, "forgetting", "0.6000 above its start"),
        ({"target": 1.0, "retention": float("inf")}, "forgetting", "the loss of retention is inf"),
    ],
)
def test_a_worse_model_is_held_back_and_the_next_checkpoint_tried(
    losses: dict[str, float], reason: str, said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Run(tmp_path, every_checkpoints=2) as run:
        run.checkpoint(1, target=2.0, retention=1.0)
        assert run.watcher.on_checkpoint is not None
        run.watcher.on_checkpoint(2, write_checkpoint(tmp_path / "checkpoints", 2))  # not its turn
        run.checkpoint(3, **losses)
        assert run.names == ["v000001-step-1"]
        run.checkpoint(4, target=2.05, retention=1.4)  # the very next
    assert run.names == ["v000001-step-1", "v000002-step-4"]
    assert run.value("publish_gated_total", reason=reason) == 1
    assert run.value("publish_failures_total", stage="version") == 0
    kinds = [(step, kind) for step, kind, _ in run.events]
    assert kinds == [(1, "published"), (3, "publish_gated"), (4, "published")]
    assert said in run.events[1][2]
    assert f"step 3 is not published: {run.events[1][2]}" in caplog.text


def test_losses_that_could_not_be_measured_publish_nothing(tmp_path: Path) -> None:
    with Run(tmp_path) as run:
        run.checkpoint(1)
        assert run.watcher.on_event is not None
        run.watcher.on_event(2, "evaluation_failed", "out of memory")
        run.checkpoint(2)  # the trainer hands over the losses it had
    assert run.names == ["v000001-step-1"]
    assert run.value("publish_gated_total", reason="not_evaluated") == 1


def test_forgetting_is_measured_from_the_start_of_the_model_over_restarts(tmp_path: Path) -> None:
    with Run(tmp_path) as run:
        run.checkpoint(1, target=2.0, retention=1.0)
    with Run(tmp_path) as run:
        run.checkpoint(2, target=2.0, retention=1.4)
        run.checkpoint(3, target=2.0, retention=1.6)
    assert run.names == ["v000001-step-1", "v000002-step-2"]
    assert read_about(run.versions / "current")["forgetting"] == {"retention": pytest.approx(0.4)}


def test_a_directory_that_is_gone_degrades_and_mends_itself(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Run(tmp_path) as run:
        run.checkpoint(1)
        run.versions.rename(tmp_path / "unmounted")
        run.checkpoint(2)
        run.checkpoint(3)
        assert run.value("degraded", cause="publish") == 1
        assert run.value("publish_failures_total", stage="version") == 2
        assert not run.versions.exists(), "a directory made anew would begin with version 1 once more"
        (tmp_path / "unmounted").rename(run.versions)
        run.checkpoint(4)
        assert run.value("degraded", cause="publish") == 0
    assert run.names == ["v000001-step-1", "v000002-step-4"]
    assert "check that the mount is still there" in caplog.text
    assert [kind for _, kind, _ in run.events] == ["published", "publish_failed", "published"]


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from stream_trainer.publishing import making

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with Run(tmp_path) as run:
        run.checkpoint(1)
        with monkeypatch.context() as patch:
            patch.setattr(making, "_write_about", full)
            run.checkpoint(2)
        assert run.names == ["v000001-step-1"]
        assert not list(run.versions.glob(".new-*"))
        run.checkpoint(3)
    assert run.names == ["v000001-step-1", "v000002-step-3"]


def test_a_current_version_that_somebody_took_away_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from stream_trainer.publishing import publisher

    def stuck(*_: object) -> None:
        raise OSError(39, "Directory not empty")

    with Run(tmp_path) as run:
        run.checkpoint(1)
        shutil.rmtree(run.versions / "v000001-step-1")
        monkeypatch.setattr(publisher, "prune", stuck)
        run.checkpoint(2, target=5.0)
        assert os.readlink(run.versions / "current") == "v000002-step-2", "its number is not given twice"
        assert run.value("degraded", cause="publish") == 0
    assert "current version v000001-step-1 cannot be read" in caplog.text
    assert "cannot be deleted" in caplog.text


def test_old_versions_go_but_for_those_that_somebody_needs(tmp_path: Path) -> None:
    with Run(tmp_path, keep=2, grace_s=0.0) as run:
        run.checkpoint(1)
        (run.versions / "v000001-step-1.pin").touch()
        run.checkpoint(2)
        hold(run.versions, "a person said so")  # current stays version 2
        for step in range(3, 7):
            run.checkpoint(step)
        assert run.names == ["v000001-step-1", "v000002-step-2", "v000005-step-5", "v000006-step-6"]
        assert os.readlink(run.versions / "current") == "v000002-step-2"
        assert run.value("publish_held") == 1
        release(run.versions)
        run.checkpoint(7)
        run.checkpoint(8)
        assert run.names == ["v000001-step-1", "v000007-step-7", "v000008-step-8"]
        assert run.value("publish_held") == 0


def test_a_version_outlives_its_last_readers(tmp_path: Path) -> None:
    with Run(tmp_path, keep=2, grace_s=3600.0) as run:
        for step in range(1, 6):
            run.checkpoint(step)
        assert len(run.names) == 5
        point_at(run.versions, "v000001-step-1")
        for version in run.names:
            os.utime(run.versions / version, (0, 0))  # long since left, but for those that are current now
        run.checkpoint(6)
    assert run.names == ["v000001-step-1", "v000005-step-5", "v000006-step-6"]


def test_readers_of_current_see_whole_versions_only(tmp_path: Path) -> None:
    opened, stop = list[int](), threading.Event()

    def read() -> int:
        seen = 0
        while seen == 0 or not stop.is_set():
            found = (run.versions / "current").resolve(strict=True)
            stop.wait(0.03)  # others are published and pruned between finding it and reading it
            opened.append(read_version(found))
            seen += 1
        return seen

    with Run(tmp_path, keep=2, grace_s=30.0) as run:
        run.checkpoint(0)
        with ThreadPoolExecutor(8) as pool:
            readers = [pool.submit(read) for _ in range(8)]
            for step in range(1, 51):
                run.checkpoint(step)
                if step % 10 == 0:  # time passes
                    for name in run.names[:-12]:
                        os.utime(run.versions / name, (0, 0))
            wait_for(lambda: len(opened) >= 1000)
            stop.set()
            assert all(reader.result(60) for reader in readers)
    assert len(set(opened)) > 5
    assert len(run.names) < 30, "versions were pruned meanwhile"
    print(f"{len(opened)} opens of {len(set(opened))} versions while 50 were published, {51 - len(run.names)} pruned")


def test_there_is_a_current_version_at_every_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stream_trainer.publishing.versions.sync_directory", lambda _: None)
    names = ("v000001-step-1", "v000002-step-2")
    stop, seen = threading.Event(), set[str]()

    def look() -> int:
        count = 0
        while not stop.is_set():
            seen.add(os.readlink(tmp_path / "current"))
            count += 1
        return count

    point_at(tmp_path, names[0])
    with ThreadPoolExecutor(1) as pool:
        looks = pool.submit(look)
        for turn in range(4_000):
            point_at(tmp_path, names[turn % 2])
            if looks.done():
                break
        stop.set()
        assert looks.result(60) > 1000
    assert seen == set(names)


def test_what_a_killed_publisher_left_goes(tmp_path: Path) -> None:
    with Run(tmp_path) as run:
        (run.versions / ".new-1234-v000001-step-1").mkdir()
        (run.versions / ".trash-v000001-step-1").mkdir()
        (run.versions / ".current-1234").symlink_to("nowhere")
        run.checkpoint(1)
    assert sorted(path.name for path in run.versions.iterdir() if path.name.startswith(".")) == [
        ".lock",
        ".publisher.lock",
    ]


def test_hooks_fail_one_by_one_and_are_tried_again_with_the_next_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    called = list[tuple[str, str]]()
    broken = {"vllm"}

    def hook(name: str, path: Path) -> None:
        called.append((name, path.name))
        if name in broken:
            raise HookError(f"{name} is away")

    hooks = {name: (lambda path, name=name: hook(name, path)) for name in ("vllm", "command")}
    with caplog.at_level(logging.ERROR), Run(tmp_path, hooks, max_target_loss_rise=0.1) as run:
        run.checkpoint(1)
        assert run.value("degraded", cause="publish") == 1
        broken.clear()
        run.checkpoint(2, target=9.0)  # held back, and what failed is tried again on the version that is there
        assert run.value("degraded", cause="publish") == 0
        run.checkpoint(3, target=0.9)
        hold(run.versions, "a person said so")
        run.checkpoint(4, target=0.8)  # not the current one: nobody is told of it
    first, third = "v000001-step-1", "v000002-step-3"
    assert called == [("vllm", first), ("command", first), ("vllm", first), ("vllm", third), ("command", third)]
    assert run.value("publish_failures_total", stage="vllm") == 1
    assert "vllm is away; training goes on" in caplog.text


def test_a_trainer_that_was_taken_over_publishes_nothing_more(tmp_path: Path) -> None:
    entered, go = threading.Event(), threading.Event()

    def wait(_: Path) -> None:
        entered.set()
        assert go.wait(60)

    run = Run(tmp_path, {"command": wait})
    assert run.watcher.on_evaluation is not None
    assert run.watcher.on_checkpoint is not None
    run.watcher.on_evaluation(1, {"target": 1.0}, 0.0)
    for step in (1, 2):
        run.watcher.on_checkpoint(step, write_checkpoint(tmp_path / "checkpoints", step))
        assert entered.wait(60)
    threading.Timer(0.2, go.set).start()
    run.publisher.end(FencedError("taken over"))
    assert run.names == ["v000001-step-1"]

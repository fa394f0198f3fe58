"""A run on several ranks decides what a run of one process decides, and any number of ranks takes it up."""

import json
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from gradient_selectors.views.interaction import Interaction
from gradient_selectors.world.base import World

from stream_trainer.checkpoints.checkpoint import save_checkpoint
from stream_trainer.distributed.group import settings_of_rank
from stream_trainer.distributed.parts import SharedIngest
from stream_trainer.errors import CheckpointError, PoisonError
from stream_trainer.monitoring.progress import Phase
from stream_trainer.service import serve
from stream_trainer.settings.schema import Settings
from stream_trainer.training import saver
from stream_trainer.training.watchers import Watcher
from tests.gradient_selectors.world.threads import on_ranks, without_locks
from tests.helpers.brokers import create_topic, publish
from tests.helpers.service import (
    ALL_ON,
    LONG_S,
    Step,
    configuration,
    counts,
    goods,
    hashes,
    jsonl,
    kafka,
    trainer_json,
    write_lines,
)
from tests.helpers.service import checkpoints as checkpoints_of
from tests.system.ranks.runs import loading_one_at_a_time, saved_model, serve_on_ranks

PARTITIONS, RECORDS = 4, 64
BAD = (5, 6, 40, 41)


@pytest.fixture(autouse=True)
def _no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    without_locks(Interaction, monkeypatch)


def publish_to_all(broker: str, topic: str, values: list[bytes]) -> None:
    create_topic(broker, topic, PARTITIONS)
    for number in range(PARTITIONS):
        publish(broker, topic, values[number::PARTITIONS], number)


def settings(folder: Path, source: dict[str, Any], **sections: Any) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    model = saved_model(folder.parent)
    return configuration(folder, source, model=model, distributed={"mode": "replicated"}, **sections)


def pools(steps: list[Step]) -> list[tuple[str | None, ...]]:
    return [step.ids for step in steps]


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_make_the_steps_of_one_process(size: int, broker: str, topic: str, tmp_path: Path) -> None:
    publish_to_all(broker, topic, goods(RECORDS))
    found = []
    for ranks in (1, size):
        config = settings(tmp_path / str(ranks), kafka(broker, topic, group_id=f"{topic}-{ranks}"))
        summaries, steps = serve_on_ranks(config, ranks)
        assert all(summary.counts == summaries[0].counts for summary in summaries)
        assert all(pools(other) == pools(steps[0]) for other in steps)
        assert all([s.coefficients for s in other] == [s.coefficients for s in steps[0]] for other in steps)
        assert sum(counts(config).values()) == RECORDS
        cursor = trainer_json(config)["cursor"]["partitions"]
        ends = {f"{topic}:{number}": RECORDS // PARTITIONS for number in range(PARTITIONS)}
        assert {name: log["next"] for name, log in cursor.items()} == ends
        found.append(steps[0])
    for ours, alone in zip(found[1], found[0], strict=True):
        assert (ours.ids, ours.selected) == (alone.ids, alone.selected)
        assert ours.coefficients == pytest.approx(alone.coefficients, abs=1e-5)


def test_a_run_goes_on_at_any_number_of_ranks(broker: str, topic: str, tmp_path: Path) -> None:
    values = goods(RECORDS)
    for number in BAD:
        values[number] = b"not json"
    publish_to_all(broker, topic, values)
    config = settings(tmp_path / "run", kafka(broker, topic))
    seen: Counter[str | None] = Counter()
    for size, last, told in ((2, 2, 1), (1, 4, 0), (3, None, 2)):
        _, steps = serve_on_ranks(config, size, last, told=told)
        seen.update(name for step in steps[0] for name in step.ids)
    assert sum(counts(config).values()) == RECORDS
    assert seen == Counter(str(n) for n in range(RECORDS) if n not in BAD)
    letters = [
        json.loads(line) for file in tmp_path.glob("run/dead-letters*") for line in file.read_text().splitlines()
    ]
    places = Counter((letter["partition"], letter["offset"]) for letter in letters)
    assert places == Counter((number % PARTITIONS, number // PARTITIONS) for number in BAD)


@pytest.mark.parametrize("draw", [pytest.param("learned", marks=pytest.mark.slow), "all_on"])
def test_what_a_draw_learns_is_the_same_on_all_ranks(draw: str, tmp_path: Path) -> None:
    write_lines(tmp_path / "samples.jsonl", goods(70))
    learned = {"profile": "thrifty", "pool_size": 8, "batch_size": 3, "learned": {"probe_every": 2}}
    selection = ALL_ON if draw == "all_on" else learned
    config = settings(tmp_path / "run", jsonl(tmp_path / "samples.jsonl"), selection=selection)
    _, first = serve_on_ranks(config, 2, 6, told=1)
    _, then = serve_on_ranks(config, 2)
    for steps in (first, then):
        assert pools(steps[0]) == pools(steps[1])
        assert [step.coefficients for step in steps[0]] == [step.coefficients for step in steps[1]]
    assert sum(counts(config).values()) == 70


def test_a_rank_without_a_partition_works_all_the_same(tmp_path: Path) -> None:
    write_lines(tmp_path / "samples.jsonl", [*goods(20), b"not json"])
    config = settings(tmp_path / "run", jsonl(tmp_path / "samples.jsonl"))
    summaries, steps = serve_on_ranks(config, 2)
    assert summaries[0].counts == summaries[1].counts
    assert sum(counts(config).values()) == 21
    assert counts(config)["dead_lettered"] == 1
    assert pools(steps[0]) == pools(steps[1])


def test_a_checkpoint_of_two_ranks_resumes_alone_with_the_same_next_decision(tmp_path: Path) -> None:
    write_lines(tmp_path / "samples.jsonl", goods(40))
    source = jsonl(tmp_path / "samples.jsonl")
    config, other = (settings(tmp_path / name, source) for name in ("run", "other"))
    for kept in (config, other):
        serve_on_ranks(kept, 2, 2)
    assert hashes(checkpoints_of(config)[-1]) == hashes(checkpoints_of(other)[-1])
    _, (alone,) = serve_on_ranks(config, 1, 3)
    _, (together, _) = serve_on_ranks(other, 2, 3)
    assert alone[0].ids == together[0].ids
    assert alone[0].coefficients == pytest.approx(together[0].coefficients, abs=1e-5)


def test_an_idle_partition_holds_nobody_up(broker: str, topic: str, tmp_path: Path) -> None:
    create_topic(broker, topic, PARTITIONS)
    for number in (0, 2):  # rank 1 reads the others
        publish(broker, topic, goods(16), number)
    source = kafka(broker, topic, stop_at_end=False)
    config = settings(tmp_path / "run", source, buffer={"wait_s": 0.5})
    summaries, steps = serve_on_ranks(config, 2, 3, told=1)
    assert [summary.step for summary in summaries] == [3, 3]
    assert [len(step.ids) for step in steps[0]] == [8, 8, 8]


def test_what_one_rank_fails_on_ends_all_with_the_same_error_and_a_checkpoint(tmp_path: Path) -> None:
    write_lines(tmp_path / "samples.jsonl", [*goods(16), *[b"not json"] * 9])
    limits = {"max_in_a_row": 5}
    config = settings(tmp_path / "run", jsonl(tmp_path / "samples.jsonl"), dead_letters=limits)

    def work(world: World) -> str:
        with pytest.raises(PoisonError) as caught:
            serve(settings_of_rank(Settings(**config), world), threading.Event(), world=world)
        return str(caught.value)

    with loading_one_at_a_time():
        own, other = on_ranks(2, work)
    assert other == f"rank 0: {own}"
    assert counts(config)["dead_lettered"] >= limits["max_in_a_row"]


def test_ranks_go_on_while_the_first_writes_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same checkpoints as if all had waited; each rank tells the stream once it knows that one is durable."""
    write_lines(tmp_path / "samples.jsonl", goods(RECORDS))
    go_on, told = threading.Event(), list[tuple[int, int]]()
    request, write = SharedIngest.request_commit, save_checkpoint

    def held(*arguments: Any, **options: Any) -> Any:
        if threading.current_thread().name == "checkpoint":
            assert go_on.wait(LONG_S)
        return write(*arguments, **options)

    def tell(ingest: SharedIngest, positions: Any, step: int) -> None:
        told.append((ingest.world.rank, step))
        if step:
            assert go_on.is_set()
        request(ingest, positions, step)

    def release(phase: Phase) -> None:
        if phase.name == "waiting for a checkpoint":
            go_on.set()

    monkeypatch.setattr(saver, "save_checkpoint", held)
    monkeypatch.setattr(SharedIngest, "request_commit", tell)
    found = list[dict[str, dict[str, str]]]()
    for asynchronous in (False, True):
        told.clear()
        go_on.clear()
        if not asynchronous:
            go_on.set()
        folder, checkpoint = tmp_path / str(asynchronous), {"every_steps": 2, "keep": 10, "asynchronous": asynchronous}
        config = settings(folder, jsonl(tmp_path / "samples.jsonl"), checkpoint=checkpoint)
        serve_on_ranks(config, 2, watcher=Watcher(on_phase=release))
        found.append({path.name: hashes(path) for path in checkpoints_of(config)})
        assert sorted(told) == [(rank, step) for rank in (0, 1) for step in range(0, RECORDS // 8 + 1, 2)]
    assert found[0] == found[1]
    assert len(found[0]) == RECORDS // 16 + 1


def test_ranks_all_learn_that_the_first_could_not_write_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lines(tmp_path / "samples.jsonl", goods(RECORDS))
    checkpoint = {"dir": str(tmp_path / "c"), "every_steps": 2, "asynchronous": True, "max_failing_s": 0.0}
    config = settings(tmp_path / "run", jsonl(tmp_path / "samples.jsonl"), checkpoint=checkpoint)
    write = save_checkpoint

    def fail(*arguments: Any, **options: Any) -> Any:
        if threading.current_thread().name == "checkpoint":
            raise CheckpointError("checkpoint.dir is full")
        return write(*arguments, **options)

    def work(world: World) -> str:
        with pytest.raises(CheckpointError) as caught:
            serve(settings_of_rank(Settings(**config), world), threading.Event(), world=world)
        return str(caught.value)

    monkeypatch.setattr(saver, "save_checkpoint", fail)
    with loading_one_at_a_time():
        own, other = on_ranks(2, work)
    assert own == other
    assert own.startswith("checkpoint.dir is full; this lasts longer")
    assert trainer_json(config)["step"] == 0

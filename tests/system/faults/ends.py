"""What a run came to: its newest checkpoint, its steps, what was decided of each record, and how two runs differ."""

import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from stream_trainer.ingest.letter import DeadLetter, from_message, read_dead_letters
from stream_trainer.settings.sections.source import KafkaSettings
from stream_trainer.sources.kafka import KafkaSource
from tests.helpers.crashes import Place, fork


def newest(config: Mapping[str, Any]) -> Path:
    """The checkpoint of the highest step. Raises ValueError if there is none."""
    manifests = Path(config["checkpoint"]["dir"]).glob("step-*/manifest.json")
    return max(manifests, key=lambda path: int(json.loads(path.read_text())["step"])).parent


def trainer_of(checkpoint: Path) -> dict[str, Any]:
    """Step, cursor and parts."""
    state: dict[str, Any] = json.loads((checkpoint / "trainer.json").read_text())
    return state


def is_whole(checkpoint: Path) -> bool:
    """Whether every file is there, with the contents that the manifest states, and no other."""
    stated = json.loads((checkpoint / "manifest.json").read_text())["files"]
    found = {p.relative_to(checkpoint).as_posix(): p for p in checkpoint.rglob("*") if p.is_file()}
    del found["manifest.json"]
    hashes = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in found.items()}
    return hashes == {name: file["sha256"] for name, file in stated.items()}


def differences(found: Path, expected: Path) -> Iterator[str]:
    """What is not, to the bit, the same in two checkpoints."""
    files = [sorted(str(p.relative_to(root)) for p in root.rglob("*.safetensors")) for root in (found, expected)]
    if files[0] != files[1]:
        yield f"files {files[0]} instead of {files[1]}"
    for name in files[1]:
        yield from (
            f"{name}: {what}" for what in _tensor_differences(load_file(found / name), load_file(expected / name))
        )
    states = [trainer_of(root) for root in (found, expected)]
    for state in states:  # a topic of letters has others' among them
        state["parts"]["dead_letters"].pop("in_topic", None)
    yield from (f"trainer.json: {name}" for name in ("step", "cursor", "parts") if states[0][name] != states[1][name])


def _tensor_differences(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> Iterator[str]:
    if found.keys() != expected.keys():
        yield f"tensors {sorted(found.keys() ^ expected.keys())} are in one of them only"
    for name in sorted(found.keys() & expected.keys()):
        sides = found[name], expected[name]
        if sides[0].dtype != sides[1].dtype or sides[0].shape != sides[1].shape:
            yield f"{name} is of another kind"
        elif not torch.equal(*(side.reshape(-1).view(torch.uint8) for side in sides)):
            yield f"{name} differs"


def steps_of(place: Place) -> Iterator[tuple[int, str]]:
    """Every step that was ever made, those that a crash took back too."""
    for line in place.trace.read_text().splitlines():
        yield int(json.loads(line)["step"]), line


def outcomes_of(place: Place) -> dict[str, set[str]]:
    found = defaultdict[str, set[str]](set)
    for line in place.ledger.read_text().splitlines():
        position, _, outcome = line.rpartition(" ")
        found[position].add(outcome)
    return found


def ledger_differences(config: Mapping[str, Any], place: Place, size: int) -> Iterator[str]:
    """Where the ledger does not list every one of `size` records once."""
    cursor = trainer_of(newest(config))["cursor"]
    outcomes = outcomes_of(place)
    if twice := {at for at, kinds in outcomes.items() if len(kinds) > 1}:
        yield f"{len(twice)} records have had two outcomes, {min(twice)} for one"
    if len(outcomes) != size or sum(cursor["counts"].values()) != size:
        yield f"{len(outcomes)} records decided and {cursor['counts']} counted instead of {size}"
    if undecided := [name for name, log in cursor["partitions"].items() if log["decided"]]:
        yield f"{undecided} hold intervals above the cursor although all is decided"
    made = [json.loads(line) for line in dict(steps_of(place)).values()]
    trained = [tuple(step["pool"][i]) for step in made for i in step["selected"]]
    pools = [tuple(position) for step in made for position in step["pool"]]
    if len(set(pools)) != len(pools) or len(trained) != cursor["counts"]["trained"]:
        yield f"{len(trained)} samples trained on, {cursor['counts']['trained']} counted, {len(set(pools))} pooled once"


def letters_of(config: Mapping[str, Any]) -> Counter[str]:
    """How often the letter of each record was kept, for readers of committed records."""
    if config["dead_letters"].get("kind") == "topic":
        return _letters_in_topic(config)
    letters = read_dead_letters(Path(config["dead_letters"]["path"]))
    return Counter(f"{letter.record.partition.number} {letter.record.offset}" for letter in letters)


def _letters_in_topic(config: Mapping[str, Any]) -> Counter[str]:
    """Those of this run. They are read by a child, for whoever forks later must not have had the client's threads."""
    found = newest(config) / "letters-of-test.json"
    owner = trainer_of(newest(config))["parts"]["dead_letters"]["in_topic"]["owner"]
    servers, topic = config["source"]["kafka"]["bootstrap_servers"], config["dead_letters"]["topic"]

    def read() -> int:
        letters = [letter for letter in letters_in(servers, topic) if letter.trainer == owner]
        found.write_text(json.dumps([f"{x.record.partition.number} {x.record.offset}" for x in letters]))
        return 0

    _, status = os.waitpid(fork(read), 0)
    if status:
        raise RuntimeError(f"{topic} could not be read")
    content = json.loads(found.read_text())
    found.unlink()
    return Counter(content)


def rows_of(checkpoints: Path) -> list[list[Any]]:
    """The ledger's rows in order, but for times and whose they are: topic, partition, offset, id, step, outcome ...

    They are read by a child, for whoever forks later must not have had the threads of Parquet's readers.
    """
    found = checkpoints.parent / "ledger-of-test.json"

    def read() -> int:
        from stream_trainer.ledger.files import read
        from stream_trainer.ledger.names import FOLDER, segments_in

        rows = [list(row.values()) for s in segments_in(checkpoints / FOLDER) for row in read(s.path).to_pylist()]
        found.write_text(json.dumps(sorted(row[:8] for row in rows)))
        return 0

    _, status = os.waitpid(fork(read), 0)
    if status:
        raise RuntimeError(f"the ledger in {checkpoints} could not be read")
    rows: list[list[Any]] = json.loads(found.read_text())
    return rows


def letters_in(servers: str, topic: str) -> list[DeadLetter]:
    """What is in a topic for readers of committed records."""
    settings = KafkaSettings(bootstrap_servers=servers, topic=topic, group_id=None, stop_at_end=True)
    letters = []
    with closing(KafkaSource(settings, "test")) as source:
        source.start({}, {}, {})
        while not source.exhausted:
            letters += list(map(from_message, source.poll(0.2)))
    return letters

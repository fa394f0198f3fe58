"""The material of `benchmarks.learning`: the files of a directory, and seeded streams mixed from them.

Streams, by name:

    mixture     each hundred records holds exactly the stated share of the target's domain, the rest in equal parts
    drift       the same share, but the others are role-play in the first half and tool use in the second
    duplicates  each hundred: 50 clean records as in `mixture`, 15 exact and 15 near copies of one of the last 16 clean
                ones (a tenth of the words dropped), 20 with the words of the answer in random order
    narrow      as in `mixture`, without the domain of what is measured as forgotten
    copies      each sixteen: one record of the target's domain four times, and 12 as in `mixture`
    swapped     as in `mixture`, but half of the answers belong to another prompt of the same domain. A record names its
                source, one of four. Of a source's records 90, 70, 30 or 10 % have lost their answers; which source has
                which share follows from the seed. Every source holds as much of every domain as the others
    known       as in `mixture`, but half of the target's domain are 16 records of its warm-up, over and over: a model
                that was warmed up has learned from them, any other one soon will have
    skill       as in `mixture`, but half of the target's domain have the first half of a prompt as their prompt and
                the second as their answer: the subject is the same, and nothing is solved
    imitation   each hundred: 70 as in `mixture`, 30 of the target's words without any sense: each word follows one
                that it follows somewhere in the target's domain

In the last four what is most like the target is not what helps most: likeness misleads.

A domain whose records are used up starts over in another order. Three of four records of a file are for streams, the
fourth is for warming a model up. What is written holds no domain, so that no method can read it: the labels stay here
and are looked up by id, for the plots. In the streams where likeness misleads, ids are mere numbers.
"""

import hashlib
import json
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path

from benchmarks.learning.supply import Record, Supply, continued, imitations, in_rounds, over_and_over, thinned
from stream_trainer.errors import SettingsError

DOMAINS = ("math", "roleplay", "tools")
TARGET = DOMAINS[0]  # unless told otherwise
TARGET_RECORDS, TEST_RECORDS = 64, 600  # held out of a stream whose target has no files of its own
MISLEADING = ("swapped", "known", "skill", "imitation")
STREAMS = ("mixture", "drift", "duplicates", "copies", "narrow", *MISLEADING)
CLEAN, COPY, NEAR, CORRUPTED = "clean", "copy", "near_copy", "corrupted"
SWAPPED, KNOWN, OTHER_SKILL, JUNK = "swapped", "known", "other_skill", "junk"
DUPLICATES = {CLEAN: 50, COPY: 15, NEAR: 15, CORRUPTED: 20}  # records of each hundred
RECENT = 16  # clean records that may be copied: copies then meet in a pool
BLOCK, COPIES = 16, 4
SOURCES = ("amber", "birch", "cedar", "dune")
SWAPPED_OF_TEN = (9, 7, 3, 1)  # records of a source, a domain at a time
KNOWN_RECORDS = 16
IMITATED = {CLEAN: 70, JUNK: 30}  # records of each hundred
WARM_UP_EVERY = 4


@dataclass(frozen=True)
class Label:
    """What a record is, for the plots. The domain of a spoilt one is that which it looks like."""

    domain: str
    kind: str = CLEAN


@dataclass(frozen=True)
class Stream:
    """Records in order, and what each is by its id."""

    records: tuple[Record, ...]
    labels: Mapping[str, Label]


@dataclass(frozen=True)
class Data:
    """What a directory holds.

    Attributes:
        domain: the target's.
        stream: records by domain, for streams.
        warm_up: records by domain, for warming a model up.
        target, test, retention: fixed sets; the last two are only ever measured on.
        fingerprint: SHA-256 of all files.
    """

    domain: str
    stream: Mapping[str, Sequence[Record]]
    warm_up: Mapping[str, Sequence[Record]]
    target: Sequence[Record]
    test: Sequence[Record]
    retention: Sequence[Record]
    fingerprint: str

    @property
    def guarded(self) -> str:
        """The domain of `retention`, which is not to be forgotten."""
        return _guarded(self.domain)


def read_data(directory: Path, domain: str = TARGET) -> Data:
    """Read the files that `--data` names. Raises SettingsError for one that is missing or holds anything else.

    `domain`: the target's. Where it has no file in `target/`, its target and test sets are held out of its stream.
    """
    digest = hashlib.sha256(domain.encode() if domain != TARGET else b"")
    streams = {name: _read(directory / "stream" / f"{name}.jsonl", digest) for name in DOMAINS}
    if (directory / "target" / f"{domain}.jsonl").exists() or domain == TARGET:
        target, test = (_read(directory / name / f"{domain}.jsonl", digest) for name in ("target", "test"))
    else:
        held_out = TARGET_RECORDS + TEST_RECORDS
        target, test = streams[domain][:TARGET_RECORDS], streams[domain][TARGET_RECORDS:held_out]
        streams[domain] = streams[domain][held_out:]
    retention = _read(directory / "test" / f"{_guarded(domain)}.jsonl", digest)
    return Data(
        domain=domain,
        stream={d: [r for i, r in enumerate(rs) if i % WARM_UP_EVERY] for d, rs in streams.items()},
        warm_up={name: records[::WARM_UP_EVERY] for name, records in streams.items()},
        target=target,
        test=test,
        retention=retention,
        fingerprint=digest.hexdigest(),
    )


def _guarded(target: str) -> str:
    return "roleplay" if target != "roleplay" else TARGET


def _read(path: Path, digest: "hashlib._Hash") -> list[Record]:
    try:
        content = path.read_bytes()
        lines = [json.loads(line) for line in content.splitlines() if line.strip()]
        records: list[Record] = [{name: str(line[name]) for name in ("id", "prompt", "response")} for line in lines]
    except OSError as error:
        raise SettingsError(f"--data: {path} cannot be read ({error.strerror}); name a directory that has it") from None
    except (ValueError, KeyError, TypeError) as error:
        raise SettingsError(
            f"--data: {path} is not one object with id, prompt and response a line ({type(error).__name__}); correct it"
        ) from None
    if len(records) <= WARM_UP_EVERY:
        raise SettingsError(f"--data: {path} holds {len(records)} records; add some more")
    digest.update(content)
    return records


def write_records(path: Path, records: Sequence[Record], prompt_chars: int) -> None:
    """As JSON lines. Of each prompt its last characters remain: short samples have to keep room for an answer."""
    lines = [json.dumps({**record, "prompt": record["prompt"][-prompt_chars:]}) for record in records]
    path.write_text("".join(f"{line}\n" for line in lines))


def make_stream(name: str, data: Data, share: int, count: int, seed: int) -> Stream:
    """`count` records of one of `STREAMS`; `share` of the target's domain, in percent.

    A longer stream begins as a shorter one does, but for `drift`, whose change stays in the middle.
    """
    rng = random.Random(f"{name} {share} {seed}")
    supply, target = Supply(data.stream, rng), data.domain
    others = tuple(domain for domain in DOMAINS if domain != target)
    narrowed = tuple(domain for domain in others if domain != data.guarded)
    if name == "drift":
        early, late = (_mixed(target, share, part, rng.random()) for part in (others[:1], others[1:]))
        domains = [*islice(early, count // 2), *islice(late, count - count // 2)]
        return _stream([(supply.take(domain), Label(domain)) for domain in domains])
    mixed = _mixed(target, share, narrowed if name == "narrow" else others, rng.random())
    if name == "duplicates":
        return _stream(_duplicates(supply, mixed, count, rng))
    if name == "copies":
        return _stream(_copies(supply, target, mixed, count, rng))
    if name in MISLEADING:
        return _stream(_numbered(islice(_misleading(name, data, supply, mixed, rng), count)))
    return _stream([(supply.take(domain), Label(domain)) for domain in islice(mixed, count)])


def even_stream(source: Mapping[str, Sequence[Record]], count: int, seed: int) -> Stream:
    """Every domain in turn, to warm a model up."""
    supply = Supply(source, random.Random(f"even {seed}"))
    return _stream([(supply.take(domain), Label(domain)) for domain in islice(cycle(DOMAINS), count)])


def _stream(labelled: Sequence[tuple[Record, Label]]) -> Stream:
    return Stream(tuple(record for record, _ in labelled), {record["id"]: label for record, label in labelled})


def _mixed(target: str, share: int, others: Sequence[str], seed: float) -> Iterator[str]:
    """Domains without end; each hundred holds the share exactly."""
    rng = random.Random(seed)
    while True:
        hundred = [target] * share + [others[i % len(others)] for i in range(100 - share)]
        rng.shuffle(hundred)
        yield from hundred


def _duplicates(supply: Supply, domains: Iterator[str], count: int, rng: random.Random) -> list[tuple[Record, Label]]:
    recent: deque[tuple[Record, str]] = deque(maxlen=RECENT)
    labelled: list[tuple[Record, Label]] = []
    while len(labelled) < count:
        kinds = [kind for kind, number in DUPLICATES.items() for _ in range(number)]
        rng.shuffle(kinds)
        if not recent:  # nothing is there to be copied yet
            kinds.insert(0, kinds.pop(kinds.index(CLEAN)))
        for kind in kinds[: count - len(labelled)]:
            if kind in (CLEAN, CORRUPTED):
                domain = next(domains)
                record = supply.take(domain)
            else:
                record, domain = rng.choice(recent)
                record = supply.named(record)
            if kind == CLEAN:
                recent.append((record, domain))
            labelled.append((_spoiled(record, kind, rng), Label(domain, kind)))
    return labelled


def _spoiled(record: Record, kind: str, rng: random.Random) -> Record:
    if kind == NEAR:
        return {"id": record["id"], **{name: thinned(record[name], rng) for name in ("prompt", "response")}}
    if kind == CORRUPTED:
        words = record["response"].split()
        return {**record, "response": " ".join(rng.sample(words, len(words)))}
    return record


def _copies(
    supply: Supply, target: str, domains: Iterator[str], count: int, rng: random.Random
) -> list[tuple[Record, Label]]:
    labelled: list[tuple[Record, Label]] = []
    while len(labelled) < count:
        block = [(supply.take(domain), Label(domain)) for domain in islice(domains, BLOCK - COPIES)]
        repeated = supply.take(target)
        block += [(supply.named(repeated), Label(target, COPY)) for _ in range(COPIES)]
        rng.shuffle(block)
        labelled += block
    return labelled[:count]


def _misleading(
    name: str, data: Data, supply: Supply, domains: Iterator[str], rng: random.Random
) -> Iterator[tuple[Record, Label]]:
    """A stream of `MISLEADING` without end."""
    target = data.domain
    if name == "swapped":
        return _swapped(supply, domains, rng)
    if name == "imitation":
        return _imitated(supply, target, domains, imitations(data.stream[target], rng.random()), rng)
    if name == "skill":
        return _half_spoilt(supply, target, domains, OTHER_SKILL, lambda: continued(supply.take(target)), rng)
    warm_up = data.warm_up[target]
    few = rng.sample(warm_up, min(KNOWN_RECORDS, len(warm_up)))
    return _half_spoilt(supply, target, domains, KNOWN, partial(next, over_and_over(few, rng.random())), rng)


def _swapped(supply: Supply, domains: Iterator[str], rng: random.Random) -> Iterator[tuple[Record, Label]]:
    swapped_of_ten = dict(zip(rng.sample(SOURCES, len(SOURCES)), SWAPPED_OF_TEN, strict=True))
    sources = {domain: in_rounds(dict.fromkeys(SOURCES, 1), rng.random()) for domain in DOMAINS}
    kinds = {
        (domain, source): in_rounds({SWAPPED: number, CLEAN: 10 - number}, rng.random())
        for domain in DOMAINS
        for source, number in sorted(swapped_of_ten.items())
    }
    left_over = {domain: supply.take(domain)["response"] for domain in DOMAINS}
    for domain in domains:
        record, source = supply.take(domain), next(sources[domain])
        kind = next(kinds[domain, source])
        if kind == SWAPPED:
            while left_over[domain] == record["response"]:
                left_over[domain] = supply.take(domain)["response"]
            # Answers move on by one record: each is in the stream once, and lengths tell nothing.
            answer, left_over[domain] = left_over[domain], record["response"]
            record = {**record, "response": answer}
        yield {**record, "source": source}, Label(domain, kind)


def _half_spoilt(
    supply: Supply, target: str, domains: Iterator[str], kind: str, spoilt: Callable[[], Record], rng: random.Random
) -> Iterator[tuple[Record, Label]]:
    kinds = in_rounds({CLEAN: 1, kind: 1}, rng.random())
    for domain in domains:
        if domain == target and next(kinds) == kind:
            yield spoilt(), Label(domain, kind)
        else:
            yield supply.take(domain), Label(domain)


def _imitated(
    supply: Supply, target: str, domains: Iterator[str], junk: Iterator[Record], rng: random.Random
) -> Iterator[tuple[Record, Label]]:
    for kind in in_rounds(IMITATED, rng.random()):
        if kind == JUNK:
            yield next(junk), Label(target, JUNK)
        else:
            domain = next(domains)
            yield supply.take(domain), Label(domain)


def _numbered(labelled: Iterable[tuple[Record, Label]]) -> list[tuple[Record, Label]]:
    """Under ids that tell nothing."""
    return [({**record, "id": f"record-{i}"}, label) for i, (record, label) in enumerate(labelled)]

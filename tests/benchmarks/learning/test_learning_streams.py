"""The streams of `benchmarks.learning` are what they say, and tell no method what only the plots may know."""

import doctest
import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks.learning import streams, summary, supply
from benchmarks.learning.methods import METHODS, records_needed
from benchmarks.learning.plan import Run
from benchmarks.learning.run import stream_of
from benchmarks.learning.streams import (
    CLEAN,
    COPY,
    CORRUPTED,
    DOMAINS,
    JUNK,
    KNOWN,
    MISLEADING,
    NEAR,
    OTHER_SKILL,
    SOURCES,
    STREAMS,
    SWAPPED,
    TARGET,
    Data,
    Stream,
    make_stream,
    read_data,
    write_records,
)
from tests.helpers.learning import TINY, domains_of, kinds_of


def test_a_target_without_files_of_its_own_is_held_out_of_its_stream(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "TARGET_RECORDS", 5)
    monkeypatch.setattr(streams, "TEST_RECORDS", 7)
    tools = read_data(directory, "tools")
    assert (len(tools.target), len(tools.test)) == (5, 7)
    kept = {r["id"] for part in (tools.target, tools.test) for r in part}
    assert kept.isdisjoint({r["id"] for part in (tools.stream, tools.warm_up) for r in part["tools"]})
    assert tools.fingerprint != read_data(directory).fingerprint
    stream = make_stream("mixture", tools, 10, 100, seed=1)
    assert Counter(domains_of(stream)) == {"tools": 10, "math": 45, "roleplay": 45}


def test_each_hundred_of_a_mixture_holds_the_stated_share(data: Data) -> None:
    stream = make_stream("mixture", data, 10, 300, seed=1)
    for start in (0, 100, 200):
        assert Counter(domains_of(stream)[start : start + 100]) == {"math": 10, "roleplay": 45, "tools": 45}
    assert len(stream.labels) == 300, "ids are unique though each domain starts over"
    assert set(kinds_of(stream)) == {CLEAN}


def test_a_drifting_mixture_changes_half_way_and_keeps_the_share(data: Data) -> None:
    domains = domains_of(make_stream("drift", data, 25, 400, seed=1))
    assert Counter(domains[:200]) == {"math": 50, "roleplay": 150}
    assert Counter(domains[200:]) == {"math": 50, "tools": 150}


def test_a_narrow_stream_holds_nothing_of_what_is_forgotten(data: Data) -> None:
    domains = domains_of(make_stream("narrow", data, 25, 200, seed=1))
    assert Counter(domains) == {"math": 50, "tools": 150}
    for target, other in (("tools", "math"), ("roleplay", "tools")):
        domains = domains_of(make_stream("narrow", replace(data, domain=target), 25, 200, seed=1))
        assert Counter(domains) == {target: 50, other: 150}


def test_where_role_play_is_the_target_mathematics_may_be_forgotten(directory: Path, data: Data) -> None:
    role_play = read_data(directory, "roleplay")
    assert (data.guarded, role_play.guarded) == ("roleplay", "math")
    assert role_play.retention == data.test


def test_duplicates_are_what_they_say(data: Data) -> None:
    stream = make_stream("duplicates", data, 25, 400, seed=1)
    kinds = kinds_of(stream)
    assert Counter(kinds) == {CLEAN: 200, COPY: 60, NEAR: 60, CORRUPTED: 80}
    originals = {r["id"].partition("~")[0]: r for domain in DOMAINS for r in data.stream[domain]}
    for made, kind in zip(stream.records, kinds, strict=True):
        original = originals[made["id"].partition("~")[0]]
        same = made["prompt"] == original["prompt"], made["response"] == original["response"]
        words, those = made["response"].split(), original["response"].split()
        if kind in (CLEAN, COPY):
            assert same == (True, True)
        elif kind == NEAR:
            assert same == (False, False)
            assert set(words) < set(those) or len(words) < len(those)
        else:
            assert same[0]
            assert sorted(words) == sorted(those)


def test_a_copy_follows_what_it_copies(data: Data) -> None:
    stream = make_stream("duplicates", data, 25, 100, seed=2)
    for i, (made, kind) in enumerate(zip(stream.records, kinds_of(stream), strict=True)):
        if kind == COPY:
            assert any(made["response"] == before["response"] for before in stream.records[:i])


def test_of_each_sixteen_four_are_copies_of_one_target_record(data: Data) -> None:
    stream = make_stream("copies", data, 25, 160, seed=1)
    for start in range(0, 160, 16):
        block = stream.records[start : start + 16]
        copies = [r for r in block if stream.labels[r["id"]].kind == COPY]
        assert len(copies) == 4
        assert {stream.labels[r["id"]].domain for r in copies} == {TARGET}
        assert len({r["response"] for r in copies}) == 1


def worth_of(stream: Stream) -> Counter[tuple[str, str]]:
    return Counter(zip(domains_of(stream), kinds_of(stream), strict=True))


def texts(data: Data, name: str, domain: str = TARGET) -> set[str]:
    return {r[name] for r in data.stream[domain]}


def test_half_of_the_answers_are_swapped_and_each_source_has_a_rate_of_its_own(data: Data) -> None:
    stream = make_stream("swapped", data, 25, 4000, seed=1)
    made = Counter((r["source"], stream.labels[r["id"]].kind) for r in stream.records)
    assert made.keys() == {(source, kind) for source in SOURCES for kind in (CLEAN, SWAPPED)}
    assert sorted(made[source, SWAPPED] for source in SOURCES) == [100, 300, 700, 900]
    assert {made.total()} == {4 * (made[source, SWAPPED] + made[source, CLEAN]) for source in SOURCES}
    assert worth_of(stream)[TARGET, CLEAN] == worth_of(stream)[TARGET, SWAPPED] == 500


def test_every_source_holds_as_much_of_every_domain(data: Data) -> None:
    stream = make_stream("swapped", data, 25, 400, seed=1)
    made = Counter((r["source"], stream.labels[r["id"]].domain) for r in stream.records)
    assert made == {(s, d): number for s in SOURCES for d, number in (("math", 25), ("roleplay", 38), ("tools", 37))}


def test_a_swapped_answer_is_that_of_another_prompt_of_the_domain(data: Data) -> None:
    stream = make_stream("swapped", data, 25, 1000, seed=1)
    for made in stream.records:
        label = stream.labels[made["id"]]
        assert made["prompt"] in texts(data, "prompt", label.domain)
        assert made["response"] in texts(data, "response", label.domain)
        assert (made["prompt"] == f"ask {made['response']}") == (label.kind == CLEAN)
    first = stream.records[:60]  # before a domain starts over
    assert len({r["response"] for r in first}) == len({r["prompt"] for r in first}) == 60, "answers are exchanged"


def test_names_of_sources_mean_nothing(data: Data) -> None:
    worst = set()
    for seed in range(20):
        stream = make_stream("swapped", data, 25, 400, seed)
        swapped = Counter(r["source"] for r in stream.records if stream.labels[r["id"]].kind == SWAPPED)
        worst.add(swapped.most_common(1)[0][0])
    assert worst == set(SOURCES)


@pytest.mark.parametrize(("name", "kind"), [("known", KNOWN), ("skill", OTHER_SKILL)])
@pytest.mark.parametrize("target", ["math", "tools"])
def test_half_of_the_target_is_worth_little(data: Data, name: str, kind: str, target: str) -> None:
    stream = make_stream(name, replace(data, domain=target), 25, 400, seed=1)
    first, second = (domain for domain in DOMAINS if domain != target)
    assert worth_of(stream) == {(target, CLEAN): 50, (target, kind): 50, (first, CLEAN): 152, (second, CLEAN): 148}


def test_what_is_known_is_a_few_records_of_the_warm_up_over_and_over(
    data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "KNOWN_RECORDS", 5)
    stream = make_stream("known", data, 25, 400, seed=1)
    made = {KNOWN: Counter[tuple[str, str]](), CLEAN: Counter[tuple[str, str]]()}
    for record in stream.records:
        made[stream.labels[record["id"]].kind][record["prompt"], record["response"]] += 1
    assert list(made[KNOWN].values()) == [10] * 5
    assert made[KNOWN].keys() <= {(r["prompt"], r["response"]) for r in data.warm_up[TARGET]}
    assert made[KNOWN].keys().isdisjoint(made[CLEAN])


def test_another_skill_goes_on_with_a_prompt_and_solves_nothing(data: Data) -> None:
    stream = make_stream("skill", data, 25, 400, seed=1)
    answers = texts(data, "response")
    for made, kind in zip(stream.records, kinds_of(stream), strict=True):
        if kind == OTHER_SKILL:
            assert f"{made['prompt']} {made['response']}" in texts(data, "prompt")
            assert len(made["prompt"].split()) == len(made["response"].split()) == 6
            assert made["response"] not in answers


def test_a_prompt_of_one_word_is_its_own_answer() -> None:
    assert supply.continued({"id": "a", "prompt": " Why? ", "response": "So."})["response"] == "Why?"
    lines = supply.continued({"id": "a", "prompt": "tool: a\nUse it well\nnow", "response": "x"})
    assert (lines["prompt"], lines["response"]) == ("tool: a\nUse", "it well\nnow"), "lines stay"


def test_of_each_hundred_thirty_imitate_the_target(data: Data) -> None:
    stream = make_stream("imitation", data, 25, 1000, seed=1)
    assert worth_of(stream) == {
        (TARGET, JUNK): 300,
        (TARGET, CLEAN): 175,
        ("roleplay", CLEAN): 266,
        ("tools", CLEAN): 259,
    }
    kinds = kinds_of(stream)
    assert {kinds[start : start + 100].count(JUNK) for start in range(0, 1000, 100)} == {30}


def test_imitations_have_the_pairs_of_words_of_the_target_and_no_sense(data: Data) -> None:
    stream = make_stream("imitation", data, 25, 400, seed=1)
    junk = [r for r, kind in zip(stream.records, kinds_of(stream), strict=True) if kind == JUNK]
    for name in ("prompt", "response"):
        originals = [text.split() for text in texts(data, name)]
        ends = {(words[-1], other[0]) for words in originals for other in originals}
        pairs = {pair for words in originals for pair in pairwise(words)} | ends
        assert all(pair in pairs for r in junk for pair in pairwise(r[name].split()))
        assert {len(r[name].split()) for r in junk} == {len(words) for words in originals}
        assert sum(r[name] in texts(data, name) for r in junk) < len(junk) / 10


def test_an_imitation_follows_how_often_a_word_comes_after_another() -> None:
    records = [{"id": "", "prompt": "p q", "response": text} for text in ("a b", "a b", "a b", "a c")]
    endless = supply.imitations(records, seed=0.5)
    made = Counter(next(endless)["response"] for _ in range(4000))
    assert made.keys() == {"a b", "a c"}
    assert made["a b"] / 4000 == pytest.approx(3 / 4, abs=0.04)


def test_rounds_hold_what_they_say_in_an_order_of_their_seed() -> None:
    def first(seed: float) -> list[str]:
        endless = supply.in_rounds({"a": 3, "b": 2}, seed)
        return [next(endless) for _ in range(50)]

    assert {tuple(sorted(first(0.5)[start : start + 5])) for start in range(0, 50, 5)} == {("a", "a", "a", "b", "b")}
    assert first(0.5) == first(0.5) != first(0.25)


@pytest.mark.parametrize("module", [summary, supply], ids=lambda module: module.__name__)
def test_examples_run(module: ModuleType) -> None:
    failed, attempted = doctest.testmod(module)
    assert attempted > failed == 0


@pytest.mark.parametrize("name", MISLEADING)
def test_what_is_written_tells_neither_domain_nor_worth(data: Data, tmp_path: Path, name: str) -> None:
    path = tmp_path / "stream.jsonl"
    stream = make_stream(name, data, 25, 200, seed=1)
    write_records(path, stream.records, prompt_chars=20)
    written = [json.loads(line) for line in path.read_text().splitlines()]
    fields = ["id", "prompt", "response", *(["source"] if name == "swapped" else [])]
    assert all(list(line) == fields for line in written), "the order of fields tells nothing either"
    assert [line["id"] for line in written] == [f"record-{i}" for i in range(200)]
    assert [line["prompt"] for line in written] == [r["prompt"][-20:] for r in stream.records]
    for field in fields[2:]:
        assert [line[field] for line in written] == [r[field] for r in stream.records]


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_follows_from_its_seed(data: Data, name: str) -> None:
    first = make_stream(name, data, 25, 200, seed=1)
    assert first == make_stream(name, data, 25, 200, seed=1)
    assert first != make_stream(name, data, 25, 200, seed=2)
    if name != "drift":
        assert first.records == make_stream(name, data, 25, 320, seed=1).records[:200]


def test_only_the_oracle_gets_a_stream_of_the_target_alone_and_none_gets_labels(data: Data) -> None:
    for method in METHODS:
        stream = stream_of(data, Run(TINY, "mixture", 25, method, 0))
        assert len(stream.records) == records_needed(METHODS[method], TINY.steps)
        assert (set(domains_of(stream)) == {TARGET}) == (method == "oracle")
        assert all(set(r) == {"id", "prompt", "response"} for r in stream.records)


def test_what_warms_a_model_up_is_in_no_stream(data: Data) -> None:
    for domain in DOMAINS:
        assert not {r["id"] for r in data.warm_up[domain]} & {r["id"] for r in data.stream[domain]}
        assert len(data.warm_up[domain]) + len(data.stream[domain]) == 40

"""Feed the decoder, the service and the settings whatever can be thought of.

    python -m tests.system.faults.fuzz --records 100000 --examples 2000

Records: conversations with all their fields, random bytes, mutated samples and mutated kinds of what is no sample, deep
nesting, huge numbers, lone surrogates, NaN, and any values in the fields that have a meaning. The decoder makes a
sample or a SampleError of each; the service, on a file of them, gives each one outcome and keeps the same ones as dead
letters. Settings: any tree of YAML values gives settings, or a SettingsError of one line for each mistake.
"""

import argparse
import json
import random
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import hypothesis
import yaml
from hypothesis import strategies as st
from pydantic import BaseModel

from stream_trainer.errors import SampleError, SettingsError
from stream_trainer.ingest.letter import read_dead_letters
from stream_trainer.records import Partition, Record, Sample
from stream_trainer.samples.byte_tokenizer import byte_tokenizer
from stream_trainer.samples.decoder import REASONS, Decoder
from stream_trainer.service import serve
from stream_trainer.settings.loading import load_settings
from stream_trainer.settings.mistakes import section_of
from stream_trainer.settings.schema import SampleSettings, Settings
from tests.helpers.malformed import malformed_values
from tests.helpers.service import configuration, good, jsonl, write_lines

MAX_BYTES = 20_000
BATCH = 64
FIELDS = ("text", "prompt", "response", "messages", "id", "weight", "timestamp", "domain", "role", "content", "other")
ODD = (
    "",
    " ",
    "\x00",
    "é",
    "\ud800",
    "a\udfff",
    "\ufdd0",
    "\U0001f600",
    "<|im_start|>",
    "2024-01-01",
    "nan",
    "x" * 3000,
)
NUMBERS = (
    "0",
    "-0",
    "1",
    "-1",
    "1e308",
    "1e309",
    "-1e999",
    "1" + "0" * 400,
    "0.1",
    "1e-400",
    "NaN",
    "Infinity",
    "-Infinity",
)


def random_record(chance: random.Random) -> bytes:
    """One value of any kind, without a newline."""
    kinds = (_random_bytes, _mutated, _mutated, _nested, _object, _object, _object, _sample, _chat, _chat, _chat)
    return chance.choice(kinds)(chance).replace(b"\n", b" ")


def _random_bytes(chance: random.Random) -> bytes:
    return chance.randbytes(chance.choice((0, 1, 3, 20, 200)))


def _sample(chance: random.Random) -> bytes:
    return good(chance.randrange(1000))


def _mutated(chance: random.Random) -> bytes:
    """A sample, or a kind of what is none, with some bytes changed, cut out, doubled or put in."""
    value = bytearray(_sample(chance) if chance.random() < 0.5 else chance.choice(_MALFORMED))
    for _ in range(chance.randint(1, 4)):
        start = chance.randrange(len(value) + 1)
        end = min(len(value), start + chance.choice((0, 1, 1, 2, 8)))
        value[start:end] = chance.choice(
            (b"", bytes(value[start:end]) * 2, chance.randbytes(1), chance.choice(_TOKENS))
        )
    return bytes(value)


def _nested(chance: random.Random) -> bytes:
    depth = chance.choice((3, 50, 400, 900, 3000, MAX_BYTES // 2))
    opening, closing = chance.choice(((b"[", b"]"), (b'{"text":', b"}"), (b'{"messages":[', b"]}")))
    inside = opening * depth + b"1" + closing * chance.choice((0, depth - 1, depth))
    return b'{"text": "a", "other": ' + inside + b"}" if chance.random() < 0.5 else inside


def _object(chance: random.Random) -> bytes:
    """Fields that have a meaning, with any values: duplicates, lone surrogates and numbers of no size among them."""
    names = chance.choices(FIELDS, k=chance.randint(1, 5))
    return ("{" + ", ".join(f'"{name}": {_value(chance, 3)}' for name in names) + "}").encode("utf-8", "surrogatepass")


def _value(chance: random.Random, depth: int) -> str:
    """JSON, or nearly."""
    kind = chance.randrange(7 if depth else 4)
    if kind == 0:
        return chance.choice(NUMBERS)
    if kind == 1:
        return chance.choice(("true", "false", "null"))
    if kind < 4:
        text = chance.choice(ODD) + chance.choice(ODD)
        return json.dumps(text, ensure_ascii=chance.random() < 0.7)
    if kind == 4:
        return "[" + ", ".join(_value(chance, depth - 1) for _ in range(chance.randrange(3))) + "]"
    if kind == 5:
        role, content = json.dumps(chance.choice(("user", "assistant", "system", "tool", ""))), _value(chance, 0)
        return f'[{{"role": {role}, "content": {content}}}]'
    return "{" + ", ".join(f'"{chance.choice(FIELDS)}": {_value(chance, depth - 1)}' for _ in range(2)) + "}"


def _chat(chance: random.Random) -> bytes:
    """A conversation, or nearly: fields of messages and beside them, now and then with any value."""
    messages = [_message(chance) for _ in range(chance.choice((0, 1, 2, 2, 3, 5)))]
    fields = {"messages": "[" + ", ".join(messages) + "]"} | _some(chance, BESIDE, 0.15)
    if chance.random() < 0.1:
        fields = {"conversations": fields.pop("messages"), **fields}
    return ("{" + ", ".join(f'"{name}": {value}' for name, value in fields.items()) + "}").encode(
        "utf-8", "surrogatepass"
    )


def _message(chance: random.Random) -> str:
    fields = {"role": json.dumps(chance.choice(ROLES)), "content": _value(chance, 0)} | _some(chance, OF_MESSAGES, 0.12)
    if chance.random() < 0.6:
        fields["content"] = json.dumps(chance.choice(WORDS) + chance.choice(ODD[:2] + WORDS))
    return "{" + ", ".join(f'"{name}": {value}' for name, value in fields.items()) + "}"


def _some(chance: random.Random, values: Mapping[str, Sequence[str]], share: float) -> dict[str, str]:
    """Some of the fields, each with one of its values or with any."""
    chosen = [name for name in values if chance.random() < share]
    return {name: chance.choice(values[name]) if chance.random() < 0.7 else _value(chance, 2) for name in chosen}


ROLES = (*("user", "assistant") * 5, "system", "tool", "developer", "function", "User", "")
WORDS = (
    "Hi",
    "Hello </s>",
    "<s>",
    "<think>a</think>b",
    "user: ",
    "assistant: ",
    "\ufdd0</s>\ufdd1",
    "é\n",
    "{{ 1 / 0 }}",
)
CALLS = (
    '[{"function": {"name": "f", "arguments": {"a": 1}}}]',
    '[{"name": "f", "arguments": "{\\"a\\": 1}"}]',
    "[{}]",
    "[]",
)
OF_MESSAGES = {
    "tool_calls": CALLS,
    "reasoning_content": ('"hm"', '""', "1"),
    "name": ('"Ann"', '"</s>"'),
    "weight": ("0", "1", "0.5", "-1", '"0"', "1e999"),
    "content": ('[{"type": "text", "text": "a"}]', '[{"type": "image"}]', "null", '""'),
    "train": ("false",),
    "tool_call_id": ('"1"', "1"),
}
BESIDE = {
    "tools": ('[{"type": "function", "function": {"name": "f"}}]', '"[]"', '"no"', "[1]", "{}"),
    "system": ('"Be brief."', '""', "1"),
    "chat_template_kwargs": ('{"a": 1}', '{"messages": []}', '{"role": 1}', "[]"),
    "weight": ("2", "0", "null"),
    "label": ("true",),
    "text": ('"a"',),
}
_MALFORMED = [value for _, value in malformed_values(2000) if len(value) < 3000]
_TOKENS = (b'"', b"{", b"}", b"[", b"]", b",", b":", b"\\", b"\\ud800", b"NaN", b"1e999", b"\xff", b"\x00", b"null")


def random_records(count: int, seed: int) -> list[bytes]:
    """`count` of them, the same for the same seed."""
    chance = random.Random(seed)
    return [random_record(chance) for _ in range(count)]


def decode_all(values: Sequence[bytes]) -> list[Sample | SampleError | None]:
    """What the decoder makes of each. Raises AssertionError if that is anything but a sample or a known SampleError."""
    decoder = Decoder(byte_tokenizer(), SampleSettings(max_tokens=64, max_bytes=MAX_BYTES))
    records = [Record(Partition("fuzz", 0), at, at + 1, value) for at, value in enumerate(values)]
    results = [r for at in range(0, len(records), BATCH) for r in decoder.decode_batch(records[at : at + BATCH])]
    assert len(results) == len(values)
    for value, result in zip(values, results, strict=True):
        if isinstance(result, SampleError):
            assert result.reason in REASONS, (value, result.reason)
            assert result.reason != "unexpected", (value, str(result))
        else:
            assert isinstance(result, Sample), value
    return results


def serve_all(values: Sequence[bytes], folder: Path) -> dict[str, int]:
    """Counts by outcome of a run on a file of these; each has one, the one that the decoder alone would give it.

    Raises AssertionError if a record is missing, or is kept as a dead letter although it is a sample.
    """
    bad = {at: r.reason for at, r in enumerate(decode_all(values)) if isinstance(r, SampleError)}
    write_lines(folder / "fuzz.jsonl", values)
    cheap = {"profile": "plain", "draw": "uniform", "pool_size": 256, "batch_size": 2}
    samples = {"max_tokens": 64, "max_bytes": MAX_BYTES}
    config = configuration(folder, jsonl(folder / "fuzz.jsonl"), samples=samples)
    config["dead_letters"] |= {"max_ratio": None, "max_in_a_row": None}  # most of it is meant to be no sample
    summary = serve(Settings(**config | {"selection": cheap}), threading.Event())
    starts = [0]
    for value in values:
        starts.append(starts[-1] + len(value) + 1)
    letters = [(letter.record.offset, letter.reason) for letter in read_dead_letters(folder / "dead-letters.jsonl")]
    assert sorted(letters) == sorted((starts[at], reason) for at, reason in bad.items())
    assert summary.counts["dead_lettered"] == len(bad)
    assert sum(summary.counts.values()) == len(values)
    return summary.counts


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats()
    | st.text(max_size=8)
    | st.dates()
    | st.sampled_from(["kafka", "jsonl", "bytes", "file", "1e-5", "cuda:0", "**********", "/", "-", "0", "null", "a:b"])
)
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(SCALARS, inner, max_size=3),
    max_leaves=6,
)


def _trees(section: type[BaseModel]) -> st.SearchStrategy[Any]:
    """Some settings of a section with any value, and sometimes something else instead of it."""
    inner: dict[str, Callable[[], st.SearchStrategy[Any]]] = {}
    for name, field in section.model_fields.items():
        below = section_of(field)
        inner[name] = partial(_trees, below) if below is not None else lambda: ANYTHING
    known = st.sampled_from(sorted(inner)).flatmap(lambda name: st.tuples(st.just(name), inner[name]()))
    unknown = st.tuples(SCALARS, ANYTHING)
    return (
        st.lists(known | known | known | unknown, max_size=4).map(dict)
        | known.map(lambda pair: dict([pair]))
        | ANYTHING
    )


TREES = _trees(Settings)
ENOUGH: Mapping[str, Any] = {
    "source": {"kind": "jsonl", "jsonl": {"path": "a.jsonl"}},
    "model": {"name": "model"},
    "target": {"path": "target.jsonl"},
}


def check_settings(tree: Any, folder: Path) -> None:
    """Settings from a file of that tree, alone and over enough, are settings or a SettingsError of lines that say all.

    Raises whatever else comes of it.
    """
    over = {**ENOUGH, **tree} if isinstance(tree, dict) else tree
    for content in (tree, over):
        file = folder / "settings.yaml"
        file.write_text(yaml.dump(content, allow_unicode=True), encoding="utf-8", errors="surrogatepass")
        try:
            load_settings(file, [])
        except SettingsError as error:
            lines = str(error).split("\n")
            assert all(line.strip() and line.isprintable() for line in lines), lines


def fuzz_settings(examples: int, folder: Path) -> None:
    """Any trees, as many as asked for."""

    @hypothesis.settings(
        max_examples=examples, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
    )
    @hypothesis.given(TREES)
    def check(tree: Any) -> None:
        check_settings(tree, folder)

    check()


def main() -> int:
    """Returns 0, or raises at what should not be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=2000)
    parser.add_argument("--examples", type=int, default=200, help="trees of settings")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print(f"records: {serve_all(random_records(options.records, options.seed), folder)}", flush=True)
        fuzz_settings(options.examples, folder)
        print(f"settings: {options.examples} trees")
    return 0


if __name__ == "__main__":
    sys.exit(main())

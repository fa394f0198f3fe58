"""What the ingest benchmark reads: made-up records of 1 KB, a tokenizer, and a topic or a file that holds them."""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from itertools import accumulate
from pathlib import Path
from typing import Any

from stream_trainer.commands.produce import produce
from stream_trainer.errors import SettingsError
from stream_trainer.samples.byte_tokenizer import byte_tokenizer
from stream_trainer.settings.sections.source import JsonlSettings, KafkaSettings, SourceSettings

RECORD_BYTES = 1000
PROMPT_CHARS = 120
MALFORMED_EVERY = 100  # one record in so many
VOCABULARY = 20_000
CONSONANTS = ["b", "c", "d", "f", "g", "h", "l", "m", "n", "p", "r", "s", "t", "v", "w", "ch", "st", "th", "tr"]
VOWELS = ["a", "e", "i", "o", "u", "ai", "ea", "ou"]


def make_records(count: int, seed: int) -> Iterator[bytes]:
    """JSON of `RECORD_BYTES` bytes each, prompt and response; every `MALFORMED_EVERY`th is spoilt in one of four ways.

    Words are drawn by Zipf's law out of `VOCABULARY` made-up ones; a tenth ends in a mark, some are numbers.
    """
    words = [_word(rng) for rng in [random.Random(0)] for _ in range(VOCABULARY)]  # whatever the seed
    rng = random.Random(seed)
    shares = list(accumulate(1 / rank for rank in range(3, VOCABULARY + 3)))
    for number in range(1, count + 1):
        frame = len(json.dumps({"id": number, "prompt": "", "response": ""}))
        text = _text(rng, words, shares, RECORD_BYTES - frame)
        end = text.rindex(" ", 0, PROMPT_CHARS)
        fields = {"id": number, "prompt": text[:end], "response": text[end + 1 :].rstrip()}
        value = json.dumps(fields).encode()
        yield value if number % MALFORMED_EVERY else _spoilt(value, number // MALFORMED_EVERY)


def _word(rng: random.Random) -> str:
    return "".join(rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(rng.choice((1, 2, 2, 3))))


def _text(rng: random.Random, words: Sequence[str], shares: Sequence[float], chars: int) -> str:
    drawn = rng.choices(words, cum_weights=shares, k=chars // 3)
    for place in range(len(drawn)):
        chance = rng.random()
        if chance < 0.10:
            drawn[place] += rng.choice(".,;:?")
        elif chance < 0.12:
            drawn[place] = str(rng.randrange(10_000))
    return " ".join(drawn)[:chars]


def _spoilt(value: bytes, kind: int) -> bytes:
    """Cut off, not UTF-8, without a response, or with one that is no string."""
    if kind % 4 == 3:
        return json.dumps({"prompt": "p" * (RECORD_BYTES - 30), "response": 1}).encode()
    return (value[:-2], value.replace(b"a", b"\xff", 1), value.replace(b'"response"', b'"rejected"'))[kind % 4]


def write_records(path: Path, count: int, seed: int) -> int:
    """Write records as lines; returns the bytes of their values."""
    size = 0
    with path.open("wb") as file:
        for value in make_records(count, seed):
            size += len(value)
            file.write(value + b"\n")
    return size


def load_tokenizer(name: str, gguf_file: str | None) -> Any:
    """`bytes`, or the one in a directory. Raises SettingsError if there is none."""
    if name == "bytes":
        return byte_tokenizer()
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, gguf_file=gguf_file)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise SettingsError(f"--tokenizer {name} holds no tokenizer ({reason}); name a model's directory") from None


def start_broker(folder: Path, stack: ExitStack) -> str:
    """`host:port` of a broker that runs until `stack` closes. Raises SettingsError if what it needs is missing."""
    folder.mkdir()
    from tests.helpers.brokers import apache_kafka, why_no_apache_kafka  # pytest is there wherever tests are

    if reason := why_no_apache_kafka():
        raise SettingsError(f"{reason}; set that up, or measure with --source jsonl")
    return stack.enter_context(apache_kafka(folder)).bootstrap_servers


def open_stream(
    records: Path, servers: str | None, topic: str, progress: Callable[[int, int], None] | None = None
) -> SourceSettings:
    """A source that ends with the last line of `records`: a topic that is filled with them, or the file itself."""
    if servers is None:
        return SourceSettings(kind="jsonl", jsonl=JsonlSettings(path=str(records)))
    kafka = KafkaSettings(bootstrap_servers=servers, topic=topic, group_id=topic, stop_at_end=True)
    produce([records], None, kafka, progress=progress)
    return SourceSettings(kind="kafka", kafka=kafka)

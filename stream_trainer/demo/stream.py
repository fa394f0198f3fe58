"""The demo's stream: one skill, spelling numbers in words, hidden among other material, junk and broken records.

Written as JSON lines, the same for the same seed. Every number to spell, in the stream or out of it, occurs once, so
neither the target set nor the held-out set has a sample in common with the stream.
"""

import json
import random
import string
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

TARGET = "spelling"  # the domain that the target set is of
WRONG = "wrong spelling"
MALFORMED = "malformed"
TARGET_SAMPLES = 32
HELD_OUT_SAMPLES = 64

SHARES = {
    TARGET: 0.25,
    WRONG: 0.03,
    "prose": 0.22,
    "tool calls": 0.21,
    "lists": 0.14,
    "noise": 0.08,
    "repetition": 0.07,
}
MALFORMED_SHARE = 0.015  # on top of the samples

NUMBERS = range(100_000, 1_000_000)

Fields = dict[str, object]


@dataclass(frozen=True)
class DemoStream:
    """Files of a demo.

    Attributes:
        records: the stream, a record a line.
        target: spellings that steer the selection.
        held_out: spellings that neither steer nor train; what was learned is measured on them.
        counts: records of the stream by domain, malformed ones included.
    """

    records: Path
    target: Path
    held_out: Path
    counts: dict[str, int]


def write_stream(directory: Path, samples: int, seed: int) -> DemoStream:
    """Write a stream of `samples` usable records, and some that are not, with its target and held-out sets."""
    rng = random.Random(seed)  # noqa: S311 - made-up data, no secret
    domains = _domains(samples)
    rng.shuffle(domains)
    counts = Counter(domains)
    needed = counts[TARGET] + counts[WRONG] + TARGET_SAMPLES + HELD_OUT_SAMPLES
    numbers = iter(rng.sample(NUMBERS, needed))
    stream = DemoStream(
        directory / "stream.jsonl", directory / "target.jsonl", directory / "held-out.jsonl", dict(counts)
    )
    for path, size in ((stream.target, TARGET_SAMPLES), (stream.held_out, HELD_OUT_SAMPLES)):
        path.write_bytes(b"".join(_spelling(TARGET, next(numbers)) for _ in range(size)))
    with stream.records.open("wb") as file:
        file.writelines(_record(domain, rng, numbers) for domain in domains)
    return stream


def spell(number: int) -> str:
    """An integer from 0 to 999,999 in English words."""
    if number < 20:
        return ONES[number]
    if number < 100:
        return TENS[number // 10] + (f"-{ONES[number % 10]}" if number % 10 else "")
    size, name = (1000, "thousand") if number >= 1000 else (100, "hundred")
    rest = f" {spell(number % size)}" if number % size else ""
    return f"{spell(number // size)} {name}{rest}"


def _domains(samples: int) -> list[str]:
    """The domain of every record, unshuffled; what rounding leaves over goes to the largest of the others."""
    counts = {domain: round(samples * share) for domain, share in SHARES.items()}
    counts["prose"] += samples - sum(counts.values())
    counts[MALFORMED] = max(len(MALFORMED_LINES), round(samples * MALFORMED_SHARE))
    return [domain for domain, count in counts.items() for _ in range(count)]


def _record(domain: str, rng: random.Random, numbers: Iterator[int]) -> bytes:
    if domain == MALFORMED:
        return rng.choice(MALFORMED_LINES) + b"\n"
    if domain == TARGET:
        return _spelling(domain, next(numbers))
    if domain == WRONG:
        return _spelling(domain, next(numbers), answer=rng.choice(NUMBERS))
    return _line(domain, MAKERS[domain](rng))


def _spelling(domain: str, number: int, answer: int | None = None) -> bytes:
    """The number's spelling, or in its place that of `answer`."""
    return _line(domain, {"prompt": f"Spell {number}", "response": spell(number if answer is None else answer)})


def _line(domain: str, fields: Fields) -> bytes:
    """A record; its domain is for the report alone."""
    return json.dumps({**fields, "domain": domain}).encode() + b"\n"


def _prose(rng: random.Random) -> Fields:
    who, what, where = rng.choice(PEOPLE), rng.choice(DEEDS), rng.choice(PLACES)
    return {"text": f"{rng.choice(TIMES)} the {who} {what} {where}, and {rng.choice(ENDINGS)}."}


def _tool_call(rng: random.Random) -> Fields:
    device, room, on = rng.choice(DEVICES), rng.choice(ROOMS), rng.random() < 0.5
    call = {"tool": "set_device", "arguments": {"device": device, "room": room, "on": on}}
    return {"prompt": f"Turn {'on' if on else 'off'} the {device} in the {room}.", "response": json.dumps(call)}


def _list(rng: random.Random) -> Fields:
    items = rng.sample(GOODS, rng.randint(5, 8))
    return {"prompt": f"Sort: {', '.join(items)}", "response": ", ".join(sorted(items))}


def _noise(rng: random.Random) -> Fields:
    return {"text": "".join(rng.choices(string.printable.strip(), k=rng.randint(50, 90)))}


def _repetition(rng: random.Random) -> Fields:
    return {"text": " ".join([rng.choice(GOODS)] * rng.randint(8, 12))}


MAKERS: dict[str, Callable[[random.Random], Fields]] = {
    "prose": _prose,
    "tool calls": _tool_call,
    "lists": _list,
    "noise": _noise,
    "repetition": _repetition,
}

MALFORMED_LINES = (
    b'{"text": "cut off in the mid',
    b'{"text": "caf\xe9 in another encoding"}',
    b'{"prompt": "a question without an answer"}',
    b'{"text": 42}',
    b"no JSON at all",
)

ONES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
        "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen")  # fmt: skip
TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
TIMES = ("Before dawn", "Late at night", "In the autumn", "After the storm", "On a market day", "Once a year")
PEOPLE = ("miller", "ferryman", "old teacher", "baker", "lighthouse keeper", "carpenter", "shepherd", "innkeeper")
DEEDS = ("walked down", "carried a lantern", "drove a cart", "sang quietly", "led a tired horse", "waited for hours")
PLACES = ("to the harbour", "by the river", "through the forest", "along the wall", "at the crossroads", "up the hill")
ENDINGS = ("nobody knew why", "the dogs barked", "snow began to fall", "it was a long way home", "all was forgotten")
DEVICES = ("lamp", "heater", "radio", "fan", "kettle", "alarm", "blind", "oven")
ROOMS = ("kitchen", "hall", "study", "bedroom", "cellar", "garage", "attic", "workshop")
GOODS = ("apples", "bread", "candles", "dates", "eggs", "flour", "grapes", "honey", "ink", "jam", "kale", "lemons",
         "milk", "nuts", "onions", "pears", "rice", "salt", "thyme", "vinegar", "walnuts", "yeast")  # fmt: skip

"""What the streams of `benchmarks.learning` are made of: records in seeded orders, and ways to spoil them."""

import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

DROPPED = 0.1  # share of the words that a near copy lacks

Record = Mapping[str, str]
"""`id`, `prompt`, `response`, and `source` where a stream has several."""


class Supply:
    """Records of each domain in a seeded order, over and over. Their ids are unique."""

    def __init__(self, source: Mapping[str, Sequence[Record]], rng: random.Random) -> None:
        # Each domain has an order of its own, whatever is taken of the others.
        self._endless = {domain: over_and_over(records, rng.random()) for domain, records in source.items()}
        self._number = 0

    def take(self, domain: str) -> Record:
        """The domain's next record under a new id."""
        return self.named(next(self._endless[domain]))

    def named(self, record: Record) -> Record:
        """The record under a new id."""
        self._number += 1
        return {**record, "id": f"{record['id'].partition('~')[0]}~{self._number}"}


def over_and_over(records: Sequence[Record], seed: float) -> Iterator[Record]:
    """All records in a random order, then in another, without end."""
    rng, order = random.Random(seed), list(records)
    while True:
        rng.shuffle(order)
        yield from order


def in_rounds(counts: Mapping[str, int], seed: float) -> Iterator[str]:
    """Keys without end: each round holds every key as often as `counts` says, in random order.

    Examples:
        >>> kinds = in_rounds({"clean": 3, "junk": 1}, seed=0.5)
        >>> sorted(next(kinds) for _ in range(4))
        ['clean', 'clean', 'clean', 'junk']
    """
    rng = random.Random(seed)
    keys = [key for key, number in counts.items() for _ in range(number)]
    while True:
        yield from rng.sample(keys, len(keys))


def thinned(text: str, rng: random.Random) -> str:
    """The text without a tenth of its words, one at least; a single word stays."""
    words = text.split()
    if len(words) < 2:
        return text
    dropped = set(rng.sample(range(len(words)), max(1, round(DROPPED * len(words)))))
    return " ".join(word for i, word in enumerate(words) if i not in dropped)


def continued(record: Record) -> Record:
    """The first half of the prompt's words as the prompt, the second as the answer. A single word answers itself.

    The subject is the same; what is asked of the model is to go on writing, not to solve.

    Examples:
        >>> continued({"id": "a", "prompt": "Two and two is what?", "response": "4"})
        {'id': 'a', 'prompt': 'Two and', 'response': 'two is what?'}
    """
    prompt = record["prompt"].strip()
    words = prompt.split(" ")  # other white space is a part of how the subject looks
    middle = max(1, len(words) // 2)
    return {**record, "prompt": " ".join(words[:middle]), "response": " ".join(words[middle:]) or prompt}


def imitations(records: Sequence[Record], seed: float) -> Iterator[Record]:
    """Records without sense and without end, made of the words of others.

    Prompts and answers are Markov chains: every word follows one that it follows somewhere in `records`, and is drawn
    in proportion to how often. Each is as long in words as one of them.
    """
    rng = random.Random(seed)
    texts = {name: [record[name].strip().split(" ") for record in records] for name in ("prompt", "response")}
    followers = {name: _followers(lists) for name, lists in texts.items()}
    while True:
        lengths = {name: len(rng.choice(lists)) for name, lists in texts.items()}
        yield {"id": "", **{name: _chain(followers[name], length, rng) for name, length in lengths.items()}}


def _followers(texts: Sequence[Sequence[str]]) -> Mapping[str | None, Sequence[str | None]]:
    """All words that come after each word, as often as they do; None stands before and after a text."""
    followers: dict[str | None, list[str | None]] = defaultdict(list)
    for words in texts:
        for word, following in pairwise([None, *words, None]):
            followers[word].append(following)
    return followers


def _chain(followers: Mapping[str | None, Sequence[str | None]], length: int, rng: random.Random) -> str:
    words: list[str] = []
    word: str | None = None
    while len(words) < length:
        word = rng.choice(followers[word])
        if word is not None:
            words.append(word)
    return " ".join(words)

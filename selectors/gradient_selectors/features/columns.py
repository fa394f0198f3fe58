"""The features that a learned draw predicts from: named columns that cost no pass.

Shape suffixes: M samples waiting, T of the target, d columns, e embedding, c components, f features of the user's own.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from gradient_selectors.features.fluency import Fluency, disordered
from gradient_selectors.features.hashing import Hashes, Tokens, Vector
from gradient_selectors.features.ngrams import NgramImportance
from gradient_selectors.features.relevance import exchanged, relevance
from gradient_selectors.features.traits import Traits, embeddings_of

LIMIT = 3.0  # standard deviations, or log odds: what is most like the target is no better than what is very like it
NEAR_COPY = 0.5  # share of a sample's shingles that others have, from which on it is a copy
TURNS = 0.2  # share up to which these are turns of phrase, as samples of one subject have in common
RECENT = 256  # samples trained on lately, among which near copies are looked for
NAMED_CHARS = 48
SURE, FREE = 16.0, 0.01  # times the certainty of other columns
UNSEEN = "unseen value"  # begins the name of a column that no value has yet
LEAST_SPREAD = 0.2  # of fluency or relevance, as a share of the target's mean: few samples may be alike by chance
BARE_MENTION = 1.0  # log odds up to which evidence is worth no more (Kass and Raftery 1995)
TINY = 1e-9
FOUNDING = 8  # samples for each component: of fewer, it would be theirs alone

SIMPLE = ("likeness", "ngrams", "fluency", "relevance", "copy", "loss_share", "length")
"""The columns that are one number of a sample each, in their order:

    likeness    cosine of the embeddings to the target's mean, both less the mean of what waits
    ngrams      mean log ratio of hashed n-grams of what carries loss, target over stream; at most the target's own
    fluency     log odds that tokens that carry loss follow one another as in the target, not in disorder; at most 0
    relevance   log odds that an answer is that of its prompt as in the target, not of another one; at most 0
    copy        share of what carries loss that was trained on lately, as `TURNS`, `NEAR_COPY` and `LIMIT` say
    loss_share  log of the share of tokens that carry loss, over the target's mean of it; at most the target's highest
    length      log of the number of tokens
"""


@dataclass(frozen=True)
class Columns:
    """Which columns there are.

    Attributes:
        simple: some of `SIMPLE`.
        components: principal components of the embeddings of what waited when there was first enough of it.
        values: values of the record's fields that have a column; what comes later shares the last one. 0 turns it off.
        own: names of a user's own features.
    """

    simple: tuple[str, ...] = SIMPLE
    components: int = 4
    values: int = 32
    own: tuple[str, ...] = ()


class ColumnTable:
    """Turns the traits of what waits into a matrix.

    Most are standardised, by what waited first for components, else by what waits, and cut at three deviations. Fluency
    and relevance are log odds, shares are logs. Copies begin above a fifth: samples of one subject share a few turns of
    phrase with what was trained on, others and broken ones none at all, and nothing is to be said against the first.
    """

    def __init__(self, columns: Columns, target: Sequence[Traits]) -> None:
        """`target`: traits of the target's samples."""
        self.columns = columns
        self._target_e = embeddings_of(target).mean(0)
        self._target_answers, self._target_exchanges = _answers(target), [traits.exchange for traits in target]
        self._disordered = [disordered(answer) for answer in self._target_answers]
        self._exchanged = exchanged(self._target_exchanges)
        self._target_shares = _log_loss_shares(target, self._target_answers)
        self._ngrams = NgramImportance(self._target_answers)
        self._fluency = Fluency()
        self._values: list[str] = []
        self._basis_ec = torch.zeros(len(self._target_e), columns.components)
        self._centre_e = torch.zeros_like(self._target_e)
        self._recent: list[Hashes] = []

    @property
    def names(self) -> tuple[str, ...]:
        """The name of each column, (d,); a value of a field has its own once it was seen."""
        free = (f"{UNSEEN} {i}" for i in range(len(self._values), self.columns.values - 1))
        return (*self._unchanging, *self._values, *free, *(("other fields",) if self.columns.values else ()))

    @property
    def _unchanging(self) -> tuple[str, ...]:
        components = (f"component {i}" for i in range(self.columns.components))
        return ("constant", *self.columns.simple, *components, *self.columns.own)

    @property
    def prior_d(self) -> Tensor:
        """Where a predictor starts: what is like the target is thought useful, what was just trained on is not.

        A sample's gradient is a mean over its tokens that carry loss: its noise falls as their number grows, and its
        price as that of all tokens.
        """
        prior = {"likeness": 0.25, "ngrams": 0.75, "fluency": 0.5, "relevance": 0.5, "copy": -0.5, "loss_share": 1.0}
        return torch.tensor([prior.get(name, 0.0) for name in self.names], dtype=torch.float64)

    @property
    def certainty_d(self) -> Tensor:
        """How much surer the prior is of one column than of another, (d,) float64.

        A producer is seen seldom. A few utilities hardly tell the target's subject from others; likeness does. Of noise
        they tell nothing. The constant is free: the prior promises much of what it draws, and rewards are relative to
        what was drawn. Else the components would take the promise back, and with it the target's subject.
        """
        certainties = {"constant": FREE, "likeness": SURE, "ngrams": SURE, "loss_share": SURE}
        unchanging = [certainties.get(name, 1.0) for name in self._unchanging]
        return torch.tensor(unchanging + [0.25] * self.columns.values, dtype=torch.float64)

    @property
    def judges_quality_d(self) -> Tensor:
        """1 for columns in which the loss tells good from bad, (d,) float64: fluency, relevance, and who made a record.

        In all others it tells one subject from another, or what is known already.
        """
        quality = [float(name in ("fluency", "relevance")) for name in self._unchanging] + [1.0] * self.columns.values
        return torch.tensor(quality, dtype=torch.float64)

    def matrix(self, waiting: Sequence[Traits]) -> Tensor:
        """The columns of what waits, (M, d) float64. Founds the components, and names values that are new."""
        embeddings_Me = embeddings_of(waiting)
        if not bool(self._basis_ec.any()) and len(waiting) >= FOUNDING * max(1, self.columns.components):
            self._found(embeddings_Me)
        answers = _answers(waiting)
        lengths_M = torch.tensor([float(len(traits.tokens)) for traits in waiting], dtype=torch.float64)
        simple = {
            "likeness": lambda: _standardised(self._likeness(embeddings_Me)),
            "ngrams": lambda: _standardised(self._like(answers)),
            "fluency": lambda: _odds(*map(self._fluency.scores, (answers, self._target_answers, self._disordered))),
            "relevance": lambda: self._relevance(waiting),
            "copy": lambda: self._copied(waiting),
            "loss_share": lambda: self._loss_share(_log_loss_shares(waiting, answers)),
            "length": lambda: _standardised(lengths_M.log1p()),
        }
        own_Mf = torch.from_numpy(np.stack([traits.own_f for traits in waiting]))
        parts = [
            torch.ones(len(waiting), 1, dtype=torch.float64),
            *(simple[name]()[:, None] for name in self.columns.simple),
            ((embeddings_Me - self._centre_e) @ self._basis_ec).double().clamp(-LIMIT, LIMIT),
            *(_standardised(own_M)[:, None] for own_M in own_Mf.T),
            self._one_hot(waiting),
        ]
        return torch.cat(parts, dim=1)

    def learn(self, gone: Sequence[Traits]) -> None:
        """Take note of samples that have left."""
        answers = _answers(gone)
        if "ngrams" in self.columns.simple:
            self._ngrams.learn(answers)
        if "fluency" in self.columns.simple:
            self._fluency.learn(answers)

    def trained(self, samples: Sequence[Traits]) -> None:
        """Take note of samples that were trained on."""
        self._recent = [*self._recent, *(traits.shingles for traits in samples)][-RECENT:]

    def _likeness(self, embeddings_Me: Tensor) -> Tensor:
        mean_e = embeddings_Me.mean(0)
        return (F.normalize(embeddings_Me - mean_e, dim=1) @ F.normalize(self._target_e - mean_e, dim=0)).double()

    def _like(self, answers: Sequence[Tokens]) -> Tensor:
        """Importance of n-grams up to that of the target's own samples: those beyond are only more like one another."""
        scores_M, target_T = self._ngrams.scores_and_target_scores(answers)
        highest = math.inf if len(target_T) == 1 else float(target_T.mean())  # no other one says what is usual
        return torch.from_numpy(scores_M).clamp(max=highest)

    def _relevance(self, waiting: Sequence[Traits]) -> Tensor:
        among = [traits.exchange for traits in waiting] + self._target_exchanges
        found = relevance(among + self._exchanged, among)
        return _odds(*np.split(found, [len(waiting), len(among)]))

    def _copied(self, waiting: Sequence[Traits]) -> Tensor:
        """0 for what is new but for turns of phrase, `LIMIT` for a copy."""
        counts = [len(traits.shingles) for traits in waiting]
        recent = np.concatenate([np.empty(0, dtype=np.uint64), *self._recent])
        seen = np.isin(np.concatenate([traits.shingles for traits in waiting]), recent)
        owners = np.repeat(np.arange(len(waiting)), counts)
        found = np.bincount(owners, weights=seen, minlength=len(waiting))
        beyond = found / np.maximum(counts, 1) - TURNS
        return torch.from_numpy(beyond / (NEAR_COPY - TURNS)).clamp(0.0, 1.0) * LIMIT

    def _loss_share(self, shares_M: Tensor) -> Tensor:
        usual, highest = float(self._target_shares.mean()), float(self._target_shares.max())
        return (shares_M - usual).clamp(-LIMIT, highest - usual)

    def _found(self, embeddings_Me: Tensor) -> None:
        """Principal components, each of unit spread; those that too few samples leave open are zero."""
        self._centre_e = embeddings_Me.mean(0)
        centred = (embeddings_Me - self._centre_e).double()
        _, sizes, right = torch.linalg.svd(centred, full_matrices=False)
        for i in range(min(self.columns.components, len(sizes))):
            spread = float(sizes[i]) / len(embeddings_Me) ** 0.5
            if spread > 1e-6:
                sign = right[i, right[i].abs().argmax()].sign()  # a singular vector's sign is the kernel's choice
                self._basis_ec[:, i] = (right[i] * sign / spread).float()

    def _one_hot(self, waiting: Sequence[Traits]) -> Tensor:
        room = self.columns.values
        one_hot_Mv = np.zeros((len(waiting), room))
        for row, traits in enumerate(waiting):
            for name, value in traits.fields if room else ():
                # A lone surrogate would break whatever shows the name.
                named = f"{name}={value}"[:NAMED_CHARS].encode(errors="replace").decode()
                one_hot_Mv[row, self._column_of(named)] = 1.0
        return torch.from_numpy(one_hot_Mv)

    def _column_of(self, named: str) -> int:
        if named in self._values:
            return self._values.index(named)
        if len(self._values) < self.columns.values - 1:
            self._values.append(named)
            return len(self._values) - 1
        return self.columns.values - 1

    def state_dict(self) -> dict[str, Any]:
        """All that the future depends on, beside which columns there are and the target."""
        lengths = torch.tensor([len(hashes) for hashes in self._recent], dtype=torch.int64)
        recent = np.concatenate([np.empty(0, dtype=np.uint64), *self._recent]).view(np.int64)
        return {
            "ngrams": self._ngrams.state_dict() if "ngrams" in self.columns.simple else {},
            "fluency": self._fluency.state_dict() if "fluency" in self.columns.simple else {},
            "values": list(self._values),
            "basis_ec": self._basis_ec.clone(),
            "centre_e": self._centre_e.clone(),
            "recent": torch.from_numpy(recent.copy()),
            "recent_lengths": lengths,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`. Raises ValueError if it is of other columns or another model."""
        if state["basis_ec"].shape != self._basis_ec.shape:
            raise ValueError(f"it has components of shape {tuple(state['basis_ec'].shape)}, not {self._basis_ec.shape}")
        if state.get("ngrams") and "ngrams" in self.columns.simple:
            self._ngrams.load_state_dict(state["ngrams"])
        if state.get("fluency") and "fluency" in self.columns.simple:
            self._fluency.load_state_dict(state["fluency"])
        self._values = list(state["values"])
        self._basis_ec, self._centre_e = state["basis_ec"].clone(), state["centre_e"].clone()
        recent = state["recent"].numpy().view(np.uint64)
        bounds = np.cumsum(state["recent_lengths"].numpy())[:-1]
        self._recent = [part.copy() for part in np.split(recent, bounds)] if len(state["recent_lengths"]) else []


def _answers(samples: Sequence[Traits]) -> list[Tokens]:
    return [traits.answer for traits in samples]


def _log_loss_shares(samples: Sequence[Traits], answers: Sequence[Tokens]) -> Tensor:
    counts = [(len(answer), len(traits.tokens)) for traits, answer in zip(samples, answers, strict=True)]
    return torch.tensor([math.log(max(1, some) / max(1, total)) for some, total in counts], dtype=torch.float64)


def _odds(values_M: Vector, target_T: Vector, spoilt_T: Vector) -> Tensor:
    """Log of how much likelier a value is of the target's samples than of the same spoilt, if that speaks against it.

    Both are normal. Text that is more fluent than the target's is only more predictable, and who repeats more of a
    prompt answers it no better. 0 where nothing is known, little is said, or the target's samples are no better than
    spoilt ones.
    """
    (mean, deviation), (spoilt_mean, spoilt_deviation) = map(_moments, (target_T, spoilt_T))
    least = LEAST_SPREAD * abs(mean)
    deviation, spoilt_deviation = max(deviation, least), max(spoilt_deviation, least)
    if not (mean > spoilt_mean and min(deviation, spoilt_deviation) > TINY):
        return torch.zeros(len(values_M), dtype=torch.float64)
    values_M = np.maximum(values_M, spoilt_mean)  # what is still worse is no less likely to be spoilt
    ours_M, theirs_M = (values_M - mean) / deviation, (values_M - spoilt_mean) / spoilt_deviation
    odds_M = (theirs_M**2 - ours_M**2) / 2 + math.log(spoilt_deviation / deviation)
    against_M = (ours_M < 0) & (odds_M < -BARE_MENTION)
    return torch.from_numpy(np.where(against_M, odds_M, 0.0)).clamp(min=-LIMIT)  # what is not a number is not against


def _moments(values: Vector) -> tuple[float, float]:
    known = values[~np.isnan(values)]
    return (float(known.mean()), float(known.std())) if len(known) else (0.0, 0.0)


def _standardised(values_M: Tensor) -> Tensor:
    """In deviations from the mean of what waits; 0 where all are alike."""
    deviation = float(values_M.std(correction=0))
    if deviation <= TINY * max(1.0, float(values_M.abs().max())):
        return torch.zeros_like(values_M)
    return ((values_M - values_M.mean()) / deviation).clamp(-LIMIT, LIMIT)

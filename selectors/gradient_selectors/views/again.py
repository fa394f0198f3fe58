"""The gradients of a pool that was scored in pieces, where what was let go takes another pass."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradient_selectors.capture.batch import Batch
from gradient_selectors.capture.capture import GradientCapture
from gradient_selectors.capture.factors import Factor, Written
from gradient_selectors.capture.gradients import Gradient, PoolGradients, layer_of, preconditioned
from gradient_selectors.capture.pieces import add_weighted_gradient, pieces_of
from gradient_selectors.preconditioner import Preconditioner

Measure = Callable[[str, Factor, Sequence[int]], Tensor]
"""Takes (parameter's name, factor, all of its samples), returns (n, ...) float32."""

Spares = Callable[[int], Sequence[Batch]]
"""Takes how many passes this process makes. Returns what it runs beside these, for others that make more."""


def no_spares(_passes: int) -> Sequence[Batch]:
    """A process makes its own passes only."""
    return ()


@dataclass
class SecondPass:
    """How a pool's samples are run again, and what that has cost.

    Over a sharded model each call is one of all ranks, of which some may run no sample: see `spares`.

    Attributes:
        samples: how many were run again, counted for each pass.
        seconds: how long it took.
    """

    capture: GradientCapture
    batch: Batch
    micro_tokens: int | None
    factors_bytes: int | None
    spares: Spares = no_spares
    samples: int = 0
    seconds: float = 0.0

    def weighted_gradient(self, samples: Sequence[int], coefficients: Tensor) -> dict[str, Tensor]:
        """`sum_i w_i g_i` of some samples, with their coefficients, (n,) or (L, n).

        Of a sharded model it is the sum over all ranks, of which each has its own rows.
        """
        total: dict[str, Tensor] = {}
        started = time.perf_counter()
        for places, batch in self._passes(samples):
            of_pass = coefficients[..., list(places)] if places else torch.zeros(1)
            add_weighted_gradient(total, self.capture, batch, of_pass)
        self._count(samples, started)
        return total

    def measured(self, samples: Sequence[int], names: Sequence[str], measure: Measure) -> dict[str, Tensor]:
        """What `measure` says of each sample's gradient of some parameters, summed over factors, (n, ...) float32.

        Without samples there is nothing. `measure` may be a call of all ranks.
        """
        found: dict[str, Tensor] = {}
        started = time.perf_counter()
        for places, batch in self._passes(samples):
            rows = torch.tensor(places, dtype=torch.int64, device=self.capture.device)

            def take(name: str, factor: Factor, rows: Tensor = rows, count: int = len(batch)) -> None:
                if name not in names:
                    return
                values = measure(name, factor, range(count))
                if len(rows) and name not in found:
                    found[name] = values.new_zeros(len(samples), *values.shape[1:])
                if len(rows):
                    found[name].index_add_(0, rows, values)

            self.capture.run(batch, keep=take)
        self._count(samples, started)
        return found

    def groups(self, count: int, names: Sequence[str]) -> Iterator[list[str]]:
        """Parameters whose gradients, written out for so many samples, fit the budget together.

        One that does not is a group by itself.
        """
        group: list[str] = []
        used = 0
        for name in names:
            needed = 4 * count * self.capture.parameters[name].numel()
            if group and self.factors_bytes is not None and used + needed > self.factors_bytes:
                yield group
                group, used = [], 0
            group.append(name)
            used += needed
        yield group

    def _passes(self, samples: Sequence[int]) -> Iterator[tuple[tuple[int, ...], Batch]]:
        """What is run: some of the samples, by their places among these, and with no place what counts for nothing."""
        batch = self.batch.among(samples) if samples else None
        pieces = [] if batch is None else pieces_of(batch.lengths, self.micro_tokens)
        for spare in self.spares(len(pieces)):
            yield (), spare
        for piece in pieces:
            assert batch is not None
            yield piece, batch.among(piece)

    def _count(self, samples: Sequence[int], started: float) -> None:
        self.samples += len(samples)
        self.seconds += time.perf_counter() - started


@dataclass
class Answers:
    """What second passes have found, for as long as the same is asked.

    Attributes:
        coefficients: of the update whose gradient is `gradient`, handed out parameter by parameter, each once.
        utilities: of the reduced samples in what was let go, along `P * G` of `target` and `preconditioner`.
        grams: of the samples `compared` under `metric`, by parameter.
        written: the gradients of the samples that it `wrote` out, by parameter.
    """

    coefficients: Tensor | None = None
    gradient: dict[str, Tensor] = field(default_factory=dict)
    target: Gradient | None = None
    preconditioner: Preconditioner | None = None
    utilities: dict[str, Tensor] = field(default_factory=dict)
    compared: tuple[int, ...] = ()
    metric: Preconditioner | None = None
    grams: dict[str, Tensor] = field(default_factory=dict)
    wrote: tuple[int, ...] = ()
    written: dict[str, Tensor] = field(default_factory=dict)

    def knows(self, coefficients: Tensor) -> bool:
        kept = self.coefficients
        if kept is None or kept.shape != coefficients.shape or kept.dtype != coefficients.dtype:
            return False
        return torch.equal(kept, coefficients)


@dataclass(frozen=True)
class PoolInPieces(PoolGradients):
    """The per-sample gradients of a pool of which some were let go.

    Attributes:
        reduced: the samples whose large matrices were let go.
        let_go: names of these matrices.
        without_rows: those of them of which no row was kept.
        second: runs samples again.
        target, preconditioner: what c was taken along.
    """

    reduced: frozenset[int]
    let_go: frozenset[str]
    without_rows: frozenset[str]
    second: SecondPass
    target: Gradient
    preconditioner: Preconditioner
    _answers: Answers = field(default_factory=Answers, init=False, repr=False)

    @torch.no_grad()
    def dots(self, direction: Gradient) -> dict[str, Tensor]:
        products = super().dots(direction)
        again = self._dots_again(lambda name: direction[name])
        return products | {name: self._with(products[name], values) for name, values in again.items()}

    @torch.no_grad()
    def utilities_of(self, name: str, target: Gradient, preconditioner: Preconditioner) -> Tensor:
        utilities_N = super().utilities_of(name, target, preconditioner)
        if name not in self.let_go or (target is self.target and preconditioner is self.preconditioner):
            return utilities_N
        found = self._answers
        if found.target is not target or found.preconditioner is not preconditioner:
            found.utilities = self._dots_again(lambda other: preconditioned(target, preconditioner, other))
            found.target, found.preconditioner = target, preconditioner
        return self._with(utilities_N, found.utilities[name])

    @torch.no_grad()
    def gram_of(self, name: str, samples: Sequence[int], preconditioner: Preconditioner) -> Tensor:
        if name not in self.let_go or not self.reduced.intersection(samples):
            return super().gram_of(name, samples, preconditioner)
        found = self._answers
        if found.compared != tuple(samples) or found.metric is not preconditioner:
            found.compared, found.metric, found.grams = tuple(samples), preconditioner, {}
        if name not in found.grams:
            names = self.without_rows if name in self.without_rows else self.let_go
            found.grams |= self._grams_again(samples, sorted(names), preconditioner)
        return found.grams[name]

    @torch.no_grad()
    def weighted_gradient_of(self, name: str, coefficients: Tensor) -> Tensor:
        again, found = self._chosen_again(coefficients), self._answers
        if not again or name not in self.factors:
            return super().weighted_gradient_of(name, coefficients)
        if not found.knows(coefficients) or name not in found.gradient:
            found.coefficients = coefficients.clone()
            found.gradient = self.second.weighted_gradient(again, coefficients[..., again])
        rest = coefficients.clone()
        rest[..., sorted(self.reduced)] = 0.0
        return self._added(name, rest, found.gradient.pop(name))

    @torch.no_grad()
    def written(self, name: str, samples: Sequence[int], lo: int, hi: int) -> Tensor:
        if name not in self.let_go or not self.reduced.intersection(samples):
            return super().written(name, samples, lo, hi)
        found, asked = self._answers, tuple(samples)
        if found.wrote != asked or name not in found.written:
            names = [other for other in self.shapes if other in self.let_go]
            group = next(self.second.groups(len(samples), names[names.index(name) :]))
            found.wrote, found.written = asked, self.second.measured(samples, group, self._written)
        return found.written[name][:, lo:hi].clone()

    def _added(self, name: str, rest: Tensor, out: Tensor) -> Tensor:
        row_N = rest if rest.ndim == 1 else rest[self.layers.index(layer_of(name))]
        if bool((row_N != 0).any()):
            for factor in self.factors[name]:
                factor.add_weighted(row_N, out, begin=False)
        return out

    def _chosen_again(self, coefficients: Tensor) -> list[int]:
        """The reduced samples that an update reads."""
        read_N = (coefficients.reshape(-1, self.num_samples) != 0).any(0).tolist()
        return [i for i in sorted(self.reduced) if read_N[i]]

    def _with(self, values_N: Tensor, again: Tensor) -> Tensor:
        out = values_N.clone()
        out[sorted(self.reduced)] = again
        return out

    def _dots_again(self, direction: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """`<u, g_i>` of the reduced samples within what was let go."""
        if not self.let_go:
            return {}
        return self.second.measured(
            sorted(self.reduced), sorted(self.let_go), lambda name, factor, _: factor.dot(direction(name))
        )

    def _grams_again(
        self, samples: Sequence[int], names: Sequence[str], preconditioner: Preconditioner
    ) -> dict[str, Tensor]:
        """Exact K within some parameters, of gradients written out for as many parameters at once as fit the budget."""
        grams = {}
        losses_n = self.losses_N[list(samples)]
        for group in self.second.groups(len(samples), names):
            written = self.second.measured(samples, group, self._written)
            for name in group:
                alone = PoolGradients(losses_n, {name: [Written(written.pop(name))]}, self.shapes)
                grams[name] = alone.gram_of(name, range(len(samples)), preconditioner)
        return grams

    def _written(self, name: str, factor: Factor, samples: Sequence[int]) -> Tensor:
        return factor.per_sample(samples, 0, self.shapes[name][0])


def second_pass_of(pool: PoolGradients) -> SecondPass | None:
    """What running samples of a pool again has cost; None where that is never needed."""
    second: SecondPass | None = getattr(pool, "second", None)
    return second

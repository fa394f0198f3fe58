"""What a capture pass knows: the per-sample gradients of a pool, as factors that are never written out in full."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Size, Tensor

from gradient_selectors.capture.factors import Factor, Lookup, MatrixFactor
from gradient_selectors.preconditioner import Preconditioner, at_rows

# Of written-out gradients held at once: 16 MB in float32, which stays in the cache of the processor while it is scaled
# and multiplied, and which the allocator reuses. Larger chunks leave the cache.
CHUNK_ELEMENTS = 4_000_000
BLOCK_COLUMNS = 4096
LARGEST = torch.finfo(torch.float32).max
SMALL_ELEMENTS = 2**18  # of written-out gradients whose products cost next to nothing in float64
BLOCK = re.compile(r"(.*?\.\d+)\.")

Gradient = Mapping[str, Tensor]
"""A gradient by parameter name, each in its parameter's shape, float32."""


def layer_of(name: str) -> str:
    """The layer of a parameter: its numbered block (`model.layers.3`), or its module where it is in none."""
    block = BLOCK.match(name)
    return block.group(1) if block else name.rpartition(".")[0] or name


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of a matrix (p, d) whose products enter a Gram matrix.

    Attributes:
        name: of the matrix.
        rows_n: which, sorted, int64.
        root_nd: sqrt(P) there, float32.
        scale: what the products are multiplied by.
    """

    name: str
    rows_n: Tensor
    root_nd: Tensor
    scale: float = 1.0


@dataclass(frozen=True)
class PoolGradients:
    """The per-sample gradients of N samples.

    Attributes:
        losses_N: mean loss of each sample before any update (nats per token): progressive validation for free.
        factors: contributions to each parameter's per-sample gradients; a parameter without any has no gradient.
        shapes: shapes of all trainable parameters.
    """

    losses_N: Tensor
    factors: Mapping[str, Sequence[Factor]]
    shapes: Mapping[str, Size]

    @property
    def num_samples(self) -> int:
        return len(self.losses_N)

    @torch.no_grad()
    def dots(self, direction: Gradient) -> dict[str, Tensor]:
        """`<u, g_i>` within each parameter, (N,) float32 each. Exact for any direction u."""
        return {
            name: torch.stack([factor.dot(direction[name]) for factor in factors]).sum(0)
            for name, factors in self.factors.items()
        }

    @cached_property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers that hold the trainable parameters, in the model's order."""
        return tuple(dict.fromkeys(layer_of(name) for name in self.shapes))

    def gram(self, samples: Sequence[int], preconditioner: Preconditioner) -> Tensor:
        """`K_ij = <g_i, P g_j>` of the given samples, (n, n) float64, exact for any element-wise P.

        Gradients are written out some rows of a parameter at a time: 2 R d p + 2 n^2 d p operations for a matrix, as
        much as the weight gradient itself. Token-pair products would cost 8 to 500 times more at usual shapes.
        """
        return self.total(self.gram_within(list(self.factors), samples, preconditioner))

    def total(self, gram: Tensor) -> Tensor:
        """The sum over processes of what each has of `gram`. Asked once: many small exchanges cost more than one."""
        return gram

    def of_all(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Numbers of all samples, (N,) each, from those of this process's samples. Asked once, as `total` is."""
        return dict(own)

    def gram_within(self, names: Sequence[str], samples: Sequence[int], preconditioner: Preconditioner) -> Tensor:
        """The share of some parameters, (n, n) float64; `total` makes it whole."""
        gram = torch.zeros(len(samples), len(samples), dtype=torch.float64, device=self.losses_N.device)
        for name in names:
            gram += self.gram_of(name, samples, preconditioner)
        return gram

    @torch.no_grad()
    def gram_of(self, name: str, samples: Sequence[int], preconditioner: Preconditioner) -> Tensor:
        """One parameter's share of `gram`, (n, n) float64; `total` makes it whole."""
        factors, rows = self._touched(name)
        diagonal = at_rows(preconditioner, name, rows)
        root = None if diagonal is None else diagonal.sqrt()
        num_rows = self.shapes[name][0] if rows is None else len(rows)
        return written_gram(factors, samples, num_rows, self.shapes[name][1:].numel(), root)

    @torch.no_grad()
    def gram_at(self, samples: Sequence[int], asked: Iterable[Rows]) -> Tensor:
        """Products of some samples' gradients at some rows of matrices, (n, n) float64; `total` makes it whole."""
        gram = torch.zeros(len(samples), len(samples), dtype=torch.float64, device=self.losses_N.device)
        for part in asked:
            factors = [factor for factor in self.factors[part.name] if isinstance(factor, MatrixFactor)]
            gram.add_(gram_at_rows(factors, samples, part.rows_n, part.root_nd), alpha=part.scale)
        return gram

    @torch.no_grad()
    def utilities_of(self, name: str, target: Gradient, preconditioner: Preconditioner) -> Tensor:
        """`<g_i, P G_target>` within one parameter that has factors, (N,) float32; `of_all` makes it whole."""
        factors, rows = self._touched(name)
        values, diagonal = target[name], at_rows(preconditioner, name, rows)
        direction = values if rows is None else values[rows]
        if diagonal is not None:
            direction = diagonal * direction
        return torch.stack([factor.dot(direction) for factor in factors]).sum(0)

    def _touched(self, name: str) -> tuple[Sequence[Factor], Tensor | None]:
        """A parameter's factors; those of a table of embeddings reduced to the rows that the pool's tokens touch.

        All other rows have no gradient, and P of the whole table would cost far more than that of these rows.
        """
        factors = self.factors[name]
        lookups = [factor for factor in factors if isinstance(factor, Lookup)]
        if len(lookups) < len(factors):
            return factors, None
        rows = torch.unique(torch.cat([lookup.ids_R for lookup in lookups]))
        return [lookup.compact(rows) for lookup in lookups], rows

    @torch.no_grad()
    def weighted_gradient_of(self, name: str, coefficients: Tensor) -> Tensor:
        """`sum_i w_i g_i` for one parameter, float32; samples whose coefficient is zero are not read.

        `coefficients` are (N,), or (L, N) with a row for each of `layers`.
        """
        row_N = coefficients if coefficients.ndim == 1 else coefficients[self.layers.index(layer_of(name))]
        out = torch.empty(self.shapes[name], dtype=torch.float32, device=self.losses_N.device)
        factors = self.factors.get(name, ())
        if not factors or not bool((row_N != 0).any()):
            return out.zero_()
        for i, factor in enumerate(factors):
            factor.add_weighted(row_N, out, begin=i == 0)
        return out

    def updates(self, coefficients: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The same by name as it enters the update: this process's rows, where the parameter is sharded."""
        return ((name, self.weighted_gradient_of(name, coefficients)) for name in self.factors)

    def weighted_gradient(self, coefficients: Tensor) -> dict[str, Tensor]:
        """`sum_i w_i g_i`: gradient of the weighted loss, without another backward pass; `coefficients` as above."""
        return {name: self.weighted_gradient_of(name, coefficients) for name in self.shapes}

    def written(self, name: str, samples: Sequence[int], lo: int, hi: int) -> Tensor:
        """Rows `lo:hi` of some samples' gradients of a parameter that has factors, (n, hi - lo, ...) float32."""
        return summed([factor.per_sample(samples, lo, hi) for factor in self.factors[name]])

    @torch.no_grad()
    def squared_length(self, coefficients: Tensor, preconditioner: Preconditioner) -> float:
        """`w^T K w = ||sqrt(P) * G(w)||^2` of the update's gradient `G(w) = sum_i w_i g_i`, exact and without K."""
        # One parameter at a time: all of them are as large as the model.
        return sum(
            (
                squared_length({name: self.weighted_gradient_of(name, coefficients)}, preconditioner)
                for name in self.factors
            ),
            0.0,
        )


def preconditioned(gradient: Gradient, preconditioner: Preconditioner, name: str) -> Tensor:
    """`P * G` of one parameter."""
    diagonal, values = preconditioner(name), gradient[name]
    return values if diagonal is None else diagonal * values


@torch.no_grad()
def squared_length(gradient: Gradient, preconditioner: Preconditioner) -> float:
    """`<G, P G> = ||sqrt(P) * G||^2`; of the target's gradient, the first-order utility of a sample just like it."""
    # By name: the order of a dictionary that comes back from a checkpoint is another one, and so is a sum's last digit.
    products = [torch.sum(preconditioned(gradient, preconditioner, name) * gradient[name]) for name in sorted(gradient)]
    return float(torch.stack(products).sum()) if products else 0.0


@torch.no_grad()
def written_gram(
    factors: Sequence[Factor], samples: Sequence[int], num_rows: int, row_size: int, root: Tensor | None
) -> Tensor:
    """Gram matrix of some samples' gradients, scaled by `root` where given, written out some rows at a time.

    `factors` are all those of one parameter, of `num_rows` rows with `row_size` weights each. (n, n) float64.
    """
    step = max(1, CHUNK_ELEMENTS // (len(samples) * row_size))
    gram: Tensor | None = None
    for lo in range(0, num_rows, step):
        hi = min(lo + step, num_rows)
        written = [factor.per_sample(samples, lo, hi) for factor in factors]
        products = scaled_products(written, None if root is None else root[lo:hi])
        gram = products if gram is None else gram.add_(products)
    assert gram is not None  # no parameter is empty
    return gram


@torch.no_grad()
def gram_at_rows(factors: Sequence[MatrixFactor], samples: Sequence[int], rows: Tensor, root: Tensor) -> Tensor:
    """The same at some rows (int64, sorted) of a matrix only, with `root` at these rows; zero if there are none."""
    step = max(1, CHUNK_ELEMENTS // (len(samples) * root.shape[1]))
    gram = torch.zeros(len(samples), len(samples), dtype=torch.float64, device=rows.device)
    for lo in range(0, len(rows), step):
        written = [factor.at_rows(samples, rows[lo : lo + step]) for factor in factors]
        gram += scaled_products(written, root[lo : lo + step])
    return gram


def summed(written: Sequence[Tensor]) -> Tensor:
    """The sum of what factors wrote out, in the place of the first."""
    total, *others = written
    for other in others:
        total += other
    return total


def scaled_products(written: Sequence[Tensor], root: Tensor | None) -> Tensor:
    """Inner products of the sum of what factors wrote out; the first of them is overwritten."""
    total = summed(written)
    if root is not None:
        total *= root
    return _products(total.flatten(1))


def _products(flat_nm: Tensor) -> Tensor:
    """Inner products of a few very long rows, (n, n) float64.

    In float64 where that costs next to nothing, so that no kernel's rounding shows. Else in blocks: a kernel that adds
    up millions of columns in float32 loses several digits.
    """
    if flat_nm.numel() <= SMALL_ELEMENTS:
        flat_nm = flat_nm.double()
        products = flat_nm @ flat_nm.T
        return products.masked_fill_(products.abs() > LARGEST, torch.inf)  # as in blocks: such a gradient is broken
    length = flat_nm.shape[1]
    whole = length - length % BLOCK_COLUMNS
    rest = flat_nm[:, whole:]
    blocks = flat_nm[:, :whole].view(len(flat_nm), -1, BLOCK_COLUMNS).transpose(0, 1) if whole else None
    products = (rest @ rest.T).double()
    return products if blocks is None else products.add_((blocks @ blocks.mT).double().sum(0))

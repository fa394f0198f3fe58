"""How a module uses its parameters, recognised by what it computes and not by what it is called.

Each kind turns the input and the output gradient of one call of a module into factors of its parameters' per-sample
gradients. A module that fits no kind has no exact factors here, and its trainable parameters are refused by name.

- matrix: `y = x W^T + b` (Linear) or `y = x W + b` (transformers' Conv1D);
- lookup: `y = s W[ids]` (Embedding, also scaled as in Gemma, also with a padding index);
- scale: `y = w * f(x) + b` with a vector w (LayerNorm, every RMSNorm, also `(1 + w) * f(x)`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gradient_selectors.capture.batch import Batch
from gradient_selectors.capture.factors import Factor, Lookup, Outer, Segments, Written

NARROW = 64  # rows or columns, as adapters have; writing gradients out takes as many operations as one exact c
TOLERANCE = 1e-4  # relative; a wrong formula is off by far more, a right one in float32 by far less


@dataclass(frozen=True)
class Rows:
    """Which rows of a flattened (N * T, ...) tensor matter: padding has a zero gradient and is dropped.

    Attributes:
        keep_R: indices of the rows to keep, or None for all.
        segments: the samples of the kept rows.
    """

    num_samples: int
    num_tokens: int
    keep_R: Tensor | None
    segments: Segments

    def by_sample(self, values: Tensor) -> Tensor:
        """(N, ...) as it is; (N * T, ...), as mixtures of experts have it, with the samples told apart."""
        is_flat = values.shape[0] == self.num_samples * self.num_tokens
        return values.reshape(self.num_samples, self.num_tokens, *values.shape[1:]) if is_flat else values

    def flatten(self, values: Tensor, row_dims: int) -> tuple[Tensor, Segments]:
        """(N, T, ..., *row) -> (R, *row) with the samples of the rows; `row_dims` trailing dimensions are kept."""
        shape = values.shape
        row = shape[len(shape) - row_dims :]
        if shape[: len(shape) - row_dims] == (self.num_samples, self.num_tokens):
            flat = values.reshape(self.num_samples * self.num_tokens, *row)
            return (flat if self.keep_R is None else flat[self.keep_R]), self.segments
        flat = values.reshape(-1, *row)
        per_sample = flat.shape[0] // self.num_samples
        return flat, Segments(tuple(range(0, flat.shape[0] + 1, per_sample)))


def rows_of(batch: Batch) -> Rows:
    """The rows of a batch."""
    num_samples, num_tokens = batch.input_ids_NT.shape
    offsets = (0, *torch.tensor(batch.lengths).cumsum(0).tolist())
    keep_R = None
    if offsets[-1] < num_samples * num_tokens:
        lengths_N = torch.tensor(batch.lengths, device=batch.input_ids_NT.device)
        inside_NT = torch.arange(num_tokens, device=lengths_N.device) < lengths_N[:, None]
        keep_R = inside_NT.flatten().nonzero().squeeze(1)
    return Rows(num_samples, num_tokens, keep_R, Segments(offsets))


Factors = Mapping[str, Factor]  # by the parameter's name within its module
MakeFactors = Callable[[Tensor, Tensor, Rows], Factors]  # (input, output gradient, rows) of one call


def recognise(module: nn.Module) -> MakeFactors | None:
    """The kind of a module that owns parameters, or None if it fits none."""
    parameters = dict(module.named_parameters(recurse=False))
    weight = parameters.get("weight")
    if weight is None or not set(parameters) <= {"weight", "bias"}:
        return None
    with torch.no_grad():
        if weight.ndim == 1:
            return _recognise_scale(module, weight)
        if weight.ndim != 2:
            return None
        if isinstance(module, nn.Embedding):
            return _recognise_lookup(module)
        return _recognise_matrix(module, weight)


def try_call(module: nn.Module, x: Tensor, parameters: dict[str, Tensor] | None = None) -> Tensor | None:
    """The module's output, or None: probing a module of an unknown kind may raise anything."""
    try:
        output = functional_call(module, parameters or {}, (x,))
    except Exception:
        return None
    return output if isinstance(output, Tensor) else None


def close(a: Tensor | None, b: Tensor) -> bool:
    """Whether a probe came out as expected: equal up to rounding."""
    if a is None or a.shape != b.shape:
        return False
    return bool((a.float() - b.float()).norm() <= TOLERANCE * b.float().norm() + 1e-12)


def in_float32(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """The module's own parameters for a probe; in fewer bits its rounding would look like a wrong formula."""
    return {f"{prefix}{name}": parameter.float() for name, parameter in module.named_parameters(recurse=False)}


def probe_input(*shape: int, like: Tensor) -> Tensor:
    """Fixed numbers without structure that could make a wrong formula look right."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator).to(like)


def _recognise_matrix(module: nn.Module, weight: Tensor) -> MakeFactors | None:
    transposed = stored_transposed(module, weight)
    has_bias = getattr(module, "bias", None) is not None
    return None if transposed is None else partial(matrix_factors, has_bias, transposed)


def stored_transposed(module: nn.Module, weight: Tensor) -> bool | None:
    """False for `y = x W^T + b`, True for `y = x W + b`, None for anything else."""
    parameters = in_float32(module)
    weight, bias = parameters.get("weight", weight.float()), parameters.get("bias")
    for transposed in (False, True):
        x = probe_input(2, 3, weight.shape[0 if transposed else 1], like=weight)
        expected = x @ (weight if transposed else weight.T)
        if bias is not None and bias.shape == expected.shape[-1:]:
            expected = expected + bias
        if close(try_call(module, x, parameters), expected):
            return transposed
    return None


def matrix_factors(has_bias: bool, transposed: bool, x: Tensor, grad: Tensor, rows: Rows) -> Factors:
    """Factors of `y = x W^T + b`; `transposed`: of `y = x W + b`."""
    inputs = x.to(grad.dtype)
    left, right = (inputs, grad) if transposed else (grad, inputs)
    factors: dict[str, Factor] = {"weight": _matrix_factor(left, right, rows)}
    if has_bias:
        factors["bias"] = Written(grad.float().reshape(rows.num_samples, -1, grad.shape[-1]).sum(1))
    return factors


def _matrix_factor(left: Tensor, right: Tensor, rows: Rows) -> Factor:
    """Factors, or gradients written out where the matrix is narrow and they are the smaller of the two.

    Otherwise c, K and the update would each read the factors again, which are many times as large for LoRA's matrices.
    """
    num_samples, p, d = rows.num_samples, left.shape[-1], right.shape[-1]
    left_NTp, right_NTd = left.reshape(num_samples, -1, p), right.reshape(num_samples, -1, d)
    if is_written_out(p, d, left_NTp.shape[1]):
        # Padding has a zero gradient. With the narrow side in front, the product itself is much faster.
        narrow_first = left_NTp.mT @ right_NTd if p <= d else (right_NTd.mT @ left_NTp).mT
        return Written(narrow_first.float().contiguous())
    left_Rp, segments = rows.flatten(left, 1)
    return Outer(left_Rp, rows.flatten(right, 1)[0], segments)


def is_written_out(p: int, d: int, num_tokens: int) -> bool:
    """Whether a matrix is so narrow that its gradients are written out for samples padded to `num_tokens`."""
    return min(p, d) <= NARROW and p * d <= num_tokens * (p + d)


def _recognise_lookup(module: nn.Embedding) -> MakeFactors | None:
    if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
        return None
    weight = module.weight
    ids = torch.arange(min(4, weight.shape[0]), device=weight.device)[None]
    rows = weight[ids].float()
    output = try_call(module, ids)
    if output is None or output.shape != rows.shape:
        return None
    norm = (rows * rows).sum()
    scale = float((output.float() * rows).sum() / norm) if norm > 0 else 1.0
    return partial(lookup_factors, module.padding_idx, scale) if close(output, scale * rows) else None


def lookup_factors(padding_idx: int | None, scale: float, ids: Tensor, grad: Tensor, rows: Rows) -> Factors:
    """Factors of `y = s W[ids]`."""
    ids_R, _ = rows.flatten(ids, 0)
    grads_Rd, segments = rows.flatten(grad, 1)
    if scale != 1.0:
        grads_Rd = grads_Rd * scale
    if padding_idx is not None:
        # torch gives the padding index no gradient, also where a text really holds that token.
        grads_Rd = grads_Rd * (ids_R != padding_idx).unsqueeze(1).to(grads_Rd.dtype)
    return {"weight": Lookup(ids_R, grads_Rd, segments)}


def _recognise_scale(module: nn.Module, weight: Tensor) -> MakeFactors | None:
    """A scale if the output is affine in the weight, element by element: y(w) = y(0) + w * (y(1) - y(0))."""
    x = probe_input(2, 3, weight.shape[0], like=weight)
    at = {value: try_call(module, x, {"weight": torch.full_like(weight, value)}) for value in (0.0, 1.0)}
    zero, one = at[0.0], at[1.0]
    if zero is None or one is None or zero.shape != x.shape:
        return None
    probe = probe_input(weight.shape[0], like=weight)
    bias = getattr(module, "bias", None)
    shifted = {} if bias is None else {"bias": bias + 1.0}
    is_affine = close(try_call(module, x, {"weight": probe}), zero + probe * (one - zero)) and (
        bias is None or close(try_call(module, x, {"weight": probe, **shifted}), zero + probe * (one - zero) + 1.0)
    )
    # A bias may be zero now, and only now.
    has_offset = bias is not None or bool(zero.any())
    return partial(_scale_factors, module, has_offset) if is_affine else None


def _scale_factors(module: nn.Module, has_offset: bool, x: Tensor, grad: Tensor, rows: Rows) -> Factors:
    """The derivative with respect to w is y(1) - y(0): the normalised input, whatever the module calls it.

    Without an offset y(0), as in most RMSNorms, half of the work is left out.
    """
    # All in float32: outside autocast, CUDA's layer norm takes no input of another dtype than its weights.
    parameters = {name: parameter.float() for name, parameter in module.named_parameters(recurse=False)}
    zeros = torch.zeros_like(parameters["weight"])
    with torch.no_grad():
        normalised = functional_call(module, parameters | {"weight": zeros + 1}, (x.float(),))
        if has_offset:
            normalised = normalised - functional_call(module, parameters | {"weight": zeros}, (x.float(),))
    products = (normalised * grad.float()).reshape(rows.num_samples, -1, grad.shape[-1])
    factors: dict[str, Factor] = {"weight": Written(products.sum(1))}
    if getattr(module, "bias", None) is not None:
        factors["bias"] = Written(grad.float().reshape(rows.num_samples, -1, grad.shape[-1]).sum(1))
    return factors

"""One forward and one backward pass over a pool, from which per-sample gradients of every parameter follow as factors.

During the pass no weight requires a gradient, so no weight gradient is computed; a tap on each module's output keeps
the module's input and the output's gradient. The update is book-keeping afterwards (`PoolGradients.weighted_gradient`),
which is exact because backpropagation is linear in its seed (Bu et al., arXiv 2210.00038). A step over N candidates
therefore costs less than plain training on the same N.

Backward runs on the *sum* of the samples' losses, each the mean over its own labels, so rows are not divided by N.
Samples must not interact in the forward pass (no packing, no batch norm) and must be padded on the right.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from gradient_selectors.capture.batch import Batch, check_lengths, mean_losses
from gradient_selectors.capture.factors import Factor, LowRank, Written
from gradient_selectors.capture.gradients import PoolGradients
from gradient_selectors.capture.head import HeadBias, HeadWeight, head_forward_backward
from gradient_selectors.capture.kinds import MakeFactors, Rows, recognise, rows_of
from gradient_selectors.capture.lora import LoraLinear, recognise_lora
from gradient_selectors.capture.norms import RmsNorm, recognise_rms_norm
from gradient_selectors.capture.parts.apart import check_apart
from gradient_selectors.capture.parts.experts import Experts, recognise_experts
from gradient_selectors.capture.parts.rotary import by_length, sample_by_sample
from gradient_selectors.capture.parts.uses import UsesWithin, kinds_of_use
from gradient_selectors.capture.passes import Passes, checked
from gradient_selectors.capture.places import MissingFactorError, Places, UnsupportedParameterError
from gradient_selectors.capture.verification import has_plain_head, mistake_of, probe_batch, replaced

Keep = Callable[[str, Factor], Factor | None]
"""Takes (parameter's name, factor) as the backward pass leaves it; returns what is kept of it, or None."""


class _Tap(torch.autograd.Function):
    """The identity on a module's output; its backward hands (input, output gradient) to the capture.

    The input is a saved tensor of the graph, so gradient checkpointing drops and recomputes it like any other, and
    pairs each input with the right gradient however often a module is called.
    """

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, inputs: Tensor, _anchor: Tensor, capture: "GradientCapture", name: str
    ) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.capture, ctx.name = capture, name
        # No view: one that a function of ours returns may not be written in place, as some models and hooks do.
        return output.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        (inputs,) = ctx.saved_tensors
        ctx.capture._collect(ctx.name, inputs, grad)
        return (grad if ctx.needs_input_grad[0] else None), None, None, None, None


class GradientCapture:
    """Hooks on a causal language model; `run` turns a batch into its `PoolGradients`.

    Hooks are registered once and do nothing outside `run`. The parameters covered are those that require a gradient
    when the capture is made; they are named as `model.named_parameters()` names them.

    Examples:
        >>> from gradient_selectors import Batch, GradientCapture
        >>> from gradient_selectors.examples import tiny_batch, tiny_model
        >>> model, batch = tiny_model(), Batch.of(tiny_batch())
        >>> capture = GradientCapture(model)
        >>> gradients = capture.run(batch)
        >>> mean = gradients.weighted_gradient(torch.full((len(batch),), 1 / len(batch)))
        >>> sorted(mean) == sorted(name for name, _ in model.named_parameters())
        True
    """

    def __init__(self, model: nn.Module, autocast: torch.dtype | None = None) -> None:
        """Attach to `model`, a transformers causal LM or a PEFT model around one.

        `autocast`: dtype of the passes (bfloat16), or None for the model's own.
        Raises UnsupportedParameterError naming the first trainable parameter that is not covered exactly: every kind
        is checked against autograd on a small batch and slightly other values, so a wrong factor cannot go unnoticed.
        """
        causal_lm: Any = model  # duck-typed: transformers and PEFT add methods that nn.Module does not know
        self._model = causal_lm.get_base_model() if hasattr(model, "get_base_model") else causal_lm
        self.passes = Passes(self._model, autocast)
        self._places = Places(model, self._model)
        if not self.parameters:
            raise ValueError("the model has no trainable parameter")
        self._sites: dict[str, tuple[nn.Module, MakeFactors]] = {}
        self.experts: list[Experts] = []
        self._within: list[str] = []  # modules that use their parameters in the midst of what they compute
        self._rows: Rows | None = None
        self._factors: dict[str, list[Factor]] = defaultdict(list)
        self._keep: Keep | None = None
        self._collected: set[str] = set()
        self._expected: frozenset[str] = frozenset()  # modules that leave factors, as the first pass shows
        self._in_one_piece: frozenset[str] = frozenset()  # norms whose forward is ours during this pass
        self.device = next(iter(self.parameters.values())).device
        self._anchor = torch.zeros((), requires_grad=True, device=self.device)
        varying = by_length(self._model)
        self.passes.by_length = bool(varying)
        self._handles = [module.register_forward_hook(sample_by_sample, with_kwargs=True) for module in varying]
        try:
            probe = probe_batch(self._model.get_input_embeddings().weight.shape[0]).to(self.device)
            check_apart(self._model, self.passes.inputs, probe)
            output = self._model.get_output_embeddings()
            self.passes.head = output if has_plain_head(self._model, self.passes, probe) else None
            self._head_name = None if self.passes.head is None else self._name_of(output)
            found = (recognise_rms_norm(name, module) for name, module in self._model.named_modules())
            self._norms = {norm.name: norm for norm in found if norm is not None}
            self._attach_all(probe)
            self._loras = list(self._lora_layers())
            mistake = mistake_of(self, self._model, probe)
            if mistake is not None:
                raise self._unsupported(*mistake)
            self._expected = frozenset(self._collected)
        except BaseException:
            self.close()
            raise

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The covered parameters by name."""
        return self._places.parameters

    def refresh(self) -> None:
        """Look again at the model's parameters, after another library has put other objects in their places.

        Names and hooks stay. Raises ReplacedParameterError if parameters that were tied no longer are.
        """
        self._places.refresh()
        self.device = next(iter(self.parameters.values())).device

    @property
    def model(self) -> Any:
        """The causal language model, without what PEFT puts around it."""
        return self._model

    @property
    def is_sharded(self) -> bool:
        """Whether the parameters lie in rows on several processes."""
        return self.passes.shards is not None

    def close(self) -> None:
        """Take the hooks off again."""
        for handle in self._handles:
            handle.remove()

    @property
    def head(self) -> str | None:
        """Name of the head's weight, if it is trainable and captured on its own path."""
        return self.head_parameters.get("weight")

    @property
    def head_parameters(self) -> Mapping[str, str]:
        """Names of the trained parameters of a head that is captured on its own path, by their names within it."""
        return {} if self._head_name is None else self._places.trained.get(self._head_name, {})

    def _name_of(self, module: nn.Module) -> str:
        names: Iterator[str] = (name for name, other in self._model.named_modules() if other is module)
        return next(names)

    @property
    def matrices(self) -> frozenset[str]:
        """Names of trained weights of linear layers that are tied to no other, without the head on its own path."""
        names = Counter(name for found in self._places.trained.values() for name in found.values())
        return frozenset(
            name
            for owner, (module, _) in self._sites.items()
            for name in self._places.trained[owner].values()
            if names[name] == 1 and self.parameters[name].ndim == 2 and not isinstance(module, nn.Embedding)
        )

    def run(self, batch: Batch, head_direction: LowRank | None = None, keep: Keep | None = None) -> PoolGradients:
        """One forward and one backward pass. Weights and their `.grad` are left as they are.

        `head_direction`: a direction of `head` along which products are to be cheap: they are taken during the pass.
        `keep`: what to keep of each factor, told as soon as there is one; all of it by default.
        Raises ValueError if a sample has no label after its first token, or one beyond its length.
        """
        self._places.check()
        batch = checked(batch).to(self.device)
        self._factors = defaultdict(list)
        self._collected = set()
        self._rows, self._keep = rows_of(batch), keep
        try:
            with self.passes.passing(), self._frozen(), replaced(self._forwards()), torch.enable_grad():
                losses_N = (
                    self._through_chunked_head(batch, head_direction)
                    if self.passes.head
                    else self._through_logits(batch)
                )
            self._check_collected()
            return PoolGradients(losses_N, dict(self._factors), {n: p.shape for n, p in self.parameters.items()})
        finally:
            self._rows = self._keep = None
            self._factors = defaultdict(list)

    def losses(self, batch: Batch) -> Tensor:
        """Mean loss of each sample (nats per token), (N,) float32: a forward pass only. Raises as `check_lengths`."""
        check_lengths(batch)
        return self.passes.losses(batch.to(self.device))

    def train(self, batch: Batch, weights_N: Tensor) -> Tensor:
        """Add the gradient of `sum_i w_i loss_i` to the parameters' `.grad`, as any trainer's backward pass would.

        Nothing is tapped and no factor is kept, so it costs what plain training costs. Returns the losses (nats per
        token), (N,) float32. Raises ValueError as `run` does.
        """
        self._places.check()
        head = {local_name: self.parameters[name] for local_name, name in self.head_parameters.items()}
        return self.passes.train(checked(batch).to(self.device), weights_N.to(self.device), head)

    def _through_chunked_head(self, batch: Batch, direction: LowRank | None) -> Tensor:
        losses_N, hidden_NTd, grad_NTd = self._at_head(batch, direction)
        if hidden_NTd.requires_grad:
            torch.autograd.backward([hidden_NTd], [grad_NTd])
        return losses_N

    def _at_head(self, batch: Batch, direction: LowRank | None) -> tuple[Tensor, Tensor, Tensor]:
        """Losses, the last hidden states and their gradients. What is not kept of the head's factors is free then."""
        trained = self.head_parameters
        with self.passes.autocasting():
            hidden_NTd = self.passes.hidden(batch)
            with torch.no_grad():
                head, hidden, labels = self.passes.converted_head(), hidden_NTd.detach(), batch.labels_NT
                losses_N, grad_NTd, rows = head_forward_backward(
                    head, hidden, labels, direction, trainable=bool(trained)
                )
        weight = HeadWeight(head, rows)
        factors: dict[str, Factor] = {"weight": weight, "bias": HeadBias(weight)}
        for local_name, name in trained.items():  # before those of a tied embedding, which only add to some of its rows
            self._add(name, factors[local_name])
        return losses_N, hidden_NTd, grad_NTd

    def _add(self, name: str, factor: Factor) -> None:
        with torch.no_grad():
            kept = factor if self._keep is None else self._keep(name, factor)
        if kept is not None:
            self._factors[name].append(kept)

    def _through_logits(self, batch: Batch) -> Tensor:
        """For heads that are more than a linear map (logit scaling, soft capping): all logits at once."""
        with self.passes.autocasting():
            logits_NTV = self._model(**self.passes.inputs(batch)).logits.float()
        losses_N = mean_losses(logits_NTV, batch.labels_NT)
        torch.autograd.backward([losses_N.sum()])
        return losses_N.detach()

    def _owners(self) -> Iterator[tuple[str, nn.Module]]:
        """Modules that own a trainable parameter, by name; the plain head is captured on its own path."""
        for name, module in self._model.named_modules():
            if module is self.passes.head:
                continue
            if name in self._places.trained:
                yield name, module

    def _lora_layers(self) -> Iterator[LoraLinear]:
        """Layers of LoRA with a frozen base, whose adapters are then captured by the layer and not by their taps."""
        for name, module in self._model.named_modules():
            layer = recognise_lora(name, module)
            if layer is None or self._places.below(f"{name}.base_layer"):
                continue
            if layer.down in self._sites and layer.up in self._sites:
                yield layer

    def _attach_all(self, probe: Batch) -> None:
        unknown: dict[str, nn.Module] = {}
        for name, module in self._owners():
            experts = recognise_experts(name, module)
            make_factors = None if experts else recognise(module)
            if experts is not None:
                self.experts.append(experts)
            elif make_factors is None:
                unknown[name] = module
            else:
                self._sites[name] = (module, make_factors)
                self._handles.append(module.register_forward_hook(partial(self._hook, name), with_kwargs=True))
        used = kinds_of_use(self._model, unknown, self.passes.inputs(probe)) if unknown else {}
        for name, module in unknown.items():
            if name not in used:
                parameter = next(iter(self._places.trained[name].values()))
                raise self._unsupported(parameter, f"a {type(module).__name__} of no known kind owns it")
            self._sites[name] = (module, used[name])
        self._within = list(used)

    def _hook(
        self, name: str, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        if self._rows is None or name in self._in_one_piece:
            return None
        return self._tap(name, output, _first(args, kwargs))

    def _tap(self, name: str, output: Tensor, inputs: Tensor) -> Tensor:
        return cast(Tensor, _Tap.apply(output, inputs.detach(), self._anchor, self, name))  # type: ignore[no-untyped-call]

    def _forwards(self) -> dict[nn.Module, Callable[..., Tensor]]:
        """Modules that compute in one piece during a pass, and how; none that was given a forward of its own."""
        norms = [norm for norm in self._norms.values() if "forward" not in vars(norm.module)]
        self._in_one_piece = frozenset(norm.name for norm in norms)
        forwards: dict[nn.Module, Callable[..., Tensor]] = {n.module: partial(self._through_norm, n) for n in norms}
        for lora in self._loras:
            if lora.is_plain and "forward" not in vars(lora.module):
                forwards[lora.module] = partial(self._through_lora, lora)
        forwards |= {experts.module: partial(self._through_experts, experts) for experts in self.experts}
        return forwards | {self._sites[name][0]: partial(self._through_uses, name) for name in self._within}

    def _through_experts(self, experts: Experts, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        rows, dtype = self._rows_for(experts.name, hidden), self.passes.autocast
        take = partial(self._take, experts.name)
        return experts.forward(hidden, index, weights, rows=rows, anchor=self._anchor, dtype=dtype, collect=take)

    def _through_uses(self, name: str, *args: Any, **kwargs: Any) -> Any:
        module = self._sites[name][0]
        with UsesWithin(module, lambda _, output, inputs: self._tap(name, output, inputs)):
            return type(module).forward(module, *args, **kwargs)

    def _through_lora(self, lora: LoraLinear, x: Tensor) -> Tensor:
        return lora.forward(x, self._anchor, self.passes.autocast, self._collect)

    def _through_norm(self, norm: RmsNorm, *args: Any, **kwargs: Any) -> Tensor:
        inputs, is_asked_for = _first(args, kwargs), norm.name in self._sites
        if len(args) + len(kwargs) == 1 and inputs.dtype == torch.float32:
            return norm.forward(inputs, self._anchor if is_asked_for else None, self._collect_products)
        output: Tensor = type(norm.module).forward(norm.module, *args, **kwargs)
        return self._tap(norm.name, output, inputs) if is_asked_for else output

    def _collect(self, name: str, inputs: Tensor, grad: Tensor) -> None:
        _, make_factors = self._sites[name]
        rows = self._rows_for(name, grad)
        found = make_factors(rows.by_sample(inputs), rows.by_sample(grad), rows)
        for local_name in self._places.trained[name]:
            if local_name not in found:
                raise MissingFactorError(f"module {name} gave no factor of its parameter {local_name}; freeze it")
        self._take(name, found)

    def _take(self, name: str, found: Mapping[str, Factor]) -> None:
        """Factors of a module's parameters, of which some may not be trained."""
        for local_name, full_name in self._places.trained[name].items():
            if local_name in found:
                self._add(full_name, found[local_name])
        self._collected.add(name)

    def _collect_products(self, name: str, products: Tensor) -> None:
        """Of a norm: `n * dL/dy`, whose sums within samples are the gradients of its weight."""
        rows = self._rows_for(name, products)
        written = Written(products.reshape(rows.num_samples, -1, products.shape[-1]).sum(1))
        self._add(self._places.trained[name]["weight"], written)
        self._collected.add(name)

    def _check_collected(self) -> None:
        """Every module that left factors in the first pass has left some, but for adapters that are not in use now."""
        idle = {name for lora in self._loras if not lora.is_plain for name in (lora.down, lora.up)}
        missing = sorted(self._expected - self._collected - idle)
        if missing:
            raise MissingFactorError(
                f"a pass left no factor of module {missing[0]}'s parameters, as the first one did; another library may "
                "have changed the model: make a new capture"
            )

    def _rows_for(self, name: str, values: Tensor) -> Rows:
        """The rows of the pass, once the values of one call of a module are known to be of them."""
        assert self._rows is not None
        if values.shape[0] not in (self._rows.num_samples, self._rows.num_samples * self._rows.num_tokens):
            raise UnsupportedParameterError(
                f"module {name} was called with {values.shape[0]} rows for {self._rows.num_samples} samples: "
                "its samples cannot be told apart; freeze its parameters"
            )
        return self._rows

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        """No trainable weight requires a gradient: autograd then skips every weight-gradient matmul."""
        for parameter in self.parameters.values():
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in self.parameters.values():
                parameter.requires_grad_(True)

    def _unsupported(self, name: str, reason: str) -> UnsupportedParameterError:
        return UnsupportedParameterError(
            f"no exact per-sample gradient for trainable parameter {name}: {reason}; freeze it or use LoRA"
        )


def _first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What a module was called with, however it was called."""
    return args[0] if args else next(iter(kwargs.values()))

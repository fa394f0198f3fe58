"""Per-sample gradients written out, and the same work on them: scoring, K of the survivors, program, update.

`Oracle` takes them from autograd, one sample at a time, and is what every method's answers are compared with;
`Vmap` takes them from `torch.func`. The mathematics here is dense and shares no code with the library; only the
quadratic program is the service's, which is a matter of milliseconds. Nothing is clipped, which is to their advantage.
"""

from typing import Any, cast

import torch
from gradient_selectors import Interaction
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn import functional as F

from benchmarks.step_cost.methods.common import (
    CHECK_SAMPLES,
    CHECK_WEIGHTS,
    Answers,
    Bench,
    amortised,
    check_moments,
    flat,
)
from benchmarks.step_cost.workloads import Workload
from stream_trainer.training.build import Generators, make_selector

PerSample = dict[str, Tensor]
"""Per-sample gradients by parameter name, (N, *shape) each."""


class DenseInteraction:
    """What the service's selector reads of an `Interaction`, from gradients that are written out.

    Attributes:
        gradients: this object, for its `losses_N`.
    """

    def __init__(
        self,
        written: PerSample,
        losses_N: Tensor,
        target: dict[str, Tensor],
        bench: Bench,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """`dtype`: of products and sums. A reference needs float64: sums over millions of weights were off by 1e-4."""
        self._written, self._bench, self._dtype = written, bench, dtype
        self._preconditioners: dict[str, Tensor] = {}
        self.losses_N = losses_N
        self.gradients = self
        utilities_N = torch.zeros(len(losses_N), dtype=dtype, device=losses_N.device)
        for name, gradients in written.items():
            utilities_N += gradients.flatten(1).to(dtype) @ (self._preconditioner(name) * target[name]).flatten()
        self.utilities_N = utilities_N

    @property
    def num_samples(self) -> int:
        return len(self.losses_N)

    def gram(self, samples: list[int]) -> Tensor:
        """K of the given samples, (n, n) float64."""
        gram = torch.zeros(len(samples), len(samples), dtype=torch.float64, device=self.utilities_N.device)
        for name, gradients in self._written.items():
            rows = (gradients[samples].to(self._dtype) * self._preconditioner(name).sqrt()).flatten(1)
            gram += (rows @ rows.T).double()
        return gram

    def weighted(self, coefficients_N: Tensor) -> dict[str, Tensor]:
        """The update's gradient by parameter name; only samples that count are read."""
        selected = coefficients_N.nonzero().squeeze(1)
        return {
            name: (coefficients_N[selected].to(gradients) @ gradients[selected].flatten(1)).view(gradients.shape[1:])
            for name, gradients in self._written.items()
        }

    def _preconditioner(self, name: str) -> Tensor:
        """P, computed once for c and K."""
        if name not in self._preconditioners:
            self._preconditioners[name] = self._make_preconditioner(name)
        return self._preconditioners[name]

    def _make_preconditioner(self, name: str) -> Tensor:
        """P of Adam's next update, relative to the learning rate, with a gradient of the usual size; zero where there
        has been none yet.
        """
        parameter = self._bench.parameters[name]
        state = self._bench.optimizer.state.get(parameter)
        if not state:
            return torch.ones_like(parameter, dtype=self._dtype)
        (beta1, beta2), eps = self._bench.settings.optimizer.betas, self._bench.settings.optimizer.eps
        step, moment = int(state["step"]), state["exp_avg_sq"].to(self._dtype)
        scale = (1 - beta1) / (1 - beta1 ** (step + 1))
        usual = moment.sum() / torch.count_nonzero(moment) / (1 - beta2**step)
        after = (beta2 * moment + (1 - beta2) * usual) / (1 - beta2 ** (step + 1))
        values = scale / (after.sqrt() + eps)
        return torch.where(moment == 0, 0.0, values)


class Oracle:
    """The step of the service on gradients that are written out; subclasses get these in other ways."""

    def __init__(self, workload: Workload, device: str) -> None:
        self.bench = Bench(workload, device)
        selection = self.bench.settings.selection
        self._selector = make_selector(selection, Generators.of(0))
        self._target: dict[str, Tensor] = {}

    def warm_up(self) -> None:
        self._refresh(self.bench.target_ids_MT)
        self._step(next(self.bench.pool_ids))

    def repetition(self) -> dict[str, Any]:
        ids_NT = next(self.bench.pool_ids)
        refresh = lambda: self._refresh(self.bench.target_ids_MT)  # noqa: E731
        return amortised(lambda: self._step(ids_NT), refresh, self.bench.device)

    def answers(self) -> Answers:
        ids_NT = next(self.bench.pool_ids)[:CHECK_SAMPLES]
        self._refresh(self.bench.target_ids_MT[:CHECK_SAMPLES])
        written, losses_N = self.written(ids_NT)
        precise = torch.float64
        plain_utilities_N = DenseInteraction(written, losses_N, self._target, self.bench, precise).utilities_N
        check_moments(self.bench.optimizer, self.bench.parameters)
        interaction = DenseInteraction(written, losses_N, self._target, self.bench, precise)
        kept_N = torch.zeros(CHECK_SAMPLES)
        kept_N[plain_utilities_N.topk(CHECK_SAMPLES // 2).indices.cpu()] = 2 / CHECK_SAMPLES
        parameters = self.bench.parameters
        return {
            "utilities_N": interaction.utilities_N,
            "plain_utilities_N": plain_utilities_N,
            "gram_NN": interaction.gram(list(range(CHECK_SAMPLES))),
            "gradient": flat(interaction.weighted(torch.tensor(CHECK_WEIGHTS)), parameters),
            "kept_gradient": flat(interaction.weighted(kept_N), parameters),
        }

    def written(self, ids_NT: Tensor) -> tuple[PerSample, Tensor]:
        """Per-sample gradients and losses (N,) of a pool."""
        parameters = self.bench.parameters
        written = {name: torch.empty(len(ids_NT), *p.shape, device=p.device) for name, p in parameters.items()}
        losses = []
        for i in range(len(ids_NT)):
            loss = self.bench.losses(ids_NT[i : i + 1]).sum()
            for rows, gradient in zip(
                written.values(), torch.autograd.grad(loss, list(parameters.values())), strict=True
            ):
                rows[i] = gradient
            losses.append(loss.detach())
        return written, torch.stack(losses)

    def _refresh(self, target_ids_MT: Tensor) -> None:
        parameters = self.bench.parameters
        loss = self.bench.losses(target_ids_MT).mean()
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        self._target = dict(zip(parameters, gradients, strict=True))

    def _step(self, ids_NT: Tensor) -> None:
        written, losses_N = self.written(ids_NT)
        with torch.no_grad():
            interaction = DenseInteraction(written, losses_N, self._target, self.bench)
            coefficients_N = self._selector.decide(cast(Interaction, interaction)).coefficients_N
            for name, gradient in interaction.weighted(coefficients_N).items():
                self.bench.parameters[name].grad = gradient
        self.bench.optimizer.step()
        self.bench.optimizer.zero_grad(set_to_none=True)


class Vmap(Oracle):
    """`torch.func.vmap` over `grad`."""

    def written(self, ids_NT: Tensor) -> tuple[PerSample, Tensor]:
        model: nn.Module = self.bench.model

        def loss(parameters: dict[str, Tensor], ids_T: Tensor) -> Tensor:
            with self.bench.autocasting():
                logits_1TV = functional_call(
                    model, parameters, kwargs={"input_ids": ids_T[None], "use_cache": False}
                ).logits
            return F.cross_entropy(logits_1TV[0, :-1].float(), ids_T[1:])

        parameters = {name: p.detach() for name, p in self.bench.parameters.items()}
        written, losses_N = vmap(grad_and_value(loss), in_dims=(None, 0))(parameters, ids_NT)
        return written, losses_N

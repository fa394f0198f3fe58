"""What all methods share: the model, its samples as tensors, and the state in which their answers are compared."""

import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from itertools import cycle
from time import perf_counter
from typing import Any, Protocol

import torch
from gradient_selectors.capture.shards import own_part
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.step_cost.workloads import REFRESH_STEPS, Workload, pools, settings_of, target_samples
from stream_trainer.models.loading import LoadedModel, load_model
from stream_trainer.records import Sample
from stream_trainer.settings.schema import Settings

CHECK_SAMPLES = 4  # of the first pool and of the target: written out, the gradients of more do not fit everywhere
CHECK_WEIGHTS = (0.1, 0.2, 0.3, 0.4)
CHECK_STEP = 10
FRESH_SCALE = 0.02
IGNORED = -100
STEPS = 4  # timed together: the first after a pause took up to half as long again

Answers = dict[str, Tensor]
"""What a method found for the check samples: `utilities_N` (c), `gram_NN` (K), `gradient` (of the check weights, all
parameters in a row), `plain_utilities_N` (c for P = 1), `kept_gradient` (mean of the better half by those). Missing
where a method does not compute it."""


class Method(Protocol):
    """Anything whose step can be timed."""

    def warm_up(self) -> None:
        """Steps that are not timed."""

    def repetition(self) -> dict[str, Any]:
        """`seconds` of one step, with its share of a refresh of the target; more details are welcome."""

    def answers(self) -> Answers | None:
        """What it finds for the check samples, or None if it scores nothing."""


def build(workload: Workload, device: str, **selection: Any) -> tuple[Settings, LoadedModel]:
    """The service's settings and model. Fresh adapters are no longer zero: half of their gradients would be."""
    settings = settings_of(workload, device, **selection)
    loaded = load_model(settings.model, settings.training.seed)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            if parameter.requires_grad and not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * FRESH_SCALE)
    return settings, loaded


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that require a gradient, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def ids_of(samples: list[Sample], device: torch.device) -> Tensor:
    """Token ids (N, T) of samples of one length."""
    return torch.tensor([sample.input_ids for sample in samples], device=device)


class Bench:
    """Model, samples and optimizer of a method that is not ours."""

    def __init__(self, workload: Workload, device: str) -> None:
        self.workload = workload
        self.settings, loaded = build(workload, device)
        self.model: Any = loaded.model
        self.device = loaded.device
        self._dtype = loaded.autocast_dtype
        self.parameters = trainable(loaded.model)
        options = self.settings.optimizer
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=options.learning_rate,
            betas=options.betas,
            eps=options.eps,
            weight_decay=options.weight_decay,
            fused=True,
        )
        self.pool_ids: Iterator[Tensor] = cycle([ids_of(pool, self.device) for pool in pools(workload)])
        self.target_ids_MT = ids_of(target_samples(workload), self.device)

    def autocasting(self) -> AbstractContextManager[Any]:
        """Autocast as the workload asks for."""
        return torch.autocast(self.device.type, self._dtype, enabled=self._dtype is not None)

    def losses(self, ids_NT: Tensor, model: Any = None) -> Tensor:
        """Mean loss of each sample (nats per token), (N,), through transformers' own forward."""
        with self.autocasting():
            logits_NTV = (model or self.model)(input_ids=ids_NT, use_cache=False).logits
        # Labels are shifted, as transformers does it: to shift the logits would copy them, in both directions.
        labels_NT = F.pad(ids_NT[:, 1:], (0, 1), value=IGNORED)
        tokens = F.cross_entropy(
            logits_NTV.float().flatten(0, 1), labels_NT.flatten(), reduction="none", ignore_index=IGNORED
        )
        return tokens.view(ids_NT.shape).sum(1) / (ids_NT.shape[1] - 1)


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    """Wall-clock seconds of some work, until a GPU is done with it."""
    synchronise(device)
    started = perf_counter()
    work()
    synchronise(device)
    return perf_counter() - started


def amortised(step: Callable[[], Any], refresh: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """Seconds of a step with its share of a refresh of the target's gradient, as our own steps have it."""
    refresh_s = seconds_of(refresh, device)
    step_s = seconds_of(lambda: [step() for _ in range(STEPS)], device) / STEPS
    return {"seconds": step_s + refresh_s / REFRESH_STEPS, "step_s": step_s, "refresh_s": refresh_s}


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def check_moments(optimizer: torch.optim.Optimizer, parameters: dict[str, Any]) -> None:
    """Put the optimizer into the state in which answers are compared: a second moment spread over magnitudes."""
    for name, parameter in parameters.items():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        moment = torch.exp(2 * torch.randn(parameter.shape, generator=generator)) * 1e-6
        optimizer.state[parameter] = {
            "step": torch.tensor(float(CHECK_STEP)),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": own_part(parameter, moment),
        }


def flat(gradient: dict[str, Tensor], parameters: dict[str, Any]) -> Tensor:
    """A gradient as one row, (total,), in the order of the parameters; zero where there is none."""
    rows = [gradient.get(name, torch.zeros_like(p)) for name, p in parameters.items()]
    return torch.cat([row.detach().float().flatten() for row in rows])

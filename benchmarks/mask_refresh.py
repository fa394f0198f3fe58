"""What a refresh of the DualSFT mask costs, against one plain training step.

    python -m benchmarks.mask_refresh --json mask_refresh.json [--layers 30 --width 576 ...] [--tiny]

The model is a Llama with random weights and tied embeddings, by default of the shapes of SmolLM2-135M. In each round, a
plain step (forward, backward, torch's AdamW) on random samples, then the selector takes in that step's gradient and
refreshes the mask, then the masked optimizer makes its step, so that the next refresh finds moments. Both are timed in
turn, so that a busy machine slows both alike; the first round counts in nothing. The gradient of the target is not
part of a refresh: a step that selects has it already.

Before anything is timed, a refresh of a small model must choose what a sort of all scores chooses, or nothing is.
Exit codes: 0 done, 1 the mask is wrong, 2 a mistake in the options.
"""

import argparse
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any
from unittest.mock import patch

import torch
from gradient_selectors import DualSft, MaskedAdamW, MaskRule
from gradient_selectors.capture.gradients import Gradient
from gradient_selectors.mask.dual_sft import Response, column_scores, direction, masked_curvature
from gradient_selectors.mask.rule import LAYER, MODULE_GROUPS, choose_units, unit_size
from torch import Tensor, nn

from benchmarks.common.reporting import OneLineParser, at_least_one, say, table, writable_file, write_result
from benchmarks.step_cost.agreement import DisagreementError

RATE = 1e-3
RESPONSE = Response(RATE, lambda_prior=0.0)  # second order, without the passes that a guard would need
DENSITY = 0.05
PHASES = ("scores", "choice", "replacing")  # of a refresh


@dataclass(frozen=True)
class Shape:
    """Of a Llama and of the samples of a step."""

    layers: int = 30
    width: int = 576
    mlp: int = 1536
    heads: int = 9
    kv_heads: int = 3
    vocabulary: int = 49152
    samples: int = 16
    tokens: int = 128


TINY = Shape(2, 32, 64, 4, 2, 320, 4, 12)


class Bench:
    """A model that both optimizers train, and a selector that follows it."""

    def __init__(self, shape: Shape, rule: MaskRule, dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype
        self.generator = torch.Generator().manual_seed(0)
        self.model = make_model(shape)
        self.plain = torch.optim.AdamW(self.model.parameters(), lr=RATE)
        self.masked = MaskedAdamW(self.model.named_parameters(), lr=RATE, granularity=rule.granularity)
        self.selector = DualSft(rule, RESPONSE)
        self.backward()
        self.target = {name: gradient.clone() for name, gradient in self.gradient().items()}

    def backward(self) -> None:
        """Fresh gradients, of new samples."""
        self.model.zero_grad()
        size = (self.shape.samples, self.shape.tokens)
        ids_NT = torch.randint(self.shape.vocabulary, size, generator=self.generator)
        with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            loss = self.model(input_ids=ids_NT, labels=ids_NT, use_cache=False).loss
        loss.backward()

    def gradient(self) -> dict[str, Tensor]:
        return {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}

    def plain_step(self) -> None:
        self.backward()
        self.plain.step()

    def refresh(self) -> None:
        self.selector.refresh(self.masked, self.target)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure as the command line says; returns the exit code."""
    options = _parser().parse_args(arguments)
    shape = TINY if options.tiny else Shape(**{name: getattr(options, name) for name in asdict(Shape())})
    rule = MaskRule(DENSITY, options.granularity)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        check(rule)
    except DisagreementError as error:
        say(f"error: {error}")
        return 1
    bench = Bench(shape, rule, getattr(torch, options.dtype))
    rounds = [measure(bench, f"round {i} of {options.rounds}") for i in range(options.rounds + 1)][1:]
    summary = summarise(rounds)
    weights = sum(parameter.numel() for parameter in bench.model.parameters())
    made = {"shape": asdict(shape), "rule": asdict(rule), "dtype": options.dtype, "weights": weights}
    write_result(options.json, {**made, "threads": torch.get_num_threads(), "rounds": rounds, "summary": summary})
    print(report(summary))
    return 0


def _parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = OneLineParser("python -m benchmarks.mask_refresh", description=__doc__, formatter_class=form)
    parser.add_argument("--json", type=writable_file, required=True, metavar="FILE", help="where the result is written")
    for name, default in asdict(Shape()).items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=at_least_one, default=default, metavar="N", help=f"of the model ({default})")
    parser.add_argument("--tiny", action="store_true", help="a very small model instead, to try the command")
    parser.add_argument("--granularity", choices=("weight", "row"), default="weight", help="what is chosen (weight)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the plain step's passes"
    )
    parser.add_argument("--rounds", type=at_least_one, default=3, metavar="R", help="that count (3)")
    parser.add_argument("--threads", type=at_least_one, metavar="N", help="of torch (as torch chooses)")
    return parser


def make_model(shape: Shape) -> nn.Module:
    """A Llama with random weights, the same in every run."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=max(64, shape.tokens),
        tie_word_embeddings=True,
    )
    model: nn.Module = LlamaForCausalLM(config)
    return model


def check(rule: MaskRule) -> None:
    """Compare refreshes of a small model with a sort of all scores; raises DisagreementError if a mask differs."""
    say("checking the mask against a sort")
    bench = Bench(TINY, rule, torch.float32)
    for number in range(3):
        bench.plain_step()
        bench.selector.observe(bench.gradient())
        expected = sorted_masks(scores_of(bench), rule)
        bench.refresh()
        wrong = sum(int((bench.masked.mask(name).bool() != mask).sum()) for name, mask in expected.items())
        if wrong:
            raise DisagreementError(f"the mask of refresh {number + 1} differs from a sort's in {wrong} weights")
        bench.masked.step()


def scores_of(bench: Bench) -> dict[str, Tensor]:
    """The column scores that the next refresh will choose by."""
    state = bench.selector.state_dict()
    corrected = 1 - bench.selector.decay ** state["observed"]
    mean = {name: values / corrected for name, values in state["average"].items()}
    return column_scores(
        direction(RESPONSE, mean, bench.target, None, masked_curvature(bench.masked, mean)),
        mean,
    )


def sorted_masks(columns: Gradient, rule: MaskRule) -> dict[str, Tensor]:
    """The rule by sorting: the best of each layer, then of each module group, then of all, as far as each budget goes.

    Every weight stands in one long vector, beside the number of its unit.
    """
    names, scores, sizes = [], [], []
    for name, values in columns.items():
        size = unit_size(values.shape, rule.granularity)
        scores.append(values.reshape(-1, size).mean(1))
        names += [name] * len(scores[-1])
        sizes += [size] * len(scores[-1])
    order = torch.cat(scores).sort(descending=True, stable=True).indices.tolist()
    budget = max(1, round(rule.density * sum(sizes)))
    left, taken = budget, torch.zeros(len(names), dtype=torch.bool)
    for quota, members in _groups(list(columns), rule, budget):
        room = min(quota, left)
        for unit in order:
            if names[unit] not in members or taken[unit]:
                continue
            if sizes[unit] > room:
                break
            taken[unit] = True
            room, left = room - sizes[unit], left - sizes[unit]
    parts = torch.split(taken, [len(part) for part in scores])
    units = zip(columns.items(), parts, strict=True)
    return {n: m[:, None].expand(-1, v.numel() // len(m)).reshape(v.shape) for (n, v), m in units}


def _groups(names: Sequence[str], rule: MaskRule, budget: int) -> Iterator[tuple[int, set[str]]]:
    """Budgets of groups of parameters, in turn."""
    layers, modules = defaultdict[str, set[str]](set), defaultdict[str, set[str]](set)
    for name in names:
        if match := LAYER.search(name):
            layers[match[1]].add(name)
        modules[next((part for part in MODULE_GROUPS if f".{part}." in name), "other")].add(name)
    for share, groups in ((rule.layer_quota, layers), (rule.module_quota, modules)):
        for members in groups.values():
            yield int(share * budget / len(groups)), members
    yield budget, set(names)


def measure(bench: Bench, title: str) -> dict[str, float]:
    """Seconds of a plain step, and of what the mask adds: taking in a gradient, and a refresh by phase."""
    seconds: dict[str, float] = {}
    clocked("plain_step", bench.plain_step, seconds)()
    clocked("observe", bench.selector.observe, seconds)(bench.gradient())
    with clocked_phases(seconds):
        clocked("refresh", bench.refresh, seconds)()
    seconds["scores"] = seconds["refresh"] - seconds["choice"] - seconds["replacing"]
    bench.masked.step()
    say(f"{title}: plain step {seconds['plain_step']:.2f} s, refresh {seconds['refresh']:.2f} s")
    return {**seconds, "ratio": seconds["refresh"] / seconds["plain_step"]}


def clocked(name: str, function: Callable[..., Any], seconds: dict[str, float]) -> Callable[..., Any]:
    """The function, writing down how long it takes."""

    def run(*arguments: Any) -> Any:
        before = time.perf_counter()
        result = function(*arguments)
        seconds[name] = time.perf_counter() - before
        return result

    return run


@contextmanager
def clocked_phases(seconds: dict[str, float]) -> Iterator[None]:
    """Write down how long the parts of a refresh take that have a name of their own."""
    choice = clocked("choice", choose_units, seconds)
    replacing = clocked("replacing", MaskedAdamW.replace_units, seconds)
    with (
        patch("gradient_selectors.mask.dual_sft.choose_units", choice),
        patch.object(MaskedAdamW, "replace_units", replacing),
    ):
        yield


def summarise(rounds: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Median and range over rounds."""
    summary = {}
    for name in rounds[0]:
        values = [measured[name] for measured in rounds]
        summary[name] = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return summary


def report(summary: Mapping[str, Mapping[str, float]]) -> str:
    """What people read at the end."""
    names = {"plain_step": "plain step", "observe": "taking in a gradient", "refresh": "refresh"}
    names |= {phase: f"  {phase}" for phase in PHASES} | {"ratio": "refresh / plain step"}
    rows = [
        (title, *(f"{summary[name][part]:.3f}" for part in ("median", "min", "max"))) for name, title in names.items()
    ]
    return table(("seconds", "median", "min", "max"), rows)


if __name__ == "__main__":
    sys.exit(main())

"""Several ranks choose what one process chooses, with the same coefficients, and stay alike to the bit."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from gradient_selectors.capture.capture import GradientCapture
from gradient_selectors.engine import SelectionEngine
from gradient_selectors.mask.cohorts import FIELDS, joined
from gradient_selectors.mask.dual_sft import DualSft, Response
from gradient_selectors.mask.masked_adamw import MaskedAdamW
from gradient_selectors.mask.rule import MaskRule
from gradient_selectors.route.gast import Gast
from gradient_selectors.target import Target, mean_loss
from gradient_selectors.views.interaction import Interaction
from gradient_selectors.views.rank_one import RankOne
from gradient_selectors.views.sketches import Sketched
from gradient_selectors.weigh.baselines import Equal
from gradient_selectors.weigh.filter_then_weight import FilterThenWeight
from gradient_selectors.weigh.greedy import Greedy
from gradient_selectors.world.base import Alone, RankError, World
from safetensors.torch import load, save
from torch import Tensor

from stream_trainer.models.loading import load_model
from tests.gradient_selectors.world.threads import ThreadWorld, on_ranks, without_locks
from tests.helpers.oracle import make_batch, make_model
from tests.helpers.tiny_models import shake, with_config

STEPS, CLOSE = 3, 1e-5
EPS = 1e-4  # at 1e-8 Adam makes whole steps of what is rounding only, as of the bias of keys
ONE = ((9,), (12,))  # which one rank has, and no other has any
TOKEN_BYTES = 9264  # that factors of the wide model take for a token
LENGTHS = ((9, 7, 12, 8, 6, 10, 11), (5, 12, 9, 9, 7, 8, 6))


@dataclass
class Course:
    """What a run of some steps came to."""

    chosen: list[list[int]]
    coefficients: list[Tensor]
    weights: dict[str, Tensor]
    losses: list[Tensor]
    calls: list[Any]
    again: list[int]
    mean: float = 0.0
    moments: dict[str, Tensor] = field(default_factory=dict)  # under a mask


def wide_model() -> Any:
    """Matrices wide enough to be sketched."""
    model = load_model(with_config("llama", hidden_size=72, intermediate_size=96, num_attention_heads=2), seed=0).model
    shake(model, frozen=True)
    return model


def course(world: World, model: Any, prepared: GradientCapture | None = None, **options: Any) -> Course:
    """Some steps; `prepared` is a capture of the model, if it is sharded."""
    trained = [p for p in model.parameters() if p.requires_grad]
    masked = options.get("mask") is not None
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    rows = masked and options["mask"]().rule.granularity == "row"
    optimizer: Any = (
        MaskedAdamW(named.items(), lr=1e-3, eps=EPS, granularity="row" if rows else "weight", world=world)
        if masked
        else torch.optim.AdamW(trained, lr=1e-3, eps=EPS)
    )
    options = {name: value() if callable(value) else value for name, value in options.items()}
    weigh, lengths = options.pop("weigh", FilterThenWeight(batch_size=3)), options.pop("lengths", LENGTHS)
    # A refresh leaves one sample out, by which an update is compared with another.
    target = Target.of([make_batch((8, 10, 6), seed=50)], refresh_steps=2, refresh_samples=2)
    engine = SelectionEngine(prepared or model, optimizer, weigh, target=target, world=world, **options)
    found = Course([], [], {}, [], [], [])
    for step in range(STEPS):
        rival = torch.Generator().manual_seed(step) if step == 1 else None
        if step == 2:  # which leaves no trace
            engine.rehearse(make_batch(lengths[0], seed=9))
        decision = engine.backward(make_batch(lengths[step % 2], seed=step), rival=rival)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.chosen.append(decision.selected)
        given = decision.coefficients_N if decision.coefficients_LN is None else decision.coefficients_LN
        found.coefficients.append(given)
        found.losses.append(engine.losses_N)
        found.again.append(0 if engine.last is None else engine.last.second_pass_samples)
    found.mean = mean_loss(engine.capture, [make_batch((9, 7, 12), seed=4)], world=world)
    found.weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    if masked:
        own = {key: values.clone() for key, values in optimizer.state_dict().items()}
        found.moments = whole_moments(world, own)
        for state in (found.moments, own):  # a rank takes its own of what all have
            density = optimizer.density
            optimizer.load_state_dict(state)
            again = optimizer.state_dict()
            assert optimizer.density == density > 0  # of all ranks
            assert again.keys() == own.keys()
            assert all(torch.equal(again[key], values) for key, values in own.items())
    found.calls = getattr(world, "calls", [])
    return found


def whole_moments(world: World, own: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of a masked optimizer whose parameters lie in rows, or the same everywhere."""
    ranks = [load(part) for part in world.gather(save(own))]
    if all(all(torch.equal(own[key], values) for key, values in rank.items()) for rank in ranks):
        return own
    names = {key.rpartition(".")[0] for key in own}
    parts = {name: [{field: rank[f"{name}.{field}"] for field in FIELDS} for rank in ranks] for name in names}
    return {f"{name}.{field}": values for name in names for field, values in joined(parts[name]).items()}


CASES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "full": (lambda: make_model("llama"), {}),
    "tied": (lambda: make_model("qwen2_tied"), {}),
    "conv1d": (lambda: make_model("gpt2"), {}),
    "lora": (lambda: make_model("lora"), {}),
    "checkpointing": (lambda: make_model("lora_checkpointing"), {}),
    "sketch": (wide_model, {"scoring": Sketched}),
    "sketch_in_pieces": (wide_model, {"scoring": Sketched, "micro_tokens": 20, "factors_bytes": 0}),
    "exact_in_pieces": (wide_model, {"micro_tokens": 20, "factors_bytes": 0}),
    "gast_in_pieces": (
        wide_model,
        {"scoring": Sketched, "route": lambda: Gast(per_layer=1), "micro_tokens": 20, "factors_bytes": 0},
    ),
    # A budget that the second of two ranks goes beyond at the first step, and neither at the second.
    "few_let_go": (
        wide_model,
        {"scoring": Sketched, "weigh": lambda: FilterThenWeight(batch_size=1), "factors_bytes": 31 * TOKEN_BYTES},
    ),
    "one_sample": (
        wide_model,
        {"scoring": Sketched, "weigh": lambda: FilterThenWeight(batch_size=1), "lengths": ONE, "factors_bytes": 0},
    ),
    "gast": (lambda: make_model("llama"), {"route": lambda: Gast(per_layer=1)}),
    "greedy": (lambda: make_model("llama"), {"weigh": lambda: Greedy(batch_size=3)}),
    "mask": (lambda: make_model("llama"), {"mask": lambda: DualSft(MaskRule(density=0.2), refresh_steps=3)}),
    "mask_of_rows": (
        wide_model,
        {
            "scoring": Sketched,
            "mask": lambda: DualSft(MaskRule(density=0.3, granularity="row"), Response(1e-3), refresh_steps=3),
            "micro_tokens": 20,
            "factors_bytes": 0,
        },
    ),
    "plain": (lambda: make_model("llama"), {"weigh": Equal}),
}


IN_PIECES = ("sketch_in_pieces", "exact_in_pieces", "gast_in_pieces", "few_let_go", "one_sample", "mask_of_rows")
LONG = (*IN_PIECES, "conv1d", "checkpointing", "greedy")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow) if case in LONG else case for case in CASES]
)
def test_ranks_choose_what_one_process_chooses(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    without_locks(Interaction, monkeypatch)
    make, options = CASES[case]
    alone = course(Alone(), make(), **options)
    for size in (2, 3) if case in ("full", "sketch") else (2,):
        models = [make() for _ in range(size)]  # not at once: they are drawn from one generator

        def work(world: ThreadWorld, models: list[Any] = models) -> Course:
            return course(world, models[world.rank], **options)

        ranks = on_ranks(size, work)
        first = ranks[0]
        assert first.chosen == alone.chosen
        for ours, wanted in zip(first.coefficients, alone.coefficients, strict=True):
            torch.testing.assert_close(ours, wanted, rtol=CLOSE, atol=CLOSE)
        for ours, wanted in zip(first.losses, alone.losses, strict=True):
            torch.testing.assert_close(ours, wanted, rtol=CLOSE, atol=CLOSE)
        assert first.mean == pytest.approx(alone.mean, rel=CLOSE)
        for name, weight in alone.weights.items():
            torch.testing.assert_close(first.weights[name], weight, rtol=0, atol=CLOSE)
        for other in ranks[1:]:
            assert other.calls == first.calls
            assert all(torch.equal(other.weights[name], first.weights[name]) for name in first.weights)


def test_a_rank_that_fails_in_a_pass_has_all_fail_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    without_locks(Interaction, monkeypatch)
    models = [make_model("llama") for _ in range(2)]

    def fails(world: ThreadWorld) -> str:
        model = models[world.rank]
        target = [make_batch((8, 10, 6), seed=50)]
        optimizer = torch.optim.AdamW(model.parameters())
        engine = SelectionEngine(model, optimizer, FilterThenWeight(batch_size=3), target=target, world=world)
        engine.backward(make_batch(LENGTHS[0]))
        if world.rank == 1:
            model.model.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(RankError) as caught:
            engine.backward(make_batch(LENGTHS[1]))
        return str(caught.value)

    assert on_ranks(2, fails) == ["rank 1 failed: ZeroDivisionError: division by zero"] * 2


def test_more_ranks_than_samples_are_of_one_mind(monkeypatch: pytest.MonkeyPatch) -> None:
    without_locks(Interaction, monkeypatch)

    def decide(world: World, model: Any) -> Tensor:
        target = [make_batch((8,), seed=50)]
        engine = SelectionEngine(
            model, torch.optim.AdamW(model.parameters()), FilterThenWeight(batch_size=1), target=target, world=world
        )
        return engine.backward(make_batch((9, 7))).coefficients_N

    alone = decide(Alone(), make_model("llama"))
    models = [make_model("llama") for _ in range(3)]
    for found in on_ranks(3, lambda world: decide(world, models[world.rank])):
        torch.testing.assert_close(found, alone, rtol=CLOSE, atol=CLOSE)


def test_rank_one_is_refused_with_the_reason() -> None:
    model = make_model("llama")
    optimizer = torch.optim.AdamW(model.parameters())
    target = [make_batch((8,), seed=50)]
    with pytest.raises(ValueError, match="several ranks"):
        SelectionEngine(model, optimizer, FilterThenWeight(1), target=target, scoring=RankOne(), world=_Pair())


class _Pair(Alone):
    size = 2

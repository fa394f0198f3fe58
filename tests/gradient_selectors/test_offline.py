"""Selection before any training, against dense autograd on a pool of some twenty samples."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from gradient_selectors.capture.batch import Batch, join
from gradient_selectors.mask.rule import MaskRule
from gradient_selectors.offline import Pool, select_cluster_ucb, select_dual_sft
from torch import Tensor, nn
from torch.nn import functional as F

from tests.helpers.oracle import Dense, dense, make_batch, make_model, relative_error

EXACT = 1e-5  # relative, float32
LENGTHS = (9, 7, 12, 8, 6, 10, 9, 5, 11, 8, 7, 9, 6, 12, 10, 8, 9, 7, 5, 6)
SIZE = len(LENGTHS)
TARGET = make_batch((8, 6, 9), seed=4)
NO_QUOTAS = MaskRule(0.1, layer_quota=0.0, module_quota=0.0)


def pool_batch() -> Batch:
    return make_batch(LENGTHS, seed=2)


def loader(batch: Batch, size: int = 6) -> list[dict[str, Any]]:
    """Batches as a data loader hands them out."""
    rows = [slice(start, start + size) for start in range(0, len(batch), size)]
    mask = (torch.arange(batch.input_ids_NT.shape[1]) < torch.tensor(batch.lengths)[:, None]).long()
    tensors = {"input_ids": batch.input_ids_NT, "labels": batch.labels_NT, "attention_mask": mask}
    return [{name: values[part] for name, values in tensors.items()} for part in rows]


@dataclass(frozen=True)
class Indexed:
    """A pool that is read by index, and keeps what was read."""

    samples: Sequence[Batch]
    read: list[int]

    @property
    def lengths(self) -> Sequence[int]:
        return [sample.lengths[0] for sample in self.samples]

    def batch(self, indices: Sequence[int]) -> Batch:
        self.read.extend(indices)
        return join([self.samples[i] for i in indices])


def indexed() -> Indexed:
    return Indexed(list(pool_batch().samples()), [])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: values.clone() for name, values in model.state_dict().items()}


def assert_untouched(model: nn.Module, before: dict[str, Tensor]) -> None:
    assert all(torch.equal(values, before[name]) for name, values in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or "forward" in vars(module) for module in model.modules())


def kept_by(mask: dict[str, Tensor], oracle: Dense) -> Tensor:
    return torch.cat([mask[name].flatten() for name in oracle.parameters])


# DualSFT


@pytest.mark.parametrize("kind", ["llama", "qwen2_tied", "lora"])
def test_without_a_warm_up_samples_and_weights_are_scored_by_the_target_alone(kind: str) -> None:
    model = make_model(kind)
    before, flags = snapshot(model), [parameter.requires_grad for parameter in model.parameters()]
    oracle, u = dense(model, pool_batch()), dense(model, TARGET).gradients.mean(0)
    found = select_dual_sft(model, loader(pool_batch()), [TARGET], share=0.25, rule=NO_QUOTAS, warm_up=0.0)
    scores_N = oracle.gradients @ u
    assert relative_error(found.scores_N, scores_N) < 10 * EXACT  # products of two gradients, which cancel
    assert list(found.selected) == scores_N.argsort(descending=True)[:5].tolist()
    kept, columns = kept_by(found.mask, oracle), u * oracle.gradients.mean(0)
    assert int(kept.sum()) == round(0.1 * len(columns))
    # The weights in question are those whose scores rounding could have put on the other side.
    threshold = columns.topk(int(kept.sum())).values[-1]
    clear = (columns - threshold).abs() > 1e-3 * threshold
    assert torch.equal(kept[clear], (columns > threshold)[clear])
    assert_untouched(model, before)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags


def test_a_warm_up_gives_the_curvature_and_is_undone() -> None:
    """Against an update of torch's AdamW in float64 on the samples that are drawn, and dense gradients after it."""
    model, rate = make_model("llama"), 1e-3
    before = snapshot(model)
    found = select_dual_sft(
        model, loader(pool_batch()), [TARGET], learning_rate=rate, warm_up=0.5, lambda_prior=0.0, generator=seeded(3)
    )
    assert_untouched(model, before)
    drawn = torch.randperm(SIZE, generator=seeded(3))[: SIZE // 2].tolist()
    reference = copy.deepcopy(model).double()
    optimizer = torch.optim.AdamW(reference.parameters(), lr=rate, weight_decay=0.0)
    for index in drawn:
        sample = list(pool_batch().samples())[index]
        logits = reference(input_ids=sample.input_ids_NT, use_cache=False).logits[0]
        torch.autograd.backward([F.cross_entropy(logits[:-1], sample.labels_NT[0, 1:]) / len(drawn)])
    optimizer.step()
    curvature = [optimizer.state[p]["exp_avg_sq"].flatten() / (1 - 0.999) for p in reference.parameters()]
    oracle, target = dense(reference, pool_batch()), dense(reference, TARGET)
    mean, new = oracle.gradients.mean(0), target.gradients.mean(0)
    want = oracle.gradients @ (new - 0.5 * rate * torch.cat(curvature) * mean)
    assert relative_error(found.scores_N, want) < 1e-3
    cold = dense(model, pool_batch()).gradients @ dense(model, TARGET).gradients.mean(0)
    assert relative_error(cold, want) > 1e-2  # it is the warmed-up model that scores


def test_self_distillation_guards_what_the_warm_up_changed() -> None:
    model = make_model("llama")
    scores = {
        weight: select_dual_sft(
            model, loader(pool_batch()), [TARGET], learning_rate=0.02, warm_up=0.5, lambda_prior=weight
        ).scores_N
        for weight in (0.0, 5.0)
    }
    assert relative_error(scores[0.0], scores[5.0]) > 1e-3


@pytest.mark.parametrize("warm_up", [0.0, 0.3])
def test_a_pool_by_index_and_batches_of_a_loader_are_the_same(warm_up: float) -> None:
    model, pool = make_model("llama"), indexed()
    assert isinstance(pool, Pool)
    ways = (pool, loader(pool_batch()), loader(pool_batch(), size=20), (part for part in loader(pool_batch(), size=3)))
    found = [
        select_dual_sft(model, way, [TARGET], rule=NO_QUOTAS, learning_rate=0.01, warm_up=warm_up, generator=seeded())
        for way in ways
    ]
    assert sorted(set(pool.read)) == list(range(SIZE))
    for other in found[1:]:
        assert torch.equal(other.scores_N, found[0].scores_N)
        assert other.selected == found[0].selected
        assert all(torch.equal(mask, found[0].mask[name]) for name, mask in other.mask.items())


def test_the_seed_decides_the_warm_up() -> None:
    model = make_model("llama")

    def scores_N(seed: int) -> Tensor:
        return select_dual_sft(
            model, loader(pool_batch()), [TARGET], learning_rate=0.01, warm_up=0.2, generator=seeded(seed)
        ).scores_N

    assert torch.equal(scores_N(1), scores_N(1))
    assert not torch.equal(scores_N(1), scores_N(2))


def test_the_target_may_come_as_a_loader_makes_it() -> None:
    model = make_model("llama")
    one, other = (
        select_dual_sft(model, loader(pool_batch()), target, warm_up=0.0) for target in ([TARGET], loader(TARGET, 2))
    )
    assert relative_error(one.scores_N, other.scores_N) < 10 * EXACT


def pool_with_one_broken(model: Any) -> Batch:
    """Sample 6 alone has a token whose embedding is not a number."""
    batch = pool_batch()
    batch.input_ids_NT[batch.input_ids_NT == 299] = 298
    batch.input_ids_NT[6, 2] = 299
    with torch.no_grad():
        model.model.embed_tokens.weight[299] = float("nan")
    return batch


@pytest.mark.parametrize("warm_up", [0.0, 1.0])
def test_a_sample_that_is_not_finite_is_not_selected_and_spoils_nothing(warm_up: float) -> None:
    model = make_model("llama")
    batch = pool_with_one_broken(model)
    found = select_dual_sft(model, loader(batch), [TARGET], share=1.0, rule=NO_QUOTAS, warm_up=warm_up)
    assert torch.isnan(found.scores_N).nonzero().flatten().tolist() == [6]
    assert sorted(found.selected) == [i for i in range(SIZE) if i != 6]
    assert sum(int(mask.sum()) for mask in found.mask.values()) == round(
        0.1 * sum(m.numel() for m in found.mask.values())
    )


def test_a_pool_whose_gradient_is_not_finite_is_refused_and_the_model_left_as_it_was() -> None:
    model = make_model("llama")
    with torch.no_grad():
        model.model.norm.weight[0] = float("inf")
    before = snapshot(model)
    with pytest.raises(ValueError, match="the gradient of the pool is not finite; lower the learning rate"):
        select_dual_sft(model, loader(pool_batch()), [TARGET])
    assert_untouched(model, before)


def test_what_is_done_is_told() -> None:
    told: dict[str, list[int]] = {}
    select_dual_sft(
        make_model("llama"),
        loader(pool_batch()),
        [TARGET],
        warm_up=0.3,
        progress=lambda phase, count, total: told.setdefault(f"{phase} {total}", []).append(count),
    )
    assert {phase: sum(counts) for phase, counts in told.items()} == {
        "warming up 6": 6,
        "adding gradients 20": 20,
        "scoring samples 20": 20,
    }


# ClusterUCB


def cosines(model: Any) -> Tensor:
    oracle, target = dense(model, pool_batch()), dense(model, TARGET).gradients.mean(0)
    return F.cosine_similarity(oracle.gradients, target[None])


@pytest.mark.parametrize("kind", ["llama", "qwen2_tied", "lora"])
def test_scores_are_the_exact_cosine_with_the_target(kind: str) -> None:
    model = make_model(kind)
    before, want = snapshot(model), cosines(model)
    found = select_cluster_ucb(model, loader(pool_batch()), [TARGET], budget=1.0, share=0.25, clusters=3)
    assert sorted(found.drawn_n.tolist()) == list(range(SIZE))
    torch.testing.assert_close(found.scores_n, want[found.drawn_n], rtol=0, atol=10 * EXACT)
    assert list(found.selected) == want.argsort(descending=True)[:5].tolist()
    assert_untouched(model, before)


def test_no_more_than_the_budget_is_scored_and_the_best_of_it_is_selected() -> None:
    model, pool, want = make_model("llama"), indexed(), cosines(make_model("llama"))
    told: list[int] = []
    found = select_cluster_ucb(
        model,
        pool,
        [TARGET],
        budget=0.5,
        share=0.1,
        clusters=3,
        progress=lambda _, count, __: told.append(count),
    )
    assert len(found.drawn_n) == len(set(found.drawn_n.tolist())) == sum(told) == 10
    order = want[found.drawn_n].argsort(descending=True)
    assert list(found.selected) == found.drawn_n[order][:2].tolist()


def test_a_bandits_pool_by_index_and_batches_of_a_loader_are_the_same() -> None:
    model = make_model("llama")
    ways: Iterator[Any] = iter((indexed(), loader(pool_batch()), loader(pool_batch(), size=20)))
    first, *others = (
        select_cluster_ucb(model, way, [TARGET], budget=0.5, share=0.1, clusters=3, generator=seeded(1)) for way in ways
    )
    for other in others:
        assert torch.equal(other.drawn_n, first.drawn_n)
        assert torch.equal(other.scores_n, first.scores_n)
        assert other.selected == first.selected


def test_a_sample_without_a_usable_feature_is_refused() -> None:
    model = make_model("llama")
    batch = pool_with_one_broken(model)
    with pytest.raises(ValueError, match="a feature is not finite"):
        select_cluster_ucb(model, loader(batch), [TARGET], budget=1.0, clusters=2)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"budget": 0.1, "share": 0.2}, "share=0.2 is more than budget=0.1; raise budget"),
        ({"share": 0.01}, "share=0.01 of 20 samples is none; raise it"),
        ({"budget": 1.5, "share": 0.5}, "budget=1.5 is no share of a pool"),
    ],
)
def test_shares_that_make_no_sense_are_refused(options: dict[str, float], says: str) -> None:
    model = make_model("llama")
    with pytest.raises(ValueError, match=says):
        select_cluster_ucb(model, loader(pool_batch()), [TARGET], **options)  # type: ignore[arg-type]
    assert not any(module._forward_hooks for module in model.modules())


def test_a_target_that_nothing_can_be_learned_from_is_refused() -> None:
    model = make_model("llama")
    with torch.no_grad():
        model.model.norm.weight[0] = float("inf")
    with pytest.raises(ValueError, match="the target's gradient has length"):
        select_cluster_ucb(model, loader(pool_batch()), [TARGET])

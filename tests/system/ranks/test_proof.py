"""The proof that a run does not depend on the number of its ranks, for whatever may be trained: `make ranks-proof`.

W = 1, 2 and 3 read the same topic and must choose the same samples at every step, with coefficients within 1e-5. At the
end their weights must be those of one process within 1e-5. Checkpoints compare the ranks' weights to the bit, and end
the run where they differ.
"""

from pathlib import Path
from typing import Any

import pytest
from gradient_selectors.views.interaction import Interaction
from safetensors.torch import load_file

from stream_trainer.models.loading import load_model
from stream_trainer.settings.schema import ModelSettings
from tests.gradient_selectors.world.threads import without_locks
from tests.helpers.service import LONG_S, MODEL, Step, checkpoints, configuration, counts, goods, kafka
from tests.system.ranks.runs import serve_on_ranks
from tests.system.ranks.test_ranks import publish_to_all

STEPS, POOL = 50, 8
CLOSE = 1e-5
EPS = 1e-4  # at 1e-8 Adam makes whole steps of what is rounding only
WIDE = MODEL | {"hidden_size": 72, "intermediate_size": 96}  # matrices wide enough to be sketched
SELECTION: dict[str, Any] = {"profile": "thorough", "pool_size": POOL, "batch_size": 3}

# Of each case the changes to a model's settings, and those of the selection.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "full": ({}, {}),
    "tied": ({"config": MODEL | {"tie_word_embeddings": True}}, {}),
    "lora": ({"lora": {"rank": 4}}, {}),
    "checkpointing": ({"gradient_checkpointing": True}, {}),
    "sketch": ({"config": WIDE}, {"scoring": "sketched"}),
    "gast": ({}, {"route": "gast", "gast": {"per_layer": 2}}),
    # A weight whose score is the threshold's but for rounding is on one side or the other: two refreshes have none.
    "mask": ({}, {"mask": "dual_sft", "dual_sft": {"density": 0.3, "refresh_steps": 25}}),
}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(4 * LONG_S)]


@pytest.mark.parametrize("case", CASES)
def test_any_number_of_ranks_makes_the_same_run(
    case: str,
    broker: str,
    topic: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    without_locks(Interaction, monkeypatch)
    publish_to_all(broker, topic, goods(STEPS * POOL))
    model = _on_disk(tmp_path, CASES[case][0])
    courses: dict[int, list[Step]] = {}
    weights = {}
    for size in (1, 2, 3):
        folder = tmp_path / str(size)
        folder.mkdir()
        config = configuration(
            folder,
            kafka(broker, topic, group_id=f"{topic}-{size}"),
            model=model,
            selection=SELECTION | CASES[case][1],
            optimizer={"learning_rate": 1e-3, "eps": EPS},
            checkpoint={"every_steps": 5},
            distributed={"mode": "replicated"},
        )
        _, steps = serve_on_ranks(config, size)
        assert all(_told(rank) == _told(steps[0]) for rank in steps)
        assert len(steps[0]) == STEPS
        assert sum(counts(config).values()) == STEPS * POOL
        courses[size] = steps[0]
        weights[size] = load_file(next(checkpoints(config)[-1].glob("**/*model.safetensors")))
    for size in (2, 3):
        off = _difference(courses[size], courses[1])
        moved = max(float((weights[size][name] - own).abs().max()) for name, own in weights[1].items())
        with capsys.disabled():
            print(f"\n{case}: {size} ranks, {STEPS} steps: coefficients off by {off:.1e}, weights by {moved:.1e}")
        assert off <= CLOSE
        assert moved <= CLOSE


def _on_disk(folder: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """A model that is read, for it to be the same everywhere; adapters are drawn."""
    path = folder / "model"
    config = changes.get("config", MODEL)
    model: Any = load_model(ModelSettings(config=config, tokenizer="bytes"), seed=5).model
    model.save_pretrained(path)
    return {**changes, "name": str(path), "config": None, "tokenizer": "bytes"}


def _told(steps: list[Step]) -> list[tuple[Any, ...]]:
    return [(step.ids, step.coefficients) for step in steps]


def _difference(ours: list[Step], alone: list[Step]) -> float:
    """The largest between the coefficients of two runs, which have chosen the same samples."""
    for own, wanted in zip(ours, alone, strict=True):
        assert (own.number, own.ids, own.selected) == (wanted.number, wanted.ids, wanted.selected)
    pairs = [
        pair
        for own, wanted in zip(ours, alone, strict=True)
        for pair in zip(own.coefficients, wanted.coefficients, strict=True)
    ]
    return max(abs(own - wanted) for own, wanted in pairs)

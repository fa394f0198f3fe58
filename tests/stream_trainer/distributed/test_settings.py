"""What several processes cannot do yet is refused in a line that names the setting."""

from pathlib import Path
from typing import Any

import pytest

from stream_trainer.distributed.group import joined, settings_of_rank
from stream_trainer.errors import SettingsError
from stream_trainer.settings.schema import Settings
from tests.helpers.service import configuration, jsonl
from tests.stream_trainer.distributed.test_cursor import Rank

REFUSED: list[dict[str, dict[str, Any]]] = [
    {"selection": {"draw": "learned", "learned": {"features": ["likeness", "tests.somewhere:features"]}}},
    {"selection": {"scoring": "rank_one"}},
    {"model": {"device": "cuda:1"}},
    {"ledger": {"enabled": True}},
    {"samples": {"duplicates": "id"}},
]


@pytest.mark.parametrize("sections", REFUSED, ids=lambda sections: next(iter(sections)))
def test_what_is_for_one_process_is_refused(sections: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    ((section, values),) = sections.items()
    config = configuration(tmp_path, jsonl(tmp_path / "s"), **sections)
    Settings(**config)
    name = list(values)[-1] if section == "selection" else next(iter(values))
    with pytest.raises(ValueError, match=rf"{section}\.{name}.*=.* is for one process only; "):
        Settings(**config, distributed={"mode": "replicated"})


ANCHORED = {"mask": "dual_sft", "dual_sft": {"anchor_path": "kept.jsonl"}}
IN_ROWS: list[tuple[str, dict[str, dict[str, Any]]]] = [
    ("selection.dual_sft.anchor_path=kept.jsonl", {"selection": ANCHORED}),
    ("optimizer.moments=int8", {"optimizer": {"moments": "int8"}}),
    ("target.watch=true", {"target": {"watch": True}}),
    ("model.lora.base=bfloat16", {"model": {"dtype": "bfloat16", "lora": {"base": "bfloat16"}}}),
]


@pytest.mark.parametrize(("said", "sections"), IN_ROWS)
def test_what_does_not_go_with_a_model_in_rows_is_refused(
    said: str, sections: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    config = configuration(tmp_path, jsonl(tmp_path / "s"), **sections)
    Settings(**config, distributed={"mode": "replicated"})
    with pytest.raises(ValueError, match=rf"{said} does not go with distributed.mode=fsdp2 yet; set it to "):
        Settings(**config, distributed={"mode": "fsdp2"})
    plain = configuration(tmp_path, jsonl(tmp_path / "s"), memory={"factors_gb": 0})
    assert Settings(**plain, distributed={"mode": "fsdp2"})


def test_several_processes_are_refused_unless_the_settings_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    settings = Settings(**configuration(tmp_path, jsonl(tmp_path / "s")))
    with pytest.raises(SettingsError, match=r"distributed.mode=none, but 2 processes"), joined(settings):
        pass


def test_restarts_by_torchrun_need_their_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "WORLD_SIZE": "2",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_MAX_RESTARTS": "3",
    }.items():
        monkeypatch.setenv(name, value)
    config = configuration(tmp_path, jsonl(tmp_path / "s"), distributed={"mode": "replicated"})
    with pytest.raises(SettingsError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"), joined(Settings(**config)):
        pass


def test_ranks_differ_in_what_only_one_may_do(tmp_path: Path) -> None:
    sections: dict[str, Any] = {
        "server": {"enabled": True, "port": 9500},
        "tracking": {"report_to": ["mlflow"]},
        "control": {"enabled": True, "token": "0123456789abcdef"},
    }
    config = configuration(tmp_path, jsonl(tmp_path / "s"), distributed={"mode": "replicated"}, **sections)
    first, second = (settings_of_rank(Settings(**config), Rank(rank, 2)) for rank in range(2))
    assert (first.server.port, second.server.port) == (9500, 9501)
    assert (first.dead_letters.path.name, second.dead_letters.path.name) == (
        "dead-letters.jsonl",
        "dead-letters.rank1.jsonl",
    )
    assert (first.control.enabled, second.control.enabled) == (True, False)
    assert (first.tracking.report_to, second.tracking.report_to) == (("mlflow",), ())
    assert (first.source.kafka.fencing, second.source.kafka.fencing) == ("auto", "off")


def test_one_process_is_as_ever_whatever_the_mode(tmp_path: Path) -> None:
    config = configuration(tmp_path, jsonl(tmp_path / "s"), distributed={"mode": "replicated"})
    with joined(Settings(**config)) as world:
        assert (world.rank, world.size) == (0, 1)

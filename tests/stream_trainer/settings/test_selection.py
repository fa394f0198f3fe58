"""Profiles and what overrides them, what does not go together, and settings that had another name once."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from stream_trainer.errors import SettingsError
from stream_trainer.settings.help import show
from stream_trainer.settings.loading import load_settings
from stream_trainer.settings.mistakes import RENAMED, fields
from stream_trainer.settings.schema import Settings
from stream_trainer.settings.sections.selection import PROFILES, SelectionSettings

ENOUGH = ["--source.kafka.topic=samples", "--model.name=model", "--target.path=target.jsonl"]
THRIFTY = {
    "draw": "learned",
    "weigh": "filter_then_weight",
    "scoring": "sketched",
    "pool_size": 6,
    "batch_size": 4,
    "waiting": 256,
    "intake": 128,
    "refresh_samples": 4,
}
RESOLVED = {
    "thrifty": THRIFTY,
    "auto": THRIFTY | {"draw": "auto", "pool_size": 8},
    "thorough": THRIFTY | {"draw": "all", "scoring": "exact", "pool_size": 16, "batch_size": 4, "refresh_samples": 8},
    "plain": THRIFTY | {"draw": "all", "weigh": "equal", "scoring": "exact", "batch_size": 4},
}


def load(*options: str) -> Settings:
    return load_settings(None, [*ENOUGH, *options])


def mistakes(path: Path | None, *options: str) -> list[str]:
    with pytest.raises(SettingsError) as raised:
        load_settings(path, [*ENOUGH, *options])
    return str(raised.value).splitlines()


def resolved(settings: Settings) -> dict[str, Any]:
    """What a profile sets, as it came out."""
    selection = settings.selection
    own = {name: getattr(selection, name) for name in ("draw", "weigh", "scoring", "pool_size", "batch_size")}
    room = {"waiting": selection.waiting, "intake": selection.intake}
    return own | room | {"refresh_samples": settings.target.refresh_samples}


# Profiles


def test_thrifty_is_what_runs_unless_told_otherwise() -> None:
    assert load().selection.profile == "thrifty"
    assert resolved(load()) == THRIFTY


@pytest.mark.parametrize("profile", PROFILES)
def test_each_profile_comes_to_its_values(profile: str) -> None:
    settings = load(f"--selection.profile={profile}")
    assert settings.selection.profile == profile
    assert resolved(settings) == RESOLVED[profile]


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize(
    ("option", "name", "value"),
    [
        ("--selection.draw=uniform", "draw", "uniform"),
        ("--selection.weigh=top_k", "weigh", "top_k"),
        ("--selection.scoring=rank_one", "scoring", "rank_one"),
        ("--selection.pool_size=9", "pool_size", 9),
        ("--selection.batch_size=2", "batch_size", 2),
        ("--selection.waiting=300", "waiting", 300),
        ("--target.refresh_samples=5", "refresh_samples", 5),
    ],
)
def test_a_single_setting_overrides_a_profile_and_no_other(profile: str, option: str, name: str, value: Any) -> None:
    assert resolved(load(f"--selection.profile={profile}", option)) == RESOLVED[profile] | {name: value}


def test_a_profile_may_be_given_in_another_place_than_what_overrides_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lower layer's single setting stands against a higher layer's profile: the profile replaces defaults only."""
    file = tmp_path / "s.yaml"
    file.write_text("selection: {pool_size: 12}\ntarget: {decay: 0.25}")
    monkeypatch.setenv("STREAM_TRAINER_SELECTION__PROFILE", "thorough")
    settings = load_settings(file, [*ENOUGH, "--selection.batch_size=6"])
    assert resolved(settings) == RESOLVED["thorough"] | {"pool_size": 12, "batch_size": 6}
    assert settings.target.decay == 0.25


def test_a_profile_counts_for_settings_made_in_code_too() -> None:
    assert SelectionSettings(profile="thorough").pool_size == 16
    given = {"source": {"kafka": {"topic": "t"}}, "model": {"name": "m"}, "target": {"path": "t"}}
    by_name = Settings(**given, selection={"profile": "thorough"})  # type: ignore[arg-type]
    assert resolved(by_name) == RESOLVED["thorough"]
    as_section = Settings(**given, selection=SelectionSettings(profile="thorough"))  # type: ignore[arg-type]
    assert resolved(as_section) == RESOLVED["thorough"]


@pytest.mark.parametrize("profile", PROFILES)
def test_show_prints_what_a_profile_came_to(profile: str, tmp_path: Path) -> None:
    settings = load(f"--selection.profile={profile}", "--selection.pool_size=9")
    shown = yaml.safe_load(show(settings))
    assert (shown["selection"]["profile"], shown["selection"]["pool_size"]) == (profile, 9)
    assert shown["selection"]["scoring"] == RESOLVED[profile]["scoring"]
    file = tmp_path / "shown.yaml"
    file.write_text(show(settings))
    assert load_settings(file, []) == settings


@pytest.mark.parametrize("value", ["thoruogh", "[thorough]", "null", "3"])
def test_a_profile_that_there_is_not_is_one_line(value: str, tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(f"selection: {{profile: {value}}}")
    (line,) = mistakes(file)
    assert "must be 'thrifty', 'auto', 'thorough' or 'plain'" in line
    assert line.startswith("selection.profile=")


# Other names


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
@pytest.mark.parametrize("layer", ["file", "environment", "command line"])
def test_an_old_name_fails_with_the_new_one(
    old: str, new: str, layer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, file = [], None
    if layer == "command line":
        options.append(f"--{old}=1")
    elif layer == "environment":
        monkeypatch.setenv("STREAM_TRAINER_" + old.upper().replace(".", "__"), "1")
    else:
        file, nested = tmp_path / "s.yaml", 1
        for part in reversed(old.split(".")):
            nested = {part: nested}  # type: ignore[assignment]
        file.write_text(yaml.safe_dump(nested))
    (line,) = mistakes(file, *options)
    assert line == f"setting {old} ({file or layer}) is now {new}; rename it"


def test_new_names_exist_and_old_ones_do_not() -> None:
    known = {name for name, _ in fields()}
    assert RENAMED.keys().isdisjoint(known)
    assert set(RENAMED.values()) <= known


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("uniform", "is now selection.draw=uniform with selection.weigh=equal"),
        ("full", "is now selection.weigh=equal"),
    ],
)
def test_a_weigh_that_was_a_draw_says_what_it_is_now(old: str, new: str) -> None:
    (line,) = mistakes(None, f"--selection.weigh={old}")
    assert f"weigh={old} {new}" in line
    assert ";" in line


# A selector of one's own


def test_a_selector_of_ones_own_has_a_path_and_options() -> None:
    selection = load("--selection.weigh=my_package.halves:Halves", "--selection.weigh_options.share=0.5").selection
    assert (selection.weigh, selection.weigh_options) == ("my_package.halves:Halves", {"share": 0.5})


@pytest.mark.parametrize("weigh", ["halves", "my-package:Halves", "package:", ":Halves", "a:b:c", "package.module:1"])
def test_what_is_neither_a_method_nor_a_path_is_one_line(weigh: str) -> None:
    (line,) = mistakes(None, f"--selection.weigh={weigh}")
    assert line.startswith("selection.weigh=")
    assert "filter_then_weight" in line


# What does not go together


@pytest.mark.parametrize(
    ("selection", "reason"),
    [
        ({"mask": "fixed"}, "mask=fixed needs mask_path"),
        ({"mask_path": "m.safetensors"}, "has no effect with mask=none"),
        ({"pool_size": 16, "intake": 4}, "intake=4 is less than the 16 samples that each step draws"),
        ({"draw": "nearest", "weigh": "equal", "intake": 2}, "intake=2 is less than the 4 samples"),
        ({"weigh": "equal"}, "draw=learned is taught by what probes weigh, and"),
        ({"learned": {"probe_every": 9, "max_probe_every": 8}}, "max_probe_every=8 is less than learned.probe_every=9"),
        ({"intake": 64, "waiting": 32}, "waiting=32 is less than"),
        ({"dual_sft": {"layer_quota": 0.7, "module_quota": 0.6}}, "add up to 1.3"),
        ({"batch_size": 9}, "batch_size=9 is more than pool_size=6"),
        ({"batch_size": 9, "draw": "uniform", "weigh": "equal"}, "batch_size=9 is more than pool_size=6"),
        ({"filter_then_weight": {"metric": "update"}}, "knows the metric p_norm only, not update"),
        ({"weigh_options": {"share": 0.5}}, "has no effect with weigh=filter_then_weight"),
    ],
)
def test_what_does_not_go_together_is_refused(selection: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        SelectionSettings(**selection)


@pytest.mark.parametrize(
    "selection",
    [
        {"weigh": "equal", "batch_size": 64, "draw": "all"},  # no pool is scored, so none has to hold the batch
        {"filter_then_weight": {"metric": "update"}, "weigh": "greedy"},
        {"filter_then_weight": {"metric": "update"}, "scoring": "exact"},
        {"intake": 2, "draw": "all"},
        {"weigh": "package.module:Class", "weigh_options": {"share": 0.5}},
    ],
)
def test_what_is_off_does_not_have_to_fit(selection: dict[str, Any]) -> None:
    SelectionSettings(**selection)


@pytest.mark.parametrize(
    ("selection", "drawn"),
    [
        ({}, 6),
        ({"draw": "nearest", "weigh": "equal"}, 4),
        ({"draw": "uniform"}, 4),
        ({"draw": "all"}, 6),
        ({"draw": "all", "weigh": "equal"}, 4),
        ({"profile": "thorough"}, 16),
        ({"profile": "plain"}, 4),
    ],
)
def test_no_more_is_drawn_than_is_used(selection: dict[str, Any], drawn: int) -> None:
    assert SelectionSettings(**selection).num_drawn == drawn


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--selection.waiting=600"], "selection.waiting=600"),
        (["--selection.draw=uniform", "--selection.pool_size=600"], "selection.pool_size=600"),
        (["--selection.profile=plain", "--selection.batch_size=600"], "selection.batch_size=600"),
    ],
)
def test_what_does_not_fit_the_buffer_is_refused(options: list[str], line: str) -> None:
    assert mistakes(None, *options) == [f"{line} does not fit buffer.max_records=512; raise buffer.max_records"]

"""The documents say what is true: links lead somewhere, snippets run, and names on a page are names in the code."""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradient_selectors
import pytest
import torch
import yaml
from gradient_selectors.examples import tiny_batch, tiny_model

import stream_trainer
from stream_trainer.monitoring.metrics import Metrics
from stream_trainer.samples.decoder import REASONS
from stream_trainer.settings.mistakes import fields
from stream_trainer.settings.schema import Settings

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
GENERATED = [DOCS / "reference" / name for name in ("settings.md", "metrics.md", "commands.md")]
BENCHMARKS = DOCS / "benchmarks.md"
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "selectors/README.md")),
    *sorted(DOCS.rglob("*.md")),
]
WRITTEN = [page for page in PAGES if page not in (*GENERATED, BENCHMARKS)]

MAX_README_WORDS = 600
MAX_SENTENCE_WORDS = 24


def page_id(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def prose(page: Path) -> str:
    """The text of a page without code, tables, pictures and the addresses of links."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    lines = [line for line in text.splitlines() if not line.startswith(("|", "    ", "!", "<!--", ":::"))]
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", "\n".join(lines))


# Generated pages


def run_generator(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(folder / "generate.py"), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_generated_pages_are_those_of_the_code_and_a_stale_one_is_named_and_mended(tmp_path: Path) -> None:
    shutil.copy(DOCS / "generate.py", tmp_path)
    shutil.copytree(DOCS / "reference", tmp_path / "reference")
    stale = tmp_path / "reference" / "metrics.md"
    stale.write_text("old")
    checked = run_generator(tmp_path, "--check")
    assert checked.returncode == 1
    assert checked.stderr.splitlines() == [f"{stale} is stale; run python docs/generate.py"]
    assert stale.read_text() == "old"
    assert run_generator(tmp_path).returncode == 0
    assert [
        page.name for page in GENERATED if (tmp_path / "reference" / page.name).read_text() != page.read_text()
    ] == []


def test_every_setting_is_in_the_reference() -> None:
    page = GENERATED[0].read_text()
    assert [name for name, _ in fields() if f"`{name}`" not in page] == []


def test_every_metric_is_in_the_reference() -> None:
    page = GENERATED[1].read_text()
    names = {
        sample.name
        for family in Metrics(REASONS, arms=1).registry.collect()
        if family.name.startswith("stream_trainer_") and family.type != "histogram"
        for sample in family.samples
    }
    assert len(names) > 20
    assert sorted(name for name in names if f"`{name}`" not in page) == []


def test_every_reason_of_a_dead_letter_is_explained() -> None:
    page = (DOCS / "how-to" / "mend-dead-letters.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", page, flags=re.MULTILINE) == list(REASONS)


@pytest.mark.parametrize("package", [gradient_selectors, stream_trainer], ids=lambda package: str(package.__name__))
def test_every_public_name_is_on_the_page_of_the_api(package: Any) -> None:
    documented = re.findall(r"^::: [\w.]+\.(\w+)$", (DOCS / "reference" / "api.md").read_text(), flags=re.MULTILINE)
    assert set(package.__all__) <= set(documented)


# Names


def known_names() -> set[str]:
    """Dotted names of settings and sections."""
    return {name for name, _ in fields()}


@pytest.mark.parametrize("page", WRITTEN, ids=page_id)
def test_settings_that_a_page_names_exist(page: Path) -> None:
    sections = "|".join(Settings.model_fields)
    text = page.read_text()
    named = set(re.findall(rf"`((?:{sections})\.[a-z_.]+?)(?:[:=` ])", text))
    named |= set(re.findall(rf"--((?:{sections})\.[a-z_.]+)=", text))
    files = (".jsonl", ".json", ".safetensors")
    assert {name for name in named if name not in known_names() and not name.endswith(files)} == set()


@pytest.mark.parametrize("page", WRITTEN, ids=page_id)
def test_variables_that_a_page_names_exist(page: Path) -> None:
    named = re.findall(r"STREAM_TRAINER_([A-Z_]+__[A-Z_]+)", page.read_text())
    assert {name.lower().replace("__", ".") for name in named} <= known_names()


@pytest.mark.parametrize("page", WRITTEN, ids=page_id)
def test_metrics_that_a_page_names_exist(page: Path) -> None:
    named = set(re.findall(r"`(stream_trainer_\w+)(?:\{[^`]*\})?`", page.read_text()))
    assert {name for name in named if f"`{name}`" not in GENERATED[1].read_text()} == set()


# Links


def slug(heading: str) -> str:
    """The anchor that both GitHub and mkdocs make of a heading."""
    return re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading.strip().lower()))


def anchors(page: Path) -> set[str]:
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)}


def links(page: Path) -> Iterator[str]:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith(("http:", "https:", "mailto:")):
            yield target


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page: Path) -> None:
    for target in links(page):
        name, _, anchor = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors(linked), target


def test_every_page_is_in_the_navigation() -> None:
    listed = re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE)
    assert sorted(listed) == sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


# Words


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) < MAX_README_WORDS


@pytest.mark.parametrize("page", WRITTEN, ids=page_id)
def test_sentences_are_short(page: Path) -> None:
    paragraphs = re.split(r"\n\s*\n|\n(?=[-#]|\d+\. )", prose(page))
    sentences = [s for paragraph in paragraphs for s in re.split(r"(?<=[.!?])\s+", paragraph)]
    assert [s for s in sentences if len(s.split()) > MAX_SENTENCE_WORDS] == []


# Snippets


def namespace() -> dict[str, Any]:
    """What the snippets take for granted: a model, its optimizer, and batches."""
    model = tiny_model()
    candidates = tiny_batch(8)
    return {
        "__name__": "snippet",
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3),
        "target_batches": [tiny_batch(seed=1)],
        "anchor_batches": [tiny_batch(seed=2)],
        "candidates": candidates,
        "loader": [candidates, tiny_batch(8, seed=3)],
        "dataset": [{name: values[0] for name, values in tiny_batch(1, seed=seed).items()} for seed in range(16)],
    }


def run_snippets(page: Path, snippets: list[str]) -> dict[str, Any]:
    """Run them one after the other, as a reader would."""
    names = namespace()
    for number, snippet in enumerate(snippets):
        exec(compile(snippet, f"{page.name}, snippet {number}", "exec"), names)
    return names


@pytest.mark.parametrize("name", ["README.md", "selectors/README.md"])
def test_the_snippet_of_a_readme_trains(name: str) -> None:
    snippets = blocks(ROOT / name, "python")
    names = run_snippets(ROOT / name, snippets)
    assert len(snippets) == 1
    assert names["engine"].last is not None
    assert any((p != q).any() for p, q in zip(names["model"].parameters(), tiny_model().parameters(), strict=True))


@pytest.mark.parametrize("name", ["select-in-your-loop.md", "keep-what-it-knows.md"])
def test_snippets_of_the_library_run(name: str) -> None:
    page = DOCS / "how-to" / name
    snippets = blocks(page, "python")
    names = run_snippets(page, snippets)
    assert isinstance(names["engine"], gradient_selectors.SelectionEngine)
    assert all(snippet.strip() for snippet in snippets)


@pytest.mark.filterwarnings("ignore:'pin_memory' argument")
def test_the_trainer_of_the_page_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = DOCS / "how-to" / "select-under-trainer.md"
    names = run_snippets(page, blocks(page, "python")[:1])
    assert names["trainer"].state.global_step > 0
    assert names["trainer"].engine.last.losses_N.shape == (16,)


def test_the_data_of_the_tutorial_are_as_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = DOCS / "tutorial.md"
    exec(compile(blocks(page, "python")[0], "make_data.py", "exec"), {"__name__": "make_data"})
    lines = (tmp_path / "stream.jsonl").read_text().splitlines()
    assert "\n".join(lines[:3]) in page.read_text()
    assert len(lines) == 10_000


@pytest.mark.parametrize("page", WRITTEN, ids=page_id)
def test_settings_on_a_page_are_accepted(page: Path) -> None:
    base = {
        "source": {"kind": "jsonl", "jsonl": {"path": "stream.jsonl"}},
        "model": {"name": "model"},
        "target": {"path": "target.jsonl"},
    }
    for block in blocks(page, "yaml"):
        Settings.model_validate(base | yaml.safe_load(block))

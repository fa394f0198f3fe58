"""Rules of the repository that no other tool enforces."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SERVICE = sorted((ROOT / "stream_trainer").rglob("*.py"))
LIBRARY = sorted((ROOT / "selectors" / "gradient_selectors").rglob("*.py"))

KAFKA = {
    "stream_trainer/commands/produce.py",
    "stream_trainer/ingest/dead_letters.py",
    "stream_trainer/sources/connection.py",
    "stream_trainer/sources/kafka.py",
}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imported(path: Path) -> Iterator[str]:
    """Dotted names of what a module imports, wherever the import stands."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def importers(package: str, paths: list[Path]) -> set[str]:
    return {
        path.relative_to(ROOT).as_posix()
        for path in paths
        if any(name == package or name.startswith(f"{package}.") for name in imported(path))
    }


@pytest.mark.parametrize("module", ["selectors", "asyncio", "subprocess"])
def test_the_folder_selectors_does_not_shadow_the_standard_module(module: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    code = f"import {module}, selectors; print(selectors.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    assert not Path(found.stdout.strip()).is_relative_to(ROOT)
    assert not (ROOT / "selectors" / "__init__.py").exists()


def test_only_the_modules_that_talk_to_brokers_import_kafka() -> None:
    assert importers("kafka", SERVICE + LIBRARY) <= KAFKA


def test_only_the_coefficient_solver_imports_cvxpy() -> None:
    assert importers("cvxpy", SERVICE + LIBRARY) <= {"selectors/gradient_selectors/weigh/coefficients.py"}


def test_only_metrics_makes_metrics() -> None:
    made = {"Counter", "Gauge", "Histogram", "Summary", "Info", "Enum"}
    makers = {
        path.name for path in SERVICE + LIBRARY if {f"prometheus_client.{name}" for name in made} & set(imported(path))
    }
    assert makers == {"metrics.py"}


def test_the_library_knows_nothing_of_the_service() -> None:
    assert importers("stream_trainer", LIBRARY) == set()
    for package in ("kafka", "prometheus_client", "pydantic", "http"):
        assert importers(package, LIBRARY) == set()


def test_nothing_is_pickled() -> None:
    for package in ("pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"):
        assert importers(package, SERVICE + LIBRARY) == set()
    for path in SERVICE + LIBRARY:
        called = {ast.unparse(node.func) for node in ast.walk(tree(path)) if isinstance(node, ast.Call)}
        assert not called & {"torch.load", "torch.save", "pd.read_pickle"}, path


@pytest.mark.parametrize("path", SERVICE + LIBRARY, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_modules_are_short_and_say_what_they_are(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 500
    assert ast.get_docstring(tree(path))
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 60, f"{path.name}: {node.name}"


def test_help_does_not_wait_for_heavy_modules() -> None:
    code = "import sys, stream_trainer.cli; print({'torch', 'transformers', 'kafka', 'pydantic'} & set(sys.modules))"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert found.stdout.strip() == "set()"

"""What the library offers at its front door: few names, each explained by an example that runs."""

import doctest
import importlib
import inspect
import pkgutil
import subprocess
import sys

import gradient_selectors
import pytest
import torch

MODULES = sorted(
    module.name for module in pkgutil.walk_packages(gradient_selectors.__path__, f"{gradient_selectors.__name__}.")
)
NAMES = gradient_selectors.__all__


def test_it_offers_about_twenty_names() -> None:
    assert 15 <= len(NAMES) <= 30
    assert list(NAMES) == sorted(set(NAMES))
    assert all(hasattr(gradient_selectors, name) for name in NAMES)


def test_it_offers_nothing_else() -> None:
    """But for its rooms and the modules beside them."""
    rooms = {name.split(".")[1] for name in MODULES}
    assert {name for name in dir(gradient_selectors) if not name.startswith("_")} - rooms == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_has_an_example(name: str) -> None:
    text = inspect.getdoc(getattr(gradient_selectors, name))
    assert text is not None
    assert ">>> " in text, f"show how {name} is used"


@pytest.mark.parametrize("name", [gradient_selectors.__name__, *MODULES])
def test_examples_run(name: str) -> None:
    """Those of every module, with torch at hand."""
    tests = doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(name), globs={"torch": torch})
    runner, reports = doctest.DocTestRunner(), list[str]()
    for test in tests:
        runner.run(test, out=reports.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(reports)


def test_it_needs_neither_the_service_nor_transformers() -> None:
    """Who selects in a loop of their own installs torch, numpy and cvxpy."""
    code = (
        "import sys, gradient_selectors as g; [getattr(g, name) for name in g.__all__]; "
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "gradient_selectors" in loaded
    assert not loaded & {"stream_trainer", "transformers", "peft", "pydantic", "kafka", "safetensors"}

"""What the allocator keeps, seen from outside: how much of a process is in memory after a large tensor is freed."""

import ctypes
import gc
import subprocess
import sys
import weakref
from collections.abc import Iterator

import pytest

from stream_trainer.monitoring.allocator import keep_freed_memory, loading_for_good

MEGABYTES = 256
FREE = f"""
import sys
import torch
from stream_trainer.monitoring.allocator import keep_freed_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

if sys.argv[1] == "keep":
    assert keep_freed_memory()
before = resident()
tensor = torch.zeros({MEGABYTES} * 2**18)
held = resident() - before
del tensor
print(held / 2**20, (resident() - before) / 2**20)
"""

needs_glibc = pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc"
)


@needs_glibc
@pytest.mark.parametrize("mode", ["keep", "default"])
def test_freed_memory_is_kept_once_told(mode: str) -> None:
    """In a process of its own: there is no way to take it back."""
    done = subprocess.run([sys.executable, "-c", FREE, mode], capture_output=True, text=True, check=True)
    held, left = map(float, done.stdout.split())
    assert held > 0.9 * MEGABYTES
    assert left > 0.9 * MEGABYTES if mode == "keep" else left < 0.1 * MEGABYTES


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not keep_freed_memory()


def test_other_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: object())
    assert not keep_freed_memory()


@pytest.fixture
def thawed() -> Iterator[None]:
    """The collector as it was, for the tests that follow."""
    yield
    gc.unfreeze()


class Node:
    """Refers to itself, so that only the collector can find out that nobody needs it."""

    def __init__(self) -> None:
        self.own = self


def test_what_is_loaded_for_good_is_never_looked_at(thawed: None) -> None:
    with loading_for_good():
        assert not gc.isenabled()
        loaded = weakref.ref(Node())
    assert gc.isenabled()
    made_later = weakref.ref(Node())
    gc.collect()
    assert loaded() is not None
    assert made_later() is None


def test_garbage_is_collected_again_if_loading_fails(thawed: None) -> None:
    with pytest.raises(ImportError), loading_for_good():
        raise ImportError
    assert gc.isenabled()

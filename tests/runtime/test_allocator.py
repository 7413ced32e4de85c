"""What malloc keeps for the next large tensor.

Bugs planted, each seen red: the threshold above which the system is asked left alone; the user's own variables ignored.
"""

import os
import subprocess
import sys

import pytest
import torch

from advgrpo.runtime import allocator

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")

FAULTS = """
import resource, sys
from advgrpo.runtime.allocator import keep_freed_memory
import torch
made = keep_freed_memory(torch.device("cpu")) if sys.argv[1] == "keep" else None
block = lambda: torch.ones(48 << 20, dtype=torch.uint8)  # above the 32 MiB that glibc keeps by itself
for _ in range(60 if made else 0):  # small objects take a part of the first holes
    block()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    block()
print(made, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(argument: str, **variables: str) -> tuple[str, int]:
    """What the settings said, and the page faults of eight blocks of 48 MiB."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, argument], env=kept | variables, capture_output=True, text=True, check=True
    )
    made, faults = done.stdout.split()
    return made, int(faults)


@pytest.mark.weekly
def test_freed_blocks_are_used_again():
    made, faults = run("keep")
    if made == "False":
        pytest.skip("glibc before 2.35, or another C library")
    _, without = run("leave")
    assert without > 8 * 48 * 256 * 0.9, "the system's pages of 4 KiB; larger ones make this test say nothing"
    assert faults < without / 20


def test_what_refuses_the_threshold_is_left_alone(monkeypatch):
    """The other two settings alone would have every block above 128 KiB asked from the system."""
    asked = []

    class Refusing:
        def mallopt(self, number: int, value: int) -> int:
            asked.append(number)
            return 0

    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: Refusing())
    monkeypatch.setattr(allocator.os, "environ", {})
    assert not allocator.keep_freed_memory(torch.device("cpu"))
    assert asked == [-3]
    assert not allocator.keep_freed_memory(torch.device("cuda"))
    assert asked == [-3]


@pytest.mark.parametrize(
    "variable",
    [
        pytest.param({"MALLOC_ARENA_MAX": "2"}, marks=pytest.mark.weekly),
        {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"},
    ],
)
def test_the_users_own_settings_stay(variable):
    assert run("keep", **variable)[0] == "False"

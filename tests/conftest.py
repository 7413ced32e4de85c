"""Settings every test needs before torch and triton are first used."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # two busy OpenMP processes on two cores otherwise spin (5x slower)
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # must be set before any kernel module is imported

import pytest


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poison_empty(monkeypatch):
    """Uninitialised memory reads as NaN, so a kernel that skips an element fails every time."""
    for name in ("empty", "empty_like"):
        real = getattr(torch, name)

        def guarded(*args, _real=real, **kwargs):
            out = _real(*args, **kwargs)
            plain = type(out) is torch.Tensor and out.is_floating_point() and not out.requires_grad
            return out.fill_(float("nan")) if plain and not torch.compiler.is_compiling() else out

        monkeypatch.setattr(torch, name, guarded)

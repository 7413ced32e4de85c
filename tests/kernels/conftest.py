"""Poison also what the root conftest does not reach: `Tensor.new_empty`, and integers."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _poison_new_empty(monkeypatch):
    real = torch.Tensor.new_empty

    def guarded(self, *args, **kwargs):
        out = real(self, *args, **kwargs)
        if type(out) is not torch.Tensor or torch.compiler.is_compiling():
            return out
        return out.fill_(float("nan") if out.is_floating_point() else -1)

    monkeypatch.setattr(torch.Tensor, "new_empty", guarded)

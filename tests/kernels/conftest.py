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


@pytest.fixture
def interpreted(monkeypatch, device) -> list[str]:
    """Names of the kernels that Triton's interpreter is asked for, none of which it then runs."""
    if device != "cpu":
        pytest.skip("counts what the interpreter would run")
    from triton.runtime.interpreter import GridExecutor

    names: list[str] = []
    monkeypatch.setattr(GridExecutor, "__call__", lambda self, *args, **kwargs: names.append(self.fn.__name__))
    return names

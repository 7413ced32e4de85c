"""A sweep proposes what is surely faster, and the kernels are launched as their table says.

Planted bugs that turned this file red: a proposal whose interval reaches below 1; the slower of two; the table read for
another GPU; `forced` that does not end; rows that reach the grid and not the kernel; a launch that is wrong, timed.
"""

import json

import pytest
import torch

from advgrpo_kernels import (
    _tuning,
    ada_layer_norm,
    ada_layer_norm_ref,
    gelu,
    gelu_ref,
    qk_rms_norm,
    qk_rms_norm_ref,
    swiglu,
    swiglu_ref,
)
from advgrpo_kernels._runtime import HAS_TRITON
from advgrpo_kernels._tuning import Launch, forced, launch_of
from bench import tune
from bench.agreement import Agreement
from bench.budget import Budget

OWN = Launch(2, 8)


def launched(kernel: str, rows: int, *gains: tuple[float, float]) -> dict:
    """An entry of a report: per case (gain, lower end)."""
    cases = {
        str(i): {"own_us": 10.0 * gain, "swept_us": 10.0, "over_own": {"ratio": gain, "low": low, "high": gain}}
        for i, (gain, low) in enumerate(gains)
    }
    return {"kernel": kernel, "rows": rows, "warps": 4, "cases": cases}


def test_the_fastest_launch_that_is_surely_faster_is_proposed():
    entries = [
        launched("gelu", 2, (1.10, 1.05)),
        launched("gelu", 4, (1.30, 0.99)),  # not sure
        launched("gelu", 8, (1.20, 1.10)),
        launched("qk_rms_norm", 32, (1.01, 1.005)),  # not worth it
        launched("residual_norm", 4, (1.50, 1.40), (0.95, 0.90)),  # slower in a case
    ]
    assert tune.proposals(entries) == {"gelu": {"rows": 8, "warps": 4}}


def test_the_table_is_read_by_the_gpus_name(monkeypatch):
    monkeypatch.setattr(_tuning, "TUNED", {"NVIDIA H200": {"gelu": Launch(8, 8)}})
    monkeypatch.setattr(_tuning, "_name", lambda index: ("NVIDIA H200", "NVIDIA L4")[index])

    class On:
        def __init__(self, device: str) -> None:
            self.device = torch.device(device)

    assert launch_of("gelu", On("cuda:0"), OWN) == Launch(8, 8)
    assert launch_of("qk_rms_norm", On("cuda:0"), OWN) == OWN
    assert launch_of("gelu", On("cuda:1"), OWN) == OWN
    assert launch_of("gelu", On("cpu"), OWN) == OWN
    with forced("gelu", Launch(1, 1)):
        assert launch_of("gelu", On("cpu"), OWN) == Launch(1, 1)
    assert launch_of("gelu", On("cpu"), OWN) == OWN


def test_what_is_committed_fits_the_kernels():
    for launches in _tuning.TUNED.values():
        assert set(launches) <= set(tune.CASES)
        assert all(
            launch.rows & (launch.rows - 1) == 0 and launch.warps in (1, 2, 4, 8, 16) for launch in launches.values()
        )


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
@pytest.mark.parametrize("kernel", sorted(tune.CASES))
def test_every_launch_of_the_sweep_gives_the_same_values(kernel, device):
    """5 tokens of 3 heads: no rows per program divide them."""
    x = torch.randn(2, 5, 24, device=device)
    shift, scale = torch.randn(2, 24, device=device), torch.randn(2, 24, device=device)
    qkv, weights = torch.randn(2, 5, 3, 3, 8, device=device), [torch.rand(8, device=device) for _ in range(2)]
    run, expected = {
        "residual_norm": (
            lambda: ada_layer_norm(x, shift, scale, backend="triton"),
            ada_layer_norm_ref(x, shift, scale),
        ),
        "gelu": (lambda: gelu(x, backend="triton"), gelu_ref(x)),
        "swiglu": (lambda: swiglu(x, backend="triton"), swiglu_ref(x)),
        "qk_rms_norm": (lambda: qk_rms_norm(qkv, weights, backend="triton"), qk_rms_norm_ref(qkv, weights)),
    }[kernel]
    for launch in tune.SWEEP[kernel]:
        with forced(kernel, launch):
            torch.testing.assert_close(run(), expected)


def test_a_launch_that_is_wrong_is_not_timed(monkeypatch, tmp_path):
    monkeypatch.setattr(tune, "SWEEP", {name: tune.SWEEP[name][:2] for name in tune.CASES})

    def agreement(name, build, bench):
        return Agreement(1.0 if name == "gelu" else 0.0, 0.0, 0.1)

    monkeypatch.setattr(tune, "agreement", agreement)
    report = tune.Sweep("cpu", 2, Budget(None), tmp_path / "tune.json").run()
    assert {entry["kernel"] for entry in report["launches"]} == {"residual_norm", "qk_rms_norm", "swiglu"}
    assert all("gelu: 1.0e+00 off float64" in why for name, why in report["failed"].items())
    assert json.loads((tmp_path / "tune.json").read_text()) == report


def test_a_report_is_adopted_into_the_table_and_none_of_a_cpu(monkeypatch):
    source = tune.TABLE.read_text()
    report = {"environment": {"gpu": "NVIDIA H200"}, "proposals": {"gelu": {"rows": 8, "warps": 4}}}
    for _ in range(2):  # what stands there is replaced
        source = tune.adopt(report, source)
        scope: dict = {}
        exec(compile(source, "adopted", "exec"), scope)
        assert scope["TUNED"] == {"NVIDIA H200": {"gelu": (8, 4)}}
    assert "def launch_of(" in source
    with pytest.raises(ValueError, match="of a CPU"):
        tune.adopt({"environment": {}, "proposals": {"gelu": {}}}, source)
    with pytest.raises(ValueError, match="proposes nothing"):
        tune.adopt({"environment": {"gpu": "NVIDIA H200"}, "proposals": {}}, source)

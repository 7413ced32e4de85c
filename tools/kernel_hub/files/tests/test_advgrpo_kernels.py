"""The kernel as its users load it. From this repository's root, with `kernels` and pytest installed:

LOCAL_KERNELS=@repo_id@=$PWD/build pytest tests
"""

import importlib.util
import json
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kernels

ROOT = Path(__file__).parents[1]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REPO, VERSION = "@repo_id@", int("@version@")
k = kernels.get_kernel(REPO, version=VERSION, trust_remote_code=[REPO])
pytestmark = pytest.mark.kernels_ci


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_the_ops_have_a_name_of_this_build():
    metadata = json.loads((Path(k.__file__).parent / "metadata.json").read_text())
    assert k.__name__ == metadata["id"]
    assert k._ops.add_op_namespace_prefix("gelu") == f"{metadata['id']}::gelu"
    assert callable(getattr(torch.ops, metadata["id"]).gelu)


@pytest.mark.parametrize("name", ["gelu", "swiglu", "ada_layer_norm", "gated_residual", "qk_rms_norm", "gaussian_step"])
def test_ops_agree_with_their_formulas(name):
    x, vectors = randn(2, 6, 32), randn(2, 128).chunk(4, dim=1)
    arguments = {
        "gelu": (x, randn(32)),
        "swiglu": (x,),
        "ada_layer_norm": (x, *vectors[:2]),
        "gated_residual": (x, randn(2, 6, 32), vectors[2]),
        "qk_rms_norm": (randn(2, 6, 3, 4, 8), [randn(8), randn(8)]),
        "gaussian_step": (x, randn(2, 6, 32), torch.tensor([0.9, -0.1, 0.3], device=DEVICE)),
    }[name]
    more = {"noise": randn(2, 6, 32)} if name == "gaussian_step" else {}
    got, expected = (getattr(k, f"{name}{suffix}")(*arguments, **more) for suffix in ("", "_ref"))
    pairs = zip(got, expected) if isinstance(got, tuple) else [(got, expected)]
    for ours, theirs in pairs:
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


class Modulated(nn.Module):
    """An adaptive norm as diffusers' AdaLayerNormContinuous."""

    def __init__(self) -> None:
        super().__init__()
        self.silu, self.linear = nn.SiLU(), nn.Linear(16, 64)
        self.norm = nn.LayerNorm(32, eps=1e-6, elementwise_affine=False)

    def forward(self, x: torch.Tensor, conditioning_embedding: torch.Tensor) -> torch.Tensor:
        scale, shift = self.linear(self.silu(conditioning_embedding)).chunk(2, dim=1)
        return self.norm(x) * (1 + scale)[:, None, :] + shift[:, None, :]


class TanhGelu(nn.Module):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.gelu(input, approximate="tanh")


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    ("cls", "layer", "shapes"),
    [(Modulated, "AdaLayerNormContinuous", [(2, 6, 32), (2, 16)]), (TanhGelu, "GeluTanh", [(2, 6, 32)])],
    ids=["AdaLayerNormContinuous", "GeluTanh"],
)
def test_kernelized_layers_agree_with_torch(cls, layer, shapes, compiled):
    inputs = [randn(*shape).requires_grad_(index == 0) for index, shape in enumerate(shapes)]
    module = cls().to(DEVICE).requires_grad_(False)
    expected = module(*inputs)
    (expected_grad,) = torch.autograd.grad(expected.square().sum(), inputs[0])
    kernels.replace_kernel_forward_from_hub(cls, layer)
    repository = kernels.LocalLayerRepository(ROOT / "build", layer_name=layer)
    mode = kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE
    with kernels.use_kernel_mapping({layer: {DEVICE: repository}}, inherit_mapping=False):
        kernels.kernelize(module, mode=mode, device=DEVICE, use_fallback=False)
    assert isinstance(module.forward, types.MethodType)
    assert module.forward.__func__ is getattr(k.layers, layer).forward
    run = torch.compile(module, backend="aot_eager", fullgraph=True) if compiled else module
    got = run(*inputs)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    (grad,) = torch.autograd.grad(got.square().sum(), inputs[0])
    torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-5)


def benchmarks() -> type:
    spec = importlib.util.spec_from_file_location("benchmark_module", ROOT / "benchmarks/benchmark.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.AdvgrpoKernelsBenchmark


@pytest.mark.parametrize("workload", sorted(n[10:] for n in dir(benchmarks()) if n.startswith("benchmark_")))
def test_benchmarks_verify(workload):
    """As `kernels benchmark` does it."""
    benchmark = benchmarks()()
    benchmark.kernel, benchmark.device = k, DEVICE
    getattr(benchmark, f"setup_{workload}")()
    getattr(benchmark, f"benchmark_{workload}")()
    assert torch.allclose(benchmark.out, getattr(benchmark, f"verify_{workload}")(), atol=1e-2)


def test_two_builds_in_one_process_do_not_share_ops(tmp_path):
    """A copy of this build under another name: loading it leaves the first one's ops as they were."""
    first = getattr(torch.ops, k.__name__).gelu.default
    source = Path(k.__file__).parent
    other = tmp_path / "build" / source.name
    for path in source.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            target = other / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(path.read_text().replace(k.__name__, f"{k.__name__}_other"))
    second = kernels.get_local_kernel(tmp_path)
    assert second.__name__ == f"{k.__name__}_other"
    assert getattr(torch.ops, second.__name__).gelu.default is not first
    assert getattr(torch.ops, k.__name__).gelu.default is first
    x = randn(3, 8)
    assert torch.equal(second.gelu(x), k.gelu(x))

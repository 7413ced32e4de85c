"""The repository of the kernel hub that tools/kernel_hub writes, loaded as the package `kernels` loads it: by its path
and the id in its metadata. With that package itself, `make kernel-hub` runs the repository's own tests.

Planted bugs that turned this file red: one name for all builds; the package's name in a build; a literal namespace in
an op; an import by the package's name; integrations or `_ops.py` among the sources; a function missing from the card, a
blank left in it; a folder that is not empty written over; shift and scale swapped, the second norm left out, a
constructor, a print and an unchecked `approximate` in a layer.
"""

import ast
import importlib.util
import inspect
import json
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import advgrpo_kernels
from advgrpo_kernels import layers
from tools.kernel_hub.__main__ import BACKENDS, PACKAGE, generate, sources

CALLS = {
    "gelu": ((2, 40),),
    "swiglu": ((2, 40),),
    "ada_layer_norm": ((2, 3, 40), (2, 40), (2, 40)),
    "gated_residual": ((2, 3, 40), (2, 3, 40), (2, 40)),
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "advgrpo-kernels"
    generate(folder)
    return folder


def load(folder: Path, backend: str = "cpu") -> types.ModuleType:
    variant = folder / "build" / f"torch-{backend}"
    identifier = json.loads((variant / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(identifier, variant / "__init__.py")
    sys.modules[identifier] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def kernel(hub):
    return load(hub)


def registered(namespace: str) -> set[str]:
    """Names of all ops under `torch.ops.<namespace>`."""
    names = (schema.name for schema in torch._C._jit_get_all_schemas())
    return {name.split("::")[1] for name in names if name.startswith(f"{namespace}::")}


def test_every_op_is_registered_in_the_build_s_own_namespace(kernel):
    ours = registered("advgrpo_kernels")
    assert len(ours) > 20
    assert registered(kernel.__name__) == ours
    assert kernel.__name__.startswith("_advgrpo_kernels_cpu_")
    assert kernel.__all__ == advgrpo_kernels.__all__
    assert all(hasattr(kernel, name) for name in kernel.__all__)


@pytest.mark.weekly
def test_nothing_is_imported_by_the_name_of_the_package(hub):
    """In a process that cannot import advgrpo_kernels, nor anything but torch and triton."""
    code = (
        "import json, sys, importlib.util as util\n"
        "class Blocked:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('advgrpo_kernels', 'advgrpo', 'diffusers', 'transformers'):\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Blocked())\n"
        f"folder = {str(hub / 'build/torch-cpu')!r}\n"
        "name = json.load(open(folder + '/metadata.json'))['id']\n"
        "spec = util.spec_from_file_location(name, folder + '/__init__.py')\n"
        "sys.modules[name] = k = util.module_from_spec(spec)\n"
        "spec.loader.exec_module(k)\n"
        "import torch\n"
        "x = torch.randn(2, 3, 4)\n"
        "step = k.gaussian_step(x, x, torch.tensor([0.9, -0.1, 0.3]), seed=1)\n"
        "print(step.log_prob.shape[0], torch.cuda.is_initialized())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env={"PATH": ""}, cwd=hub, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "2 False\n"


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", CALLS)
def test_ops_give_the_bits_of_the_package(kernel, name, backend, device):
    inputs = [torch.randn(shape, device=device) for shape in CALLS[name]]
    results = []
    for module in (kernel, advgrpo_kernels):
        x = inputs[0].clone().requires_grad_()
        y = getattr(module, name)(x, *inputs[1:], backend=backend)
        results.append((y.detach(), *torch.autograd.grad(y.square().sum(), x)))
    for got, expected in zip(*results):
        assert torch.equal(got, expected)


def test_two_versions_in_one_process_keep_their_own_kernels(kernel, tmp_path, device):
    """Another version, whose GELU has another slope: each has its own result, before and after the other is loaded."""
    x = torch.randn(3, 40, device=device)
    expected = F.gelu(x, approximate="tanh")
    torch.testing.assert_close(kernel.gelu(x, backend="triton"), expected)

    package = tmp_path / "advgrpo_kernels"
    for name, content in sources(PACKAGE).items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    source = (package / "ops/gelu.py").read_text()
    assert source.count("(u * _sigmoid_of_2z(u))") == 1
    (package / "ops/gelu.py").write_text(source.replace("(u * _sigmoid_of_2z(u))", "(3 * u * _sigmoid_of_2z(u))"))
    generate(tmp_path / "hub", package=package)
    other = load(tmp_path / "hub")

    assert other.__name__ != kernel.__name__
    torch.testing.assert_close(other.gelu(x, backend="triton"), 3 * expected)
    torch.testing.assert_close(kernel.gelu(x, backend="triton"), expected)
    torch.testing.assert_close(advgrpo_kernels.gelu(x, backend="triton"), expected)


def test_the_same_sources_give_the_same_build_and_others_another(hub, tmp_path):
    again = generate(tmp_path / "again", repo_id="someone/kernels")
    assert {path.name for path in (hub / "build").iterdir()} == {f"torch-{backend}" for backend in BACKENDS}
    for backend in BACKENDS:
        metadata = json.loads((hub / f"build/torch-{backend}/metadata.json").read_text())
        assert metadata["id"] == again[backend]
        assert metadata["backend"] == {"type": backend}
    with pytest.raises(FileExistsError, match="not empty"):
        generate(tmp_path / "again")


def test_a_source_that_imports_the_package_by_name_is_refused(tmp_path):
    package = tmp_path / "advgrpo_kernels"
    package.mkdir()
    (package / "__init__.py").write_text("__all__ = []\n\n\ndef f():\n    from advgrpo_kernels import gelu\n")
    with pytest.raises(ValueError, match=r"__init__.py:5 imports advgrpo_kernels by name"):
        generate(tmp_path / "hub", package=package)


def test_what_is_built_from_is_the_package_without_its_integrations(hub):
    """Nor with `_ops.py`, which the builder writes."""
    files = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")}
    left = {name for name in files if not name.startswith("integrations/")} - {"patch.py", "_ops.py"}
    package = hub / "torch-ext/advgrpo_kernels"
    assert {path.relative_to(package).as_posix() for path in package.rglob("*") if path.is_file()} == left
    assert "ops/gelu.py" in left
    assert "layers.py" in left


def test_every_registration_is_one_that_the_builder_accepts(hub):
    """The builder reads the decorators: each must call add_op_namespace_prefix where it stands."""
    found = 0
    for path in sorted((hub / "torch-ext").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.library.custom_op":
                assert ast.unparse(node.args[0]).startswith("add_op_namespace_prefix("), f"{path}:{node.lineno}"
                found += 1
    assert found > 20


def test_the_card_lists_what_is_there_and_has_no_blanks(hub, kernel):
    text = (hub / "README.md").read_text()
    assert text == (hub / "CARD.md").read_text()
    rows = set(re.findall(r"^\| `(\w+)` \| \S", text, re.MULTILINE))
    functions = {n for n in kernel.__all__ if n.islower() and not n.endswith("_ref")} - {"layers"}
    assert rows == functions | set(layers.__all__)
    for needed in ("python >=3.10", "torch >=2.6,<2.14", "triton >=3.2,<3.10"):
        assert needed in text
    for path in hub.rglob("*"):
        if path.suffix in (".py", ".md", ".toml", ".nix"):
            assert not re.search(r"@[a-z_]+@", path.read_text()), path
    for example in text.split("```python\n")[1:]:
        compile(example.split("```")[0], "README.md", "exec")


# Layers: the module that each stands for is diffusers' or transformers' own.


def adopted(module: nn.Module, layer: type[nn.Module]) -> nn.Module:
    """`module` with the forward of `layer`, as kernelize does it."""
    module.forward = types.MethodType(layer.forward, module)
    return module


def stock(name: str) -> tuple[nn.Module, list[torch.Tensor]]:
    """A module of the class that a layer stands for, and inputs of it."""
    x, emb = torch.randn(2, 5, 32), torch.randn(2, 32)
    if name in ("GeluTanh", "NewGELU"):
        activations = pytest.importorskip("transformers.activations")
        return {"GeluTanh": activations.GELUTanh, "NewGELU": activations.NewGELUActivation}[name](), [x]
    if name == "GELU":
        return pytest.importorskip("diffusers.models.activations").GELU(32, 48, approximate="tanh"), [x]
    if name == "Flux2SwiGLU":
        return pytest.importorskip("diffusers.models.transformers.transformer_flux2").Flux2SwiGLU(), [x]
    norms = pytest.importorskip("diffusers.models.normalization")
    if name == "AdaLayerNormContinuous":
        return norms.AdaLayerNormContinuous(32, 32, elementwise_affine=False, eps=1e-6), [x, emb]
    if name == "AdaLayerNormZero":
        return norms.AdaLayerNormZero(32), [x, None, None, None, emb]
    return norms.SD35AdaLayerNormZeroX(32), [x, emb]


@pytest.fixture(params=["torch", "triton"])
def auto(request, monkeypatch):
    """What "auto" means in a layer."""
    monkeypatch.setattr("advgrpo_kernels._runtime.DEFAULT_BACKEND", request.param)
    return request.param


@pytest.mark.parametrize("name", layers.__all__)
def test_layers_equal_the_module_they_stand_for(name, auto, device):
    """Outputs and the gradient of the first input, in float32, with the module's own weights frozen."""
    module, inputs = stock(name)
    module = module.to(device).requires_grad_(False)
    inputs = [tensor if tensor is None else tensor.to(device) for tensor in inputs]
    results = []
    for fused in (False, True):
        x = inputs[0].clone().requires_grad_()
        out = (adopted(module, getattr(layers, name)) if fused else module)(x, *inputs[1:])
        outs = out if isinstance(out, tuple) else (out,)
        loss = sum((index + 1) * y.square().sum() for index, y in enumerate(outs))
        results.append((*outs, *torch.autograd.grad(loss, x)))
    assert len(results[0]) == len(results[1])
    for got, expected in zip(results[1], results[0]):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def parameters(cls: type) -> list[tuple]:
    return [(p.name, p.kind, p.default) for p in inspect.signature(cls.forward).parameters.values()]


@pytest.mark.parametrize("name", layers.__all__)
def test_layers_have_no_state_and_the_signature_of_their_module(name):
    """What `kernels` demands before it lets a layer in."""
    layer, (module, _) = getattr(layers, name), stock(name)
    assert layer.__init__ is nn.Module.__init__
    own = set(dir(layer)) - set(dir(nn.Module))
    assert own <= {"can_torch_compile", "has_backward"}
    ours, theirs = (parameters(cls) for cls in (layer, type(module)))
    assert ours == theirs
    assert layer.can_torch_compile


def test_the_modulation_s_own_weights_get_gradients(auto, device):
    """They are no activations: the norm takes PyTorch's way then, and none is left out."""
    module, inputs = stock("AdaLayerNormContinuous")
    module, inputs = module.to(device), [tensor.to(device) for tensor in inputs]
    (expected,) = torch.autograd.grad(module(*inputs).square().sum(), module.linear.weight)
    (got,) = torch.autograd.grad(
        adopted(module, layers.AdaLayerNormContinuous)(*inputs).square().sum(), module.linear.weight
    )
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", layers.__all__)
def test_layers_compile_without_graph_breaks(name, auto, device):
    module, inputs = stock(name)
    module = adopted(module.to(device).requires_grad_(False), getattr(layers, name))
    inputs = [tensor if tensor is None else tensor.to(device) for tensor in inputs]
    got = torch.compile(module, backend="aot_eager", fullgraph=True)(*inputs)
    torch.testing.assert_close(got, module(*inputs))


def test_a_layer_refuses_a_module_that_is_built_otherwise():
    norms = pytest.importorskip("diffusers.models.normalization")
    x, emb = torch.randn(2, 5, 32), torch.randn(2, 32)
    for options in ({"elementwise_affine": True}, {"norm_type": "rms_norm", "elementwise_affine": False}):
        module = adopted(norms.AdaLayerNormContinuous(32, 32, **options), layers.AdaLayerNormContinuous)
        with pytest.raises(ValueError, match="norm must be a LayerNorm without affine parameters"):
            module(x, emb)
    exact = pytest.importorskip("diffusers.models.activations").GELU(32, 48)
    with pytest.raises(ValueError, match=r"approximate must be \"tanh\", .* got 'none'"):
        adopted(exact, layers.GELU)(x)
    gated = pytest.importorskip("diffusers.models.transformers.transformer_flux2").Flux2SwiGLU()
    gated.gate_fn = nn.GELU()
    with pytest.raises(ValueError, match=r"gate_fn must be a SiLU, .* got GELU"):
        adopted(gated, layers.Flux2SwiGLU)(x)

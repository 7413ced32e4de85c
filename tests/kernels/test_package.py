"""The distribution `advgrpo-kernels` on its own: what importing it does, and the wheel of `pip install ./kernels`.

Planted bugs that turned this file red: `import numpy` in an op; `import advgrpo` in the runtime;
`list[torch.Tensor]` in an op's signature; no readme, license-files or urls in kernels/pyproject.toml, each on its
own; ops left out of its packages; no upper bound of torch; no py.typed; another year in the copy of the license;
a parameter of a public function without a type.
"""

import ast
import email
import inspect
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import advgrpo_kernels

KERNELS = Path(advgrpo_kernels.__file__).parents[1]
ALLOWED = {"advgrpo_kernels", "torch", "triton"}


def test_import_is_lean():
    """No CUDA context, nothing heavy, no kernel compiled."""
    code = (
        "import sys, torch, advgrpo_kernels\n"
        "heavy = ('transformers', 'diffusers', 'accelerate', 'peft', 'kernels', 'einops', 'advgrpo')\n"
        "assert not [name for name in heavy if name in sys.modules]\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    environment = {"PYTHONPATH": str(KERNELS), "PATH": ""}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


@pytest.mark.parametrize("source", sorted(KERNELS.rglob("advgrpo_kernels/**/*.py")), ids=lambda path: path.stem)
def test_the_package_needs_torch_and_triton_only(source):
    """Absolute imports anywhere in a file, also inside functions; the integrations reach their peers by name only."""
    nodes = list(ast.walk(ast.parse(source.read_text())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 0]
    roots = {name.split(".")[0] for name in names}
    # Peers that hold rewards in numpy arrays bring numpy themselves.
    allowed = ALLOWED | ({"numpy"} if source.parent.name == "integrations" else set())
    assert roots - allowed - set(sys.stdlib_module_names) == set()


@pytest.mark.parametrize("source", sorted((KERNELS / "advgrpo_kernels/ops").glob("*.py")), ids=lambda path: path.stem)
def test_op_signatures_are_of_types_that_torch_2_6_reads(source):
    """There `infer_schema` knows typing.List and refuses list[...], at import, so nothing at all would work."""
    functions = [node for node in ast.walk(ast.parse(source.read_text())) if isinstance(node, ast.FunctionDef)]
    ops = [f for f in functions if any("custom_op" in ast.unparse(decorator) for decorator in f.decorator_list)]
    annotations = [a.annotation for f in ops for a in f.args.args] + [f.returns for f in ops]
    assert [text for text in map(ast.unparse, annotations) if re.search(r"\blist\[", text)] == []


def test_every_public_name_exists():
    missing = [name for name in advgrpo_kernels.__all__ if not hasattr(advgrpo_kernels, name)]
    assert missing == []
    assert list(advgrpo_kernels.__all__) == sorted(advgrpo_kernels.__all__)


def test_every_public_signature_is_typed():
    """Without a type a checker takes anything for it, so `make types` would be content with no types at all."""
    public = [getattr(advgrpo_kernels, name) for name in advgrpo_kernels.__all__]
    public += [getattr(advgrpo_kernels.layers, name).forward for name in advgrpo_kernels.layers.__all__]
    untyped = [
        f"{function.__qualname__}: {name}"
        for function in public
        if inspect.isfunction(function)
        for name in (*inspect.signature(function).parameters, "return")
        if name != "self" and name not in function.__annotations__
    ]
    assert untyped == []


def test_the_reference_runs_without_triton():
    """Where triton is not installed (macOS, Windows) the same calls take the PyTorch reference."""
    code = (
        "import sys, importlib.util as util\n"
        "find = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name == 'triton' else find(name, *rest)\n"
        "sys.modules['triton'] = None\n"
        "import torch, advgrpo_kernels as k\n"
        "x = torch.randn(2, 3, 4)\n"
        "taken = k.gaussian_step(x, x, torch.tensor([0.9, -0.1, 0.3]), seed=1)\n"
        "assert taken.log_prob.shape == (2,)\n"
        "try:\n"
        "    k.gaussian_step(x, x, torch.tensor([0.9, -0.1, 0.3]), seed=1, backend='triton')\n"
        "except RuntimeError as error:\n"
        "    assert 'needs triton' in str(error)\n"
        "else:\n"
        "    raise AssertionError('an explicit backend fell back')\n"
    )
    environment = {"PYTHONPATH": str(KERNELS), "PATH": ""}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """What `pip wheel ./kernels` gives, built without isolation (no network)."""
    folder = tmp_path_factory.mktemp("wheel")
    # A build in place would leave its folders behind, and put what an earlier one left into the wheel.
    ignore = shutil.ignore_patterns("build", "*.egg-info", "__pycache__")
    source = shutil.copytree(KERNELS, folder / "source", ignore=ignore)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    built = subprocess.run([*command, "--wheel-dir", folder, source], capture_output=True, text=True)
    if "setuptools" in built.stderr and built.returncode:
        pytest.skip(f"the installed setuptools cannot build it: {built.stderr[-200:]}")
    assert built.returncode == 0, built.stderr
    (path,) = folder.glob("advgrpo_kernels-*.whl")
    return zipfile.ZipFile(path)


def test_the_license_of_the_kernels_is_the_project_s():
    if (KERNELS.parent / "LICENSE").exists():
        assert (KERNELS / "LICENSE").read_bytes() == (KERNELS.parent / "LICENSE").read_bytes()


@pytest.mark.slow
def test_what_the_wheel_holds_and_says(wheel):
    """The package and nothing else; license, long description, links and what it needs, for a page on an index."""
    (info,) = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    held = {name for name in wheel.namelist() if not name.startswith(info)}
    package = KERNELS / "advgrpo_kernels"
    sources = {str(path.relative_to(KERNELS)) for path in package.rglob("*.py")}
    compiled_later = {str(path.relative_to(KERNELS)) for path in (package / "cpu").iterdir()}
    assert held == sources | compiled_later | {"advgrpo_kernels/py.typed"}
    assert wheel.read(f"{info}/licenses/LICENSE") == (KERNELS / "LICENSE").read_bytes()
    metadata = email.message_from_bytes(wheel.read(f"{info}/METADATA"))
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload(decode=True).decode().strip() == (KERNELS / "README.md").read_text().strip()
    links = dict(line.split(", ") for line in metadata.get_all("Project-URL"))
    assert links["Paper"] == "https://arxiv.org/abs/2511.20256"
    needs = {Requirement(line).name: Requirement(line) for line in metadata.get_all("Requires-Dist")}
    assert needs.keys() == {"torch", "triton"}
    assert needs["torch"].specifier == SpecifierSet(">=2.6,<2.14")
    assert needs["triton"].specifier == SpecifierSet(">=3.2,<3.10")


@pytest.mark.slow
@pytest.mark.weekly
def test_the_wheel_works_outside_the_repository(wheel, tmp_path):
    """Unpacked, and run from another folder."""
    wheel.extractall(tmp_path / "site")
    code = (
        "import torch, advgrpo_kernels as k\n"
        "x = torch.randn(2, 3, 4)\n"
        "taken = k.gaussian_step(x, x, torch.tensor([0.9, -0.1, 0.3]), seed=1)\n"
        "step = (x, x.clone().requires_grad_(), taken.next_latents, torch.tensor([0.9, -0.1, 0.3]))\n"
        "k.clipped_policy_loss(*step, taken.log_prob, torch.ones(2), clip_range=1e-4).loss.backward()\n"
        "print(k.__file__)\n"
    )
    environment = {"PYTHONPATH": str(tmp_path / "site"), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path))

"""What installs, imports and shadows what: facts of packaging that break a user's environment, not a test run.

Planted bugs that turned this file red: advgrpo_kernels importing advgrpo, advgrpo importing bench inside a function,
a wheel without advgrpo_kernels.ops, numpy imported by the integrations, an empty kernels/__init__.py (2 tests), another
lower bound of torch than the matrix tests.
"""

import ast
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
FORBIDDEN = {
    "kernels/advgrpo_kernels": {"advgrpo", "bench", "tests", "tools", "kernels"},
    "advgrpo": {"bench", "tests", "tools", "kernels"},
    "bench": {"tests", "tools", "kernels"},
}
IMPORT_EVERYTHING = """
import transformers, diffusers, peft
from transformers import CLIPModel, CLIPTextModelWithProjection, Dinov2Model, T5EncoderModel
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from peft import LoraConfig
import advgrpo_kernels
import importlib.util
spec = importlib.util.find_spec("kernels")
print("kernels at", spec and (spec.origin or list(spec.submodule_search_locations)))
"""
SMOKE_TEST = """
import sys, torch
import advgrpo_kernels as k
assert not torch.cuda.is_initialized()
heavy = {"numpy", "diffusers", "transformers", "peft", "accelerate", "advgrpo", "kernels"} & set(sys.modules)
assert not heavy, heavy
table = k.transition_coefficients([1.0, 0.7, 0.4, 0.0], dynamics="flow_cps", noise_level=0.8)
x, v = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3, requires_grad=True)
taken = k.gaussian_step(x, v.detach(), table[0], seed=1, likelihood="squared_error")
rows = k.group_advantages(torch.tensor([1.0, 3.0]), torch.tensor([7, 7])).advantages
loss = k.clipped_policy_loss(
    x, v, taken.next_latents, table[0], taken.log_prob, rows, clip_range=1e-5, likelihood="squared_error"
)
loss.loss.backward()
assert torch.equal(loss.ratio, torch.ones(2)), loss.ratio
from advgrpo_kernels.integrations import adv_grpo, dance_grpo, flow_factory, flow_grpo, miles_diffusion, mix_grpo
from advgrpo_kernels.integrations import unirl, verl_omni
import advgrpo_kernels.patch
from advgrpo_kernels.testing import assert_within_budget
print(k.__file__)
"""


def imports(source: Path):
    """(line, root of the imported module) of every absolute import in a file, also inside functions."""
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.lineno, node.module.split(".")[0]


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_imports_point_one_way(folder):
    """advgrpo -> advgrpo_kernels -> torch, triton; bench and tests import both and are imported by none."""
    sources = sorted((ROOT / folder).rglob("*.py"))
    assert sources
    own_tests = [source for source in sources if source.name.startswith("test_")]
    wrong = [
        f"{source.relative_to(ROOT)}:{line} imports {name}"
        for source in sources
        for line, name in imports(source)
        if name in FORBIDDEN[folder]
    ]
    assert wrong == []
    assert folder == "bench" or own_tests == []


def test_the_folder_kernels_is_no_package():
    """With an __init__.py it would shadow the PyPI package `kernels` for everything that runs from the root."""
    assert not (ROOT / "kernels/__init__.py").exists()


def test_the_readme_of_the_kernels_covers_every_op_and_its_examples_are_python():
    import advgrpo_kernels

    text = (ROOT / "kernels/README.md").read_text()
    table = "".join(line.split(" | ")[0] for line in text.splitlines() if line.startswith("| `"))
    ops = {name for name in advgrpo_kernels.__all__ if name.islower() and not name.endswith("_ref")} - {"layers"}
    assert [op for op in sorted(ops) if f"`{op}`" not in table] == []
    examples = text.split("```python\n")[1:]
    assert len(examples) == 4  # use, patch, diffusers, check
    for example in examples:
        compile(example.split("```")[0], "kernels/README.md", "exec")


def test_the_matrix_of_the_kernels_begins_at_what_they_allow():
    """The first lane has the lowest torch and triton, every lane lies within the bounds."""
    lanes = re.search(r"^MATRIX \?= (.+?)\n\n", (ROOT / "Makefile").read_text(), re.DOTALL | re.MULTILINE)[1]
    lanes = lanes.replace("\\\n", " ").split()
    project = [line.strip().rstrip(",") for line in (ROOT / "kernels/pyproject.toml").read_text().splitlines()]
    bounds = [Requirement(line[1:-1]) for line in project if line[1:].startswith(("torch>", "triton>"))]
    for lane in lanes:
        for version, needs in zip(lane.split(":")[1:3], bounds, strict=True):
            assert version in needs.specifier, (lane, str(needs))
    lowest = [next(s.version for s in needs.specifier if s.operator == ">=") for needs in bounds]
    assert [f"{version}.0" for version in lowest] == lanes[0].split(":")[1:3]


def test_the_readme_of_the_kernels_names_the_commits_that_are_tested():
    """A row per peer of the launcher, with the repository and commit of tests/peers/commits.json."""
    from advgrpo_kernels.integrations import _launcher
    from tests.peers import checkouts

    rows = {
        line.split("`")[1]: line for line in (ROOT / "kernels/README.md").read_text().splitlines() if "/tree/" in line
    }
    assert set(rows) == set(_launcher.PEERS)
    for peer, row in rows.items():
        entry = checkouts.COMMITS[checkouts.RECIPES[peer].folder]
        assert f"{entry['repository']}/tree/{entry['commit']}) {entry['commit'][:7]} |" in row


def run(code: str, *path: Path | str, cwd: Path = ROOT, python: str = sys.executable) -> str:
    environment = {
        "PYTHONPATH": os.pathsep.join(map(str, path)),
        "PATH": "",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run([python, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


def stub_of_the_pypi_package(folder: Path, version: str) -> Path:
    """A distribution `kernels` whose package has any name one asks it for, as transformers imports a dozen."""
    package, info = folder / "kernels", folder / f"kernels-{version}.dist-info"
    (package / "layer").mkdir(parents=True)
    info.mkdir()
    any_class = (
        "class Anything:\n"
        "    def __init__(self, *args, **kwargs): pass\n"
        "    def __call__(self, *args, **kwargs): return args[0] if args else self\n"  # a decorator that does nothing
        "def __getattr__(name):\n"
        "    if name.startswith('__'): raise AttributeError(name)\n"
        "    return type(name, (Anything,), {})\n"
    )
    (package / "__init__.py").write_text(any_class)
    (package / "layer/__init__.py").write_text(any_class)
    (package / "layer/mode.py").write_text(any_class)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n")
    (info / "top_level.txt").write_text("kernels\n")
    (info / "RECORD").write_text("kernels/__init__.py,,\n")
    return folder


@pytest.mark.weekly
@pytest.mark.slow
def test_the_stack_imports_from_the_root_without_the_package_kernels():
    if importlib.util.find_spec("transformers") is None or importlib.util.find_spec("diffusers") is None:
        pytest.skip("needs the train extra")
    if "kernels" in {d.metadata["Name"] for d in importlib.metadata.distributions()}:
        pytest.skip("the PyPI package kernels is installed here")
    out = run(IMPORT_EVERYTHING, ROOT, ROOT / "kernels")
    assert f"kernels at ['{ROOT / 'kernels'}'" in out  # a namespace with a list of folders: what a plain folder is


@pytest.mark.weekly
@pytest.mark.slow
def test_the_stack_imports_from_the_root_with_the_package_kernels(tmp_path):
    """In the version range transformers uses, so that it does import it; the folder must not get in its way."""
    utilities = pytest.importorskip("transformers.utils.import_utils")
    pytest.importorskip("diffusers")
    stub = stub_of_the_pypi_package(tmp_path, getattr(utilities, "KERNELS_MIN_VERSION", "0.10.0"))
    out = run(
        IMPORT_EVERYTHING + "print(transformers.utils.import_utils.is_kernels_available())",
        ROOT,
        stub,
        ROOT / "kernels",
    )
    assert f"kernels at {stub / 'kernels/__init__.py'}" in out
    assert out.endswith("True")


def required(names: tuple[str, ...]) -> dict[str, importlib.metadata.Distribution]:
    """Installed distributions and all they require, extras included; numpy, an extra of some, is not among them."""
    found: dict[str, importlib.metadata.Distribution] = {}
    waiting = [Requirement(name) for name in names]
    while waiting:
        wanted = waiting.pop()
        distribution = importlib.metadata.distribution(wanted.name)
        if wanted.name in found and not wanted.extras:
            continue
        found[wanted.name] = distribution
        for line in distribution.requires or []:
            needs = Requirement(line)
            if needs.marker is None or any(needs.marker.evaluate({"extra": e}) for e in ("", *wanted.extras)):
                waiting.append(needs)
    return found


def environment_of_torch_alone(folder: Path) -> Path:
    """A venv whose site-packages link to torch, triton and what they require (with or without CUDA's packages); returns
    its python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    here = Path(importlib.util.find_spec("torch").origin).parents[1]
    for distribution in required(("torch", "triton", "setuptools")).values():
        for name in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            if not (site / name).exists():
                (site / name).symlink_to(here / name)
    assert not (site / "numpy").exists()
    return folder / "bin/python"


@pytest.mark.slow
@pytest.mark.weekly
def test_pip_install_kernels_into_an_environment_with_only_torch_and_triton(tmp_path):
    """`pip install ./kernels` finds its requirements met, builds, and the result works far from the repository."""
    python = environment_of_torch_alone(tmp_path / "venv")
    source = shutil.copytree(ROOT / "kernels", tmp_path / "kernels")  # a build in place would leave its folders behind
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-build-isolation", "--quiet"]
    done = subprocess.run([*pip, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    shutil.rmtree(source)
    out = run(SMOKE_TEST, cwd=tmp_path, python=str(python))
    assert out.startswith(str(tmp_path / "venv"))


WITHOUT_DIFFUSERS = """
import sys, tempfile
from pathlib import Path

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("diffusers",):
            raise ImportError(name)

sys.meta_path.insert(0, Blocked())
import bench.profile, bench.step
from bench.contenders import random
from bench.random_policy import SMALL

contenders = random(Path(tempfile.mkdtemp()), "cpu", SMALL)
assert contenders.trainer.iterate()["log_prob_mismatch_max"] == 0
"""


@pytest.mark.weekly
def test_the_full_size_benchmark_needs_no_diffusers():
    """Its code path with small random models, in a process that cannot import diffusers."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    subprocess.run([sys.executable, "-c", WITHOUT_DIFFUSERS], cwd=ROOT, env=environment, check=True, timeout=300)

"""The codebases that the integrations are checked against: where their checkouts are, how their modules are imported.

ADVGRPO_PEERS names a folder with one checkout for each entry of commits.json. `python -m tests.peers.checkouts FOLDER`
clones them at their commits (`make peers` does, and runs the tests). Their code is imported as it is; what it imports
and this machine lacks (wandb, flash_attn, ...) is a stub that has every name.
"""

import hashlib
import importlib
import importlib.abc
import importlib.machinery
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).parent
COMMITS = json.loads((HERE / "commits.json").read_text())

# What may be missing: training, video and inference packages that none of the replaced functions touches.
STUBS = {
    "wandb",
    "flash_attn",
    "liger_kernel",
    "decord",
    "torchvision",
    "torchaudio",
    "av",
    "imageio",
    "hpsv2",
    "HPSv2",
    "open_clip",
    "clip",
    "cv2",
    "einops",
    "peft",
    "ml_collections",
    "absl",
    "webdataset",
    "deepspeed",
    "bitsandbytes",
    "swanlab",
    "tensorboard",
    "image_reward",
    "ImageReward",
    "paddleocr",
    "Levenshtein",
    "loguru",
    "opencv",
    "trl",
    "datasets",
    "pandas",
    "matplotlib",
    "timm",
    "sentencepiece",
    "lpips",
    "moviepy",
    "aiohttp",
    "requests",
    "ray",
    "vllm",
    "verl",
    "tensordict",
    "vllm_omni",
    "omegaconf",
    "hydra",
}


class Recipe:
    """How one peer's modules are imported: folders for sys.path, and packages whose own __init__ is passed over."""

    def __init__(self, folder, integration, modules, paths=(".",), bare=()):
        self.folder, self.integration, self.modules = folder, integration, modules
        self.paths, self.bare = paths, bare


RECIPES = {
    recipe.integration: recipe
    for recipe in (
        Recipe("flow_grpo", "flow_grpo", ["flow_grpo.diffusers_patch.sd3_sde_with_logprob", "flow_grpo.stat_tracking"]),
        Recipe("Adv-GRPO", "adv_grpo", ["adv_grpo.diffusers_patch.sd3_sde_with_logprob", "adv_grpo.stat_tracking"]),
        Recipe("DanceGRPO", "dance_grpo", ["fastvideo.train_grpo_flux"]),
        Recipe("MixGRPO", "mix_grpo", ["fastvideo.utils.sampling_utils"]),
        Recipe("Flow-Factory", "flow_factory", ["flow_factory.scheduler.flow_match_euler_discrete"], paths=["src"]),
        Recipe(
            "verl-omni",
            "verl_omni",
            ["verl_omni.pipelines.schedulers.flow_match_sde"],
            bare=["verl_omni", "verl_omni.pipelines", "verl_omni.pipelines.qwen_image_flow_grpo", "verl_omni.workers"],
        ),
        Recipe("UniRL", "unirl", ["unirl.sde.kernels"], bare=["unirl", "unirl.sde"]),
        Recipe(
            "miles_diffusion",
            "miles_diffusion",
            [
                "miles.utils.sde_log_prob",
                "flow_grpo.diffusers_patch.sd3_sde_with_logprob",
                "flow_grpo.stat_tracking",
            ],
            paths=[".", "flow_grpo"],
            bare=["miles", "miles.utils"],
        ),
    )
}


def checkout(integration: str) -> Path:
    """The folder of a peer's checkout; the test is skipped where there is none."""
    root = os.environ.get("ADVGRPO_PEERS")
    if not root:
        pytest.skip("ADVGRPO_PEERS is not set: it names a folder with the peers' checkouts (`make peers` makes one)")
    folder = Path(root, RECIPES[integration].folder)
    if not folder.is_dir():
        pytest.skip(f"{folder} does not exist: ADVGRPO_PEERS has no checkout of {RECIPES[integration].folder}")
    return folder


def source_of(integration: str, module: str) -> Path:
    """The file of a peer's module."""
    file = Path(*module.split(".")).with_suffix(".py")
    folder = checkout(integration)
    found = [folder / path / file for path in RECIPES[integration].paths]
    return next(path for path in found if path.is_file())


def digest(integration: str) -> str:
    """sha256 over the sources of the recipe's modules."""
    content = b"".join(source_of(integration, module).read_bytes() for module in RECIPES[integration].modules)
    return hashlib.sha256(content).hexdigest()


@contextmanager
def importable(integration: str, modules=None):
    """Inside, the peer's modules can be imported; afterwards they and the stubs are gone again.

    Gives those of the recipe, or `modules`, imported in this order.
    """
    folder, recipe = checkout(integration), RECIPES[integration]
    before, path, finders = set(sys.modules), list(sys.path), list(sys.meta_path)
    sys.path[:0] = [str(folder / part) for part in recipe.paths]
    sys.meta_path.append(_Stubs(folder))
    try:
        for name in recipe.bare:
            package = sys.modules[name] = ModuleType(name)
            package.__path__ = [str(folder / part / Path(*name.split("."))) for part in recipe.paths]
        yield [importlib.import_module(name) for name in (recipe.modules if modules is None else modules)]
    finally:
        sys.path[:], sys.meta_path[:] = path, finders
        roots = {name.partition(".")[0] for name in [*recipe.modules, *recipe.bare, *(modules or ())]}
        for name in set(sys.modules) - before:
            if name.partition(".")[0] in roots or isinstance(sys.modules[name], _Stub):
                del sys.modules[name]


class _Anything:
    """Stands for a class, a function, a decorator or a value of a package that is not installed."""

    def __init__(self, *args, **kwargs):
        pass

    def __call__(self, *args, **kwargs):
        return args[0] if len(args) == 1 and callable(args[0]) else self

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything()

    def __mro_entries__(self, bases):
        return (_Anything,)

    def __or__(self, other):
        return self

    __ror__ = __or__


class _Stub(ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything()


class _Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """The last finder asked: packages of STUBS that are not installed, for the peer's own code alone.

    transformers and diffusers look for torchvision and others too, and must not find a stub.
    """

    def __init__(self, folder: Path):
        self._folder = str(folder)

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in STUBS and _importer().startswith(self._folder):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Stub(spec.name)

    def exec_module(self, module):
        pass


def _importer() -> str:
    """The file whose code is importing something, as seen from a finder."""
    frame = sys._getframe(2)
    while frame and ("importlib" in frame.f_code.co_filename or frame.f_code.co_filename == __file__):
        frame = frame.f_back
    return frame.f_code.co_filename if frame else ""


def clone(root: Path) -> None:
    """All peers at their commits into `root`, the working tree of each and no history."""
    for name, entry in COMMITS.items():
        folder = root / name
        if (folder / ".git").is_dir():
            head = subprocess.run(["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True).stdout
            if head.strip() == entry["commit"]:
                continue
        folder.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"GIT_LFS_SKIP_SMUDGE": "1"}
        for command in (
            ["init", "--quiet"],
            ["fetch", "--quiet", "--depth", "1", entry["repository"], entry["commit"]],
            ["checkout", "--quiet", "--force", "FETCH_HEAD"],
        ):
            subprocess.run(["git", "-C", str(folder), *command], check=True, env=environment)
        print(f"{name} {entry['commit']}")


if __name__ == "__main__":
    clone(Path(sys.argv[1]))

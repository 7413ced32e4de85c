"""Settings every test needs before torch and triton are first used."""

import atexit
import gc
import os
from collections.abc import Iterable

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # two busy OpenMP processes on two cores otherwise spin (5x slower)
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # must be set before any kernel module is imported

import pytest
from torch.utils._device import _device_constructors

from advgrpo.runtime.allocator import keep_freed_memory
from advgrpo_kernels import _cpu

gc.set_threshold(50_000, 20, 100)  # a million objects stay: looking for what does not is a fifth of every import
keep_freed_memory(torch.device("cpu"))  # a tenth of the tests' time is spent in page faults


def is_second(places: Iterable[int]) -> bool:
    """Whether a combination of arguments, by their places among the values of each, is left to the week."""
    return sum(places) % 2 == 1


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """What the marks `every_second` and `in_ci` leave to the week is marked weekly.

    Files with slow tests first and the kernels', which are many and quick, last: no process is left alone at the end
    with minutes of work. (xdist would sort files by how many tests they have: the long ones come last.)"""
    for variants in _by_test(items):
        if named := variants[0].get_closest_marker("every_second"):
            assert len(named.args) >= 3, f"{variants[0]}: of fewer, two values would never meet in CI"
            _leave(variants, [is_second(each) for each in _places(variants, named.args)])
        if few := variants[0].get_closest_marker("in_ci"):
            _leave(variants, [number >= few.args[0] for number in range(len(variants))])
    slow = {item.path for item in items if "slow" in item.keywords}
    items.sort(key=lambda item: (item.path not in slow, "kernels" in item.path.parts))


def _by_test(items) -> list[list]:
    """Every test's variants, in their order."""
    found: dict[str, list] = {}
    for item in items:
        if hasattr(item, "callspec"):
            found.setdefault(item.nodeid.partition("[")[0], []).append(item)
    return list(found.values())


def _places(variants, names: Iterable[str]) -> list[tuple[int, ...]]:
    """Of every variant: which of its argument's values each is. (pytest's own `indices` number the variants.)"""
    places: dict[str, dict] = {name: {} for name in names}
    every = [[(name, repr(item.callspec.params[name])) for name in names] for item in variants]
    return [tuple(places[name].setdefault(value, len(places[name])) for name, value in each) for each in every]


def _leave(variants, weekly: Iterable[bool]) -> None:
    for item, left in zip(variants, weekly, strict=True):
        if left:
            item.add_marker("weekly")


def pytest_collection_finish(session):
    """What is imported by now stays: no collection looks at it again."""
    gc.freeze()


def pytest_unconfigure():
    """Later than pytest's own five collections, which come now; extension modules complain of leaks without."""
    atexit.register(gc.unfreeze)


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _seed() -> None:
    if torch.cuda.is_available():
        torch.manual_seed(0)
    else:  # the same without notes, each with a stack, for devices that nobody will start: 2 ms of every test
        torch.default_generator.manual_seed(0)


@pytest.fixture(autouse=True)
def _poison_empty(monkeypatch):
    """Uninitialised memory reads as NaN, so a kernel that skips an element fails every time.

    A `with torch.device(...)` applies to the functions that PyTorch has found at the first one, and remembers: they
    have to be its own. Found while these are guarded, what modules allocate in such a context would stay on the host,
    in all later tests of the process.
    """
    _device_constructors()
    for name in ("empty", "empty_like"):
        real = getattr(torch, name)

        def guarded(*args, _real=real, **kwargs):
            out = _real(*args, **kwargs)
            plain = type(out) is torch.Tensor and out.is_floating_point() and not out.requires_grad
            return out.fill_(float("nan")) if plain and not torch.compiler.is_compiling() else out

        monkeypatch.setattr(torch, name, guarded)


@pytest.fixture
def layers_by_pytorch(monkeypatch) -> None:
    """For what stands in for a GPU on the CPU: it has none of the CPU's kernels, and recorders see operators."""
    monkeypatch.setattr(_cpu, "MODE", "off")


@pytest.fixture(scope="session", autouse=True)
def _no_waiting_for_the_disk():
    """Tests' files need not survive a power cut. Which are forced to the disk, tests/runtime/test_atomic.py sees."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session")
def plain_curves():
    """Runs of the unit models, and all that follow in this process, do not render their curves (curves.py)."""
    from tests import curves

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curves.DRAWN_BY, curves.lay_out)
        yield


@pytest.fixture(scope="session")
def unit_pipeline(tmp_path_factory, plain_curves) -> str:
    """An untrained SD3 pipeline of width 64 with 2 blocks, the first with dual attention: seconds, not minutes."""
    return make_unit_pipeline(tmp_path_factory.mktemp("models") / "pipeline")


@pytest.fixture(scope="session")
def unit_backbone(tmp_path_factory) -> str:
    """An untrained DINOv2 of width 64 with 2 layers."""
    return make_unit_backbone(tmp_path_factory.mktemp("models") / "backbone")


def make_unit_pipeline(folder, dual_layers: int = 1, layers: int = 2) -> str:
    """Without dual attention it is of SD3.5-large's kind, with it of SD3.5-medium's."""
    from advgrpo.tiny import architecture
    from advgrpo.tiny.assets import save_half_precision
    from tests.unit_size import UNIT

    pipe = architecture.pipeline(seed=0, width=64, layers=layers, dual_layers=dual_layers, size=UNIT)
    pipe.vae.register_to_config(scaling_factor=1.3, shift_factor=0.1)
    with torch.no_grad():  # an untrained MMDiT outputs zeros: give its last layer something to say
        generator = torch.Generator().manual_seed(1)
        for parameter in pipe.transformer.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    save_half_precision(pipe, folder)
    return str(folder)


def make_large_pipeline(folder) -> str:
    """Of SD3.5-large's kind, with blocks between the first and the last, which FP8 quantises."""
    return make_unit_pipeline(folder, dual_layers=0, layers=4)


def make_unit_backbone(folder) -> str:
    from advgrpo.tiny import architecture
    from advgrpo.tiny.assets import save_half_precision
    from tests.unit_size import UNIT

    save_half_precision(architecture.backbone(seed=0, width=64, layers=2, size=UNIT), folder)
    return str(folder)


@pytest.fixture
def unit_config(unit_pipeline, unit_backbone, tmp_path):
    return make_unit_config(unit_pipeline, unit_backbone, tmp_path)


def make_unit_config(unit_pipeline, unit_backbone, tmp_path):
    """A run of seconds: 2 groups of 4, untrained models, a few shipped prompts and their references, own caches."""
    from advgrpo import config, tiny
    from tests.unit_size import UNIT

    side = UNIT.image_size
    for name, shipped, count in (
        ("prompts", tiny.prompts_file(), 6),
        ("held_out_prompts", tiny.held_out_prompts_file(), 3),
    ):
        (tmp_path / f"{name}.txt").write_text("\n".join(shipped.read_text().splitlines()[:count]))
    settings = {
        "iterations": 2,
        "output_dir": str(tmp_path / "run"),
        "model": {
            "path": unit_pipeline,
            "resolution": side,
            "max_sequence_length": UNIT.t5_tokens,
            "lora": {"rank": 4, "alpha": 8},
        },
        "data": {
            "prompts": str(tmp_path / "prompts.txt"),
            "held_out_prompts": str(tmp_path / "held_out_prompts.txt"),
            "cache_dir": str(tmp_path / "cache"),
            "min_reference_size": 16,
        },
        "rollout": {
            "prompts_per_iteration": 2,
            "group_size": 4,
            "micro_batch": 4,
            "num_steps": 4,
            "guidance_scale": 1.5,
            "window": {"noise_range": [0.5, 1.0]},
        },
        "adversary": {
            "backbone": unit_backbone,
            "image_size": side,
            "schedule": "when_fooled",
            "fooled_margin": 2.0,
            "hidden_size": 16,
            "num_patches": 8,
            "updates_per_iteration": 2,
            "warmup_iterations": 0,
            "batch_size": 6,
            "replay_capacity": 16,
        },
        "evaluation": {
            "every": 0,
            "images_per_prompt": 1,
            "num_steps": 2,
            "guidance_scale": 1.0,
            "grid_prompts": 1,
            "metrics": ["dino_similarity", "rule_accuracy"],
        },
        "output": {"checkpoint_every": 0, "tensorboard": False},
    }
    return config.build(config.merge(config.read_preset("tiny"), settings), "unit_config")

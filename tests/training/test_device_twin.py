"""A whole iteration beside a device twin (`device_twin.py`): nothing mixes devices, and the host waits only where the
log, the schedule or a first visit needs it to. In one configuration every wait is counted; others take the paths that
it does not: further adversaries and rewards, noise per image, KL, replay, SFT, full fine-tuning, the evaluation.

Bugs planted in a copy, each seen red: a host scalar stacked in `Updater.reweigh`; prompts encoded per micro-batch and
copied from pageable memory; the ids of `initial_latents`, the step table, the scores' or the statistics' ids copied so;
images for a vision tower or DINO, prompts for CLIP, the judge's scores and SFT's rows copied so; a host scalar
stacked in the KL or the evaluation's mean; the replay buffer asked by slots of the host.
"""

import contextlib
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
import torch
from rich.console import Console
from torch.utils._python_dispatch import _disable_current_modes

from advgrpo import config as configuration
from advgrpo.adversary.reference_features import ReferenceFeatures
from advgrpo.policy.diffusers_policy import DiffusersPolicy
from advgrpo.runtime import transfer
from advgrpo.runtime.distributed import Distributed
from advgrpo.training.run import Run
from bench import contenders
from tests.device_twin import DEVICE, FIRST_FEATURES, FIRST_VISITS, ITERATION_READS, DeviceTwin, MixedDevices
from tests.parts import some_weekly
from tests.vision_models import write_clip, write_siglip

pytestmark = pytest.mark.usefixtures("layers_by_pytorch")

MORE_READS = {  # of the configurations below
    "advgrpo/rewards/pixels.py:check_images",  # the judge is on the CPU
    "advgrpo/rewards/checks.py:finite_scores",  # a reward that is not finite
    "advgrpo/training/supervised.py:iterate",  # SFT's log
    "advgrpo/training/nft.py:update",  # NFT's log
    "advgrpo/training/awm.py:update",
    "advgrpo/training/forward_process.py:gathered",  # what both logs have in common
    "advgrpo/training/cheaper.py:choose",  # which scouts are drawn again: micro-batches are made on the host
    "advgrpo/training/cheaper.py:number",  # how alike rewards rank
    "advgrpo/training/cheaper.py:agreement",  # the same by shortened tails
    "advgrpo/training/policy_gradient.py:_learned",  # which images are trained on
    "advgrpo/training/supervised.py:_encoded",  # its first visit of a reference, which it keeps on the host
}
WEEKLY = {  # their paths are longer, or mostly those of the others
    *("noise per image, kl, replay", "full fine-tuning, no adversary", "awm, kl to the average"),
    *("nft, kl", "scouts, a short tail, the informative share", "siglip and a judge", "pickscore"),
    "a head with every restraint",
}
NOT_EVALUATED = {"data": {"held_out_prompts": ""}, "evaluation": {"backbone_image_size": 32}}
CONFIGURATIONS = {
    "sft, weights on the host": {"update": {"objective": "sft"}, "model": {"offload": "text_vae"}},
    "nft, kl": {"update": {"objective": "nft", "kl_weight": 0.1}, "rollout": {"initial_noise": "per_image"}},
    "awm, kl to the average": {
        "update": {"objective": "awm", "kl_weight": 0.1, "kl_to": "ema"},
        "rollout": {"initial_noise": "per_image"},
    },
    "noise per image, kl, replay": {
        "rollout": {"initial_noise": "per_image", "window": {"order": "contiguous"}},
        "update": {"kl_weight": 0.1},
        "adversary": {
            "schedule": "always",
            "replay_share": 0.5,
            "reference_choice": "in_turn",
            "patch_sampling": "with_replacement",
        },
    },
    "scouts, a short tail, the informative share": {
        "rollout": {
            **{"num_steps": 6, "micro_batch": 2, "window": {"order": "fixed", "steps": [0, 1]}, "tail_steps": 3},
            **{"tail_agreement": 0.0, "tail_check_every": 1, "scouts": 2, "scout_tail_steps": 1},
        },
        "update": {"informative_share": 0.5, "skip_dead_groups": True, "trust_region": "divergence"},
        **NOT_EVALUATED,
    },
    "siglip and a judge": {
        "adversary": {"kind": "siglip", "schedule": "always"},
        "rewards": {"rule": {"weight": 1.0, "normalize": "group"}},
        **NOT_EVALUATED,
    },
    "a head with every restraint": {
        "adversary": {
            **{"schedule": "always", "augment": "crop_flip", "feature_layers": [1, 2], "heads": 2, "reward_ema": 0.5},
            **{"gradient_penalty": 0.1, "spectral_norm": True, "reset_every": 1, "warmup_updates": 2},
        },
        **NOT_EVALUATED,
    },
    "pickscore": {"adversary": {"kind": "pickscore", "schedule": "always"}, **NOT_EVALUATED},
    "full fine-tuning, no adversary": {
        "model": {"train": "full", "attention": "auto"},
        "adversary": {"kind": "none"},
        "rewards": {"dino_similarity": {"weight": 1.0, "path": "tiny", "image_size": 48}},
        "data": {"held_out_prompts": ""},
    },
}


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(transfer, "PINNED_FOR", ("cuda", DEVICE.type))
    for module in ("gaussian_step", "_gaussian", "patches"):  # values are looked at on a CPU only, where it is free
        monkeypatch.setattr(f"advgrpo_kernels.ops.{module}.can_look_at", lambda tensor: False)
    autocast = torch.autocast  # which the twin's device has none of

    def on_devices(kind: str, **options):
        return contextlib.nullcontext() if kind == DEVICE.type else autocast(kind, **options)

    monkeypatch.setattr(torch, "autocast", on_devices)


def place_on(device: torch.device) -> Distributed:
    place = Distributed.start("cpu")
    place.device = device
    return place


def run_on(config, device: torch.device, monkeypatch):
    """A run; models are loaded outside the twin, because loaders use the meta device themselves."""

    def load(self, kind, part, dtype, device=None):
        with _disable_current_modes():
            module = kind.from_pretrained(self.folder, subfolder=part, dtype=dtype)
        return module.to(device or self.device).requires_grad_(False).eval()

    monkeypatch.setattr(DiffusersPolicy, "_load", load)
    monkeypatch.setattr(ReferenceFeatures, "prefetch", lambda self, prompts: None)  # a thread leaves the twin
    return Run(config, place_on(device), resume=False, console=Console(quiet=True))


def iterate_on_both(config, monkeypatch) -> list[list]:
    """Two iterations on a CPU and on the twin, which have to agree: what the twin waited for in each."""
    prompts = Path(config.data.prompts)
    prompts.write_text("".join(prompts.read_text().splitlines(keepends=True)[:2]))  # the second iteration knows all
    trainer = run_on(config, torch.device("cpu"), monkeypatch).trainer  # encodes the prompts as well
    expected, waits = [trainer.iterate() for _ in range(2)], []
    config.output_dir += "_on_the_twin"
    with DeviceTwin() as twin:
        trainer = run_on(config, DEVICE, monkeypatch).trainer
        for other in expected:
            twin.waits.clear()
            own = trainer.iterate()
            waits.append(list(twin.waits))
            for name, value in other.items():  # composite operators are taken apart on the twin: sums round otherwise
                if "seconds" not in name and "per_second" not in name:
                    assert own[name] == (value and pytest.approx(value, rel=1e-3, abs=1e-5)), name
            assert own["grad_norm"] > 0
    return waits


def places(waits: list, what: str) -> Counter:
    return Counter(wait.place for wait in waits if wait.what == what)


def test_an_iteration_is_the_cpus_and_waits_only_where_it_says(unit_config, monkeypatch):
    unit_config.model.attention = "math"
    waits = iterate_on_both(unit_config, monkeypatch)[1]
    assert not places(waits, "copy")
    assert places(waits, "read") == ITERATION_READS


@pytest.mark.parametrize("name", some_weekly(CONFIGURATIONS, WEEKLY))
@pytest.mark.in_ci(1)
def test_other_configurations_wait_nowhere_else(name, unit_config, monkeypatch, tmp_path):
    unit_config.model.attention = "math"
    made = configuration.merge(unit_config.model_dump(), CONFIGURATIONS[name])
    if made["adversary"]["kind"] == "siglip":
        made["adversary"]["backbone"] = str(write_siglip(tmp_path / "siglip"))
    if made["adversary"]["kind"] == "pickscore":
        made["adversary"]["backbone"] = str(write_clip(tmp_path / "clip"))
    first, second = iterate_on_both(configuration.build(made, name), monkeypatch)
    assert set(places(first, "copy")) <= FIRST_VISITS
    assert not places(second, "copy")
    assert set(places(second, "read")) <= ITERATION_READS.keys() | MORE_READS


def test_an_evaluation_is_the_cpus_and_copies_nothing_from_ordinary_memory(unit_config, monkeypatch):
    unit_config.model.attention = "math"
    unit_config.evaluation.metrics = ["dino_similarity", "rule_accuracy", "saturation"]
    expected = run_on(unit_config, torch.device("cpu"), monkeypatch).evaluator.run(1)
    unit_config.output_dir += "_on_the_twin"
    with DeviceTwin() as twin:
        evaluator = run_on(unit_config, DEVICE, monkeypatch).evaluator
        twin.waits.clear()
        found = evaluator.run(1)
        base = evaluator.base().run(1)  # nothing is trained, so it is the same
        images = evaluator.grid_images()
        waits = list(twin.waits)
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert base == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert {len(drawn) for _, drawn in images} == {4}
    assert not places(waits, "copy")


@pytest.mark.weekly
def test_the_iteration_that_a_gpu_is_asked_about_waits_nowhere_else(tmp_path, monkeypatch):
    """tests/gpu/ asks CUDA itself, of the same settings at a larger size."""
    monkeypatch.setattr(ReferenceFeatures, "prefetch", lambda self, prompts: None)
    rollout = {"initial_noise": "shared", "num_steps": 5, "window": {"steps": [1, 2]}}
    with DeviceTwin() as twin, mock.patch.object(contenders.Distributed, "start", return_value=place_on(DEVICE)):
        trainer = contenders.small(tmp_path, "cpu", rollout=rollout, update={"learning_rate": 1e-4}).trainer
        for _ in range(3):
            trainer.iterate()
        twin.waits.clear()
        trainer.iterate()
    assert {wait.place for wait in twin.waits} <= ITERATION_READS.keys() | FIRST_VISITS | FIRST_FEATURES
    assert "advgrpo/training/policy_gradient.py:_update_metrics" in places(twin.waits, "read")


@pytest.mark.parametrize("mode", [pytest.param("recompute", marks=pytest.mark.weekly), "truncated_importance"])
def test_old_log_probs_are_replaced_on_the_device(mode, tmp_path):
    changes = {"rollout": {"window_forward": "merged"}, "update": {"old_log_prob": mode, "learning_rate": 1e-3}}
    with DeviceTwin() as twin:
        with mock.patch.object(contenders.Distributed, "start", return_value=place_on(DEVICE)):
            trainer = contenders.small(tmp_path, "cpu", **changes).trainer
        table = trainer.objective.table(0)
        rollout = trainer.objective.rollout(table, 0)
        advantages = torch.linspace(-1, 1, trainer.length.images, device=DEVICE)
        twin.waits.clear()
        sums = trainer.updater.reweigh(rollout.micro_batches, table)
        stats = trainer.updater.accumulate(
            rollout.micro_batches, advantages, table, total=len(advantages), watch_kl=True
        )
        trainer.updater.step(stats.max_mismatch())
        assert twin.waits == []
        gap, weight, _, pairs = sums.tolist()
        assert stats.max_mismatch().item() == 0
    assert pairs == 2 * len(advantages)
    assert gap > 0
    assert weight == pytest.approx(pairs, rel=0.01)


def test_modules_are_made_on_the_device_of_their_context_whatever_tests_do_to_torch():
    """With the guarded functions of conftest.py; two tests above once found their policy's weights on the host."""
    assert torch.empty.__name__ == "guarded"
    with torch.device("meta"):
        assert torch.empty(1).is_meta
        assert torch.nn.Linear(2, 3).weight.is_meta
        assert torch.nn.Embedding(2, 3).weight.is_meta


def test_the_twin_refuses_what_a_gpu_refuses_and_sees_every_wait():
    host = torch.arange(4.0)
    with DeviceTwin() as twin:
        device = torch.randn(4, device=DEVICE)
        assert (device * torch.tensor(2.0)).device == DEVICE  # a scalar of the host is fine there
        for refused in (
            lambda: device + host,
            lambda: torch.stack([device.sum(), torch.tensor(4)]),
            lambda: torch.cat([device, host]),
        ):
            with pytest.raises(MixedDevices):
                refused()
        transfer.to_device(host, DEVICE)
        assert twin.waits == []
        waits = (
            lambda: host.to(DEVICE),
            lambda: host.to(DEVICE, non_blocking=True),  # not pinned
            lambda: torch.tensor([1.0], device=DEVICE),
            lambda: device.new_tensor([1.0]),
            lambda: device[torch.tensor([1, 2])],
            lambda: device.cpu(),
            lambda: device.sum().item(),
            lambda: device.tolist(),
            lambda: bool((device > 9).any()),
            lambda: device.nonzero(),
        )
        for number, wait in enumerate(waits, 1):
            wait()
            assert len(twin.waits) == number, number
        assert Counter(wait.what for wait in twin.waits) == {"copy": 5, "read": 5}


def test_values_views_gradients_and_writes_in_place_are_the_cpus():
    def compute(device):
        torch.manual_seed(0)
        weight = torch.randn(3, 4).to(device).requires_grad_()
        x = torch.zeros(2, 4, device=device)
        x.view(8)[2:6].fill_(1.5)
        x[1] += torch.full((4,), 0.25, device=device)
        kept, x.data = x.data, torch.full((2, 4), 9.0, device=device)
        y, x.data = x + 1, kept
        loss = torch.nn.functional.gelu(x @ weight.t()).square().sum()
        loss.backward()
        return [x, y, loss.detach(), weight.grad]

    expected = compute(torch.device("cpu"))
    with DeviceTwin():
        found = compute(DEVICE)
    assert all(torch.equal(own.held, other) for own, other in zip(found, expected, strict=True))

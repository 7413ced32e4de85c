"""Weights on the host but while they are used: the bits of weights that stay on the device, beside a device twin.

Bugs planted in a copy, each seen red: weights left on the device after an error; the decoder in use left there; all
layers of an encoder there at once; a shared tensor pinned twice; a copy from ordinary memory.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from advgrpo.policy import diffusers_policy
from advgrpo.policy.diffusers_policy import DiffusersPolicy
from advgrpo.policy.loading import load_policy
from advgrpo.policy.offload import HostWeights
from advgrpo.runtime import transfer
from advgrpo.training.resuming import differences
from tests import flux2_models, flux_models, qwen_models, unet_models
from tests.device_twin import DEVICE, DeviceTwin, TwinTensor
from tests.parts import some_weekly

# CI has ours and diffusers' forward: SD3 has FLUX.1's encoders, and Qwen-Image's VAE is the one of video.
PROMPTS = ["a small red star", "a large green ring at the top"]
FAMILIES = {
    "SD3": None,
    "FLUX.1": flux_models.save_pipeline,
    "FLUX.2": flux2_models.save_pipeline,
    "Qwen-Image": qwen_models.save_pipeline,
    "SDXL": partial(unet_models.save_pipeline, xl=True),
}


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch):
    """Loaders use the meta device themselves, so they run outside the twin."""
    monkeypatch.setattr(transfer, "PINNED_FOR", ("cuda", DEVICE.type))
    load, whole = DiffusersPolicy._load, DiffusionPipeline.from_pretrained

    def part(self, kind, name, dtype, device=None):
        with _disable_current_modes():
            module = load(self, kind, name, dtype, torch.device("cpu"))
        return module.to(device or self.device)

    def pipeline(*arguments, **options):
        with _disable_current_modes():
            return whole(*arguments, **options)

    monkeypatch.setattr(DiffusersPolicy, "_load", part)
    monkeypatch.setattr(diffusers_policy.DiffusionPipeline, "from_pretrained", pipeline)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory, unit_pipeline) -> Callable[[str], str]:
    """A family's pipeline, made when it is first asked for."""
    root = tmp_path_factory.mktemp("families")
    return cache(lambda name: str(FAMILIES[name](root / name)) if FAMILIES[name] else unit_pipeline)


def on_the_device(module: nn.Module, *, recurse: bool = True) -> int:
    """Bytes of its tensors."""
    held = (*module.parameters(recurse=recurse), *module.buffers(recurse=recurse))
    return sum(tensor.nbytes for tensor in held if isinstance(tensor, TwinTensor))


def policy_of(settings, folder: str, offload: str, cache: Path) -> DiffusersPolicy:
    fused = {"fused": True} if folder == settings.model.path else {}
    changes = {"path": folder, "offload": offload, "attention": "math" if fused else "auto"}
    model = settings.model.model_copy(update=changes)
    return load_policy(model, device=DEVICE, cache_dir=cache, seed=0, **fused)


def computed(policy: DiffusersPolicy) -> list[torch.Tensor]:
    """Text, images and latents, as of ordinary memory."""
    text = policy.encode(PROMPTS)
    latents = torch.randn(2, *policy.latent_shape(), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    images = policy.decode(latents)
    return [tensor.held for tensor in (*text.tensors().values(), images, policy.encode_images(images))]


@pytest.mark.parametrize("family", some_weekly(FAMILIES, FAMILIES.keys() - {"SD3", "Qwen-Image"}))
@pytest.mark.in_ci(1)
def test_results_are_those_of_weights_that_stay_to_the_bit(family, folder_of, unit_config, tmp_path, monkeypatch):
    unit_config.model.max_sequence_length, folder = 24, folder_of(family)
    with DeviceTwin() as twin:
        stay = policy_of(unit_config, folder, "none", tmp_path / "stay")
        expected = computed(stay)
        for offload in ("text", "text_vae") if family == "SD3" else ("text_vae",):
            policy = policy_of(unit_config, folder, offload, tmp_path / offload)
            twin.waits.clear()
            with monkeypatch.context() as patch:
                beside = beside_a_layer(patch)
                policy.encode(PROMPTS)
            assert beside
            assert max(beside) < 1000, "but for the positions of the layers around it"
            assert not [wait for wait in twin.waits if wait.what == "copy" and "offload.py:_bring " in f"{wait} "]
            assert all(torch.equal(*pair) for pair in zip(computed(policy), expected, strict=True))
            assert on_the_device(policy.vae) == (0 if offload == "text_vae" else on_the_device(stay.vae))
            assert (on_the_device(policy.decoder) == 0) == (offload == "text_vae") if policy.decoder else True


def beside_a_layer(patch) -> list[int]:
    """Bytes of other layers that are on the device when one is brought there."""
    bring, beside = HostWeights._bring, []

    def watched(self, owner):
        beside.append(sum(on_the_device(module, recurse=False) for module in self._own))
        bring(self, owner)

    patch.setattr(HostWeights, "_bring", watched)
    return beside


def test_what_fails_leaves_nothing_on_the_device_and_what_is_shared_lies_on_the_host_once():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)).requires_grad_(False).eval()
    model[2].weight = model[2].again = model[0].weight
    x = torch.ones(2, 3)
    expected = model(x)
    with DeviceTwin() as twin:
        weights = HostWeights(model, DEVICE)
        assert model[2].weight.data_ptr() == model[0].weight.data_ptr()
        with weights.lent():
            names = model.named_parameters(remove_duplicate=False)
            assert on_the_device(model) == sum(t.nbytes for t in (*dict(names).values(), *model.buffers()))
            assert torch.equal(model(x.to(DEVICE)).held, expected)
        assert on_the_device(model) == 0
        with pytest.raises(RuntimeError, match="on the way"), weights.lent():
            raise RuntimeError("on the way")
        assert on_the_device(model) == 0
        with weights.lent_by_layer():
            seen = []
            watch = model[1].register_forward_pre_hook(
                lambda *_: seen.append([on_the_device(layer) > 0 for layer in model])
            )
            twin.waits.clear()
            assert torch.equal(model(x.to(DEVICE)).held, expected)
            assert seen == [[False, True, False]]
            assert torch.equal(model(x).held, expected), "its input is brought along"
            assert [wait.operator for wait in twin.waits] == ["_to_copy"], "the other input, from ordinary memory"
            with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
                model(torch.ones(2, 4))
            assert on_the_device(model) == 0
            watch.remove()
        assert torch.equal(model(x), expected), "on the host, as any module"


def test_encoders_are_let_go_of_and_their_memory_returned_once_prompts_are_cached(
    folder_of, unit_config, tmp_path, monkeypatch
):
    """Without a collection, which may be long in coming: 11 GB of SD3.5's are pinned."""
    begin, encoders, left = HostWeights.__init__, [], []

    def watched(self, module, device):
        begin(self, module, device)
        encoders.append(weakref.ref(module))

    monkeypatch.setattr(HostWeights, "__init__", watched)
    monkeypatch.setattr(transfer, "release_pinned", lambda device: left.append([each() for each in encoders]))
    unit_config.model.max_sequence_length = 24
    gc.disable()
    try:
        with DeviceTwin():
            policy_of(unit_config, folder_of("SD3"), "text", tmp_path).encode(PROMPTS)
    finally:
        gc.enable()
    assert encoders
    assert left == [[None] * len(encoders)]


def test_a_resumed_run_may_change_where_frozen_weights_lie():
    assert not differences({"model": {"offload": "none"}}, {"model": {"offload": "text_vae"}})

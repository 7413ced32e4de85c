"""Merged weights in FP8 beside diffusers' forward, by one process: the bits of our forward's. Those of several
are in tests/training/test_sharding.py.

Bugs planted in a copy, each seen red (tests/mutants): adapters that are merged once; codes of a base in FP8 that are
merged without their scales.
"""

from pathlib import Path

import pytest
import torch

from advgrpo.policy.diffusers_policy import DiffusersPolicy
from advgrpo.policy.fp8_base import Fp8Linear
from advgrpo.sampling.dynamics import step_table
from advgrpo.sampling.sampler import Sampler
from advgrpo_kernels import Fp8Tensor
from tests import flux_models, qwen_models
from tests.conftest import make_large_pipeline
from tests.families import PROMPTS, load
from tests.parts import some_weekly, train_adapters

ROW = torch.tensor([0, 0, 1])
WEEKLY = ["flux", "qwen", "large"]  # the last: SD3.5-large's kind


def settings_of(family: str, unit_config, folder: Path):
    made = {"flux": flux_models.save_pipeline, "qwen": qwen_models.save_pipeline, "large": make_large_pipeline}
    path = made[family](folder / family) if family in made else "tiny"
    unit_config.model.path, unit_config.model.max_sequence_length = str(path), 16
    return unit_config


def merged_latents(policy: DiffusersPolicy) -> torch.Tensor:
    """Two ODE steps, which the prompts' rows share no part of."""
    policy.merge()
    sampler = Sampler(policy, 1.5, "gaussian", share_prefix=False, shared_noise=True, merged=True)
    initial = sampler.initial_latents(0, torch.arange(2))
    return sampler.run(step_table(policy, 2), policy.encode(PROMPTS), initial, ROW)[0]


def as_trained(ours: DiffusersPolicy, trained: DiffusersPolicy) -> None:
    """Give our forward the adapters of diffusers'."""
    theirs = dict(trained.trainable_parameters())
    with torch.no_grad():
        for name, parameter in ours.network.lora.state_dict().items():
            parameter.copy_(theirs[name.replace(".weight", ".default.weight")])


@pytest.mark.parametrize("name", some_weekly(["sd3", "flux-bfloat16", *WEEKLY], WEEKLY))
def test_a_copy_samples_the_bits_of_a_whole_model_in_fp8(name, unit_config, tmp_path):
    """From merged weights, also when the adapters have moved on, and loses as much of them to rounding."""
    family, _, dtype = name.partition("-")
    settings = settings_of(family, unit_config, tmp_path)
    how = {"precision": "fp8", "dtype": dtype or "float32"}
    copied, ours = (load(settings, fused=fused, **how) for fused in (False, True))
    for _ in range(2):
        train_adapters(copied)
        as_trained(ours, copied)
        found, expected = merged_latents(copied), merged_latents(ours)
        assert torch.equal(found, expected)
        assert torch.equal(copied.merge_error(), ours.merge_error())
    copied.network.copy._gathered = lambda module: pytest.fail("gathered, though adapters are as they were")
    copied.merge()
    layers = copied.network.copy.transformer.linears()
    quantised = [layer.names for layer in layers if layer.merged_fp8 is not None]
    assert quantised == [x.names for x in ours.network.transformer.linears() if x.merged_fp8 is not None] != []
    assert all(layer.weight.is_meta for layer in layers), "it holds no frozen weights"


def test_a_copy_of_a_base_in_fp8_has_its_codes(unit_config, tmp_path):
    """Where nothing is merged into them; the others are rounded again, by no more than a whole model's."""
    settings = settings_of("flux", unit_config, tmp_path)
    policy = load(settings, fused=False, precision="fp8", base_precision="fp8")
    train_adapters(policy)
    policy.merge()
    copy, adapted = policy.network.copy, policy.network.adapters.modules()
    quantised = {name: m for name, m in copy._linears.items() if isinstance(m, Fp8Linear)}
    assert quantised.keys() & adapted.keys()
    assert quantised.keys() == {name for name, rows in copy._rows.items() if isinstance(rows, Fp8Tensor)}
    for name in quantised.keys() - adapted.keys():
        linear = quantised[name]
        assert torch.equal(copy._rows[name].dequantize(), Fp8Tensor(linear.weight, linear.scale).dequantize())
    latents, step = torch.randn(2, *policy.latent_shape()), torch.tensor([1])
    prepared = policy.prepare(policy.encode(PROMPTS), torch.tensor([900.0, 500.0]), guidance=1.5)
    with torch.no_grad():
        expected, found = policy.predict(latents, step, prepared)[0], policy.predict_merged(latents, step, prepared)[0]
        again = policy.with_prompt_tensors(prepared, policy.prompt_tensors(prepared))
        assert torch.equal(policy.predict_merged(latents, step, again)[0], found)
    assert 1e-3 < (found - expected).norm() / expected.norm() < 0.1
    assert 0 < policy.merge_error() < 0.1

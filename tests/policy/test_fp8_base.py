"""Frozen layers in e4m3 by diffusers' forward: which, what they compute, and that it is what our forward computes.

Bugs planted in a copy, each seen red (tests/mutants): the gradient of codes without their scales; the last block's
layers quantised as well. Not there: another result of diffusers' layers where a gradient is wanted.
"""

from pathlib import Path

import pytest
import torch
from torch import nn

from advgrpo.policy.fp8_base import Fp8Linear, quantize
from advgrpo.policy.loading import load_policy
from advgrpo_kernels import fp8_quantize
from tests import flux_models, qwen_models
from tests.conftest import make_large_pipeline
from tests.families import PROMPTS, assert_on_policy, load
from tests.parts import some_weekly

CPU = torch.device("cpu")
SAVED = {"flux": flux_models.save_pipeline, "qwen": qwen_models.save_pipeline, "sd35-large": make_large_pipeline}


def test_a_layer_is_the_product_of_what_it_holds_and_so_is_its_gradient():
    torch.manual_seed(0)
    linear = nn.Linear(48, 32).requires_grad_(False)
    ours = Fp8Linear(linear, CPU)
    assert (ours.weight.dtype, ours.weight.nbytes) == (torch.float8_e4m3fn, 48 * 32)
    x, gradient = torch.randn(2, 5, 48, requires_grad=True), torch.randn(2, 5, 32)
    held = ours.weight.double() * ours.scale.double()
    y = ours(x)
    y.backward(gradient)
    assert torch.allclose(y.double(), fp8_quantize(x).dequantize().double() @ held.t() + linear.bias, atol=1e-5)
    assert torch.allclose(x.grad.double(), gradient.double() @ held, atol=1e-5)
    assert 0.01 < (held - linear.weight).norm() / linear.weight.norm() < 0.05


def test_modulation_trained_layers_and_other_sizes_stay():
    block = nn.ModuleDict({"norm": nn.ModuleDict({"linear": nn.Linear(16, 16)}), "ff": nn.Linear(16, 32)})
    block.update({"odd": nn.Linear(16, 24), "lora_A": nn.Linear(16, 16)})
    block.requires_grad_(False)["lora_A"].requires_grad_(True)
    quantize(block, CPU)
    assert [name for name, module in block.named_modules() if isinstance(module, Fp8Linear)] == ["ff"]


@pytest.mark.parametrize("family", some_weekly(["flux", "qwen", "sd35-large"], ["qwen", "sd35-large"]))
def test_the_layers_and_their_rounding_are_those_of_our_forward(family, unit_config, tmp_path):
    """Up to codes that a rounding of other sums has tipped over: far nearer than to the model in its dtype. Adapters
    are at their start, where they add nothing."""
    made = SAVED[family](tmp_path / family)
    unit_config.model.path, unit_config.model.max_sequence_length = str(made), 16
    velocities = []
    for fused, precision in ((False, "fp8"), (True, "fp8"), (False, "model")):
        model = unit_config.model.model_copy(update={"base_precision": precision})
        policy = load_policy(model, device=CPU, cache_dir=Path(unit_config.data.cache_dir), seed=0, fused=fused)
        generator = torch.Generator().manual_seed(7)
        latents = torch.randn(len(PROMPTS), *policy.latent_shape(), generator=generator)
        prepared = policy.prepare(policy.encode(PROMPTS), torch.tensor([900.0, 500.0]), guidance=1.5)
        with torch.no_grad():
            velocities.append(policy.predict(latents, torch.tensor([1]), prepared)[0])
    stock, ours, plain = velocities
    assert (stock - ours).norm() < 0.05 * (stock - plain).norm()
    assert (stock - plain).norm() > 1e-3 * plain.norm()


@pytest.mark.weekly
@pytest.mark.parametrize("fused", [True, False], ids=["ours", "diffusers"])
@pytest.mark.parametrize("family", ["flux", "sd35-large"])
def test_ratios_are_exact_before_the_first_step(family, fused, unit_config, tmp_path):
    """Qwen-Image's are in test_qwen.py."""
    unit_config.model.path, unit_config.model.max_sequence_length = str(SAVED[family](tmp_path / family)), 16
    policy = load(unit_config, fused=fused, base_precision="fp8")
    modules = policy.network.transformer.linears() if fused else policy.transformer.modules()
    assert any(isinstance(each, Fp8Linear) or getattr(each, "base_fp8", None) is not None for each in modules)
    assert_on_policy(policy, unit_config, window=(1, 2))

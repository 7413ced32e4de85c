"""Image decoder: parity with diffusers' AutoencoderKL, float32 statistics under bfloat16, the gate between the two.

Bugs planted in a copy, each seen red: channel sums, or square sums, without dtype=float32; variance of the channel
means left out; sign of the shift; the shortcut's convolution skipped; post_quant_conv skipped, or its default False;
images of a second micro-batch written over the first; shift_factor left out; the gate averaging over images instead
of taking the worst; the gate passing NaN; bfloat16 weights left contiguous; our kernels in the float32
decoder.
"""

import dataclasses
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from advgrpo import tiny
from advgrpo.errors import UserError
from advgrpo.policy.fused import decoder as decoder_module
from advgrpo.policy.fused.decoder import SD3_DECODER, Decoder, DecoderConfig, ImageQualityError, psnr_gate
from advgrpo_kernels import group_norm
from advgrpo_kernels.ops import group_norm as group_norm_op

NARROW_SD3 = dataclasses.replace(SD3_DECODER, block_out_channels=(32, 64, 96, 96))


def tiny_vae() -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(tiny.pipeline_dir(), subfolder="vae").eval()


def narrow_sd3_vae(post_quant_conv: bool) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=NARROW_SD3.block_out_channels,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=16,
        scaling_factor=SD3_DECODER.scaling_factor,
        shift_factor=SD3_DECODER.shift_factor,
        use_quant_conv=False,
        use_post_quant_conv=post_quant_conv,
    ).eval()


def latents_for(batch: int, side: int = 8) -> torch.Tensor:
    return torch.randn((batch, 16, side, side), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("vae", [tiny_vae, lambda: narrow_sd3_vae(False), lambda: narrow_sd3_vae(True)])
def test_float32_equals_diffusers(vae):
    vae, latents = vae(), latents_for(2)
    config = DecoderConfig.from_mapping(vae.config)
    decoder = Decoder.from_state_dict(config, vae.state_dict())
    with torch.no_grad():
        expected = vae.decode(latents, return_dict=False)[0]
        images = vae.decode(latents / config.scaling_factor + config.shift_factor, return_dict=False)[0]
    assert expected.std() > 0.1
    assert (decoder(latents) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (decoder.images(latents) - (images / 2 + 0.5).clamp(0, 1)).abs().max() <= 1e-5


@pytest.mark.parametrize("channels_last", [True, pytest.param(False, marks=pytest.mark.weekly)])
def test_every_stage_by_our_kernels_equals_diffusers(channels_last, monkeypatch):
    """In float32, where PyTorch or the CPU's kernels would compute it otherwise: in the interpreter without a GPU."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, **blocks).eval()
    for name, parameter in vae.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, 0.5, 0.5)
    config = DecoderConfig.from_mapping(vae.config)
    ours = Decoder.from_state_dict(config, vae.state_dict(), channels_last=channels_last)
    norms = norms_of(ours)
    assert {norm.backend for norm in norms} == {"auto" if channels_last else "torch"}
    reference = Decoder.from_state_dict(config, vae.state_dict())  # what `psnr_gate` compares with
    assert {norm.backend for norm in norms_of(reference)} == {"torch"}
    for norm in norms:
        norm.backend = "triton"
    launched, launch = [], group_norm_op._launch
    monkeypatch.setattr(group_norm_op, "_launch", lambda *args: launched.append(args[-2:]) or launch(*args))
    latents = torch.randn(1, 4, 4, 3, generator=torch.Generator().manual_seed(1))
    found = {
        name: stages(root.decoder, act)
        for name, root, act in (("ours", ours, "conv_norm_out"), ("theirs", vae, "conv_act"))
    }
    with torch.no_grad():
        images = vae.decode(latents, return_dict=False)[0]
    assert (ours(latents) - images).abs().max() <= 1e-5 * images.abs().max()
    assert found["ours"].keys() == found["theirs"].keys()
    for name, expected in found["theirs"].items():
        assert (found["ours"][name] - expected).abs().max() <= 1e-5 * expected.abs().max(), name
    assert len(launched) == len(norms) == 14
    assert sum(silu for silu, _ in launched) == 13  # all but the attention's
    assert {layout for _, layout in launched} == {channels_last}


def norms_of(decoder) -> list:
    return [module for module in decoder.modules() if isinstance(module, decoder_module._Norm)]


def stages(decoder, act: str) -> dict[str, torch.Tensor]:
    """Filled with the output of every stage of a decoder when it runs; `act` is the module behind its last norm."""
    found, modules = {}, dict(decoder.named_modules())
    names = {"conv_in": "conv_in", "mid_block": "mid_block", act: "norm_out", "conv_out": "conv_out"}
    names |= {name: name for name in modules if name.startswith("up_blocks.") and name.count(".") == 1}
    for module, name in names.items():
        modules[module].register_forward_hook(lambda _m, _i, out, name=name: found.__setitem__(name, out))
    return found


def test_config_is_read_as_diffusers_reads_it():
    config = DecoderConfig.from_mapping(narrow_sd3_vae(True).config)
    assert config == dataclasses.replace(NARROW_SD3, use_post_quant_conv=True)
    assert DecoderConfig.from_mapping({"block_out_channels": [64]}) == DecoderConfig(
        (64,), 16, layers_per_block=1, use_post_quant_conv=True, shift_factor=None, scaling_factor=0.18215
    )


@pytest.mark.weekly
def test_full_size_sd3_is_built_without_diffusers():
    code = (
        "import sys; from advgrpo.policy.fused.decoder import *; "
        "print(sum(p.numel() for p in Decoder(SD3_DECODER, device='meta').parameters())); "
        "assert not {'diffusers', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == 49_545_475  # decoder.* of stabilityai/stable-diffusion-3.5-medium's VAE


@pytest.mark.parametrize("offset", [0.0, 2.0])
def test_bfloat16_group_norm_has_float32_statistics(offset):
    generator = torch.Generator().manual_seed(2)
    channel = torch.randn((1, 32, 1, 1), generator=generator)  # means differ within a group
    x = (offset + 0.3 * channel + 0.2 * torch.randn((2, 32, 64, 64), generator=generator)).bfloat16()
    x = x.to(memory_format=torch.channels_last)
    weight, bias = torch.randn((2, 32), generator=generator).bfloat16()
    expected = F.group_norm(x.double(), 8, weight.double(), bias.double(), 1e-6)
    result = group_norm(x, 8, weight, bias, eps=1e-6)
    assert result.dtype == torch.bfloat16
    assert result.is_contiguous(memory_format=torch.channels_last)
    # Half an ulp of the one rounding, and float32 sums of squares of values 10 standard deviations from zero.
    assert ((result.double() - expected).abs() <= 2**-8 * expected.abs() + 1e-3).all()
    assert (group_norm(x.float().contiguous(), 8, weight, bias, eps=1e-6).double() - expected).abs().max() <= 1e-4


def test_bfloat16_is_channels_last_throughout():
    seen = []
    decoder = Decoder.random(NARROW_SD3, seed=0, dtype=torch.bfloat16)
    assert decoder.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    for module in decoder.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda _m, inputs, output: seen.extend((*inputs, output)))
    norms = [p for name, p in decoder.named_parameters() if "norm" in name]
    assert {p.dtype for p in norms} == {torch.float32}
    decoder.images(latents_for(1))
    assert len(seen) > 60
    assert all(t.dtype == torch.bfloat16 and t.is_contiguous(memory_format=torch.channels_last) for t in seen)


def test_micro_batches_give_the_same_images():
    whole = Decoder.random(NARROW_SD3, seed=0)
    parts = Decoder.from_state_dict(NARROW_SD3, whole.state_dict(), micro_batch=2)
    sizes = []
    parts.decoder.register_forward_hook(lambda _m, inputs, _o: sizes.append(len(inputs[0])))
    latents = latents_for(5)
    images = parts.images(latents)
    assert sizes == [2, 2, 1]
    assert images.shape == (5, 3, 64, 64)
    assert images.dtype == torch.float32
    assert images.is_contiguous()
    assert (images - whole.images(latents)).abs().max() <= 1e-5
    assert (images.min(), images.max()) == (0, 1)  # clamped on both sides
    assert images.std() > 0.2


@pytest.fixture
def pair():
    reference = Decoder.random(NARROW_SD3, seed=0)
    return Decoder.from_state_dict(NARROW_SD3, reference.state_dict(), dtype=torch.bfloat16), reference


def test_gate_passes_bfloat16(pair):
    assert 40 < psnr_gate(*pair, latents_for(2)) < 70
    vae = tiny_vae()
    config, state = DecoderConfig.from_mapping(vae.config), vae.state_dict()
    fast, reference = (Decoder.from_state_dict(config, state, dtype=d) for d in (torch.bfloat16, torch.float32))
    assert 40 < psnr_gate(fast, reference, latents_for(2)) < 90


def test_gate_refuses_bfloat16_statistics(pair, monkeypatch):
    def bfloat16_statistics(x, groups, weight, bias, *, eps, silu, backend):
        if x.dtype == torch.float32:
            return group_norm(x, groups, weight, bias, eps=eps, silu=silu, backend=backend)
        values = x.reshape(len(x), groups, -1)
        mean, square = (sum_in_bfloat16(v) / values.shape[2] for v in (values, values * values))
        normed = (values - mean) * ((square - mean * mean).clamp_min(0) + eps).rsqrt()
        weight, bias = (t.to(x.dtype).view(1, -1, 1, 1) for t in (weight, bias))
        y = torch.addcmul(bias, normed.reshape(x.shape), weight)
        return F.silu(y) if silu else y

    def sum_in_bfloat16(values):
        total = torch.zeros_like(values[..., :1])
        for part in values.split(max(1, values.shape[2] // 256), 2):
            total = total + part.sum(2, keepdim=True)
        return total

    monkeypatch.setattr(decoder_module, "group_norm", bfloat16_statistics)
    with pytest.raises(ImageQualityError, match=r"dB against torch\.float32, below 40 dB"):
        psnr_gate(*pair, latents_for(2))


def test_gate_judges_the_worst_image_and_refuses_nan(pair):
    _, reference = pair

    class OneBad(Decoder):
        def images(self, latents):
            images = super().images(latents)
            images[-1] += self.change
            return images

    bad = OneBad.from_state_dict(NARROW_SD3, reference.state_dict())
    bad.change = 0.02  # 34 dB in this image, 43 dB over all eight
    with pytest.raises(ImageQualityError, match=r"34\.0 dB"):
        psnr_gate(bad, reference, latents_for(8))
    bad.change = float("nan")
    with pytest.raises(ImageQualityError, match="nan dB"):
        psnr_gate(bad, reference, latents_for(2))


def test_bad_input_names_the_field(pair):
    state = pair[1].state_dict()
    with pytest.raises(UserError, match=r"1 weights .* 'decoder.conv_in.bias': want \[96\], found nothing"):
        Decoder.from_state_dict(NARROW_SD3, {k: v for k, v in state.items() if k != "decoder.conv_in.bias"})
    with pytest.raises(UserError, match=r"want \[512, 16, 3, 3\], found \[96, 16, 3, 3\]"):
        Decoder.from_state_dict(SD3_DECODER, state, device="meta")
    with pytest.raises(UserError, match="act_fn 'gelu'"):
        DecoderConfig.from_mapping({"block_out_channels": [64], "act_fn": "gelu"})
    with pytest.raises(UserError, match="latents_mean"):
        DecoderConfig.from_mapping({"block_out_channels": [64], "latents_mean": [0.0]})
    with pytest.raises(ValueError, match=r"dtype = torch\.float16"):
        Decoder(NARROW_SD3, dtype=torch.float16)
    with pytest.raises(ValueError, match="micro_batch = 0"):
        Decoder(NARROW_SD3, micro_batch=0)
    for wrong in (latents_for(1).bfloat16(), latents_for(1)[0], latents_for(1)[:, :4]):
        with pytest.raises(ValueError, match=r"want \[B, 16, h, w\] float32"):
            pair[0].images(wrong)

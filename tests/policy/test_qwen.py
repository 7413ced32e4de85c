"""Qwen-Image policy: parity with stock QwenImagePipeline, text with a mask, guidance that keeps lengths, whole runs.

Bugs planted in a copy, each seen red (tests/mutants): the mask left out; the rescaling left out of the gradient; rows
counted from the columns' middle; the template's first tokens kept; the empty prompt instead of a space; latents
decoded without their deviations; what padding adds to attention made by every block, or of the first prompts alone.
"""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_qwen_lora_to_diffusers
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from advgrpo.config import LORA_TARGETS, LoraSection
from advgrpo.errors import UserError
from advgrpo.plan import known_models
from advgrpo.policy.adapters import target_modules
from advgrpo.policy.fused.transformer import FusedTransformer, TransformerConfig
from advgrpo.policy.guidance import rescaled_guidance
from advgrpo.policy.lora_file import convert
from advgrpo.policy.packing import pack
from advgrpo.policy.pipelines import native_guidance
from advgrpo.policy.qwen import QwenPolicy
from advgrpo.sampling.drawing import Drawn
from advgrpo.sampling.stock import draw_stock
from advgrpo.training.fast import FastPaths
from advgrpo.training.preflight import preflight
from tests.families import (
    PROMPTS,
    ROW,
    accumulated,
    assert_a_stopped_run_goes_on,
    assert_an_embedding_is_of_its_prompt_alone,
    assert_captured_steps_follow_the_prompts,
    assert_gradients,
    assert_on_policy,
    assert_preset_trains,
    assert_the_reference_is_the_base,
    both_forwards,
    clipped_loss_written_out,
    edited,
    load,
    merged_in_fp8,
    ode_images,
    sample,
    stock,
    with_adapters_of,
)
from tests.parts import assert_generate_draws, train_adapters
from tests.qwen_models import save_pipeline

GUIDANCE = 4.0
MOST_TOKENS = 20  # of a text; the first prompt's are 16, the second's 12
FEED_FORWARDS = tuple(f"{stream}_mlp.net.{name}" for stream in ("img", "txt") for name in ("0.proj", "2"))


@pytest.fixture(scope="session")
def qwen_pipeline(tmp_path_factory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("qwen") / "pipeline", shard="300KB")


@pytest.fixture
def settings(unit_config, qwen_pipeline):
    """The unit run on a Qwen-Image model."""
    unit_config.model.path, unit_config.model.max_sequence_length = str(qwen_pipeline), MOST_TOKENS
    unit_config.rollout.guidance_scale = unit_config.evaluation.guidance_scale = GUIDANCE
    return unit_config


def stock_images(pipe, initial, *, steps, guidance):
    return pipe(
        PROMPTS, negative_prompt=[" "] * 2, true_cfg_scale=guidance, latents=pack(initial), num_inference_steps=steps,
        height=32, width=32, max_sequence_length=MOST_TOKENS, output_type="pt",
    ).images  # fmt: skip


def velocity_at(policy, latents, text, *, guidance=GUIDANCE):
    """[R, C, H, W], guided, at timestep 500."""
    prepared = policy.prepare(text, torch.tensor([900.0, 500.0]), guidance=guidance)
    with torch.no_grad():
        velocity, unconditional = policy.predict(latents, torch.tensor([1]), prepared)
    assert unconditional is None  # what was combined is one prediction
    return velocity


@both_forwards
@pytest.mark.parametrize("guidance", [1.0, GUIDANCE])
def test_ode_images_equal_the_stock_pipelines(settings, guidance, fused):
    policy = load(settings, fused=fused)
    assert isinstance(policy, QwenPolicy)
    initial, images = ode_images(policy, steps=5, guidance=guidance)
    expected = stock_images(stock(settings), initial, steps=5, guidance=guidance)
    assert (images - expected).abs().max() <= 1e-5
    assert expected.std() > 0.01
    assert (images - ode_images(policy, steps=5, guidance=guidance + 2)[1]).abs().max() > 1e-3


def written_out(conditional: torch.Tensor, unconditional: torch.Tensor, scale: float) -> torch.Tensor:
    """As the pipeline has it, over packed tokens [R, T, 4·C]."""
    combined = unconditional + scale * (conditional - unconditional)
    return combined * (conditional.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True))


@pytest.mark.parametrize("scale", [1.5, GUIDANCE])
def test_rescaled_guidance_and_its_gradient_equal_autograds(scale):
    both = torch.randn(2, 3, 16, 4, 6, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(3, 16, 4, 6, dtype=torch.float64)
    expected = written_out(pack(both[0]), pack(both[1]), scale)
    (gradient,) = torch.autograd.grad(expected, both, pack(upstream))
    ours = both.detach().float().requires_grad_()
    found = rescaled_guidance(ours[0], ours[1], scale, 2)
    torch.testing.assert_close(pack(found).double(), expected, rtol=1e-5, atol=1e-5)
    found.backward(upstream.float())
    torch.testing.assert_close(ours.grad.double(), gradient, rtol=1e-5, atol=1e-5)
    half = rescaled_guidance(ours[0].bfloat16(), ours[1].bfloat16(), scale, 2)
    assert half.dtype == torch.float32
    torch.testing.assert_close(pack(half).norm(dim=-1), pack(ours[0].bfloat16().float()).norm(dim=-1))


@both_forwards
@pytest.mark.parametrize(
    ("guidance", "tolerance"),
    [(1.0, 1e-5), pytest.param(1.5, 1e-5, marks=pytest.mark.weekly), (GUIDANCE, 2e-5)],
)
def test_lora_gradients_equal_those_of_the_stock_transformer(settings, guidance, tolerance, fused):
    """Stock call with PEFT's own adapters, guidance, step, likelihood, ratio and clip written out, by autograd; a
    guidance of 4 multiplies rounding as well."""
    settings.update.clip_range, settings.rollout.guidance_scale = 0.5, guidance
    settings.model.lora.targets = (*LORA_TARGETS, *FEED_FORWARDS)
    policy = load(settings, fused=fused)
    train_adapters(policy)
    rollout, table = sample(policy, settings)
    _, gradient = accumulated(policy, settings, rollout, table)
    pipe = stock(settings)
    theirs = with_adapters_of(policy, pipe.transformer, settings)
    texts = [pipe.encode_prompt(prompts) for prompts in (PROMPTS, [" "] * 2)]

    def velocity(latents, step):
        both = [
            pipe.transformer(
                pack(latents),
                timestep=table.timesteps[step.step].expand(6) / 1000,
                encoder_hidden_states=text[ROW],
                encoder_hidden_states_mask=None if mask is None else mask[ROW],
                img_shapes=[[(1, 4, 4)]] * 6,
                return_dict=False,
            )[0]
            for text, mask in texts
        ]
        return pipe._unpack_latents(written_out(*both, guidance), 32, 32, 4)[:, :, 0]

    clipped_loss_written_out(rollout, table, velocity).backward()
    assert_gradients(policy, gradient, theirs, tolerance)


@both_forwards
@pytest.mark.parametrize(("share", "dynamics", "window"), [(True, "flow_cps", (1, 2)), (False, "flow_sde", (0, 3))])
def test_log_probs_before_the_first_step_are_exact(settings, share, dynamics, window, fused):
    settings.rollout.dynamics = dynamics
    assert_on_policy(load(settings, fused=fused), settings, window=window, share=share)


@both_forwards
def test_bfloat16_base_with_float32_adapters_keeps_ratios_exact(settings, fused):
    policy = load(settings, fused=fused, dtype="bfloat16", gradient_checkpointing=True)
    assert policy.transformer.dtype == torch.bfloat16
    assert_on_policy(policy, settings, window=(1, 2))


# The text.


def test_text_is_the_encoders_last_state_without_the_templates_beginning(settings):
    policy, pipe = load(settings), stock(settings)
    beginning, end = pipe.prompt_template_encode.split("{}")
    assert len(pipe.tokenizer(beginning).input_ids) == 34
    encoded, lengths = policy.encode([*PROMPTS, " "]), []
    for prompt, text, mask in zip([*PROMPTS, " "], encoded.text, encoded.mask):
        tokens = pipe.tokenizer(beginning + prompt + end, return_tensors="pt")
        with torch.no_grad():
            expected = pipe.text_encoder(**tokens, output_hidden_states=True).hidden_states[-1][0, 34:]
        lengths.append(len(expected))
        assert mask.tolist() == [True] * len(expected) + [False] * (MOST_TOKENS - len(expected))
        torch.testing.assert_close(text[: len(expected)], expected, rtol=1e-5, atol=1e-5)
        assert not text[len(expected) :].any()
    assert lengths == [16, 12, 6]
    assert policy.unconditional().mask.sum() == 6
    short = load(settings, max_sequence_length=8).encode(PROMPTS)
    assert torch.equal(short.text, encoded.text[:2, :8])
    assert short.mask.all()


def test_an_embedding_is_the_same_to_the_bit_alone_and_with_others(settings):
    assert_an_embedding_is_of_its_prompt_alone(load(settings))


@both_forwards
def test_what_stands_beside_a_row_and_in_its_padding_changes_none_of_its_bits(settings, fused):
    policy = load(settings, fused=fused)
    latents, text = torch.randn(2, *policy.latent_shape()), policy.encode(PROMPTS)
    expected = velocity_at(policy, latents, text)
    text.text[~text.mask] = 7.0
    assert torch.equal(velocity_at(policy, latents, text), expected)
    text.text[0] += 1.0
    changed = velocity_at(policy, latents, text)
    assert torch.equal(changed[1], expected[1])
    assert not torch.equal(changed[0], expected[0])
    second = policy.encode(PROMPTS[1:])
    torch.testing.assert_close(velocity_at(policy, latents[1:], second)[0], expected[1], rtol=1e-5, atol=1e-5)
    second.mask[0, 12:] = True  # padding that is attended to is another prompt
    assert (velocity_at(policy, latents[1:], second)[0] - expected[1]).abs().max() > 1e-4


@pytest.mark.usefixtures("layers_by_pytorch")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_padding_adds_to_attention_is_made_once_for_all_blocks(settings, checkpointing):
    """Of a forward and its backward; numbers of rows and keys, not of heads or queries."""
    policy = load(settings, gradient_checkpointing=checkpointing)
    prepared = policy.prepare(policy.encode(PROMPTS), torch.tensor([500.0]), guidance=1.0)
    made = []

    class Made(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket == torch.ops.aten.masked_fill_:
                made.append(args[0].untyped_storage().nbytes())
            return function(*args, **(kwargs or {}))

    with Made():
        policy.predict(torch.randn(2, *policy.latent_shape()), torch.tensor([0]), prepared)[0].sum().backward()
    assert made == [2 * 48 * 4]  # 36 keys, in rows of 16
    assert len(policy.network.transformer.blocks) == 3


@pytest.mark.usefixtures("layers_by_pytorch")
def test_captured_steps_follow_the_lengths_of_the_prompts_at_hand(settings, monkeypatch):
    """Texts of 16, 12 and 6 tokens in the same static storage, of which a replay makes what padding adds."""
    assert_captured_steps_follow_the_prompts(settings, monkeypatch)


def test_rotations_are_the_stock_embeddings_for_any_size(settings):
    ours = load(settings).network.transformer
    for height, width in ((3, 5), (6, 2)):
        image, text = stock(settings).transformer.pos_embed((1, height, width), "cpu", 7)
        for part, expected in zip(ours._rotary((2 * height, 2 * width), 7), (torch.real, torch.imag)):
            torch.testing.assert_close(part, expected(torch.cat([image, text])), rtol=0, atol=1e-5)


def test_waves_of_a_time_are_the_stock_embeddings_to_the_bit(settings):
    """A thousand times the angles, not the angles of a thousand times the time, whose cosines differ by 6e-5."""
    times = torch.tensor([999.9, 901.2345, 713.37, 500.1, 20.7])
    expected = stock(settings).transformer.time_text_embed.time_proj(times / 1000)
    assert torch.equal(load(settings).network.transformer._waves(times), expected)


# Schedule and VAE.


def test_the_schedule_is_shifted_by_the_size_and_ends_at_the_terminal(settings):
    small, large = load(settings), load(settings, resolution=64)
    assert (small.image_tokens, large.image_tokens) == (16, 64)
    levels, timesteps = small.schedule(4)
    assert levels[-2:].tolist() == pytest.approx([0.02, 0.0], abs=1e-6)
    assert not torch.equal(levels, large.schedule(4)[0])
    torch.testing.assert_close(timesteps, (1000 * levels[:-1]).float())
    sigmas, times = small.training_sigmas(torch.tensor([0.25, 0.5]))
    torch.testing.assert_close(
        sigmas, small.shift * torch.tensor([0.25, 0.5]) / (1 + (small.shift - 1) * torch.tensor([0.25, 0.5]))
    )
    torch.testing.assert_close(times, 1000 * sigmas)


def test_latents_of_an_image_are_what_decodes_to_it(settings):
    policy, vae = load(settings), stock(settings).vae
    images = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(vae.config[name]).view(1, 16, 1, 1) for name in ("latents_mean", "latents_std"))
    posterior = vae.encode((images * 2 - 1).unsqueeze(2)).latent_dist.mode()[:, :, 0]
    latents = policy.encode_images(images)
    torch.testing.assert_close(latents, (posterior - mean) / std, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        decoded = vae.decode(posterior.unsqueeze(2)).sample[:, :, 0]
    torch.testing.assert_close(policy.decode(latents), (decoded / 2 + 0.5).clamp(0, 1), rtol=1e-4, atol=1e-5)
    assert torch.equal(policy.decode(latents[1:])[0], policy.decode(latents)[1])


# Weights and adapters.


@pytest.mark.parametrize("precision", ["model", "fp8"])
def test_merged_weights_equal_adapters(settings, precision):
    """FP8 to what its eight bits give; all blocks are quantised but the first and the last."""
    settings.model.lora.targets = (*LORA_TARGETS, *FEED_FORWARDS)
    policy = load(settings, precision=precision)
    quantised = merged_in_fp8(policy, guidance=1.0, precision=precision)
    if precision == "fp8":
        assert {name.split(".")[1] for name in quantised} == {"1"}


def test_frozen_weights_in_fp8_keep_ratios_exact(settings):
    policy = load(settings, base_precision="fp8")
    assert sum(layer.base_fp8 is not None for layer in policy.network.transformer.linears()) == 8
    assert_on_policy(policy, settings, window=(1, 2))


def test_reference_is_the_base_model_bit_for_bit(settings):
    assert_the_reference_is_the_base(load(settings))


def test_an_exported_lora_is_the_trained_policy_in_stock_diffusers(settings, tmp_path):
    """In diffusers' own file, and through the names of kohya's scripts (musubi-tuner), which its loader converts."""
    lora = LoraSection(rank=4, alpha=8, targets=(*LORA_TARGETS, *FEED_FORWARDS), export_format="kohya")
    policy = load(settings, lora=lora)
    train_adapters(policy)
    initial, images = ode_images(policy, steps=3, guidance=GUIDANCE)
    policy.export(tmp_path / "lora")
    pipe = stock(settings)
    assert (images - stock_images(pipe, initial, steps=3, guidance=GUIDANCE)).abs().max() > 1e-2
    for name in ("pytorch_lora_weights", "kohya"):
        pipe.load_lora_weights(tmp_path / "lora" / f"{name}.safetensors")
        assert (images - stock_images(pipe, initial, steps=3, guidance=GUIDANCE)).abs().max() <= 1e-4
        pipe.unload_lora_weights()


def test_lora_on_the_exact_qwen_image_configuration(monkeypatch):
    """60 blocks of 24 heads of 128 (meta device: no memory, no weights)."""
    monkeypatch.undo()  # conftest's NaN poisoning would allocate the weights
    with torch.device("meta"):
        network = QwenImageTransformer2DModel(**known_models.QWEN_TRANSFORMERS["Qwen/Qwen-Image"])
        names = target_modules(network, LoraSection())
    assert sum(p.numel() for p in network.parameters()) == 20_430_401_088
    assert len(names) == 60 * 8
    tensors = {name: p.detach() for name, p in network.named_parameters()}
    ours = FusedTransformer(TransformerConfig.from_stock(network.config), tensors, attention="math")
    lora = ours.adapt(set(names).__contains__, rank=32, alpha=64, init="gaussian", seed=0)
    assert lora.master.numel() == 480 * 32 * 2 * 3072
    text, pooled, latents = (torch.empty(2, *shape, device="meta") for shape in ((128, 3584), (0,), (16, 128, 128)))
    mask = torch.empty(2, 128, dtype=torch.bool, device="meta")
    prepared = ours.prepare(text, pooled, torch.empty(6, device="meta"), mask=mask)
    assert prepared.modulation.shape == (6, 1, (60 * 12 + 2) * 3072)  # the same for all prompts
    step = torch.zeros(1, dtype=torch.int64, device="meta")
    with torch.no_grad():  # 4096 image tokens at 1024 pixels
        assert ours.predict(latents, step, prepared, "adapted").shape == latents.shape
    modules = {name: (torch.zeros(1, 3072), torch.zeros(3072, 1)) for name in names}
    tensors, header = convert(modules, "transformer", "kohya")
    assert header["ss_network_module"] == "networks.lora_qwen_image"
    found = _convert_non_diffusers_qwen_lora_to_diffusers(dict(tensors))
    assert {name.rsplit(".lora_", 1)[0].removeprefix("transformer.") for name in found} == set(names)


def test_what_is_prepared_can_lie_in_static_storage(settings):
    latents, step = torch.randn(2, 16, 8, 8), torch.tensor([1])
    for fused in (True, False):
        policy = load(settings, fused=fused)
        prepared = policy.prepare(policy.encode(PROMPTS), torch.tensor([900.0, 500.0]), guidance=GUIDANCE)
        tensors = policy.prompt_tensors(prepared)
        assert tensors["mask"].shape == (4, MOST_TOKENS)
        again = policy.with_prompt_tensors(prepared, {name: t.clone() for name, t in tensors.items()})
        expected = policy.predict(latents, step, prepared)[0]
        assert torch.equal(policy.predict(latents, step, again)[0], expected)
        swapped = policy.predict(latents.flip(0), step, prepared.rows(torch.tensor([1, 0])))[0]
        torch.testing.assert_close(swapped.flip(0), expected, rtol=1e-4, atol=1e-5)


# Runs and refusals.


def test_a_run_trains_and_goes_on_as_if_never_stopped(settings, tmp_path):
    assert_a_stopped_run_goes_on(settings, tmp_path)
    stock(settings).load_lora_weights(tmp_path / "whole" / "lora")
    names = load_file(tmp_path / "whole" / "lora" / "pytorch_lora_weights.safetensors")
    assert len(names) == 2 * 3 * 8


def test_the_preset_trains_a_folder_by_one_command(settings, tmp_path):
    settings.data.held_out_prompts = ""  # evaluations are FLUX.1's test's
    fewer = {"rollout.group-size": 2, "rollout.micro-batch": 2, "rollout.num-steps": 4}
    assert_preset_trains("qwen-image-dino", settings, tmp_path / "run", iterations=1, **fewer)


@pytest.mark.weekly
def test_generate_draws_base_and_lora(settings, tmp_path, capsys):
    policy = load(settings)
    train_adapters(policy)
    assert_generate_draws(policy, PROMPTS[0], settings, tmp_path, capsys)


def test_stock_drawing_looks_at_the_guidance(settings):
    assert native_guidance(Path(settings.model.path)) == 4.0
    pipe, images = stock(settings), []
    for scale in (1.0, GUIDANCE):
        drawn = Drawn(guidance_scale=scale, num_steps=2, resolution=32, max_sequence_length=MOST_TOKENS)
        images.append(draw_stock(pipe, drawn, PROMPTS[0], [0]))
    assert not torch.equal(*images)


def test_what_is_not_for_qwen_image_is_refused_before_it_is_loaded(settings, tmp_path):
    preflight(settings)
    changed = settings.model_copy(deep=True)
    changed.model.resolution = 36
    with pytest.raises(UserError, match=r"model\.resolution = 36: this model wants a multiple of 8, such as 32"):
        preflight(changed)
    changed.model.resolution, changed.model.decoder_dtype = 32, "bfloat16"
    with pytest.raises(UserError, match=r"model\.decoder_dtype = 'bfloat16': Qwen-Image's VAE decodes in float32"):
        preflight(changed)
    unmasked = settings.model_copy(deep=True, update={"fast": True})
    unmasked.model.attention = "flash2"
    for early_and_late in (lambda: FastPaths.choose(unmasked, torch.device("cpu")), lambda: load(unmasked)):
        with pytest.raises(UserError, match=r"model\.attention = 'flash2': it takes no mask, which this model's text"):
            early_and_late()
    changed.model.decoder_dtype, changed.evaluation.num_steps = settings.model.decoder_dtype, 1
    with pytest.raises(UserError, match=r"evaluation\.num_steps = 1: its schedule has no single step"):
        preflight(changed)
    network = QwenImageTransformer2DModel.load_config(settings.model.path, subfolder="transformer")
    halved, vae = SimpleNamespace(**{**network, "out_channels": 8}), SimpleNamespace(z_dim=16)
    with pytest.raises(UserError, match="its transformer maps 64 to 32 channels, packed latents have 64"):
        QwenPolicy.check_parts(settings.model, {}, halved, vae, {})
    edited(settings, tmp_path / "edited", "transformer", zero_cond_t=True)
    with pytest.raises(UserError, match="its transformer has zero_cond_t; want a text-to-image model"):
        preflight(settings)


def test_what_fast_switches_on(settings):
    fast = FastPaths.choose(settings, torch.device("cpu"))
    assert (fast.share_prefix, fast.fused_optimizer, fast.fused, fast.graphs) == (True, True, True, False)
    settings.model.lora.targets = (*FEED_FORWARDS, "img_mod.1")
    fast = FastPaths.choose(settings, torch.device("cpu"))
    rows = {row.name: row for row in fast.table}
    assert rows["fused transformer"].why == "it has no adapters on img_mod.1 (model.lora.targets)"

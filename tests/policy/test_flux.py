"""FLUX.1 policy: parity with stock FluxPipeline, exact log-probs, whole runs, LoRA for other programs, bad input.

Bugs planted in a copy, each seen red: rows and columns of a patch swapped in `pack` and back; image ids without
columns, or counted in latents; a fixed shift; guidance times 1000 twice, or left out of `rows`; a second row for
embedded guidance; T5's text where CLIP's vector belongs; latents not unscaled; single blocks left out of the LoRA;
prompts padded to the longest that is encoded with them; the first row's pooled vector for all.
"""

import math
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers

from advgrpo.config import LORA_TARGETS, LoraSection
from advgrpo.errors import UserError
from advgrpo.policy.adapters import stored_network, target_modules
from advgrpo.policy.flux import FluxPolicy, image_ids
from advgrpo.policy.fused.transformer import FusedTransformer, TransformerConfig
from advgrpo.policy.lora_file import convert
from advgrpo.policy.packing import pack, unpack
from advgrpo.policy.pipelines import native_guidance
from advgrpo.sampling.drawing import Drawn
from advgrpo.sampling.stock import draw_stock
from advgrpo.training.fast import FastPaths
from advgrpo.training.models import lora_section
from advgrpo.training.preflight import preflight
from tests.families import (
    PROMPTS,
    ROW,
    accumulated,
    assert_a_rows_bits_are_of_its_text_alone,
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
from tests.flux_models import save_pipeline
from tests.parts import assert_generate_draws, train_adapters


@pytest.fixture(scope="session")
def flux_pipelines(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("flux")
    return {
        "dev": save_pipeline(folder / "dev", shard="300KB"),
        "schnell": save_pipeline(folder / "schnell", guidance_embeds=False),
    }


@pytest.fixture
def kind() -> str:
    return "dev"  # unless parametrized


@pytest.fixture
def settings(unit_config, flux_pipelines, kind):
    """The unit run on a FLUX.1 model."""
    unit_config.model.path = str(flux_pipelines[kind])
    unit_config.rollout.guidance_scale = unit_config.evaluation.guidance_scale = 3.5
    return unit_config


both_kinds = pytest.mark.parametrize("kind", ["dev", "schnell"])


def stock_images(pipe, initial, *, steps, guidance):
    """By the pipeline's own call; what has no embedding is guided by its true_cfg_scale."""
    embeds = pipe.transformer.config.guidance_embeds
    how = {"guidance_scale": guidance} if embeds else {"true_cfg_scale": guidance, "negative_prompt": [""] * 2}
    return pipe(
        PROMPTS, latents=pack(initial.clone()), num_inference_steps=steps, height=32, width=32,
        max_sequence_length=12, output_type="pt", **how,
    ).images  # fmt: skip


@both_kinds
@both_forwards
@pytest.mark.parametrize("guidance", [3.5, 1.0])  # schnell takes the second row above 1
@pytest.mark.in_ci(4)
def test_ode_images_equal_the_stock_pipelines(settings, guidance, fused):
    policy = load(settings, fused=fused)
    initial, images = ode_images(policy, steps=5, guidance=guidance)
    expected = stock_images(stock(settings), initial, steps=5, guidance=guidance)
    assert (images - expected).abs().max() <= 1e-5
    assert expected.std() > 0.01
    other = ode_images(policy, steps=5, guidance=guidance + 1)[1]
    assert (images - other).abs().max() > 1e-3


def test_an_embedding_is_the_same_to_the_bit_alone_and_with_others(settings):
    assert_an_embedding_is_of_its_prompt_alone(load(settings))


@both_forwards
@both_kinds
@pytest.mark.in_ci(2)
def test_what_stands_beside_a_row_changes_none_of_its_bits(settings, fused):
    assert_a_rows_bits_are_of_its_text_alone(load(settings, fused=fused), guidance=3.5)


def test_packing_is_the_pipelines_and_undone():
    latents = torch.randn(2, 16, 4, 6)
    packed = pack(latents)
    assert torch.equal(packed, FluxPipeline._pack_latents(latents, 2, 16, 4, 6))
    assert torch.equal(unpack(packed, (4, 6)), latents)
    expected = FluxPipeline._prepare_latent_image_ids(2, 2, 3, "cpu", torch.float32)
    assert torch.equal(image_ids((4, 6), torch.device("cpu")), expected)


def test_the_shift_follows_the_resolution_and_the_training_levels_follow_the_shift(settings):
    small, large = load(settings), load(settings, resolution=64)
    assert (small.image_tokens, large.image_tokens) == (16, 64)
    assert math.log(small.shift) == pytest.approx(0.5 + 0.65 * (16 - 8) / (64 - 8))
    assert math.log(large.shift) == pytest.approx(1.15)
    levels, timesteps = large.schedule(4)
    assert not torch.equal(levels, small.schedule(4)[0])
    assert levels[-1] == 0
    torch.testing.assert_close(timesteps, (1000 * levels[:-1]).float())
    sigmas, times = large.training_sigmas(torch.tensor([1.0, 0.75, 0.5, 0.25]))
    torch.testing.assert_close(sigmas.double(), levels[:-1], rtol=1e-6, atol=0)
    torch.testing.assert_close(times, timesteps, rtol=1e-6, atol=0)


@both_kinds
@both_forwards
@pytest.mark.parametrize(("share", "dynamics", "window"), [(True, "flow_cps", (1, 2)), (False, "flow_sde", (0, 3))])
def test_log_probs_before_the_first_step_are_exact(settings, share, dynamics, window, fused):
    settings.rollout.dynamics = dynamics
    assert_on_policy(load(settings, fused=fused), settings, window=window, share=share)


@both_forwards
def test_lora_gradients_equal_those_of_the_stock_transformer(settings, fused):
    """Stock call with PEFT's own adapters, the step, likelihood, ratio and clip written out, by autograd."""
    settings.update.clip_range = 0.5
    policy = load(settings, fused=fused)
    train_adapters(policy)
    rollout, table = sample(policy, settings)
    _, gradient = accumulated(policy, settings, rollout, table)
    pipe = stock(settings)
    theirs = with_adapters_of(policy, pipe.transformer, settings)
    text, pooled, text_ids = pipe.encode_prompt(PROMPTS, max_sequence_length=settings.model.max_sequence_length)
    ids = pipe._prepare_latent_image_ids(6, 4, 4, "cpu", torch.float32)

    def velocity(latents, step):
        packed = pipe.transformer(
            pipe._pack_latents(latents, 6, 16, 8, 8),
            timestep=table.timesteps[step.step].expand(6) / 1000,
            guidance=torch.full((6,), 3.5),
            encoder_hidden_states=text[ROW],
            pooled_projections=pooled[ROW],
            img_ids=ids,
            txt_ids=text_ids,
            return_dict=False,
        )[0]
        return pipe._unpack_latents(packed, 32, 32, 4)

    clipped_loss_written_out(rollout, table, velocity).backward()
    assert_gradients(policy, gradient, theirs)


@pytest.mark.parametrize("precision", ["model", "fp8"])
def test_merged_weights_equal_adapters(settings, precision):
    """FP8 to what its eight bits give; blocks of both kinds are quantised but the first and the last."""
    settings.model.lora.targets = (*LORA_TARGETS, "proj_mlp", "proj_out")
    policy = load(settings, precision=precision)
    quantised = merged_in_fp8(policy, guidance=3.5, precision=precision)
    if precision == "fp8":
        assert {name.split(".attn")[0] for name in quantised if ".to_q" in name} == {
            "transformer_blocks.1", "single_transformer_blocks.0",
        }  # fmt: skip


def test_reference_is_the_base_model_bit_for_bit(settings):
    assert_the_reference_is_the_base(load(settings))


def test_an_exported_lora_is_the_trained_policy_in_stock_diffusers(settings, tmp_path):
    targets = (*LORA_TARGETS, "ff.net.0.proj", "ff_context.net.2", "proj_mlp", "proj_out", "norm1.linear")
    policy = load(settings, fused=False, lora=LoraSection(rank=4, alpha=8, targets=targets))
    train_adapters(policy)
    initial, images = ode_images(policy, steps=3, guidance=3.0)
    policy.export(tmp_path / "lora")
    pipe = stock(settings)
    before = stock_images(pipe, initial, steps=3, guidance=3.0)
    pipe.load_lora_weights(tmp_path / "lora")
    assert (images - before).abs().max() > 1e-2
    assert (images - stock_images(pipe, initial, steps=3, guidance=3.0)).abs().max() <= 1e-4


@pytest.mark.parametrize("scope", ["every layer", "attention", "blocks of two streams"])
def test_kohyas_names_are_read_by_diffusers_converter_with_the_same_updates(scope, monkeypatch):
    """At FLUX.1's own width, which that converter wants: one block of each kind, on the meta device."""
    monkeypatch.undo()  # conftest's NaN poisoning would allocate them
    with torch.device("meta"):
        network = FluxTransformer2DModel(num_layers=1, num_single_layers=1)
    linear = {n: m for n, m in network.named_modules() if isinstance(m, torch.nn.Linear) and "blocks" in n}
    if scope != "every layer":
        linear = {n: m for n, m in linear.items() if ".attn." in n}
    if scope == "blocks of two streams":
        linear = {n: m for n, m in linear.items() if n.startswith("transformer_blocks")}
    generator = torch.Generator().manual_seed(1)
    modules = {
        name: (
            torch.randn(1, layer.in_features, generator=generator),
            torch.randn(layer.out_features, 1, generator=generator),
        )
        for name, layer in linear.items()
    }
    tensors, header = convert(modules, "transformer", "kohya")
    assert header["ss_network_module"] == "networks.lora_flux"
    found = _convert_kohya_flux_lora_to_diffusers(dict(tensors))
    names = {name.rsplit(".lora_", 1)[0].removeprefix("transformer.") for name in found}
    assert names - modules.keys() <= {"single_transformer_blocks.0.proj_mlp"}  # one module with q, k and v there
    for name in names - modules.keys():
        modules[name] = (torch.zeros(1, 3072), torch.zeros(12288, 1))
    assert names == modules.keys()
    for name, (a, b) in modules.items():
        down, up = (found[f"transformer.{name}.lora_{side}.weight"] for side in "AB")
        probe = torch.randn(down.shape[1], generator=generator)
        torch.testing.assert_close(up @ (down @ probe), b @ (a @ probe), rtol=1e-4, atol=1e-3)


def test_a_lora_is_read_back_with_its_scope(settings, tmp_path):
    policy = load(settings)
    train_adapters(policy)
    policy.export(tmp_path / "lora")
    section = lora_section(tmp_path / "lora", Path(settings.model.path))
    assert (section.rank, section.alpha, section.blocks) == (4, 4, "all")
    again, own = (each.network.lora.state_dict() for each in (load(settings, lora=section), policy))
    assert again.keys() == own.keys()
    assert all(torch.equal(again[name], own[name] * (2 if "lora_B" in name else 1)) for name in own)
    load(settings, lora=LoraSection(rank=2, blocks=3, targets=("attn.to_k",))).export(tmp_path / "last")
    section = lora_section(tmp_path / "last", Path(settings.model.path))
    assert (section.rank, section.blocks, section.targets) == (2, 3, ("attn.to_k",))


def test_lora_scope(settings):
    names = list(load(settings, fused=False).network.adapters.modules())
    assert names == list(load(settings).network.lora.modules())
    assert len(names) == 2 * 8 + 2 * 3  # the blocks of one stream have no projections of text and no to_out
    last = list(load(settings, lora=LoraSection(rank=4, blocks=3)).network.lora.modules())
    assert {name.rsplit(".attn", 1)[0] for name in last} == {
        "transformer_blocks.1", "single_transformer_blocks.0", "single_transformer_blocks.1",
    }  # fmt: skip
    with pytest.raises(UserError, match="blocks = 5: the model has 4 transformer blocks"):
        load(settings, lora=LoraSection(blocks=5))


def test_lora_on_the_exact_flux1_dev_configuration(monkeypatch):
    """19 blocks of two streams and 38 of one, 3072 wide (meta device: no memory, no weights)."""
    monkeypatch.undo()  # conftest's NaN poisoning would allocate the weights
    with torch.device("meta"):
        network = FluxTransformer2DModel(guidance_embeds=True)  # diffusers' defaults are FLUX.1's
        names = target_modules(network, LoraSection())
    assert sum(p.numel() for p in network.parameters()) == 11_901_408_320
    assert len(names) == 19 * 8 + 38 * 3
    layers = [network.get_submodule(name) for name in names]
    assert {(layer.in_features, layer.out_features) for layer in layers} == {(3072, 3072)}
    tensors = {name: p.detach() for name, p in network.named_parameters()}
    ours = FusedTransformer(TransformerConfig.from_stock(network.config), tensors, attention="math")
    lora = ours.adapt(set(names).__contains__, rank=32, alpha=64, init="gaussian", seed=0)
    assert lora.master.numel() == 266 * 32 * 2 * 3072
    text, pooled, latents = (torch.empty(2, *shape, device="meta") for shape in ((512, 4096), (768,), (16, 128, 128)))
    prepared = ours.prepare(text, pooled, torch.empty(6, device="meta"), 3.5)
    assert prepared.modulation.shape == (6, 2, 19 * 12 * 3072 + 38 * 3 * 3072 + 2 * 3072)
    step = torch.zeros(1, dtype=torch.int64, device="meta")
    with torch.no_grad():  # 4096 image tokens at 1024 pixels
        assert ours.predict(latents, step, prepared, "adapted").shape == latents.shape


@both_forwards
@pytest.mark.parametrize("checkpointing", [False, True])
def test_bfloat16_base_with_float32_adapters_keeps_ratios_exact(settings, checkpointing, fused):
    policy = load(settings, fused=fused, dtype="bfloat16", gradient_checkpointing=checkpointing)
    train_adapters(policy)
    rollout, table = sample(policy, settings)
    stats, gradient = accumulated(policy, settings, rollout, table)
    assert policy.transformer.dtype == torch.bfloat16
    assert stats.max_mismatch() == 0.0
    assert gradient.abs().max() > 0


def test_what_is_prepared_can_lie_in_static_storage(settings):
    policy = load(settings)
    latents, step = torch.randn(2, *policy.latent_shape()), torch.tensor([1])
    prepared = policy.prepare(policy.encode(PROMPTS), torch.tensor([900.0, 500.0]), guidance=3.5)
    tensors = policy.prompt_tensors(prepared)
    stored = load(settings, fused=False).prepare(policy.encode(PROMPTS), torch.tensor([900.0]), guidance=3.5)
    assert policy.prompt_tensors(stored)["guidance"].tolist() == [3.5]
    again = policy.with_prompt_tensors(prepared, {name: t.clone() for name, t in tensors.items()})
    expected = policy.predict(latents, step, prepared)
    assert expected[1] is None
    assert torch.equal(policy.predict(latents, step, again)[0], expected[0])
    swapped = policy.predict(latents.flip(0), step, prepared.rows(torch.tensor([1, 0])))[0]
    torch.testing.assert_close(swapped.flip(0), expected[0], rtol=1e-4, atol=1e-5)


@pytest.mark.weekly
@both_kinds
@pytest.mark.usefixtures("layers_by_pytorch")
def test_captured_steps_follow_the_prompts_at_hand(settings, monkeypatch):
    assert_captured_steps_follow_the_prompts(settings, monkeypatch)


def test_latents_of_an_image_are_what_decodes_to_it(settings):
    policy = load(settings)
    images = torch.rand(2, 3, 32, 32)
    config = stock(settings).vae.config
    posterior = stock(settings).vae.encode(images * 2 - 1).latent_dist.mode()
    torch.testing.assert_close(policy.encode_images(images), (posterior - config.shift_factor) * config.scaling_factor)


def test_a_run_trains_and_goes_on_as_if_never_stopped(settings, tmp_path):
    assert_a_stopped_run_goes_on(settings, tmp_path)
    stock(settings).load_lora_weights(tmp_path / "whole" / "lora")


def test_the_preset_trains_a_folder_by_one_command(settings, tmp_path):
    assert_preset_trains("flux1-dino", settings, tmp_path / "run")


def test_full_fine_tuning_exports_a_transformer_that_diffusers_loads(settings, tmp_path):
    policy = load(settings, fused=False, train="full")
    train_adapters(policy)
    policy.export(tmp_path / policy.component)
    loaded = dict(FluxTransformer2DModel.from_pretrained(tmp_path / "transformer").state_dict())
    torch.testing.assert_close(loaded, dict(policy.transformer.state_dict()), rtol=0, atol=0)


def test_generate_draws_base_and_lora(settings, tmp_path, capsys):
    policy = load(settings)
    train_adapters(policy)
    assert_generate_draws(policy, PROMPTS[0], settings, tmp_path, capsys)


def test_what_is_not_for_flux_is_refused_before_it_is_loaded(settings, tmp_path):
    preflight(settings)  # sharded weights and parts that model_index.json lists as absent are a whole model
    changed = settings.model_copy(deep=True)
    changed.model.resolution = 36
    with pytest.raises(UserError, match=r"model\.resolution = 36: this model wants a multiple of 8, such as 32"):
        preflight(changed)
    settings.rollout.dynamics = "ddim"
    with pytest.raises(UserError, match=r"rollout\.dynamics = 'ddim' needs a model that predicts noise"):
        preflight(settings)
    settings.rollout.dynamics = "flow_cps"
    edited(settings, tmp_path / "edited", "scheduler", shift_terminal=0.02)
    with pytest.raises(UserError, match="its scheduler has shift_terminal"):
        preflight(settings)


@pytest.mark.parametrize("objective", ["nft", "awm", "sft"])
def test_what_is_fitted_at_guidance_1_is_drawn_at_1(settings, objective):
    settings.update.objective = objective
    settings.rollout.guidance_scale = 1.0
    with pytest.raises(UserError, match=rf"evaluation\.guidance_scale = 3\.5: .* {objective} fits it at 1"):
        preflight(settings)
    settings.evaluation.guidance_scale = 1.0
    preflight(settings)
    settings.rollout.guidance_scale = 3.5
    if objective == "sft":
        preflight(settings)  # which draws nothing to learn from
        return
    with pytest.raises(UserError, match=r"set --rollout\.guidance-scale 1"):
        preflight(settings)


def test_each_kind_is_drawn_at_the_guidance_of_its_card(flux_pipelines):
    assert {kind: native_guidance(folder) for kind, folder in flux_pipelines.items()} == {"dev": 3.5, "schnell": 1.0}


@both_kinds
def test_stock_drawing_looks_at_the_guidance(settings):
    pipe, images = stock(settings), []
    for scale in (1.0, 3.5):
        drawn = Drawn(guidance_scale=scale, num_steps=2, resolution=32, max_sequence_length=12)
        images.append(draw_stock(pipe, drawn, PROMPTS[0], [0]))
    assert not torch.equal(*images)


def test_a_transformer_of_another_task_is_named(settings, tmp_path):
    vae = stock(settings).vae.config
    edited(settings, tmp_path / "edited", "transformer", in_channels=384, out_channels=64)  # FLUX.1-Fill's
    network = stored_network(Path(settings.model.path)).config
    with pytest.raises(UserError, match="its transformer maps 384 to 64 channels, packed latents have 64; want a text"):
        FluxPolicy.check_parts(settings.model, {}, network, vae, {})


def test_what_fast_switches_on(settings):
    fast = FastPaths.choose(settings, torch.device("cpu"))
    assert (fast.share_prefix, fast.fused_optimizer, fast.fused, fast.graphs) == (True, True, True, False)
    settings.model.lora.targets = ("attn.to_q", "norm.linear")
    fast = FastPaths.choose(settings, torch.device("cpu"))
    rows = {row.name: row for row in fast.table}
    assert not fast.fused
    assert rows["fused transformer"].why == "it has no adapters on norm.linear (model.lora.targets)"

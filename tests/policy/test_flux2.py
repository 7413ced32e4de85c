"""FLUX.2 klein policy: parity with stock Flux2KleinPipeline, exact log-probs, whole runs, LoRA in diffusers, bad input.

Planted bugs that turned this file red: see tests/mutants (flux2-*); besides, latents normalised before they are
packed, and the rotation of text left at 0.
"""

import math
import re
from pathlib import Path

import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

from advgrpo import config as configuration
from advgrpo.config import LORA_TARGETS, LoraSection
from advgrpo.errors import UserError
from advgrpo.policy.adapters import stored_network, target_modules
from advgrpo.policy.flux import FluxPolicy, PackedNetwork
from advgrpo.policy.flux2 import Flux2Network, Flux2Policy
from advgrpo.policy.networks import StockNetwork
from advgrpo.policy.packed import PackedPolicy
from advgrpo.policy.pipelines import Family, native_guidance
from advgrpo.policy.qwen import QwenNetwork, QwenPolicy
from advgrpo.policy.sd3 import SD3Policy
from advgrpo.training.fast import FastPaths
from advgrpo.training.preflight import preflight
from tests.families import (
    PROMPTS,
    ROW,
    accumulated,
    assert_a_rows_bits_are_of_its_text_alone,
    assert_a_stopped_run_goes_on,
    assert_an_embedding_is_of_its_prompt_alone,
    assert_gradients,
    assert_on_policy,
    assert_preset_trains,
    assert_the_reference_is_the_base,
    clipped_loss_written_out,
    edited,
    load,
    ode_images,
    sample,
    stock,
    with_adapters_of,
)
from tests.flux2_models import save_pipeline
from tests.parts import assert_generate_draws, some_weekly, train_adapters

GUIDANCE = 4.0
MOST_TOKENS = 24
PAGE = Path(__file__).parents[2] / "docs" / "families.md"
NETWORKS = {SD3Policy: StockNetwork, FluxPolicy: PackedNetwork, QwenPolicy: QwenNetwork, Flux2Policy: Flux2Network}
TARGETS = (*LORA_TARGETS, "attn.to_qkv_mlp_proj", "attn.to_out")


@pytest.fixture(scope="session")
def flux2_pipelines(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("flux2")
    return {
        "base": save_pipeline(folder / "base", shard="300KB"),
        "distilled": save_pipeline(folder / "distilled", is_distilled=True),
    }


@pytest.fixture
def settings(unit_config, flux2_pipelines):
    """The unit run on a FLUX.2 klein."""
    unit_config.model.path, unit_config.model.max_sequence_length = str(flux2_pipelines["base"]), MOST_TOKENS
    unit_config.model.lora.targets = TARGETS
    unit_config.rollout.guidance_scale = unit_config.evaluation.guidance_scale = GUIDANCE
    return unit_config


def policy_of(settings, **changes):
    return load(settings, fused=False, **changes)


def stock_images(pipe, initial, *, steps, guidance):
    return pipe(
        prompt=PROMPTS, latents=Flux2KleinPipeline._patchify_latents(initial), num_inference_steps=steps,
        guidance_scale=guidance, height=32, width=32, max_sequence_length=MOST_TOKENS, output_type="pt",
    ).images  # fmt: skip


@pytest.mark.parametrize("guidance", some_weekly([1.0, GUIDANCE], [1.0]))
def test_ode_images_equal_the_stock_pipelines(settings, guidance):
    policy = policy_of(settings)
    assert isinstance(policy, Flux2Policy)
    initial, images = ode_images(policy, steps=5, guidance=guidance)
    expected = stock_images(stock(settings), initial, steps=5, guidance=guidance)
    assert (images - expected).abs().max() <= 1e-5
    assert expected.std() > 0.01
    assert (images - ode_images(policy, steps=5, guidance=guidance + 2)[1]).abs().max() > 1e-3


def test_the_shift_follows_resolution_and_steps(settings):
    small, large = policy_of(settings), policy_of(settings, resolution=64)
    assert (small.image_tokens, large.image_tokens) == (16, 64)
    levels = {(policy, steps): policy.schedule(steps)[0] for policy in (small, large) for steps in (4, 8)}
    assert levels[small, 4][-1] == 0
    assert levels[large, 4][1] != levels[small, 4][1]
    assert levels[small, 8][2] != levels[small, 4][1]  # as far along
    sigmas, times = large.training_sigmas(torch.tensor([1.0, 0.5]))
    at_50 = large.schedule(50)[0]
    torch.testing.assert_close(sigmas.double(), at_50[[0, 25]], rtol=1e-6, atol=0)
    torch.testing.assert_close(times, (1000 * sigmas))
    assert math.log(large.shift) == pytest.approx(compute_empirical_mu(64, 50))


@pytest.mark.parametrize(
    ("share", "dynamics", "window"),
    [(True, "flow_cps", (1, 2)), pytest.param(False, "flow_sde", (0, 3), marks=pytest.mark.weekly)],
)
def test_log_probs_before_the_first_step_are_exact(settings, share, dynamics, window):
    settings.rollout.dynamics = dynamics
    assert_on_policy(policy_of(settings), settings, window=window, share=share)


def test_lora_gradients_equal_those_of_the_stock_transformer(settings):
    """Stock call with PEFT's own adapters, guidance, step, likelihood, ratio and clip written out, by autograd."""
    settings.update.clip_range = 0.5
    policy = policy_of(settings)
    train_adapters(policy)
    rollout, table = sample(policy, settings)
    _, gradient = accumulated(policy, settings, rollout, table)
    pipe = stock(settings)
    theirs = with_adapters_of(policy, pipe.transformer, settings)
    with torch.no_grad():
        text, ids = pipe.encode_prompt(PROMPTS, max_sequence_length=MOST_TOKENS)
        empty, _ = pipe.encode_prompt([""] * 2, max_sequence_length=MOST_TOKENS)

    def velocity(latents, step):
        patches = pipe._patchify_latents(latents)
        places = pipe._prepare_latent_ids(patches)
        both = [
            pipe.transformer(
                pipe._pack_latents(patches),
                timestep=table.timesteps[step.step].expand(6) / 1000,
                encoder_hidden_states=each[ROW],
                img_ids=places,
                txt_ids=ids,
                guidance=None,
                return_dict=False,
            )[0]
            for each in (empty, text)
        ]
        guided = both[0] + GUIDANCE * (both[1] - both[0])
        return pipe._unpatchify_latents(pipe._unpack_latents_with_ids(guided, places))

    clipped_loss_written_out(rollout, table, velocity).backward()
    assert_gradients(policy, gradient, theirs)


@pytest.mark.weekly
def test_an_embedding_and_a_rows_bits_are_of_its_text_alone(settings):
    policy = policy_of(settings)
    assert_an_embedding_is_of_its_prompt_alone(policy)
    assert_a_rows_bits_are_of_its_text_alone(policy, guidance=GUIDANCE)


@pytest.mark.weekly
def test_reference_is_the_base_model_bit_for_bit(settings):
    assert_the_reference_is_the_base(policy_of(settings))


@pytest.mark.weekly
def test_an_exported_lora_is_the_trained_policy_in_stock_diffusers(settings, tmp_path):
    targets = (*TARGETS, "ff.linear_in", "ff_context.linear_out")
    policy = policy_of(settings, lora=LoraSection(rank=4, alpha=8, targets=targets))
    train_adapters(policy)
    initial, images = ode_images(policy, steps=3, guidance=3.0)
    policy.export(tmp_path / "lora")
    pipe = stock(settings)
    before = stock_images(pipe, initial, steps=3, guidance=3.0)
    pipe.load_lora_weights(tmp_path / "lora")
    assert (images - before).abs().max() > 1e-2
    assert (images - stock_images(pipe, initial, steps=3, guidance=3.0)).abs().max() <= 1e-4


@pytest.mark.weekly
@pytest.mark.parametrize("checkpointing", [False, True])
def test_bfloat16_base_with_float32_adapters_keeps_ratios_exact(settings, checkpointing):
    policy = policy_of(settings, dtype="bfloat16", gradient_checkpointing=checkpointing)
    train_adapters(policy)
    rollout, table = sample(policy, settings)
    stats, gradient = accumulated(policy, settings, rollout, table)
    assert policy.transformer.dtype == torch.bfloat16
    assert stats.max_mismatch() == 0.0
    assert gradient.abs().max() > 0


def test_latents_of_an_image_are_what_decodes_to_it(settings):
    policy, pipe = policy_of(settings), stock(settings)
    images = torch.rand(2, 3, 32, 32)
    expected = pipe._unpatchify_latents(pipe._encode_vae_image(images * 2 - 1, None))
    torch.testing.assert_close(policy.encode_images(images), expected)
    decoded = pipe.vae.decode(pipe.vae.encode(images * 2 - 1).latent_dist.mode(), return_dict=False)[0]
    torch.testing.assert_close(policy.decode(expected), (decoded / 2 + 0.5).clamp(0, 1), rtol=1e-5, atol=1e-5)


def test_lora_scope_on_the_exact_klein_configuration(settings, monkeypatch):
    """5 blocks of two streams and 20 of one, 3072 wide (meta device: no memory, no weights)."""
    names = list(policy_of(settings).network.adapters.modules())
    assert len(names) == 2 * 8 + 2 * 2
    targets = configuration.load("flux2-dino").model.lora
    monkeypatch.undo()  # conftest's NaN poisoning would allocate the weights
    with torch.device("meta"):
        network = Flux2Transformer2DModel(**KLEIN_4B)
    assert sum(p.numel() for p in network.parameters()) == 3_875_544_576
    assert len(target_modules(network, targets)) == 5 * 8 + 20 * 2


@pytest.mark.weekly
def test_a_run_trains_and_goes_on_as_if_never_stopped(settings, tmp_path):
    assert_a_stopped_run_goes_on(settings, tmp_path)
    stock(settings).load_lora_weights(tmp_path / "whole" / "lora")


@pytest.mark.weekly
def test_the_preset_trains_a_folder_by_one_command(settings, tmp_path):
    assert_preset_trains("flux2-dino", settings, tmp_path / "run")


@pytest.mark.weekly
def test_generate_draws_base_and_lora(settings, tmp_path, capsys):
    policy = policy_of(settings)
    train_adapters(policy)
    assert_generate_draws(policy, PROMPTS[0], settings, tmp_path, capsys)


def test_what_is_not_for_flux2_is_refused_before_it_is_loaded(settings, tmp_path):
    preflight(settings)
    changed = settings.model_copy(deep=True)
    changed.model.resolution = 36
    with pytest.raises(UserError, match=r"model\.resolution = 36: this model wants a multiple of 8, such as 32"):
        preflight(changed)
    changed = settings.model_copy(deep=True)
    changed.model.lora.export_format = "kohya"
    with pytest.raises(UserError, match=r"export_format = 'kohya' has no names for FLUX\.2; use diffusers"):
        preflight(changed)
    changed.model.lora.export_format, changed.model.decoder_dtype = "diffusers", "bfloat16"
    with pytest.raises(UserError, match=r"FLUX\.2's VAE decodes in float32; use auto"):
        preflight(changed)
    changed.model.decoder_dtype, changed.model.shard_base = "auto", "blocks"
    with pytest.raises(UserError, match=r"shard_base = 'blocks' has not been tried with FLUX\.2; use none"):
        preflight(changed)
    network, vae = stored_network(Path(settings.model.path)).config, stock(settings).vae.config
    with pytest.raises(UserError, match=r"its transformer embeds the guidance, as FLUX\.2-dev's; want a FLUX\.2 klein"):
        Flux2Policy.check_parts(settings.model, {}, dict_of(network, guidance_embeds=True), vae, {})
    edited(settings, tmp_path / "edited", "scheduler", shift_terminal=0.02)
    with pytest.raises(UserError, match="its scheduler has shift_terminal"):
        preflight(settings)


def dict_of(config, **changes):
    return type(config)(config | changes)


def test_each_kind_is_drawn_at_the_guidance_of_its_card(flux2_pipelines):
    assert {kind: native_guidance(folder) for kind, folder in flux2_pipelines.items()} == {
        "base": 4.0,
        "distilled": 1.0,
    }


def named_on_the_page(row: str) -> set[str]:
    """Names in what `row` matches of the tables of docs/families.md, on how to add a family."""
    section = PAGE.read_text().split("## Adding a family\n")[1].split("\n## ")[0]
    return set(re.findall(r"`(?:\w+\.)*(\w+)`", "\n".join(re.findall(row, section, re.MULTILINE))))


@pytest.mark.parametrize("family", NETWORKS)
def test_the_page_names_what_a_family_overrides(family):
    """Of the policy and of its network."""
    named = named_on_the_page(r"^\|.*")
    for kind in (family, NETWORKS[family]):
        inherited = {
            name for base in kind.__mro__[1:] for name in (*vars(base), *vars(base).get("__annotations__", {}))
        }
        own = {name for name in vars(kind) if not name.startswith(("__", "_abc_"))}
        assert own & inherited - named == set()
    assert set(Family._fields) <= named


def test_what_the_page_says_to_write_is_there_to_be_overridden():
    written = named_on_the_page(r"^\| [^|]*`[^|]*\|")
    bases = {each for kind in (PackedPolicy, StockNetwork) for each in kind.__mro__}
    known = {name for base in bases for name in (*vars(base), *vars(base).get("__annotations__", {}))}
    assert len(written) > 10
    assert written - known == {"FAMILIES", "POLICIES"}


def test_what_fast_switches_on(settings):
    fast = FastPaths.choose(settings, torch.device("cpu"))
    rows = {row.name: row for row in fast.table}
    assert (fast.share_prefix, fast.fused, fast.graphs) == (True, False, False)
    assert rows["fused transformer"].why == "a Flux2KleinPipeline has blocks that it does not compute"
    settings.model.sequence_parallel = 2
    with pytest.raises(UserError, match=r"model\.sequence_parallel = 2 is the fused transformer's \(a Flux2Klein"):
        FastPaths.choose(settings, torch.device("cpu"))


KLEIN_4B = {
    "num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "attention_head_dim": 128,
    "in_channels": 128, "joint_attention_dim": 7680, "guidance_embeds": False,
}  # fmt: skip

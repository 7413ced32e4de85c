"""SD1.5- and SDXL-class policies: parity with stock DDIM pipelines, exact log-probs, whole runs, bad input.

Bugs planted in a copy, each seen red: image size left out of SDXL's conditions; the empty prompt encoded where SDXL
wants zeros; final ᾱ always 1; timestep spacing ignored; noise on every step; std left out of the ε coefficient; last
step eligible; guidance rows swapped; latents not unscaled; alpha lost on export; LoRA left on in `reference()`; blocks
in order of registration; v-prediction accepted; either half of the dynamics check left out; fused path on for a UNet.
"""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from rich.console import Console

from advgrpo import config
from advgrpo.config import LoraSection
from advgrpo.errors import UserError
from advgrpo.policy.adapters import target_modules
from advgrpo.policy.loading import load_policy
from advgrpo.policy.sd3 import SD3Policy
from advgrpo.policy.sdxl import UNetPolicy
from advgrpo.runtime.distributed import Distributed
from advgrpo.sampling.dynamics import step_table
from advgrpo.sampling.sampler import Sampler
from advgrpo.training.fast import FastPaths
from advgrpo.training.models import lora_section
from advgrpo.training.run import Run
from advgrpo.types import MicroBatch, MicroBatchRollout
from tests.parts import assert_generate_draws, every_second, steps_of, train_adapters, updater_of
from tests.unet_models import SDXL_UNET, save_pipeline, unet

PROMPTS = ["a small red star on the left of a blue background", "a large green ring at the top of a white background"]
ROW = torch.tensor([0, 0, 0, 1, 1, 1])
ADVANTAGES = torch.tensor([1.0, -1.0, 0.5, 2.0, -0.5, -1.5])


@pytest.fixture(scope="session")
def unet_pipelines(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("unets")
    return {name: save_pipeline(folder / name, xl=name == "sdxl") for name in ("sd15", "sdxl")}


@pytest.fixture
def kind() -> str:
    return "sdxl"  # unless parametrized


@pytest.fixture
def settings(unit_config, unet_pipelines, kind):
    """The unit run on an ε-prediction model."""
    unit_config.model.path = str(unet_pipelines[kind])
    unit_config.rollout.dynamics = "ddim"
    unit_config.rollout.guidance_scale = 1.7
    return unit_config


both_kinds = pytest.mark.parametrize("kind", ["sd15", "sdxl"])


def load(settings, **changes) -> UNetPolicy:
    model = settings.model.model_copy(update=changes)
    return load_policy(model, device=torch.device("cpu"), cache_dir=Path(settings.data.cache_dir), seed=0)


def stock(settings, *, spacing: str = "") -> DiffusionPipeline:
    """The folder in diffusers, sampled by DDIM."""
    pipe = DiffusionPipeline.from_pretrained(settings.model.path)
    own = {"timestep_spacing": spacing} if spacing else {}
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, **own)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stock_images(pipe, initial, *, steps, guidance):
    return pipe(
        PROMPTS, latents=initial.clone(), num_inference_steps=steps, guidance_scale=guidance, height=32, width=32,
        output_type="pt",
    ).images  # fmt: skip


def ode_images(policy, *, steps, guidance):
    """(initial noise, images) of PROMPTS without a window."""
    sampler = Sampler(policy, guidance, "gaussian", share_prefix=True, merged=False)
    initial = sampler.initial_latents(0, torch.arange(2))
    latents, _ = sampler.run(step_table(policy, steps), policy.encode(PROMPTS), initial, torch.arange(2))
    return initial, policy.decode(latents)


def sample(policy, settings, *, window=(1, 2), share=True, row=ROW, steps=4):
    sampler = Sampler(policy, 1.7, settings.rollout.likelihood, share_prefix=share, merged=False)
    table = step_table(policy, steps, window, rollout=settings.rollout)
    initial = sampler.initial_latents(7, torch.arange(2))
    ids = torch.arange(len(row))
    text = policy.encode(PROMPTS)
    latents, taken = sampler.run(table, text, initial, row, noise_seed=3, image_ids=ids)
    return MicroBatchRollout(
        MicroBatch(ids, PROMPTS, torch.arange(2), row, 0), text, taken, policy.decode(latents)
    ), table


def accumulated(policy, settings, rollout, table):
    """(stats, gradient) of one minibatch."""
    updater = updater_of(policy, settings)
    stats = updater.accumulate([rollout], ADVANTAGES, table, total=6, watch_kl=True)
    return stats, torch.cat([p.grad.flatten() for _, p in policy.trainable_parameters()])


@both_kinds
@pytest.mark.parametrize("guidance", [1.0, 4.5])
@pytest.mark.in_ci(2)
def test_images_without_a_window_equal_stock_ddim(settings, guidance):
    initial, images = ode_images(load(settings), steps=10, guidance=guidance)
    expected = stock_images(stock(settings), initial, steps=10, guidance=guidance)
    assert (images - expected).abs().max() <= 1e-4
    assert expected.std() > 0.01


def edited_scheduler(settings, tmp_path, **changes) -> None:
    """Point the settings at a copy of the pipeline with another scheduler_config.json; None removes a key."""
    source, folder = Path(settings.model.path), tmp_path / "edited"
    folder.mkdir()
    for part in source.iterdir():
        if part.name != "scheduler":
            (folder / part.name).symlink_to(part)
    content = json.loads((source / "scheduler" / "scheduler_config.json").read_text()) | changes
    (folder / "scheduler").mkdir()
    kept = {name: value for name, value in content.items() if value is not None}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(kept))
    settings.model.path = str(folder)


def test_trailing_timesteps_are_taken_from_the_scheduler(settings, tmp_path):
    leading = load(settings).schedule(5)
    edited_scheduler(settings, tmp_path, timestep_spacing="trailing")
    policy = load(settings)
    assert policy.schedule(5)[1].tolist() == [999, 799, 599, 399, 199] != leading[1].tolist()
    initial, images = ode_images(policy, steps=5, guidance=3.0)
    expected = stock_images(stock(settings), initial, steps=5, guidance=3.0)
    assert (images - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("to_one", [True, False])
def test_levels_are_those_of_the_timesteps_and_end_at_the_final_one(settings, tmp_path, spacing, to_one):
    edited_scheduler(settings, tmp_path, timestep_spacing=spacing, set_alpha_to_one=to_one)
    levels, timesteps = load(settings).schedule(7)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = (1 - betas).cumprod(0)
    assert len(levels) == 8
    torch.testing.assert_close(levels[:-1], alphas[timesteps.long()], rtol=1e-5, atol=0)
    torch.testing.assert_close(levels[-1], torch.ones(()).double() if to_one else alphas[0], rtol=1e-6, atol=0)
    assert (levels.diff() >= 0).all()


@both_kinds
@pytest.mark.parametrize(("share", "likelihood"), every_second([True, False], ["gaussian", "squared_error"]))
@pytest.mark.in_ci(2)
def test_log_probs_before_the_first_step_are_exact(settings, share, likelihood):
    settings.rollout.likelihood = likelihood
    policy = load(settings)
    train_adapters(policy)
    rollout, table = sample(policy, settings, window=(0, 2), share=share)
    stats, gradient = accumulated(policy, settings, rollout, table)
    _, ratio, clipped, kl, _, pairs, _ = stats.sums().tolist()
    assert stats.max_mismatch() == 0.0
    assert (ratio, clipped, pairs) == (12, 0, 12)
    assert kl > 0
    assert gradient.abs().max() > 0


@both_kinds
@pytest.mark.parametrize("likelihood", ["gaussian", "squared_error"])
@pytest.mark.in_ci(2)
def test_gradients_equal_autograd_through_an_independent_loss(settings, likelihood):
    """Stock UNet call, DDIM of the paper, likelihood, ratio and clip written out, differentiated by autograd."""
    settings.rollout.likelihood, settings.update.clip_range = likelihood, 0.5
    policy = load(settings)
    train_adapters(policy)
    rollout, table = sample(policy, settings)
    _, gradient = accumulated(policy, settings, rollout, table)
    for _, parameter in policy.trainable_parameters():
        parameter.grad = None
    pipe, eta = stock(settings), settings.rollout.eta
    pipe.scheduler.set_timesteps(4)
    text, empty, *pooled = pipe.encode_prompt(PROMPTS, device="cpu", num_images_per_prompt=1,
                                              do_classifier_free_guidance=True)  # fmt: skip
    embeddings = torch.cat([empty[ROW], text[ROW]])
    added = {}
    if pooled:
        time_ids = torch.tensor([[32.0, 32, 0, 0, 32, 32]]).expand(12, -1)
        added = {
            "added_cond_kwargs": {"text_embeds": torch.cat([pooled[1][ROW], pooled[0][ROW]]), "time_ids": time_ids}
        }
    total = 0.0
    for step in rollout.steps:
        time = int(pipe.scheduler.timesteps[step.step])
        now, after = pipe.scheduler.alphas_cumprod[time], pipe.scheduler.alphas_cumprod[time - 250]
        latents = step.latents[ROW] if step.shared else step.latents
        uncond, cond = policy.unet(torch.cat([latents] * 2), time, embeddings, return_dict=False, **added)[0].chunk(2)
        noise = uncond + 1.7 * (cond - uncond)
        std = eta * ((1 - after) / (1 - now)).sqrt() * (1 - now / after).sqrt()
        image = (latents - (1 - now).sqrt() * noise) / now.sqrt()
        mean = after.sqrt() * image + (1 - after - std**2).sqrt() * noise
        error = (step.next_latents - mean).square().flatten(1).mean(1)
        log_prob = -error / (2 * std**2) if likelihood == "gaussian" else -error
        ratio = (log_prob - log_prob.detach()).exp()
        loss = torch.maximum(-ADVANTAGES * ratio, -ADVANTAGES * ratio.clamp(0.5, 1.5))
        total = total + loss.mean() / len(rollout.steps)
    total.backward()
    plain = torch.cat([p.grad.flatten() for _, p in policy.trainable_parameters()])
    torch.testing.assert_close(gradient, plain, rtol=1e-3, atol=1e-4 * plain.abs().max().item())


def test_noise_of_the_window_is_ddims(settings):
    """Mean, spread and log-probability of a window's step against `DDIMScheduler.step` with the same η."""
    settings.rollout.likelihood, settings.rollout.eta = "gaussian", 0.6
    policy, scheduler = load(settings), stock(settings).scheduler
    scheduler.set_timesteps(4)
    row = torch.arange(2).repeat_interleave(32)
    rollout, table = sample(policy, settings, window=(1,), row=row)
    (step,) = rollout.steps
    prepared = policy.prepare(policy.encode(PROMPTS), table.timesteps, guidance=2.0)
    with torch.no_grad():
        cond, uncond = policy.predict(step.latents, table.numbers[1], prepared)
        mean, above = (
            scheduler.step(
                uncond + 1.7 * (cond - uncond), scheduler.timesteps[1], step.latents, eta=0.6,
                variance_noise=torch.full_like(step.latents, value),
            ).prev_sample for value in (0.0, 1.0)
        )  # fmt: skip
    std = (above - mean).mean()
    torch.testing.assert_close(table.coefficients[1, 2], std, rtol=1e-4, atol=0)
    noise = (step.next_latents - mean[row]) / std
    assert noise.numel() == 64 * 256
    assert noise.mean().abs() < 4 / noise.numel() ** 0.5
    assert (noise.std() - 1).abs() < 4 / (2 * noise.numel()) ** 0.5
    assert noise.flatten(1).corrcoef().fill_diagonal_(0).abs().max() < 0.4
    log_prob = torch.distributions.Normal(mean[row], std).log_prob(step.next_latents).flatten(1).mean(1)
    torch.testing.assert_close(step.log_prob, log_prob, rtol=1e-4, atol=1e-4)


def test_only_the_windows_steps_are_noisy_and_never_the_last(settings):
    policy = load(settings)
    table = step_table(policy, 10, (3, 5), rollout=settings.rollout)
    assert (table.coefficients[:, 2] > 0).nonzero().flatten().tolist() == [3, 5]
    assert step_table(policy, 10).coefficients[:, 2].abs().max() == 0
    settings.rollout.num_steps, settings.rollout.window.noise_range = 10, (0.0, 1.0)
    assert {i for n in range(60) for i in steps_of(settings, n)} == set(range(9))
    settings.rollout.window.steps = (9,)
    with pytest.raises(UserError, match=r"within 0\.\.8 \(num_steps = 10, dynamics ddim\)"):
        config.check(settings)
    settings.rollout.window.steps, settings.rollout.eta = (8,), 1.2
    with pytest.raises(UserError, match=r"rollout\.eta = 1\.2: ddim wants at most 1"):
        config.check(settings)


@both_kinds
@pytest.mark.in_ci(1)
def test_lora_loads_into_stock_diffusers_and_back(settings, tmp_path):
    policy = load(settings)
    untrained = ode_images(policy, steps=4, guidance=3.0)[1]
    train_adapters(policy)
    initial, images = ode_images(policy, steps=4, guidance=3.0)
    assert (images - untrained).abs().max() > 1e-2
    policy.export(tmp_path / "lora")
    pipe = stock(settings)
    pipe.load_lora_weights(tmp_path / "lora")
    assert (images - stock_images(pipe, initial, steps=4, guidance=3.0)).abs().max() <= 1e-4
    again = load(settings, lora=settings.model.lora.model_copy(update={"start_from": str(tmp_path / "lora")}))
    own = dict(policy.trainable_parameters())
    assert all(torch.equal(parameter, own[name]) for name, parameter in again.trainable_parameters())
    with pytest.raises(UserError, match=r"model\.lora\.rank as it was trained"):
        load(settings, lora=LoraSection(rank=8, start_from=str(tmp_path / "lora")))


def test_reference_is_the_base_model_bit_for_bit(settings):
    policy = load(settings)
    base = ode_images(policy, steps=2, guidance=2.0)[1]
    train_adapters(policy)
    with policy.disable_adapter():
        assert torch.equal(ode_images(policy, steps=2, guidance=2.0)[1], base)
    assert not torch.equal(ode_images(policy, steps=2, guidance=2.0)[1], base)


def test_lora_scope(settings):
    policy = load(settings)
    names = list(policy.network.adapters.state_dict())
    assert len(names) == 2 * 8 * sum(layers for layers in (2, 2, 2 * 2))  # blocks of down, middle and up
    assert all(p.dtype == torch.float32 for _, p in policy.trainable_parameters())
    last = target_modules(unet(xl=True), LoraSection(blocks=1, targets=("attn2.to_q",)))
    assert last == ["up_blocks.0.attentions.1.transformer_blocks.1.attn2.to_q"]
    with pytest.raises(UserError, match=r"\['attn1\.to_query'\] match no linear layer"):
        load(settings, lora=LoraSection(targets=("attn1.to_q", "attn1.to_query")))
    with pytest.raises(UserError, match="the model has 8 transformer blocks"):
        load(settings, lora=LoraSection(blocks=9))


def test_lora_on_the_exact_sdxl_configuration(monkeypatch):
    """70 transformer blocks; at rank 4 the 5,806,080 parameters of diffusers' own SDXL training script."""
    monkeypatch.undo()  # conftest's NaN poisoning would allocate the weights
    with torch.device("meta"):
        network = UNet2DConditionModel(**SDXL_UNET)
        names = target_modules(network, LoraSection())
        layers = [network.get_submodule(name) for name in names]
    assert len(names) == 70 * 8
    assert sum(4 * (layer.in_features + layer.out_features) for layer in layers) == 5_806_080


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.in_ci(1)
def test_bfloat16_base_with_float32_adapters_keeps_ratios_exact(settings, checkpointing):
    policy = load(settings, dtype="bfloat16", gradient_checkpointing=checkpointing)
    train_adapters(policy)
    rollout, table = sample(policy, settings)
    stats, gradient = accumulated(policy, settings, rollout, table)
    assert policy.unet.dtype == torch.bfloat16
    assert {p.dtype for _, p in policy.trainable_parameters()} == {torch.float32}
    assert stats.max_mismatch() == 0.0
    assert gradient.abs().max() > 0


@pytest.mark.parametrize(("kind", "fast"), [pytest.param("sdxl", True, marks=pytest.mark.weekly), ("sd15", False)])
def test_a_run_trains_and_leaves_a_lora(settings, kind, fast):
    settings.fast = fast
    run = Run(settings, Distributed.start("cpu"), resume=False, console=Console(quiet=True))
    run.train()
    assert isinstance(run.trainer.policy, UNetPolicy)
    folder = Path(settings.output_dir)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    for row in rows:
        assert row["log_prob_mismatch_max"] == 0
        assert row["pre_update_clip_fraction"] == 0
        assert row["grad_norm"] > 0
    pipe = stock(settings)
    pipe.load_lora_weights(folder / "lora")
    moved = [p for n, p in pipe.unet.named_parameters() if "lora_B" in n]
    assert len(moved) == len(run.trainer.updater.named) // 2
    assert max(p.abs().max() for p in moved) > 0
    assert {"base", "final"} <= json.loads((folder / "summary.json").read_text()).keys()


def test_full_fine_tuning_exports_a_unet_that_diffusers_loads(settings, tmp_path):
    policy = load(settings, train="full")
    train_adapters(policy)
    policy.export(tmp_path / policy.component)
    loaded = dict(UNet2DConditionModel.from_pretrained(tmp_path / "unet").state_dict())
    torch.testing.assert_close(loaded, dict(policy.unet.state_dict()), rtol=0, atol=0)


def test_what_fast_switches_on_for_a_unet(settings):
    fast = FastPaths.choose(settings, torch.device("cpu"))
    assert (fast.share_prefix, fast.fused_optimizer, fast.fused, fast.graphs) == (True, True, False, False)
    rows = {row.name: row for row in fast.table}
    for name in ("fused transformer", "merged LoRA", "CUDA graphs"):
        assert not rows[name].on
        assert rows[name].why == "a StableDiffusionXLPipeline has a UNet; the fused forward is of transformers"
    settings.rollout.precision = "fp8"
    with pytest.raises(UserError, match=r"rollout\.precision = 'fp8' needs the fused transformer \(a StableDiff"):
        FastPaths.choose(settings, torch.device("cpu"))
    settings.rollout.precision, settings.rollout.window_forward = "model", "merged"
    with pytest.raises(UserError, match=r"rollout\.window_forward = 'merged' needs the fused transformer \(a Stable"):
        FastPaths.choose(settings, torch.device("cpu"))
    settings.rollout.window_forward, settings.model.sequence_parallel = "trainer", 2
    with pytest.raises(UserError, match=r"model\.sequence_parallel = 2 is the fused transformer's \(a Stable.*use 1"):
        FastPaths.choose(settings, torch.device("cpu"))


@both_kinds
def test_generate_draws_base_and_lora_with_ddim(settings, tmp_path, capsys):
    policy = load(settings)
    train_adapters(policy)
    assert_generate_draws(policy, PROMPTS[0], settings, tmp_path, capsys)


def test_a_lora_is_read_with_its_scope(settings, unit_pipeline, tmp_path):
    folder, pipeline = tmp_path / "lora", Path(settings.model.path)
    load(settings).export(folder)
    section = lora_section(folder, pipeline)
    assert (section.rank, section.alpha, section.blocks) == (4, 4, "all")  # trained with 8, folded on export
    again = load(settings, lora=section).network.adapters.state_dict()
    assert again.keys() == load(settings).network.adapters.state_dict().keys()
    load(settings, lora=LoraSection(rank=2, blocks=3, targets=("attn2.to_k",))).export(folder)
    section = lora_section(folder, pipeline)
    assert (section.rank, section.blocks, section.targets) == (2, 3, ("attn2.to_k",))
    with pytest.raises(UserError, match=r"adapts a unet, but .* has a transformer"):
        lora_section(folder, Path(unit_pipeline))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"prediction_type": "v_prediction"}, r"prediction_type = 'v_prediction'; only 'epsilon'"),
        ({"beta_schedule": None, "_class_name": "EDMEulerScheduler"}, "its EDMEulerScheduler has no beta_schedule"),
        ({"clip_sample": True}, "clip_sample = true"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr = true"),
    ],
)
def test_a_scheduler_that_ddim_cannot_follow_is_named(settings, tmp_path, changes, expected):
    edited_scheduler(settings, tmp_path, **changes)
    with pytest.raises(UserError, match=rf"model\.path = .*{expected}"):
        load(settings)


def test_a_scheduler_file_without_prediction_type_means_epsilon(settings, tmp_path):
    edited_scheduler(settings, tmp_path, prediction_type=None)
    assert load(settings).prediction_type == "epsilon"


@pytest.mark.parametrize("part", ["unet/config.json", "scheduler/scheduler_config.json", "model_index.json"])
def test_a_broken_folder_is_named(settings, tmp_path, part):
    edited_scheduler(settings, tmp_path)
    file = Path(settings.model.path) / part
    if part.startswith("unet"):
        file.parent.unlink()
    else:
        file.unlink()
        file.write_text("not JSON")
    with pytest.raises(UserError, match=r"model\.path = "):
        load(settings)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"resolution": 42}, r"model\.resolution = 42: this model wants a multiple of 4"),
        ({"attention": "math"}, r"model\.attention = 'math' is the fused transformer's"),
        ({"decoder_dtype": "bfloat16"}, r"model\.decoder_dtype = 'bfloat16'"),
    ],
)
def test_settings_a_unet_does_not_have_are_named(settings, changes, expected):
    with pytest.raises(UserError, match=expected):
        load(settings, **changes)


def test_a_unet_of_another_task_is_named(settings, tmp_path):
    """An inpainting UNet (9 channels in) and an SDXL UNet under SD1.5's name."""
    edited_scheduler(settings, tmp_path)
    folder, index = Path(settings.model.path), Path(settings.model.path) / "model_index.json"
    other = UNet2DConditionModel.from_config(folder / "unet", in_channels=9)
    (folder / "unet").unlink()
    other.save_pretrained(folder / "unet")
    with pytest.raises(UserError, match="its UNet maps 9 to 4 channels, latents have 4"):
        load(settings)
    UNet2DConditionModel.from_config(folder / "unet", in_channels=4).save_pretrained(folder / "unet")
    renamed = json.loads(index.read_text()) | {"_class_name": "StableDiffusionPipeline"}
    index.unlink()
    index.write_text(json.dumps(renamed))
    with pytest.raises(UserError, match="addition_embed_type 'text_time'"):
        load(settings)


def test_more_steps_than_the_model_was_trained_on(settings):
    with pytest.raises(UserError, match="num_steps = 1000: this model was trained on 1000 timesteps"):
        load(settings).schedule(1000)


@pytest.mark.parametrize("dynamics", ["flow_cps", "flow_sde", "dance_sde"])
def test_flow_dynamics_on_a_noise_predictor(settings, dynamics):
    settings.rollout.dynamics = dynamics
    expected = rf"rollout\.dynamics = '{dynamics}' .* set rollout\.dynamics = 'ddim'"
    with pytest.raises(UserError, match=expected):
        step_table(load(settings), 4, (1,), rollout=settings.rollout)
    with pytest.raises(UserError, match=expected):
        Run(settings, Distributed.start("cpu"), resume=False, console=Console(quiet=True))


def test_ddim_on_a_velocity_predictor(unit_config):
    unit_config.rollout.dynamics = "ddim"
    expected = r"rollout\.dynamics = 'ddim' needs a model that predicts noise"
    policy = load(unit_config)
    assert isinstance(policy, SD3Policy)
    with pytest.raises(UserError, match=expected):
        step_table(policy, 4, (1,), rollout=unit_config.rollout)
    with pytest.raises(UserError, match=expected):
        Run(unit_config, Distributed.start("cpu"), resume=False, console=Console(quiet=True))


def test_the_preset_is_a_run_that_passes_every_check(unet_pipelines):
    preset = config.load("sdxl-dino")
    preset.data.prompts = preset.data.references = "given"
    config.check(preset)
    assert (preset.rollout.dynamics, preset.adversary.backbone) == ("ddim", "facebook/dinov2-large")
    preset.model.path = str(unet_pipelines["sdxl"])  # the hub's model is not on this machine
    assert not FastPaths.choose(preset, torch.device("cpu")).fused

"""SD3 policy, sampler and update: parity with stock diffusers, exact on-policy log-probs, fast equals plain.

Bugs planted in a copy, each seen red: guidance rows swapped; merge scale alpha instead of alpha / rank; window
steps run on merged weights (mismatch); noise keyed by row instead of image id; alpha lost on export; LoRA left enabled
inside `reference()`.
"""

from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

from advgrpo import config
from advgrpo.config import LoraSection
from advgrpo.errors import UserError
from advgrpo.plan import known_models
from advgrpo.policy.adapters import target_modules
from advgrpo.policy.fused.decoder import ImageQualityError
from advgrpo.policy.sd3 import SD3Policy
from advgrpo.sampling.dynamics import step_table
from advgrpo.sampling.sampler import Sampler
from advgrpo.training.update import LogProbMismatchError
from advgrpo.types import MicroBatch, MicroBatchRollout
from tests.conftest import make_unit_pipeline
from tests.families import (
    ADVANTAGES,
    assert_a_rows_bits_are_of_its_text_alone,
    assert_a_stopped_run_goes_on,
    assert_an_embedding_is_of_its_prompt_alone,
    assert_gradients,
    assert_on_policy,
    clipped_loss_written_out,
    with_adapters_of,
)
from tests.parts import every_second, steps_of, train_adapters, updater_of

PROMPTS = ["a small red star on the left of a blue background", "a large green ring at the top of a white background"]
ROW = torch.tensor([0, 0, 0, 1, 1, 1])


def load(settings, *, fused=True, precision="model", **changes) -> SD3Policy:
    model = settings.model.model_copy(update=changes)
    cache = Path(settings.data.cache_dir)
    return SD3Policy(model, device=torch.device("cpu"), cache_dir=cache, seed=0, fused=fused, precision=precision)


def velocity_at(policy: SD3Policy, latents: torch.Tensor, *, guidance: float) -> torch.Tensor:
    """Conditional velocity of PROMPTS at timestep 500."""
    prepared = policy.prepare(policy.encode(PROMPTS), torch.tensor([900.0, 500.0]), guidance=guidance)
    return policy.predict(latents, torch.tensor([1]), prepared)[0].detach()


def sample(policy, settings, *, window=(1, 2), share=True, merged=True):
    sampler = Sampler(policy, 1.7, settings.rollout.likelihood, share_prefix=share, merged=merged)
    table = step_table(policy, 4, window, rollout=settings.rollout)
    policy.merge()
    initial = sampler.initial_latents(7, torch.arange(2))
    conditioning = policy.encode(PROMPTS)
    latents, steps = sampler.run(table, conditioning, initial, ROW, noise_seed=3, image_ids=torch.arange(6))
    micro_batch = MicroBatch(torch.arange(6), PROMPTS, torch.arange(2), ROW, 0)
    return latents, MicroBatchRollout(micro_batch, conditioning, steps, policy.decode(latents)), table


def gradients(policy, settings, rollout, table, advantages, watch_kl=False):
    settings = settings.model_copy(deep=True)
    settings.rollout.guidance_scale = 1.7
    updater = updater_of(policy, settings)
    stats = updater.accumulate([rollout], advantages, table, total=6, watch_kl=watch_kl)
    return stats, torch.cat([p.grad.flatten() for _, p in policy.trainable_parameters()])


@pytest.fixture(scope="session")
def large_pipeline(tmp_path_factory, plain_curves) -> str:
    """Of SD3.5-large's kind: no block attends twice."""
    return make_unit_pipeline(tmp_path_factory.mktemp("models") / "large", dual_layers=0)


@pytest.fixture
def settings(unit_config, kind, request):
    """The unit run on a model of SD3.5-medium's or SD3.5-large's kind."""
    unit_config.model.path = request.getfixturevalue({"medium": "unit_pipeline", "large": "large_pipeline"}[kind])
    return unit_config


both_kinds = pytest.mark.parametrize("kind", ["medium", "large"])


@both_kinds
@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_ode_images_equal_the_stock_pipelines(settings, guidance):
    policy = load(settings)
    sampler = Sampler(policy, guidance, "gaussian", share_prefix=True, merged=False)
    initial = sampler.initial_latents(0, torch.arange(2))
    latents, _ = sampler.run(step_table(policy, 10), policy.encode(PROMPTS), initial, torch.arange(2))
    pipe = StableDiffusion3Pipeline.from_pretrained(settings.model.path)
    expected = pipe(
        PROMPTS, latents=initial.clone(), num_inference_steps=10, guidance_scale=guidance, height=32, width=32,
        max_sequence_length=12, output_type="pt",
    ).images  # fmt: skip
    assert (policy.decode(latents) - expected).abs().max() <= 1e-5
    assert expected.std() > 0.01


@both_kinds
def test_merged_weights_equal_adapters_and_stock_diffusers_with_the_exported_lora(settings, tmp_path):
    policy = load(settings)
    train_adapters(policy)
    policy.merge()
    table, conditioning = step_table(policy, 4), policy.encode(PROMPTS)
    initial = Sampler(policy, 4.5, "gaussian", True, True).initial_latents(0, torch.arange(2))
    row = torch.arange(2)
    by_merge, _ = Sampler(policy, 4.5, "gaussian", True, True).run(table, conditioning, initial, row)
    by_adapter, _ = Sampler(policy, 4.5, "gaussian", True, False).run(table, conditioning, initial, row)
    with policy.disable_adapter():
        base, _ = Sampler(policy, 4.5, "gaussian", True, False).run(table, conditioning, initial, row)
    assert (base - by_adapter).abs().max() > 1e-2
    torch.testing.assert_close(by_merge, by_adapter, rtol=1e-4, atol=1e-4)

    policy.export(tmp_path / "lora")
    assert (tmp_path / "lora" / "pytorch_lora_weights.safetensors").is_file()
    pipe = StableDiffusion3Pipeline.from_pretrained(settings.model.path)
    pipe.load_lora_weights(tmp_path / "lora")
    stock = pipe(
        PROMPTS, latents=initial.clone(), num_inference_steps=4, guidance_scale=4.5, height=32, width=32,
        max_sequence_length=12, output_type="pt",
    ).images  # fmt: skip
    assert (policy.decode(by_merge) - stock).abs().max() <= 1e-4


def test_reference_is_the_base_model_bit_for_bit(unit_config):
    policy = load(unit_config)
    latents = torch.randn(2, *policy.latent_shape())
    before = velocity_at(policy, latents, guidance=2.0)
    train_adapters(policy)
    with policy.disable_adapter():
        assert torch.equal(velocity_at(policy, latents, guidance=2.0), before)
    assert not torch.equal(velocity_at(policy, latents, guidance=2.0), before)


@pytest.mark.parametrize(
    ("share", "dynamics", "window"),
    every_second([True, False], ["flow_cps", "flow_sde", "dance_sde"], [(0, 1), (1, 3), (2,)]),
)
def test_log_probs_before_the_first_step_are_exact(unit_config, share, dynamics, window):
    unit_config.rollout.dynamics = dynamics
    if dynamics == "flow_cps" and 3 in window:
        window = (1, 2)
    policy = load(unit_config)
    train_adapters(policy)
    _, rollout, table = sample(policy, unit_config, window=window, share=share)
    stats, gradient = gradients(policy, unit_config, rollout, table, torch.randn(6))
    assert stats.max_mismatch() == 0.0
    assert stats.sums()[2] == 0
    assert stats.sums()[1] == 6 * len(window)
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("kind", ["large"])
@pytest.mark.parametrize("share", [True, False])
def test_log_probs_of_a_model_without_dual_attention_are_exact(settings, share):
    """Of SD3.5-large's kind; of SD3.5-medium's the test above is."""
    assert_on_policy(load(settings), settings, window=(1, 2), share=share)


@both_kinds
def test_drift_is_seen_when_the_window_runs_merged_weights(settings, monkeypatch):
    policy = load(settings)
    train_adapters(policy)
    _, rollout, table = sample(policy, settings)
    assert gradients(policy, settings, rollout, table, torch.ones(6))[0].max_mismatch() == 0
    with monkeypatch.context() as patch:
        patch.setattr(policy, "predict", policy.predict_merged)
        _, rollout, table = sample(policy, settings)
    stats, _ = gradients(policy, settings, rollout, table, torch.ones(6))
    assert stats.max_mismatch() > 0


@pytest.mark.weekly
@pytest.mark.parametrize("kind", ["large"])
def test_a_run_trains_and_goes_on_as_if_never_stopped(settings, tmp_path):
    """Of a small SD3.5-medium all other tests of runs are."""
    assert_a_stopped_run_goes_on(settings, tmp_path)
    StableDiffusion3Pipeline.from_pretrained(settings.model.path).load_lora_weights(tmp_path / "whole" / "lora")


def test_fast_and_plain_paths_agree(unit_config):
    """Fused, merged, shared prefix against diffusers' forward with PEFT, every row computed: images and gradients."""
    advantages = torch.tensor([1.0, -1.0, 0.5, 2.0, -0.5, -1.5])
    fast, plain = load(unit_config), load(unit_config, fused=False)
    train_adapters(fast)
    plain.network.adapters.load_state_dict(fast.network.lora.state_dict(), "test")
    latents, rollout, table = sample(fast, unit_config)
    plain_latents, plain_rollout, _ = sample(plain, unit_config, share=False, merged=False)
    torch.testing.assert_close(latents, plain_latents, rtol=1e-4, atol=1e-4)
    _, gradient = gradients(fast, unit_config, rollout, table, advantages)
    gradients(plain, unit_config, plain_rollout, table, advantages)
    expected = {n.replace(".default.", "."): p.grad for n, p in plain.trainable_parameters()}
    found = fast.network.lora.state_dict(gradient)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4 * scale, msg=name)


def test_gradients_equal_autograd_through_an_independent_loss(unit_config, unit_pipeline):
    """Stock call with PEFT's own adapters, guidance, step, likelihood, ratio and clip written out, by autograd."""
    unit_config.update.clip_range = 0.5
    policy = load(unit_config)
    train_adapters(policy)
    _, rollout, table = sample(policy, unit_config)
    _, gradient = gradients(policy, unit_config, rollout, table, ADVANTAGES)
    pipe = StableDiffusion3Pipeline.from_pretrained(unit_pipeline)
    theirs = with_adapters_of(policy, pipe.transformer, unit_config)
    text, empty, pooled, empty_pooled = pipe.encode_prompt(PROMPTS, None, None, max_sequence_length=12)

    def velocity(latents, step):
        both = [
            pipe.transformer(
                latents,
                timestep=table.timesteps[step.step].expand(6),
                encoder_hidden_states=each[ROW],
                pooled_projections=vector[ROW],
                return_dict=False,
            )[0]
            for each, vector in ((empty, empty_pooled), (text, pooled))
        ]
        return both[0] + 1.7 * (both[1] - both[0])

    clipped_loss_written_out(rollout, table, velocity).backward()
    assert_gradients(policy, gradient, theirs)


def test_zero_advantages_give_exactly_zero_gradient(unit_config):
    policy = load(unit_config)
    train_adapters(policy)
    _, rollout, table = sample(policy, unit_config)
    _, gradient = gradients(policy, unit_config, rollout, table, torch.zeros(6))
    assert gradient.abs().max() == 0


def test_kl_is_measured_against_the_base_and_pulls_towards_it(unit_config):
    policy = load(unit_config)
    train_adapters(policy)
    _, rollout, table = sample(policy, unit_config)
    stats, _ = gradients(policy, unit_config, rollout, table, torch.zeros(6), watch_kl=True)
    assert stats.sums()[3] > 0
    for _, parameter in policy.trainable_parameters():
        parameter.grad = None
    unit_config.update.kl_weight = 1.0
    stats, gradient = gradients(policy, unit_config, rollout, table, torch.zeros(6))
    with torch.no_grad():
        flat = torch.cat([p.flatten() for _, p in policy.trainable_parameters()])
        scale = 1e-3 / gradient.norm()
        start = 0
        for _, parameter in policy.trainable_parameters():
            parameter.sub_(scale * gradient[start : start + parameter.numel()].view_as(parameter))
            start += parameter.numel()
    assert start == flat.numel()
    lower, _ = gradients(policy, unit_config, rollout, table, torch.zeros(6))
    assert lower.sums()[3] < stats.sums()[3]


def test_gradient_checkpointing_changes_memory_not_gradients(unit_config):
    advantages, found = torch.tensor([1.0, -1.0, 0.5, 2.0, -0.5, -1.5]), []
    for checkpointing in (False, True):
        policy = load(unit_config, gradient_checkpointing=checkpointing)
        train_adapters(policy)
        _, rollout, table = sample(policy, unit_config)
        stats, gradient = gradients(policy, unit_config, rollout, table, advantages)
        assert stats.max_mismatch() == 0.0
        found.append(gradient)
    assert torch.equal(*found)


def test_images_do_not_depend_on_how_the_batch_is_split(unit_config):
    policy = load(unit_config)
    whole, _, table = sample(policy, unit_config)
    sampler = Sampler(policy, 1.7, "squared_error", True, True)
    part, _ = sampler.run(
        table, policy.encode(PROMPTS[1:]), sampler.initial_latents(7, torch.tensor([1])), torch.zeros(2, dtype=int),
        noise_seed=3, image_ids=torch.tensor([4, 5]),
    )  # fmt: skip
    torch.testing.assert_close(part, whole[4:], rtol=1e-4, atol=1e-4)


def test_rows_of_a_prompt_share_noise_up_to_the_window_and_differ_after(unit_config):
    policy = load(unit_config)
    latents, rollout, _ = sample(policy, unit_config, window=(1, 2))
    first, second = rollout.steps
    assert first.shared
    assert len(first.latents) == 2
    assert not second.shared
    assert len(second.latents) == 6
    assert (latents[0] - latents[1]).abs().max() > 0.1


def test_text_is_encoded_once_and_survives_a_torn_cache_file(unit_config, monkeypatch):
    policy = load(unit_config)
    first = policy.encode(PROMPTS)
    again = load(unit_config)
    calls, real = [], again.text_cache.encode
    monkeypatch.setattr(again.text_cache, "encode", lambda prompts: calls.append(prompts) or real(prompts))
    assert torch.equal(again.encode(PROMPTS).text, first.text)
    assert not calls
    torn = load(unit_config)
    path = torn.text_cache.tensors.path(torn.text_cache.key(PROMPTS[0]))
    path.write_bytes(path.read_bytes()[:100])
    monkeypatch.setattr(torn.text_cache, "encode", lambda prompts: calls.append(prompts) or real(prompts))
    assert torch.equal(torn.encode(PROMPTS).text, first.text)
    assert calls == [PROMPTS[:1]]


def test_an_embedding_and_a_rows_bits_are_of_its_text_alone(unit_config):
    """CLIP projects its pooled vectors, by a product with a row for each prompt that is encoded at once."""
    assert_an_embedding_is_of_its_prompt_alone(load(unit_config), rounded="pooled")
    for fused in (True, False):
        assert_a_rows_bits_are_of_its_text_alone(load(unit_config, fused=fused), guidance=1.7)


def test_text_matches_the_stock_pipeline_without_t5(unit_config, unit_pipeline, tmp_path):
    """A folder whose T5 is absent loads, with the zeros stock diffusers uses in its place."""
    stock = StableDiffusion3Pipeline.from_pretrained(unit_pipeline, text_encoder_3=None, tokenizer_3=None)
    stock.save_pretrained(tmp_path / "no_t5")
    unit_config.model.path = str(tmp_path / "no_t5")
    policy = load(unit_config, max_sequence_length=1)
    text, _, pooled, _ = stock.encode_prompt(
        PROMPTS, None, None, do_classifier_free_guidance=False, max_sequence_length=1
    )
    encoded = policy.encode(PROMPTS)
    torch.testing.assert_close(encoded.text, text)
    torch.testing.assert_close(encoded.pooled, pooled)


def test_lora_scope(unit_config):
    every = load(unit_config).network.lora.state_dict()
    stock = load(unit_config, fused=False).network.adapters.state_dict()
    last = load(unit_config, lora=LoraSection(rank=4, blocks=1)).network.lora.state_dict()
    assert len(every) == 2 * 15  # 2 blocks x 8 projections, but the last block has no to_add_out
    assert len(last) == 2 * 7
    assert every.keys() == stock.keys()
    assert all(torch.equal(stock[name], every[name]) for name in every)  # and both paths start alike
    assert all(".1." in name for name in last)
    assert not any("attn2" in name for name in every)
    with pytest.raises(UserError, match="blocks = 3: the model has 2"):
        load(unit_config, lora=LoraSection(blocks=3))
    with pytest.raises(UserError, match="match no linear layer"):
        load(unit_config, lora=LoraSection(targets=("attn.to_query",)))


@pytest.mark.parametrize(
    ("kind", "modules", "parameters"), [("medium", 191, 18_776_064), ("large", 303, 303 * 32 * 2 * 2432)]
)
def test_lora_on_the_exact_sd35_configurations(kind, modules, parameters, monkeypatch):
    """docs/method.md section 8, of SD3.5-medium (meta device: no memory, no weights)."""
    monkeypatch.undo()  # conftest's NaN poisoning would allocate the weights
    with torch.device("meta"):
        transformer = SD3Transformer2DModel(**known_models.TRANSFORMERS[f"stabilityai/stable-diffusion-3.5-{kind}"])
        names = target_modules(transformer, config.load("sd35m-dino-paper").model.lora)
        layers = [transformer.get_submodule(name) for name in names]
    assert len(names) == modules
    assert sum(32 * (layer.in_features + layer.out_features) for layer in layers) == parameters


def test_full_fine_tuning_warns_and_keeps_the_base(unit_config, caplog):
    policy = load(unit_config, train="full", fused=False)
    assert "forgotten" in caplog.text
    latents = torch.randn(2, *policy.latent_shape())
    before = velocity_at(policy, latents, guidance=1.0)
    train_adapters(policy)
    with policy.disable_adapter(), torch.no_grad():
        assert torch.equal(velocity_at(policy, latents, guidance=1.0), before)
    assert not torch.equal(velocity_at(policy, latents, guidance=1.0), before)


def test_random_windows_stay_in_range_and_depend_on_the_iteration_alone(unit_config):
    unit_config.rollout.num_steps = 10
    windows = [steps_of(unit_config, i) for i in range(50)]
    assert windows == [steps_of(unit_config, i) for i in range(50)]
    assert {s for w in windows for s in w} == {0, 1, 2, 3, 4}
    assert all(len(w) == 2 and w[0] < w[1] for w in windows)
    unit_config.rollout.window.steps = (1, 0)
    assert steps_of(unit_config, 3) == (0, 1)


@pytest.mark.parametrize("kind", ["absent", "empty", "other"])
def test_a_wrong_model_folder_is_named(unit_config, tmp_path, kind):
    folder = tmp_path / "model"
    if kind != "absent":
        folder.mkdir()
    if kind == "other":
        (folder / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    unit_config.model.path = str(folder)
    with pytest.raises(UserError, match=r"model\.path = "):
        load(unit_config)


def test_a_resolution_the_model_cannot_draw_is_named(unit_config):
    with pytest.raises(UserError, match=r"model\.resolution = 1024"):
        load(unit_config, resolution=1024)


def test_defaults_name_the_models_of_the_method():
    assert config.Config().model.path == "stabilityai/stable-diffusion-3.5-medium"


def test_bfloat16_images_pass_the_gate_and_a_bad_decoder_does_not(unit_config, monkeypatch):
    policy = load(unit_config, decoder_dtype="bfloat16")
    latents = torch.randn(3, *policy.latent_shape())
    exact = load(unit_config, fused=False).decode(latents)
    assert (policy.decode(latents) - exact).square().mean() < 1e-4
    assert policy.decoder_psnr >= 40
    broken = load(unit_config, decoder_dtype="bfloat16")
    monkeypatch.setattr(broken.decoder.decoder.conv_in.bias, "data", broken.decoder.decoder.conv_in.bias + 1)
    with pytest.raises(ImageQualityError, match="below 40 dB"):
        broken.decode(latents)


def reweighed(unit_config, mode, monkeypatch, *, scale):
    """A rollout whose log-probabilities are `scale` off, corrected by the update; (sums, weights, gradient)."""
    unit_config.update.old_log_prob, unit_config.update.importance_cap = mode, 1.5
    unit_config.rollout.guidance_scale = 1.7
    policy = load(unit_config)
    train_adapters(policy)
    _, rollout, table = sample(policy, unit_config)
    exact = [step.log_prob.clone() for step in rollout.steps]
    gaps = torch.linspace(-1, 1, 6) * scale
    for step in rollout.steps:
        step.log_prob = step.log_prob - gaps
    updater = updater_of(policy, unit_config)
    sums = updater.reweigh([rollout], table)
    for step, log_prob in zip(rollout.steps, exact):
        assert torch.equal(step.log_prob, log_prob)  # the trainer's own
    stats = updater.accumulate([rollout], torch.ones(6), table, total=6, watch_kl=False)
    assert stats.max_mismatch() == 0
    return sums, gaps, rollout.steps, updater.named[0][1].grad.clone()


def test_recomputed_log_probs_make_a_foreign_rollout_exact(unit_config, monkeypatch):
    sums, gaps, steps, _ = reweighed(unit_config, "recompute", monkeypatch, scale=0.8)
    torch.testing.assert_close(sums[0], 2 * gaps.abs().sum().double(), rtol=1e-4, atol=1e-6)
    assert all(step.weight is None for step in steps)
    assert sums[3] == 12


def test_truncated_importance_weighs_each_image(unit_config, monkeypatch):
    sums, gaps, steps, gradient = reweighed(unit_config, "truncated_importance", monkeypatch, scale=0.8)
    expected = gaps.exp().clamp(max=1.5)
    for step in steps:
        torch.testing.assert_close(step.weight, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sums[1], 2 * expected.sum().double(), rtol=1e-4, atol=1e-4)
    assert sums[2] == 2 * (gaps.exp() >= 1.5).sum() > 0
    _, _, _, unweighted = reweighed(unit_config, "recompute", monkeypatch, scale=0.8)
    assert not torch.allclose(gradient, unweighted, rtol=1e-2)


def test_a_drift_or_a_bad_gradient_leaves_the_weights_alone_and_is_reported(unit_config):
    policy = load(unit_config)
    train_adapters(policy)
    _, rollout, table = sample(policy, unit_config)
    unit_config.rollout.guidance_scale = 1.7
    before = policy.network.lora.master.detach().clone()

    def one_window(updater, *, mismatch=None, spoil=False):
        updater.accumulate([rollout], torch.ones(6), table, total=6, watch_kl=False)
        if spoil:
            policy.network.lora.master.grad[-1] = float("inf")
        return updater.step(mismatch)

    updater = updater_of(policy, unit_config)
    norms = [one_window(updater, mismatch=torch.tensor(1e-3)), one_window(updater)]
    assert torch.equal(policy.network.lora.master, before)
    with pytest.raises(LogProbMismatchError, match=r"moved by 1\.000e-03"):
        updater.check(1e-3, [norm.item() for norm in norms], 7)
    one_window(updater_of(policy, unit_config), mismatch=torch.tensor(float("nan")))
    assert torch.equal(policy.network.lora.master, before), "what is no number is within no bound"
    updater = updater_of(policy, unit_config)
    norms = [one_window(updater, mismatch=torch.tensor(0.0), spoil=True), one_window(updater)]
    assert torch.equal(policy.network.lora.master, before)
    with pytest.raises(FloatingPointError, match="iteration 7"):
        updater.check(0.0, [norm.item() for norm in norms], 7)
    updater = updater_of(policy, unit_config)
    assert torch.isfinite(one_window(updater, mismatch=torch.tensor(0.0)))
    assert not torch.equal(policy.network.lora.master, before)

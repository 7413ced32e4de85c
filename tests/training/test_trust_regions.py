"""Trust regions and step weights in the update: exact before the first step, seen after it, and weighed as they say.

Planted bugs that turned this file red: no means kept for a trust region that needs them; the ratio's bound for the
divergence; the rollout's mean left after reweighing; weights by the step's place in the window; noise weights relative
to the noisiest step; the advantages' bound without the weight; weights that are the noise's square.
"""

import copy
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from advgrpo import config
from advgrpo.errors import UserError
from advgrpo.sampling.dynamics import step_weights
from tests.parts import every_second
from tests.sampling.test_branching import tempflow
from tests.sampling.test_rollout import build, changed, rollout_of, without_times

GOLDEN = Path(__file__).parents[1] / "golden"
REGIONS = ("ratio", "normalized_ratio", "divergence")
SDE = {"dynamics": "flow_sde", "likelihood": "gaussian", "eta": 0.7}


def settings_of(unit_config, region="ratio", weights="uniform", **rollout):
    settings = changed(unit_config, micro_batch=2, **rollout)
    settings.update.minibatches, settings.update.learning_rate = 2, 1e-2
    settings.update.trust_region, settings.update.step_weights = region, weights
    config.check(settings)
    return settings


@pytest.mark.parametrize(("region", "fast", "rollout"), every_second(REGIONS, [True, False], [{}, SDE]))
def test_every_region_starts_where_the_rollout_was_and_moves(unit_config, region, fast, rollout):
    settings = settings_of(unit_config, region, **rollout)
    settings.fast, settings.update.clip_range, settings.update.max_divergence = fast, 1e-12, 1e-12
    metrics = build(settings).trainer.iterate()
    assert metrics["log_prob_mismatch_max"] == metrics["pre_update_clip_fraction"] == 0
    assert 0 < metrics["clip_fraction"] <= 0.5, "of the second minibatch"
    assert metrics["ratio_mean"] != 1
    assert (metrics.get("policy_divergence", 0) > 0) == (region == "divergence")


def test_a_divergence_that_is_allowed_masks_nothing(unit_config):
    """Neither does the clip range, which is the ratio's."""
    settings = settings_of(unit_config, "divergence")
    settings.update.max_divergence, settings.update.clip_range = 1e6, 1e-12
    metrics = build(settings).trainer.iterate()
    assert metrics["clip_fraction"] == 0 < metrics["policy_divergence"]


@pytest.mark.parametrize("region", REGIONS[1:])
def test_a_window_of_merged_weights_is_compared_with_the_trainers_own_mean(unit_config, region):
    unit_config.update.old_log_prob = "recompute"
    settings = settings_of(unit_config, region, window_forward="merged")
    settings.update.minibatches = 1
    trainer = build(settings).trainer
    with torch.no_grad():
        for _, parameter in trainer.policy.trainable_parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)))
    metrics = trainer.iterate()
    assert metrics["log_prob_mismatch_mean"] > 0, "merging rounds"
    assert metrics["ratio_mean"] == 1
    assert metrics.get("policy_divergence", 0) == 0


def noise_of_steps(levels: list[float], eta: float) -> list[float]:
    """Flow-GRPO's sigma_t * sqrt(-dt) of every step, where the first level's 1 - sigma is the second's."""
    at = [levels[1] if level == 1 else level for level in levels]
    return [eta * (a / (1 - b) * (a - c)) ** 0.5 for a, b, c in zip(levels, at, levels[1:])]


@pytest.mark.parametrize("weights", ["inverse_length", "noise"])
def test_steps_weigh_as_much_as_they_are_short(unit_config, weights):
    """SD3's schedule of 4 steps, shift 3: loss and gradient of a step are the unweighted ones over sigma - sigma',
    which is GRPO-Guard's, or times its noise over the mean of all steps', TempFlow-GRPO's."""
    losses, gradients = {}, {}
    region = "normalized_ratio" if weights == "inverse_length" else "ratio"
    for which in ("uniform", weights):
        settings = settings_of(unit_config, region, which, **SDE, window={"order": "fixed", "steps": [0, 2]})
        trainer = build(settings).trainer
        micro_batch, table = rollout_of(trainer).micro_batches[0], trainer.objective.table(0)
        for step in list(micro_batch.steps):
            micro_batch.steps = [step]
            advantages = torch.linspace(-3, 7, 8)  # clipped to 5 before they are weighed
            stats = trainer.updater.accumulate([micro_batch], advantages, table, total=4, watch_kl=False)
            losses[which, step.step] = stats.sums()[0].item()
            gradients[which, step.step] = torch.cat([p.grad.flatten() for _, p in trainer.updater.named])
    levels = trainer.policy.schedule(4)[0].tolist()
    noise = noise_of_steps(levels, SDE["eta"])
    for step in (0, 2):
        expected = (
            1 / (levels[step] - levels[step + 1]) if weights == "inverse_length" else 4 * noise[step] / sum(noise)
        )
        assert abs(expected - 1) > 0.1
        assert losses[weights, step] == pytest.approx(expected * losses["uniform", step], rel=1e-5)
        plain, weighed = gradients["uniform", step], gradients[weights, step]
        assert plain.abs().max() > 0
        torch.testing.assert_close(weighed / expected, plain, rtol=1e-4, atol=1e-5 * plain.abs().max().item())


def test_weights_are_of_the_step_and_not_of_its_place(unit_config):
    trainer = build(settings_of(unit_config, weights="inverse_length")).trainer
    levels = trainer.policy.schedule(4)[0].tolist()
    expected = [1 / (levels[i] - levels[i + 1]) for i in range(4)]
    assert trainer.updater.step_weights == pytest.approx(expected)
    assert len(set(expected)) == 4
    assert step_weights(trainer.policy, trainer.objective.settings, "uniform") == (1.0,) * 4


def test_the_weighed_loss_is_tempflows_on_recorded_rows(unit_config):
    """Its loss is Flow-GRPO's on a step's rows times 2.25 std_dev_t: the recorded loss and gradient (Adv-GRPO's lines,
    16 rows beyond the clip and beyond the advantages' bound among them), times the deviations that TempFlow's own
    rollout recorded, over those of its first step."""
    golden = {name: torch.from_numpy(np.asarray(value)) for name, value in np.load(GOLDEN / "policy_loss.npz").items()}
    recorded, policy, rollout = tempflow()
    settings = settings_of(unit_config, **SDE)
    settings.update.clip_range = float(golden["clip_range"])
    settings.advantage.clip = float(golden["adv_clip_max"])
    updater = build(settings).trainer.updater
    updater.step_weights = step_weights(policy, rollout, "noise")
    s = math.exp(-0.5 * math.log(2 * math.pi) - 0.05)  # log p = 0.05 - d²/(2s²), which reaches the recorded values
    next_latents = (s * torch.sqrt(2 * (0.05 - golden["log_prob"].double()))).float()[:, None]
    table = SimpleNamespace(coefficients=torch.tensor([1.0, 1.0, s]).expand(4, 3), lengths=(0.2,) * 4)
    assert (golden["advantages"].abs() > settings.advantage.clip).any()
    assert ((golden["ratio"] - 1).abs() > settings.update.clip_range).any()
    first = updater.step_weights[0]
    for branch, deviation in enumerate(recorded["std_dev_t"] / recorded["std_dev_t"][0]):
        velocity = torch.zeros_like(next_latents, requires_grad=True)
        step = SimpleNamespace(
            step=branch, weight=None, next_latents=next_latents, log_prob=golden["old_log_prob"], mean=None
        )
        found = updater._loss(step, torch.zeros_like(velocity), (velocity, None), golden["advantages"], table, None)
        torch.testing.assert_close(found.loss.detach() / first, deviation * golden["loss"], rtol=1e-5, atol=1e-6)
        (gradient,) = torch.autograd.grad(found.loss, velocity)
        by_log_prob = gradient[:, 0] * s**2 / next_latents[:, 0]  # d log p / dv = d / s²
        torch.testing.assert_close(by_log_prob / first, deviation * golden["grad_log_prob"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dynamics", ["flow_sde", "flow_cps"])
def test_noise_weights_are_the_steps_recorded_deviations_over_their_mean(unit_config, dynamics):
    """sigma_t·sqrt(-dt) by flow_grpo's own std_dev_t; flow_cps' recorded one is that of the whole step, and its last
    step has none."""
    golden = np.load(GOLDEN / {"flow_sde": "flow_sde_flow_grpo.npz", "flow_cps": "flow_cps_adv_grpo.npz"}[dynamics])
    sigmas = torch.from_numpy(golden["sigmas"]).double()
    policy = SimpleNamespace(prediction_type="flow_prediction", schedule=lambda steps: (sigmas, None))
    eta = float(golden["noise_level"])
    rollout = changed(unit_config, num_steps=10, dynamics=dynamics, eta=eta).rollout
    lengths = sigmas[:-1] - sigmas[1:]
    std = torch.tensor([golden[f"{step}_std_dev_t"][0].item() for step in range(10)])
    std = std * lengths.sqrt() if dynamics == "flow_sde" else std
    expected = std / std[: 10 if dynamics == "flow_sde" else 9].mean()
    assert step_weights(policy, rollout, "noise") == pytest.approx(expected.tolist(), rel=1e-5)


def test_a_step_of_ddim_has_no_length(unit_config):
    settings = changed(unit_config, dynamics="ddim")
    settings.update.step_weights = "inverse_length"
    with pytest.raises(UserError, match=r"update\.step_weights = 'inverse_length' divides by a step's length"):
        config.check(settings)


@pytest.mark.parametrize("region", REGIONS[1:])
@pytest.mark.in_ci(1)
def test_a_resumed_run_takes_the_same_steps(unit_config, region):
    going, resumed = (build(settings_of(unit_config, region)).trainer for _ in range(2))
    going.iterate()
    tensors, state = copy.deepcopy(going.state())
    resumed.load(tensors, state)
    second, again = (without_times(trainer.iterate()) for trainer in (going, resumed))
    assert second == again
    assert second["ratio_mean"] != 1

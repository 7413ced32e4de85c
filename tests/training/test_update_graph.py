"""The update's forward and backward as captured graphs, on the emulator: the eager bits, and graphs that are kept."""

from pathlib import Path

import pytest
import torch

from advgrpo import config
from advgrpo.policy.sd3 import SD3Policy
from advgrpo.sampling.dynamics import step_table
from advgrpo.sampling.sampler import Sampler
from advgrpo.training import fast
from advgrpo.types import MicroBatch, MicroBatchRollout
from tests.graph_emulator import EmulatedGraphs
from tests.parts import some_weekly, updater_of

pytestmark = pytest.mark.usefixtures("layers_by_pytorch")

PROMPTS, ROW = ["a small red star", "a large green ring"], torch.tensor([0, 0, 1, 1])


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch):
    """On a CPU some ops also check values, which is free there; a captured step must not."""
    for module in ("gaussian_step", "_gaussian"):
        monkeypatch.setattr(f"advgrpo_kernels.ops.{module}.can_look_at", lambda tensor: False)


def trained(settings, graphs=None, *, iterations: int = 4, window=(0, 1)):
    """(policy, updater, statistics of each minibatch) after optimizer steps on what the policy has drawn itself."""
    policy = SD3Policy(
        settings.model, device=torch.device("cpu"), cache_dir=Path(settings.data.cache_dir), seed=0, fused=True
    )
    updater = updater_of(policy, settings, graphs)
    share = settings.rollout.initial_noise == "shared"
    sampler = Sampler(
        policy, settings.rollout.guidance_scale, settings.rollout.likelihood, share_prefix=share, merged=True,
        shared_noise=share, keep_means=settings.update.trust_region != "ratio",
    )  # fmt: skip
    seen = []
    for number in range(iterations):
        policy.merge()
        table = step_table(policy, 4, window, rollout=settings.rollout)
        rollouts = []
        for place in range(2):
            ids = torch.arange(4) + 4 * place
            text = policy.encode([f"{prompt} {number} {place}" for prompt in PROMPTS])
            initial = sampler.initial_latents(number, torch.arange(2) if share else ids)
            latents, steps = sampler.run(table, text, initial, ROW, noise_seed=number, image_ids=ids)
            micro_batch = MicroBatch(ids, PROMPTS, torch.arange(2), ROW, 0)
            rollouts.append(MicroBatchRollout(micro_batch, text, steps, latents))
        advantages = torch.linspace(-1, 1, 8).roll(number)
        stats = updater.accumulate(rollouts, advantages, table, total=8, watch_kl=True)
        assert stats.max_mismatch() == 0
        updater.step(stats.max_mismatch())
        seen.append(stats.sums())
    return policy, updater, torch.stack(seen)


CHANGES = {
    "shared noise": {},
    "noise per image, kl": {"rollout": {"initial_noise": "per_image"}, "update": {"kl_weight": 0.1}},
    "divergence, kl to the average": {
        "update": {"trust_region": "divergence", "kl_to": "ema", "kl_weight": 0.1, "max_divergence": 1e-3}
    },
}


@pytest.mark.parametrize("name", some_weekly(CHANGES, ["divergence, kl to the average"]))
def test_captured_updates_have_the_eager_bits_and_graphs_are_kept(name, unit_config):
    change = config.merge({"update": {"graphs": True, "learning_rate": 1e-2}}, CHANGES[name])
    settings = config.build(config.merge(unit_config.model_dump(), change), name)
    backend = EmulatedGraphs()
    eager, _, expected = trained(settings)
    captured, updater, found = trained(settings, backend)
    assert torch.equal(found, expected)
    for (label, own), (_, other) in zip(captured.trainable_parameters(), eager.trainable_parameters()):
        assert torch.equal(own, other), label
        assert own.grad.abs().max() > 0
    kinds = 2 + (settings.update.kl_weight == 0)  # a graph for each step; another where only image 0's KL is watched
    assert updater.captured.captures == kinds
    assert backend.replays == 2 * 2 * 4 - 2 * kinds


def test_without_the_setting_nothing_is_captured(unit_config):
    backend = EmulatedGraphs()
    _, updater, _ = trained(unit_config, backend, iterations=3)
    assert (updater.captured.captures, backend.replays) == (0, 0)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({}, "update.graphs = false"),
        ({"graphs": True}, ""),
        ({"graphs": True, "objective": "nft"}, "update.objective = nft: only the policy gradient's is"),
    ],
)
def test_the_table_of_fast_paths_says_why_it_is_off(change, why, unit_config):
    settings = config.build(config.merge(unit_config.model_dump(), {"update": change}), "test")
    assert fast._why_not_captured(settings) == why
    row = next(
        row for row in fast.FastPaths.choose(settings, torch.device("cpu")).table if row.name == "captured update"
    )
    assert (row.on, row.why) == (False, "no CUDA device")

"""The sampler's steps as captured graphs, on the emulated backend: same bits, live weights, no re-capture.

Bugs planted in a copy, each seen red: results of a replay kept without a copy; one step's coefficients for all; prompts
not expanded after the branch; shapes left out of the key; static storage for a policy that has none.
"""

from pathlib import Path

import pytest
import torch

from advgrpo.policy.base import Capturable, Generator, Trainable
from advgrpo.policy.sd3 import SD3Policy
from advgrpo.sampling.dynamics import step_table
from advgrpo.sampling.sampler import Sampler
from advgrpo.types import MicroBatch, MicroBatchRollout
from tests.graph_emulator import EmulatedGraphs
from tests.parts import every_second, updater_of

pytestmark = pytest.mark.usefixtures("layers_by_pytorch")

PROMPTS = ["a small red star on the left of a blue background", "a large green ring at the top of a white background"]
ROW = torch.tensor([0, 0, 0, 1, 1, 1])


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch):
    """On a CPU the step also checks values, which is free there; a captured step must not."""
    for module in ("gaussian_step", "_gaussian"):
        monkeypatch.setattr(f"advgrpo_kernels.ops.{module}.can_look_at", lambda tensor: False)


@pytest.fixture
def policy(unit_config) -> SD3Policy:
    return SD3Policy(
        unit_config.model, device=torch.device("cpu"), cache_dir=Path(unit_config.data.cache_dir), seed=0, fused=True
    )


def make_sampler(policy, graphs=None, guidance=1.7, share=True, whole=False) -> Sampler:
    return Sampler(policy, guidance, "squared_error", share_prefix=share, merged=True, graphs=graphs, whole=whole)


def rollout(sampler: Sampler, settings, *, seed: int, window: tuple[int, ...], row=ROW, num_steps: int = 4):
    policy = sampler.policy
    policy.merge()
    table = step_table(policy, num_steps, window, rollout=settings.rollout if window else None)
    initial = sampler.initial_latents(seed, torch.arange(2))
    ids = torch.arange(len(row)) + 10 * seed
    latents, steps = sampler.run(table, policy.encode(PROMPTS), initial, row, noise_seed=seed, image_ids=ids)
    return latents, steps, table


def move_weights(policy: SD3Policy, seed: int) -> None:
    with torch.no_grad():
        for _, parameter in policy.trainable_parameters():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
            parameter.add_(0.1 * noise)


def assert_same(one, other) -> None:
    assert torch.equal(one[0], other[0])
    assert len(one[1]) == len(other[1])
    for a, b in zip(one[1], other[1]):
        assert a.step == b.step
        assert a.shared == b.shared
        for name in ("latents", "next_latents", "log_prob"):
            assert torch.equal(getattr(a, name), getattr(b, name)), (a.step, name)


@pytest.mark.parametrize(("share", "guidance"), every_second([True, False], [1.7, 1.0]))
def test_replays_equal_the_eager_sampler_bit_for_bit_while_everything_changes(policy, unit_config, share, guidance):
    """Seeds, image ids, windows and weights differ every time; the captured graphs stay."""
    backend = EmulatedGraphs()
    captured, eager = make_sampler(policy, backend, guidance, share), make_sampler(policy, None, guidance, share)
    counts = []
    for seed, window in enumerate([(1, 2), (0, 2), (2,), (0, 1)] * 2):
        move_weights(policy, seed)
        found = rollout(captured, unit_config, seed=seed, window=window)
        assert_same(found, rollout(eager, unit_config, seed=seed, window=window))
        counts.append(captured.captures)
    assert counts[-1] == counts[-4] > 0
    assert backend.replays >= 12
    assert eager.captures == 0


@pytest.mark.parametrize("share", [True, False])
def test_ten_steps_of_a_fixed_window_are_one_graph(policy, unit_config, share):
    """The released window {0, 1}: one launch per trajectory, with the eager bits, whatever else changes."""
    backend = EmulatedGraphs()
    captured, eager = make_sampler(policy, backend, share=share, whole=True), make_sampler(policy, share=share)
    for seed in range(4):
        move_weights(policy, seed)
        found, expected = (
            rollout(sampler, unit_config, seed=seed, window=(0, 1), num_steps=10) for sampler in (captured, eager)
        )
        assert_same(found, expected)
        assert torch.isfinite(found[0]).all()
    assert captured.captures == 1
    assert backend.replays == 2  # after two warm-up calls, of which every one draws a trajectory
    own = [tensor for step in found[1] for tensor in (step.latents, step.next_latents, step.log_prob)]
    before = [tensor.clone() for tensor in own]
    rollout(captured, unit_config, seed=9, window=(0, 1), num_steps=10)
    assert all(torch.equal(*pair) for pair in zip(own, before))  # what was handed out is nobody else's memory


def test_every_window_and_length_has_a_trajectory_of_its_own(policy, unit_config):
    captured, eager = make_sampler(policy, EmulatedGraphs(), whole=True), make_sampler(policy)
    for seed in range(3):
        for window, steps in (((0, 1), 4), ((1, 2), 4), ((), 4), ((0, 1), 5)):
            settings = {"seed": seed, "window": window, "num_steps": steps}
            assert_same(rollout(captured, unit_config, **settings), rollout(eager, unit_config, **settings))
    assert captured.captures == 4


@pytest.mark.parametrize(("share", "whole"), every_second([True, False], [True, False]))
def test_a_tail_of_second_order_has_the_eager_bits(policy, unit_config, share, whole):
    """What a step hands on to the next lies in static storage, or inside the trajectory's graph."""
    unit_config.rollout.tail_steps, unit_config.rollout.tail_solver = 3, "dpm2"
    backend = EmulatedGraphs()
    captured, eager = make_sampler(policy, backend, share=share, whole=whole), make_sampler(policy, share=share)
    for seed in range(5):
        move_weights(policy, seed)
        settings = {"seed": seed, "window": (0, 1), "num_steps": 9}
        found, expected = (rollout(sampler, unit_config, **settings) for sampler in (captured, eager))
        assert found[2].second_order.steps == (2, 4)
        assert_same(found, expected)
    assert backend.replays > 0
    unit_config.rollout.tail_solver = "euler"
    assert not torch.equal(rollout(eager, unit_config, **settings)[0], expected[0])


def test_only_a_new_shape_captures_again(policy, unit_config):
    sampler = make_sampler(policy, EmulatedGraphs())
    for seed in range(4):
        rollout(sampler, unit_config, seed=seed, window=(1, 2))
    before = sampler.captures
    for seed in range(4):
        rollout(sampler, unit_config, seed=seed, window=(1, 2), row=torch.tensor([0, 0, 1, 1]))
    assert sampler.captures > before
    grown = sampler.captures
    for seed in range(2):
        rollout(sampler, unit_config, seed=seed, window=(1, 2))
    assert sampler.captures == grown


@pytest.mark.parametrize("whole", [False, True])
def test_log_probs_are_repeated_exactly_with_graphs(policy, unit_config, whole):
    """docs/method.md section 5, captured steps: drift and pre-update clip fraction 0, after several optimizer steps."""
    unit_config.rollout.guidance_scale = 1.7
    unit_config.update.learning_rate = 1e-2
    updater = updater_of(policy, unit_config)
    sampler = make_sampler(policy, EmulatedGraphs(), whole=whole)
    for seed in range(5):
        window = (1, 2) if whole or seed % 2 == 0 else (0, 2)
        latents, steps, table = rollout(sampler, unit_config, seed=seed, window=window)
        images, text = policy.decode(latents), policy.encode(PROMPTS)
        micro_batch = MicroBatchRollout(
            MicroBatch(torch.arange(6), PROMPTS, torch.arange(2), ROW, 0), text, steps, images
        )
        stats = updater.accumulate(
            [micro_batch], torch.tensor([1.0, -1, 0.5, 2, -0.5, -1.5]), table, total=6, watch_kl=False
        )
        assert stats.max_mismatch() == 0
        assert stats.sums()[2] == 0
        assert torch.isfinite(updater.step(stats.max_mismatch()))
    assert sampler.captures == 1 if whole else sampler.captures >= 3


def test_averages_and_a_loaded_lora_are_seen_by_captured_graphs(policy, unit_config, tmp_path):
    """EMA swap and loading write the parameters' own storage."""
    updater = updater_of(policy, unit_config)
    captured, eager = make_sampler(policy, EmulatedGraphs()), make_sampler(policy)
    for seed in range(4):
        rollout(captured, unit_config, seed=seed, window=(1, 2))
    move_weights(policy, 1)
    own = rollout(captured, unit_config, seed=9, window=(1, 2))
    with updater.ema.swap():
        averaged = rollout(captured, unit_config, seed=9, window=(1, 2))
        assert_same(averaged, rollout(eager, unit_config, seed=9, window=(1, 2)))
    assert not torch.equal(averaged[0], own[0])
    assert_same(rollout(captured, unit_config, seed=9, window=(1, 2)), own)
    policy.export(tmp_path / "lora")
    move_weights(policy, 2)
    policy.network.load_lora(tmp_path / "lora")
    assert_same(rollout(captured, unit_config, seed=9, window=(1, 2)), own)


class OnlyGenerates:
    """What `Generator` asks of a policy and nothing beyond: what a new family of models has to write."""

    def __init__(self, policy: SD3Policy):
        self._own = policy

    def __getattr__(self, name: str):
        if name not in {*Generator.__annotations__, *vars(Generator)}:
            raise AttributeError(name)
        return getattr(self._own, name)


def test_a_generator_alone_is_sampled_and_a_graph_backend_leaves_it_eager_and_says_so(policy, unit_config, caplog):
    table = step_table(policy, 4, (1, 2), rollout=unit_config.rollout)
    results, text = [], policy.encode(PROMPTS)
    alone, backend = OnlyGenerates(policy), EmulatedGraphs()
    assert not isinstance(alone, (Trainable, Capturable))
    assert isinstance(policy, Trainable)
    assert isinstance(policy, Capturable)
    for given, graphs in ((policy, None), (alone, None), (alone, backend)):
        caplog.clear()
        sampler = Sampler(given, 1.7, "squared_error", share_prefix=True, merged=False, graphs=graphs)
        assert ("OnlyGenerates is not Capturable" in caplog.text) == (graphs is not None)
        for seed in range(4):
            initial = sampler.initial_latents(seed, torch.arange(2))
            ids = torch.arange(6) + 10 * seed
            results.append(sampler.run(table, text, initial, ROW, noise_seed=seed, image_ids=ids))
        assert sampler.captures == 0
    for number, result in enumerate(results):
        assert_same(result, results[number % 4])


@pytest.mark.parametrize("where", ["merged", "window_merged"])
def test_merged_steps_are_refused_where_nothing_can_be_merged(policy, where):
    merged = {"merged": False, **{where: True}}
    with pytest.raises(ValueError, match="need a Trainable policy, which a OnlyGenerates is not"):
        Sampler(OnlyGenerates(policy), 1.0, "gaussian", share_prefix=True, **merged)


def test_a_window_without_image_ids_is_refused(policy, unit_config):
    sampler = make_sampler(policy)
    table = step_table(policy, 4, (1,), rollout=unit_config.rollout)
    with pytest.raises(ValueError, match="image_ids"):
        sampler.run(table, policy.encode(PROMPTS), sampler.initial_latents(0, torch.arange(2)), ROW)


@pytest.mark.parametrize(("share", "whole"), [(True, False), (False, False), (True, True)])
def test_means_are_kept_on_demand_by_captured_steps_as_well(policy, unit_config, share, whole):
    """They are where the steps would have gone without noise, and the rest of the rollout does not change."""
    kept = []
    for graphs in (None, EmulatedGraphs()):
        plain, keeping = make_sampler(policy, graphs, share=share), make_sampler(policy, graphs, share=share)
        keeping.keep_means, keeping.whole = True, whole
        for seed in range(3):  # captured at the second call, replayed at the third
            own = rollout(plain, unit_config, seed=seed, window=(1, 2))
            latents, steps, table = rollout(keeping, unit_config, seed=seed, window=(1, 2))
        assert torch.equal(own[0], latents)
        assert all(step.mean is None for step in own[1])
        kept.append([step.mean for step in steps])
    for eager, captured, step in zip(*kept, steps):
        assert torch.equal(eager, captured)
        noise = (step.next_latents - captured) / table.coefficients[step.step, 2]
        assert noise.std().item() == pytest.approx(1, abs=0.05)
        assert abs(noise.mean().item()) < 0.05
    assert not torch.equal(*kept[1])

"""`rollout.window.branching`: groups of a prompt that leave one trajectory at a step each, beside TempFlow-GRPO's own.

Bugs planted in a copy, each seen red: the initial noise by group; a prompt for every group; noise at all steps of the
window; a group's step drawn by minibatch; the loss's mean over the whole window; the kept images of a cut group with
the step of another.
"""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from advgrpo import config
from advgrpo.config import RolloutSection
from advgrpo.config.sections import WindowSection
from advgrpo.errors import UserError
from advgrpo.runtime.mesh import Mesh
from advgrpo.sampling.dynamics import step_table, step_weights
from advgrpo.sampling.sampler import Sampler
from advgrpo.training.micro_batches import MicroBatches
from advgrpo.types import MicroBatch
from tests.sampling.test_multistep import given_noise
from tests.sampling.test_rollout import build, by_image, changed, rollout_of, without_times
from tests.sampling.toy import ToyGenerator, bent

GOLDEN = Path(__file__).parents[1] / "golden"


def tempflow():
    golden = {name: torch.from_numpy(value) for name, value in np.load(GOLDEN / "branches_tempflow.npz").items()}
    window = WindowSection(order="fixed", steps=tuple(range(len(golden["noise"]))), branching=True)
    rollout = RolloutSection(num_steps=5, dynamics="flow_sde", eta=0.7, window=window, initial_noise="shared")
    return golden, ToyGenerator(golden["sigmas"], bent), rollout


@pytest.mark.parametrize("share", [True, False])
def test_every_branch_is_tempflows_own(monkeypatch, share):
    """Latents of the trajectory, the step that leaves it with its log-probability, and the image at the ODE's end."""
    golden, policy, rollout = tempflow()
    table = step_table(policy, 5, (0, 1, 2, 3), rollout=rollout)
    row = torch.arange(2).repeat_interleave(6)
    for branch in range(4):
        sampler = Sampler(policy, 1.0, "gaussian", share_prefix=share, merged=False)
        given_noise(monkeypatch, golden["noise"][branch : branch + 1])
        text = policy.encode(["a", "b"])
        latents, (step,) = sampler.run(table.of(branch), text, golden["latents"][0], row, image_ids=torch.arange(12))
        monkeypatch.undo()
        before = golden["latents"][branch]
        torch.testing.assert_close(step.latents, before if share else before[row], rtol=0, atol=2e-6)
        torch.testing.assert_close(step.next_latents, golden["next_latents"][branch], rtol=0, atol=2e-6)
        torch.testing.assert_close(step.log_prob, golden["log_prob"][branch], rtol=0, atol=2e-6)
        torch.testing.assert_close(latents, golden["images"][branch], rtol=0, atol=5e-6)
        assert step.step == branch


def test_the_weights_are_tempflows_up_to_one_factor():
    """Its loss is multiplied by 2.25 times the deviation of a step's noise; ours by that over its mean."""
    golden, policy, rollout = tempflow()
    weights = torch.tensor(step_weights(policy, rollout, "noise"))[:4]
    torch.testing.assert_close(weights / weights.sum(), golden["std_dev_t"] / golden["std_dev_t"].sum())


def three_branches(branching: bool = True, **changes) -> RolloutSection:
    window = WindowSection(order="fixed", steps=(1, 2, 4), branching=branching)
    return RolloutSection(prompts_per_iteration=6, group_size=4, micro_batch=2, num_steps=6, window=window, **changes)


@pytest.mark.parametrize("world_size", [1, 2])
def test_groups_of_a_prompt_share_their_noise_and_take_the_steps_in_turn(world_size):
    prompts = [f"prompt {number}" for number in range(20)]
    every: list[MicroBatch] = []
    for rank in range(world_size):
        micro_batches = MicroBatches(prompts, three_branches(), 3, seed=7, mesh=Mesh(rank, world_size))
        every += micro_batches.of(4)
        texts = micro_batches.prompts_of(4)
    assert [texts[0]] * 3 + [texts[3]] * 3 == texts
    assert texts[0] != texts[3]
    found = {int(image): each for each in every for image in each.image_ids}
    assert sorted(found) == list(range(24))
    for image, each in found.items():
        group = image // 4
        assert (each.branch, each.trajectories.tolist()) == (group % 3, [group // 3 * 3])
        assert each.prompts == [texts[group]]


def test_without_branching_nothing_is_shared_out():
    micro_batches = MicroBatches(["a", "b"], three_branches(branching=False), 3, seed=7, mesh=Mesh()).of(0)
    assert {each.branch for each in micro_batches} == {None}
    assert [each.trajectories.tolist() for each in micro_batches[:4]] == [[0], [0], [1], [1]]


def test_each_branch_has_a_table_of_its_own():
    """Its tail is as short as asked for after its own step, and the update finds its step's row in the whole table."""
    policy = ToyGenerator(torch.linspace(1, 0, 7), bent)
    rollout = three_branches(dynamics="flow_sde", initial_noise="shared", tail_steps=2, tail_solver="dpm2")
    table = step_table(policy, 6, (1, 2, 4), rollout=rollout)
    assert [each.taken for each in table.branches] == [(0, 1, 2, 4), (0, 1, 2, 3, 4), (0, 1, 2, 3, 4, 5)]
    assert [each.window for each in table.branches] == [(1,), (2,), (4,)]
    assert table.trained_per_image == 1
    assert [len(each.trained) for each in table.to_look_at().branches] == [0, 0, 0]
    for own in table.branches:
        (step,) = own.window
        assert torch.equal(table.coefficients[step], own.coefficients[step])
        assert own.coefficients[step, 2] > 0
        assert own.coefficients[[i for i in range(6) if i != step], 2].abs().max() == 0


BRANCHING = {"order": "fixed", "steps": [0, 2], "branching": True}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"scouts": 2}, marks=pytest.mark.weekly),
        {"tail_steps": 2, "tail_solver": "dpm2", "tail_agreement": 0.0},
    ],
)
@pytest.mark.in_ci(1)
def test_a_run_that_branches_starts_on_policy_learns_and_resumes_bit_for_bit(unit_config, changes):
    unit_config.update.learning_rate = 1e-2
    unit_config.rollout.num_steps = 6
    settings = changed(
        unit_config, initial_noise="shared", window=BRANCHING, micro_batch=2, prompts_per_iteration=4, **changes
    )
    going, resumed = build(settings).trainer, build(settings).trainer
    steps = {step.step for each in rollout_of(going).micro_batches for step in each.steps}
    assert steps == {0, 2}
    assert all(len(each.steps) == 1 for each in rollout_of(going).micro_batches)
    going.iterate()
    resumed.load(*copy.deepcopy(going.state()))
    metrics = going.iterate()
    assert metrics["log_prob_mismatch_max"] == 0
    assert metrics["grad_norm"] > 0
    assert without_times(resumed.iterate()) == without_times(metrics)


def test_two_processes_draw_the_branches_that_one_does(unit_config):
    settings = changed(unit_config, initial_noise="shared", window=BRANCHING, micro_batch=2)
    trainer = build(settings).trainer
    alone, parts = by_image(rollout_of(trainer)), []
    for rank in range(2):
        mine = trainer.objective.micro_batches
        mine.mesh = Mesh(rank, 2)
        parts.append(rollout_of(trainer))
    together = by_image(*parts)
    assert together.keys() == alone.keys() == set(range(8))
    for number, held in alone.items():
        assert all(torch.equal(*pair) for pair in zip(held, together[number], strict=True))
    assert torch.equal(alone[0][1], alone[3][1]), "step 0 holds the initial noise, which a group has one of"


def test_the_loss_is_a_mean_over_images_whatever_the_windows_size(unit_config):
    """Two steps that branch, of which each image has one: the gradient is that of the steps alone, added up."""
    settings = changed(unit_config, initial_noise="shared", window=BRANCHING, micro_batch=2)
    trainer = build(settings).trainer
    advantages = torch.linspace(-1, 1, 8)
    rollout, table = rollout_of(trainer), trainer.objective.table(0)
    learned = {"total": 8, "watch_kl": False}
    both = trainer.updater.accumulate(rollout.micro_batches, advantages, table, **learned).sums()
    gradient = [parameter.grad.clone() for _, parameter in trainer.policy.trainable_parameters()]
    parts = [torch.zeros_like(each) for each in gradient]
    for branch in range(2):
        own = [each for each in rollout.micro_batches if each.micro_batch.branch == branch]
        trainer.updater.accumulate(own, advantages, table.of(branch), **learned)
        for part, (_, parameter) in zip(parts, trainer.policy.trainable_parameters()):
            part += parameter.grad
    assert both[5] == 8
    for one, other in zip(gradient, parts):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"initial_noise": "per_image"}, "set rollout.initial_noise = shared"),
        ({"micro_batch": 8}, "rollout.micro_batch = 8 would hold several groups .* set rollout.micro_batch = 4"),
        ({"prompts_per_iteration": 3}, "set a multiple of 2, such as 4"),
        ({"window": {**BRANCHING, "train_share": 0.99}}, "set rollout.window.train_share = 1"),
    ],
)
def test_what_does_not_go_with_branching_is_refused(unit_config, changes, message):
    unit_config.update.minibatches = 1
    whole = {"initial_noise": "shared", "window": BRANCHING, "micro_batch": 4, **changes}
    settings = changed(unit_config, **whole)
    with pytest.raises(UserError, match=message):
        config.check(settings)

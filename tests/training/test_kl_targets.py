"""Whom the KL pulls towards and where it is taken: base, average, teacher; latents or velocities.

Planted bugs that turned this file red: lent weights left in the parameters; a teacher read into the policy; the average
as it was at the start; twice the velocities' difference; a policy loss beside policy_weight 0.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from advgrpo import config
from advgrpo.errors import UserError
from advgrpo_kernels import clipped_policy_loss
from tests.sampling.test_rollout import build, changed, rollout_of
from tests.training.test_repair import change

GOLDEN = Path(__file__).parents[1] / "golden"
SDE = {"dynamics": "flow_sde", "likelihood": "gaussian", "eta": 0.7, "window": {"order": "fixed", "steps": [0, 2]}}


def moved(trainer, seed, scale=0.1):
    with torch.no_grad():
        for _, parameter in trainer.policy.trainable_parameters():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
            parameter.add_(scale * noise)


def weights(trainer):
    return [parameter.detach().clone() for _, parameter in trainer.policy.trainable_parameters()]


@pytest.fixture
def teacher(unit_config, tmp_path):
    """(folder, parameters) of a LoRA that draws something else."""
    trainer = build(change(unit_config, output_dir=str(tmp_path / "teacher"))).trainer
    moved(trainer, 7)
    trainer.policy.export(tmp_path / "lora")
    return tmp_path / "lora", weights(trainer)


def pulled(unit_config, fast=True, **update):
    settings = change(changed(unit_config, **SDE), update={"kl_weight": 0.3, **update}, fast=fast)
    config.check(settings)
    trainer = build(settings).trainer
    moved(trainer, 5)
    return trainer


def kl_of(trainer, advantages=None):
    """(kl per pair, loss per pair) of one micro-batch's two steps, with its gradients accumulated."""
    micro_batch = rollout_of(trainer).micro_batches[0]
    advantages = torch.zeros(8) if advantages is None else advantages
    table = trainer.objective.table(0)
    stats = trainer.updater.accumulate([micro_batch], advantages, table, total=4, watch_kl=False)
    loss, _, _, kl, _, pairs, kl_pairs = stats.sums().tolist()
    return kl / kl_pairs, loss / pairs


def expected_kl(trainer, target, space):
    """Written out: guided velocities of both weights on the rollout's own latents."""
    policy, table, guidance = trainer.policy, trainer.objective.table(0), trainer.objective.settings.guidance_scale
    micro_batch, own, found = rollout_of(trainer).micro_batches[0], weights(trainer), []
    prompts = policy.prepare(policy.encode(micro_batch.micro_batch.prompts), table.timesteps, guidance=2.0)
    prompts = prompts.rows(micro_batch.micro_batch.row)

    def velocity(step, values):
        latents = step.latents[micro_batch.micro_batch.row] if step.shared else step.latents
        with torch.no_grad():
            for (_, parameter), value in zip(policy.trainable_parameters(), values):
                parameter.copy_(value)
            c, u = policy.predict(latents, table.numbers[step.step], prompts)
        return (1 - guidance) * u + guidance * c

    for step in micro_batch.steps:
        gap = velocity(step, target).float() - velocity(step, own).float()
        _, b, s = table.coefficients[step.step].tolist()
        found.append(gap.square().mean().item() * (1.0 if space == "velocity" else b * b / (2 * s * s)))
    return sum(found) / len(found)


# By diffusers' forward CI has the teacher, whose LoRA it reads in another way.
@pytest.mark.parametrize(
    ("to", "space", "fast"),
    [
        pytest.param(to, space, fast, marks=[pytest.mark.weekly] * (not fast and to != "teacher"))
        for to in ("base", "ema", "teacher")
        for space in ("latent", "velocity")
        for fast in (True, False)
    ],
)
def test_the_kl_is_to_the_model_named_in_the_space_named(unit_config, teacher, to, space, fast):
    settings = {"kl_to": to, "kl_space": space, "teacher": str(teacher[0]) if to == "teacher" else ""}
    trainer = pulled(unit_config, fast, **settings)
    before = weights(trainer)
    target = [torch.zeros_like(value) for value in before]
    if to == "ema":
        target = [value.clone() for value in trainer.ema.state_dict().values()]
    if to == "teacher":
        target = teacher[1] if fast else list(trainer.policy.parameters_of_lora(teacher[0], "a test").values())
    kl, loss = kl_of(trainer)
    assert all(torch.equal(*pair) for pair in zip(weights(trainer), before)), "lent weights are given back"
    assert kl == pytest.approx(expected_kl(trainer, target, space), rel=1e-3)
    assert loss == pytest.approx(0.3 * kl, rel=1e-5)
    assert kl > 1e-8
    assert max(parameter.grad.abs().max().item() for _, parameter in trainer.updater.named) > 0


def test_the_average_is_the_one_of_now(unit_config):
    """Once it has caught up, the policy is pulled nowhere."""
    trainer = pulled(unit_config, kl_to="ema", ema_decay=0.0)
    assert kl_of(trainer)[0] > 1e-8
    trainer.ema.step()
    kl, _ = kl_of(trainer)
    assert kl == 0
    assert all(parameter.grad.abs().max() == 0 for _, parameter in trainer.updater.named)


@pytest.mark.weekly
def test_distillation_alone_looks_at_no_advantage_and_comes_nearer_to_the_teacher(unit_config, teacher):
    alone = {"kl_to": "teacher", "teacher": str(teacher[0]), "kl_space": "velocity", "policy_weight": 0.0}
    trainer = pulled(unit_config, **alone, learning_rate=3e-3, clip_range=1e-3)
    first, loss = kl_of(trainer, torch.linspace(-3, 3, 8))
    gradients = [parameter.grad.clone() for _, parameter in trainer.updater.named]
    assert loss == pytest.approx(0.3 * first, rel=1e-5)
    assert kl_of(trainer) == (first, loss)
    assert all(torch.equal(p.grad, gradient) for (_, p), gradient in zip(trainer.updater.named, gradients))
    for iteration in range(6):
        trainer.iteration = iteration
        metrics = trainer.iterate()
        assert metrics["log_prob_mismatch_max"] == 0
    assert kl_of(trainer)[0] < 0.8 * first


def test_the_policy_loss_is_weighed_and_the_kl_is_not(unit_config):
    losses = {}
    for weight in (1.0, 0.25):
        trainer = pulled(unit_config, policy_weight=weight)
        kl, losses[weight] = kl_of(trainer, torch.linspace(-3, 3, 8))
    assert losses[0.25] - 0.3 * kl == pytest.approx(0.25 * (losses[1.0] - 0.3 * kl), rel=1e-4)


@pytest.mark.parametrize("which", ["transition", "velocity"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_distillation_losses_of_verl_omni(which, backend, device):
    """Theirs divides by 2·std_dev_t², or compares velocities; b·v is the mean of a step without a·x."""
    golden = {name: torch.from_numpy(np.asarray(value)).to(device) for name, value in np.load(FILE).items()}
    student, teacher = golden["student"], golden["teacher"]
    b = 1.0 if which == "transition" else -0.2
    velocity, rows = student.clone().requires_grad_(), torch.zeros(len(student), device=device)
    result = clipped_policy_loss(
        *(torch.zeros_like(student), velocity, student, torch.tensor([0.0, b, 0.3], device=device), rows, rows),
        clip_range=1e-4,
        reference_mean=b * teacher,
        kl_weight=1.0,
        kl_std=golden["std_dev_t"] if which == "transition" else abs(b) * 0.5**0.5,
        backend=backend,
    )
    torch.testing.assert_close(result.loss.detach(), golden[f"{which}_loss"], rtol=1e-5, atol=0)
    (grad,) = torch.autograd.grad(result.loss, velocity)
    expected = golden[f"{which}_grad"]
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_kl_to_the_average_is_flow_factorys(backend, device):
    """Its ema_kl_beta of the AWM trainer, recorded with advantages of 0: X-GenGroup/Flow-Factory
    a0b2bc5a2b4fbf9125429b3fb70c0c5d7631047c, src/flow_factory/trainers/awm.py."""
    file = GOLDEN / "awm_flow_factory.npz"
    golden = {name: torch.from_numpy(np.asarray(value)).to(device) for name, value in np.load(file).items()}
    for level in range(2):
        velocity, b = golden["velocity"][level].clone().requires_grad_(), -0.2
        rows = torch.zeros(len(velocity), device=device)
        result = clipped_policy_loss(
            *(torch.zeros_like(velocity), velocity, velocity.detach(), torch.tensor([0.0, b, 0.3], device=device)),
            *(rows, rows),
            clip_range=1e-4,
            reference_mean=b * golden["average"][level],
            kl_weight=golden["ema_kl_beta"].item(),
            kl_std=torch.tensor(abs(b) * 0.5**0.5, device=device),
            backend=backend,
        )
        torch.testing.assert_close(result.loss.detach(), golden["loss_average"][level], rtol=1e-5, atol=0)
        (grad,) = torch.autograd.grad(result.loss, velocity)
        expected = golden["grad_average"][level]
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


FILE = GOLDEN / "distill_verl_omni.npz"


def test_a_teacher_of_another_shape_is_refused_before_the_model_is_loaded(unit_config, teacher):
    settings = change(unit_config, update={"kl_weight": 0.1, "kl_to": "teacher", "teacher": str(teacher[0])})
    settings.model.lora.rank = 8
    with pytest.raises(UserError, match=r"update\.teacher = .*lora_A\.weight is \[4, 64\], this run has \[8, 64\]"):
        build(settings)


@pytest.mark.parametrize(
    ("update", "said"),
    [
        ({"kl_to": "ema"}, r"update\.kl_to = 'ema' pulls nowhere with update\.kl_weight = 0"),
        ({"kl_to": "teacher", "kl_weight": 1}, r"update\.teacher = '' with update\.kl_to = 'teacher'"),
        ({"teacher": "lora", "kl_weight": 1}, r"update\.teacher = 'lora' with update\.kl_to = 'base'"),
        ({"policy_weight": 0}, r"update\.policy_weight = 0 and update\.kl_weight = 0: nothing would be learned"),
        (
            {"kl_to": "teacher", "kl_weight": 1, "teacher": "/nowhere"},
            r"update\.teacher = '/nowhere' does not exist; pass a folder",
        ),
    ],
)
def test_a_kl_that_cannot_be_is_refused(unit_config, update, said):
    with pytest.raises(UserError, match=said):
        config.check(change(unit_config, update=update))


def test_a_variance_that_velocities_do_not_have_is_refused(unit_config):
    settings = change(changed(unit_config, **SDE), update={"kl_space": "velocity", "kl_variance": "unit_time"})
    with pytest.raises(UserError, match=r"update\.kl_variance = 'unit_time' would not be looked at"):
        config.check(settings)

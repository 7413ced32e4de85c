"""What the tests of FLUX.1 and Qwen-Image share: small runs, step by step, and what is compared with autograd.

Prompts differ in length, which matters to a family whose text has a mask.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, ModelMixin
from peft import LoraConfig
from rich.console import Console
from safetensors.torch import load_file

from advgrpo import config
from advgrpo.config import Config
from advgrpo.policy.adapters import target_modules
from advgrpo.policy.diffusers_policy import DiffusersPolicy
from advgrpo.policy.loading import load_policy
from advgrpo.policy.networks import FusedNetwork
from advgrpo.runtime.distributed import Distributed
from advgrpo.sampling.dynamics import StepTable, step_table
from advgrpo.sampling.sampler import Sampler
from advgrpo.train import main as train
from advgrpo.training.run import Run
from advgrpo.types import MicroBatch, MicroBatchRollout, WindowStep
from tests.graph_emulator import EmulatedGraphs
from tests.parts import train_adapters, updater_of

PROMPTS = ["a small red star on the left of a blue background", "a large green ring at the top"]
ROW = torch.tensor([0, 0, 0, 1, 1, 1])
ADVANTAGES = torch.tensor([1.0, -1.0, 0.5, 2.0, -0.5, -1.5])
SMALL_MODEL = Path(__file__).parents[1] / "examples" / "small_model.yaml"
both_forwards = pytest.mark.parametrize("fused", [True, False], ids=["ours", "diffusers"])


def load(settings: Config, *, fused: bool = True, precision: str = "model", **changes) -> DiffusersPolicy:
    model, cache = settings.model.model_copy(update=changes), Path(settings.data.cache_dir)
    how = {"fused": fused, "precision": precision}
    return load_policy(model, device=torch.device("cpu"), cache_dir=cache, seed=0, **how)


def stock(settings: Config) -> DiffusionPipeline:
    pipe = DiffusionPipeline.from_pretrained(settings.model.path)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def assert_an_embedding_is_of_its_prompt_alone(policy: DiffusersPolicy, rounded: str = "") -> None:
    """To the bit, but for the tensor `rounded`: as encoded beside prompts of other lengths, and by itself."""
    prompts = [*PROMPTS, "a"]
    together, *alone = (next(iter(policy.text_cache.encode(each))) for each in (prompts, *([one] for one in prompts)))
    for name, tensor in together.tensors().items():
        own = torch.cat([one.tensors()[name] for one in alone])
        if name == rounded:
            torch.testing.assert_close(own, tensor, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(own, tensor), name
    assert len(together.text.flatten(1).unique(dim=0)) == 3


def assert_a_rows_bits_are_of_its_text_alone(policy: DiffusersPolicy, *, guidance: float) -> None:
    """Another text beside a row changes none of its bits; a library's product may block another number of rows
    otherwise, so that without others it is the same up to rounding."""
    latents, times, step = torch.randn(2, *policy.latent_shape()), torch.tensor([900.0, 500.0]), torch.tensor([1])

    def velocity(prompts: list[str]) -> torch.Tensor:
        prepared = policy.prepare(policy.encode(prompts), times, guidance=guidance)
        with torch.no_grad():
            both = policy.predict(latents[-len(prompts) :], step, prepared)
        return torch.stack([each for each in both if each is not None], dim=1)

    expected = velocity(PROMPTS)
    for other in ("a", PROMPTS[1], ""):
        changed = velocity([other, PROMPTS[1]])
        assert torch.equal(changed[1], expected[1])
        assert not torch.equal(changed[0], expected[0])
    torch.testing.assert_close(velocity(PROMPTS[1:])[0], expected[1], rtol=1e-5, atol=1e-5)


def ode_images(policy: DiffusersPolicy, *, steps: int, guidance: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(initial noise, images) of PROMPTS without a window."""
    sampler = Sampler(policy, guidance, "gaussian", share_prefix=True, merged=False)
    initial = sampler.initial_latents(0, torch.arange(2))
    latents, _ = sampler.run(step_table(policy, steps), policy.encode(PROMPTS), initial, torch.arange(2))
    return initial, policy.decode(latents)


def sample(
    policy: DiffusersPolicy, settings: Config, *, window: tuple[int, ...] = (1, 2), share: bool = True
) -> tuple[MicroBatchRollout, StepTable]:
    sampler = Sampler(
        policy, settings.rollout.guidance_scale, settings.rollout.likelihood, share_prefix=share, merged=False
    )
    table, text = step_table(policy, 4, window, rollout=settings.rollout), policy.encode(PROMPTS)
    initial, ids = sampler.initial_latents(7, torch.arange(2)), torch.arange(len(ROW))
    latents, steps = sampler.run(table, text, initial, ROW, noise_seed=3, image_ids=ids)
    return MicroBatchRollout(
        MicroBatch(ids, PROMPTS, torch.arange(2), ROW, 0), text, steps, policy.decode(latents)
    ), table


def accumulated(policy, settings, rollout, table, advantages=ADVANTAGES):
    """(stats, gradient) of one minibatch."""
    stats = updater_of(policy, settings).accumulate([rollout], advantages, table, total=6, watch_kl=True)
    return stats, torch.cat([p.grad.flatten() for _, p in policy.trainable_parameters()])


def assert_captured_steps_follow_the_prompts(settings: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replays have the bits of eager steps of a model that has seen no other prompts, whose lengths differ. Run without
    the CPU's own kernels, as `layers_by_pytorch` says."""
    for module in ("gaussian_step", "_gaussian"):  # which on a CPU look at values, as no captured step may
        monkeypatch.setattr(f"advgrpo_kernels.ops.{module}.can_look_at", lambda tensor: False)
    backend, table = EmulatedGraphs(), step_table(load(settings), 4, (1, 2), rollout=settings.rollout)

    def sampler(graphs: EmulatedGraphs | None) -> Sampler:
        policy = load(settings)
        policy.merge()
        likelihood, guidance = settings.rollout.likelihood, settings.rollout.guidance_scale
        return Sampler(policy, guidance, likelihood, share_prefix=True, merged=True, graphs=graphs)

    def drawn(sampler: Sampler, prompts: list[str]):
        text, initial = sampler.policy.encode(prompts), sampler.initial_latents(7, torch.arange(2))
        return sampler.run(table, text, initial, ROW, noise_seed=3, image_ids=torch.arange(6))

    captured, replays = sampler(backend), []
    for prompts in (PROMPTS, PROMPTS, PROMPTS, PROMPTS[::-1], [*PROMPTS[1:], "a"]):
        found, expected = drawn(captured, prompts), drawn(sampler(None), prompts)
        assert torch.equal(found[0], expected[0])
        for own, other in zip(found[1], expected[1], strict=True):
            assert torch.equal(own.log_prob, other.log_prob)
        replays.append(backend.replays)
    assert replays[-1] > replays[-2] > replays[-3] > 0  # the last prompts by graphs of the first


def assert_on_policy(policy: DiffusersPolicy, settings: Config, *, window: tuple[int, ...], share: bool = True) -> None:
    """Likelihoods of the update are the rollout's to the bit, for trained adapters and two steps of a window."""
    train_adapters(policy)
    rollout, table = sample(policy, settings, window=window, share=share)
    stats, gradient = accumulated(policy, settings, rollout, table)
    _, ratio, clipped, kl, _, pairs, _ = stats.sums().tolist()
    assert stats.max_mismatch() == 0.0
    assert (ratio, clipped, pairs) == (12, 0, 12)
    assert kl > 0
    assert gradient.abs().max() > 0
    gap, _, _, pairs = updater_of(policy, settings).reweigh([rollout], table).tolist()
    assert (gap, pairs) == (0, 12)


def merged_in_fp8(policy: DiffusersPolicy, *, guidance: float, precision: str) -> list[str]:
    """What merged weights predict is what adapters do, in FP8 to what its eight bits give; the names of the layers that
    are quantised."""
    train_adapters(policy)
    policy.merge()
    latents, step = torch.randn(2, *policy.latent_shape()), torch.tensor([1])
    prepared = policy.prepare(policy.encode(PROMPTS), torch.tensor([900.0, 500.0]), guidance=guidance)
    with torch.no_grad():
        expected, found = policy.predict(latents, step, prepared)[0], policy.predict_merged(latents, step, prepared)[0]
    error = (found - expected).norm() / expected.norm()
    assert error <= (0.1 if precision == "fp8" else 1e-5)
    assert precision != "fp8" or error > 1e-3
    return [layer.names[0] for layer in policy.network.transformer.linears() if layer.merged_fp8 is not None]


def assert_the_reference_is_the_base(policy: DiffusersPolicy) -> None:
    """Bit for bit."""
    base = ode_images(policy, steps=2, guidance=2.0)[1]
    train_adapters(policy)
    with policy.disable_adapter():
        assert torch.equal(ode_images(policy, steps=2, guidance=2.0)[1], base)
    assert not torch.equal(ode_images(policy, steps=2, guidance=2.0)[1], base)


def by_stock_name(policy: DiffusersPolicy, flat: torch.Tensor) -> dict[str, torch.Tensor]:
    """Adapters, or their gradients in one vector, by PEFT's names."""
    if isinstance(policy.network, FusedNetwork):
        return {n.replace(".weight", ".default.weight"): t for n, t in policy.network.lora.state_dict(flat).items()}
    sizes = [p.numel() for _, p in policy.trainable_parameters()]
    return {n: part.view_as(p) for (n, p), part in zip(policy.trainable_parameters(), flat.split(sizes))}


def with_adapters_of(policy: DiffusersPolicy, network: ModelMixin, settings: Config) -> dict[str, torch.nn.Parameter]:
    """PEFT's own adapters on a stock network, with the policy's values; by PEFT's names."""
    lora = settings.model.lora
    network.requires_grad_(False).add_adapter(
        LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=target_modules(network, lora))
    )
    own = by_stock_name(policy, torch.cat([p.detach().flatten() for _, p in policy.trainable_parameters()]))
    theirs = {name: p for name, p in network.named_parameters() if p.requires_grad}
    assert theirs.keys() == own.keys()
    with torch.no_grad():
        for name, parameter in theirs.items():
            parameter.copy_(own[name])
    return theirs


def clipped_loss_written_out(
    rollout: MicroBatchRollout, table: StepTable, velocity: Callable[[torch.Tensor, WindowStep], torch.Tensor]
) -> torch.Tensor:
    """The policy's loss by autograd: the step, likelihood, ratio and clip at 0.5 written out.

    Args:
        velocity: guided, [6, C, H, W] of latents [6, C, H, W] at a step.
    """
    total = torch.zeros(())
    for step in rollout.steps:
        a, b, _ = table.coefficients[step.step]
        latents = step.latents[ROW] if step.shared else step.latents
        mean = a * latents + b * velocity(latents, step)
        log_prob = -(step.next_latents - mean).square().flatten(1).mean(1)
        ratio = (log_prob - log_prob.detach()).exp()
        loss = torch.maximum(-ADVANTAGES * ratio, -ADVANTAGES * ratio.clamp(0.5, 1.5))
        total = total + loss.mean() / len(rollout.steps)
    return total


def assert_gradients(
    policy: DiffusersPolicy, gradient: torch.Tensor, theirs: dict[str, torch.nn.Parameter], tolerance: float = 1e-5
) -> None:
    """Of adapters, against autograd's: every element to `tolerance` of its matrix's largest. What nothing reads has
    none there, and zeros here."""
    unread = 0
    for name, found in by_stock_name(policy, gradient).items():
        expected = theirs[name].grad
        if expected is None or not expected.any():
            assert not found.any(), name
            unread += 1
            continue
        off = ((found - expected).abs().max() / expected.abs().max()).item()
        assert off <= tolerance, f"{name}: off by {off:.1e} of its largest element"
    assert unread <= len(theirs) // 8


def trained_lora(settings: Config, folder: Path, *, iterations: int = 2, resume: bool = False):
    """LoRA of a run with checkpoints that ends after so many iterations, by name."""
    settings = settings.model_copy(deep=True)
    settings.output_dir, settings.iterations = str(folder), iterations
    settings.output.checkpoint_every, settings.data.held_out_prompts = 1, ""
    Run(settings, Distributed.start("cpu"), resume=resume, console=Console(quiet=True)).train()
    return load_file(folder / "lora" / "pytorch_lora_weights.safetensors")


def assert_a_stopped_run_goes_on(settings: Config, folder: Path) -> None:
    """With the same bits, after the first of two iterations; the whole run's LoRA is left in folder / "whole"."""
    whole = trained_lora(settings, folder / "whole")
    trained_lora(settings, folder / "parts", iterations=1)
    parts = trained_lora(settings, folder / "parts", resume=True)
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    assert max(t.abs().max() for name, t in whole.items() if "lora_B" in name) > 0
    rows = metrics(folder / "parts")
    assert [row["log_prob_mismatch_max"] for row in rows] == [0, 0]
    assert [row["pre_update_clip_fraction"] for row in rows] == [0, 0]
    assert all(row["grad_norm"] > 0 for row in rows)


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_preset_trains(preset: str, settings: Config, folder: Path, *, iterations: int = 2, **changes) -> None:
    """README's `python -m advgrpo.train --preset PRESET --config examples/small_model.yaml --model.path FOLDER`."""
    flags = {
        "config": SMALL_MODEL,
        "model.path": settings.model.path,
        "model.max-sequence-length": settings.model.max_sequence_length,
        "data.prompts": settings.data.prompts,  # fewer than the file's, and a cache of the test's own
        "data.held-out-prompts": settings.data.held_out_prompts,
        "data.cache-dir": settings.data.cache_dir,
        "iterations": iterations,
        "output-dir": folder,
        **changes,
    }
    assert train(["--preset", preset, *(f"--{name}={value}" for name, value in flags.items())]) == 0
    rows = [row for row in metrics(folder) if row["grad_norm"] is not None]  # in some the adversary trains alone
    assert len(metrics(folder)) == flags["iterations"]
    assert rows
    assert all(row["grad_norm"] > 0 for row in rows)
    if config.load(preset).update.objective == "policy":
        assert [row["log_prob_mismatch_max"] for row in rows] == [0] * len(rows)
    assert (folder / "lora" / "pytorch_lora_weights.safetensors").is_file()


def edited(settings: Config, folder: Path, part: str, **changes) -> None:
    """Point the settings at a copy of the pipeline with another configuration of a part."""
    source = Path(settings.model.path)
    folder.mkdir()
    for each in source.iterdir():
        (folder / each.name).symlink_to(each)
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    (folder / part).unlink()
    (folder / part).mkdir()
    for each in (source / part).iterdir():
        if each.name != name:
            (folder / part / each.name).symlink_to(each)
    (folder / part / name).write_text(json.dumps(json.loads((source / part / name).read_text()) | changes))
    settings.model.path = str(folder)

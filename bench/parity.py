"""Do ours and another contender compute the same? Errors are relative norms, on the same weights, noise and patches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from advgrpo.config import UpdateSection
from advgrpo.runtime import rng
from advgrpo.types import MicroBatchRollout
from advgrpo_kernels import philox_normal, score_features

from .baseline import Baseline, Features, MicroBatch
from .contenders import Contenders


@dataclass(frozen=True)
class Check:
    error: float
    allowed: float
    what: str

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed


def tolerance(dtype: torch.dtype) -> float:
    """float32 differs in the order of sums; bfloat16 rounds every activation on both sides, at other places."""
    return 1e-3 if dtype == torch.float32 else 0.1


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()


def same_micro_batch(c: Contenders, other: Baseline) -> tuple[MicroBatchRollout, torch.Tensor, MicroBatch]:
    """The iteration's first micro-batch by our sampler (and its last latents), and by the other from the same noise."""
    trainer, table, seed = c.trainer, c.table(), c.config.seed
    micro_batch = c.objective.micro_batches.of(0)[0]
    row, ids = micro_batch.row.to(c.device), micro_batch.image_ids.to(c.device)
    sampler = c.objective.sampler
    shared = sampler.shared_noise
    owners = micro_batch.prompt_groups if shared else micro_batch.image_ids
    initial = sampler.initial_latents(rng.derive_seed(seed, "initial_noise", 0), owners)
    noise_seed = rng.derive_seed(seed, "step_noise", 0)
    trainer.policy.merge()
    text = trainer.policy.encode(micro_batch.prompts)
    latents, steps = sampler.run(table, text, initial, row, noise_seed=noise_seed, image_ids=ids)
    shape = (len(ids), *trainer.policy.latent_shape())
    noise = {i: philox_normal(shape, seed=noise_seed, sample_ids=ids, step=i, device=c.device) for i in c.window}
    other.merge()
    theirs = other.sampler(micro_batch.captions, initial.index_select(0, row) if shared else initial, c.window, noise)
    return MicroBatchRollout(micro_batch, text, steps, trainer.policy.decode(latents)), latents, theirs


def _largest(errors: list[float]) -> float:
    """NaN where one of them is, which is no error that is allowed; Python's max may lose it."""
    return torch.tensor(errors).max().item()


def check_sampler(c: Contenders, other: Baseline, allowed: float) -> Check:
    ours, latents, theirs = same_micro_batch(c, other)
    errors = [_relative(latents, theirs.latents), _relative(ours.images, theirs.images)]
    errors += [_relative(a.next_latents, b.next_latents) for a, b in zip(ours.steps, theirs.steps)]
    return Check(_largest(errors), allowed, "latents and images of one micro-batch")


def check_update(c: Contenders, other: Baseline, allowed: float) -> Check:
    """Gradients of one micro-batch, of unclipped objectives: a contender whose forward with gradients rounds otherwise
    than the one that sampled, as compiled blocks do, leaves a clip range of 1e-5 here and there, at which its gradient
    is 0, and is no other algorithm for that."""
    with _unclipped(c.trainer.updater.config.update, other.config.update):
        return _compared_gradients(c, other, allowed)


@contextmanager
def _unclipped(*sections: UpdateSection) -> Iterator[None]:
    before = [section.clip_range for section in sections]
    try:
        for section in sections:
            section.clip_range = 1.0
        yield
    finally:
        for section, clip_range in zip(sections, before, strict=True):
            section.clip_range = clip_range


def _compared_gradients(c: Contenders, other: Baseline, allowed: float) -> Check:
    ours, _, theirs = same_micro_batch(c, other)
    count = len(theirs.captions)
    advantages = torch.linspace(-1, 1, count, device=c.device)
    everyone = torch.zeros(c.images, device=c.device).index_copy(0, ours.micro_batch.image_ids.to(c.device), advantages)
    stats = c.trainer.updater.accumulate([ours], everyone, c.table(), total=count, watch_kl=False)
    other.optimizer.zero_grad()
    other.accumulate([theirs], [advantages])
    lora = getattr(c.trainer.policy, "lora", None) or c.trainer.policy.network.lora
    expected = {
        name.replace(".default.", "."): p.grad for name, p in other.transformer.named_parameters() if p.grad is not None
    }
    found = lora.state_dict(lora.master.grad)
    stacked = [torch.cat([side[name].float().flatten() for name in expected]) for side in (found, expected)]
    other.optimizer.zero_grad()
    mismatch = stats.max_mismatch().item()
    if mismatch != 0:
        return Check(float("inf"), allowed, f"log-probabilities moved by {mismatch:.1e} before any optimizer step")
    return Check(_relative(*stacked), allowed, "gradients of one micro-batch")


def check_adversary(c: Contenders, other: Baseline, allowed: float) -> Check:
    """Backbone features of the same images, rewards and the head's loss on the same patches."""
    adversary, side = c.objective.scorer.adversary, c.config.adversary.image_size
    images = torch.rand(4, 3, side, side, generator=torch.Generator().manual_seed(0)).to(c.device)
    ours, theirs = adversary.features(images, [""] * 4), other.features(images)
    ids = torch.arange(4, device=c.device)
    chosen = adversary.training_features(ours, ids, 1)
    inverse = adversary.training_features(adversary.features(1 - images, [""] * 4), ids, 2)
    losses = [
        adversary.loss(inverse, chosen).loss.detach(),
        other.head_loss(*(Features(f["cls"], f["patches"]) for f in (inverse, chosen))).detach(),
    ]
    section, patches = c.config.adversary, chosen["patches"]
    every = torch.arange(patches.shape[1], device=c.device).expand(4, -1)
    settings = {"weights": section.reward_weights, "normalize": section.normalize != "never"}
    rewards = score_features(chosen["cls"], patches, every, adversary.head, **settings).reward
    errors = [_relative(ours["cls"], theirs.cls), _relative(ours["patches"], theirs.patches), _relative(*losses)]
    errors.append(_relative(rewards, other.rewards(Features(chosen["cls"], patches))))
    return Check(_largest(errors), allowed, "features, rewards and head loss")

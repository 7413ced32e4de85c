"""Supervised fine-tuning on the references: the baseline without reinforcement learning.

The rectified-flow loss (arXiv 2209.03003; docs/method.md 1.1), per image the mean over elements:

    x_σ = (1 - σ) x₀ + σ ε,    L = |v_θ(x_σ, σ) - (ε - x₀)|²,    σ = shift of sigmoid(z), z ~ N(0, 1)

x₀ are the latents of a reference of the image's prompt, ε is unit noise; the levels are SD3's training distribution
(arXiv 2403.03206, section 3.1), one per prompt group. The text is never dropped: the unconditional velocity, which
guidance needs, is not trained.

Shapes: M images of a micro-batch, P prompts of it, latents [., C, h, w] float32.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path

import torch

from advgrpo.config import Config
from advgrpo.data.references import ReferenceSet
from advgrpo.policy.base import SupervisedTarget
from advgrpo.runtime import rng
from advgrpo.runtime.transfer import to_device
from advgrpo.training.update import Updater
from advgrpo.types import MicroBatch
from advgrpo_kernels import philox_normal

_IMAGES_IN_MEMORY = 16_384  # latents on the host; 4 GiB at 512 pixels and 16 channels


class SupervisedUpdater:
    """Accumulates the loss's gradients over micro-batches; `Updater` reduces, clips and steps.

    Every draw is keyed by (seed, purpose, iteration, group or image number), so that neither the number of processes
    nor the size of the micro-batches changes it.
    """

    def __init__(self, policy: SupervisedTarget, updater: Updater, references: ReferenceSet, config: Config):
        self.policy, self.updater, self.references, self.config = policy, updater, references, config
        self._latents: OrderedDict[str, torch.Tensor] = OrderedDict()  # [C, h, w] by content

    def accumulate(self, micro_batches: Iterable[MicroBatch], iteration: int, *, total: int) -> torch.Tensor:
        """Gradients of one minibatch's micro-batches, whose images number `total` over all processes.

        Returns:
            The sum of this process's losses, a float64 scalar on the device.

        Raises:
            UserError: a reference can no longer be read.
        """
        self.updater.zero_gradients()
        summed = torch.zeros((), dtype=torch.float64, device=self.policy.device)
        for micro_batch in micro_batches:
            clean, noise = self.clean_latents(micro_batch, iteration), self.noise(micro_batch, iteration)
            sigmas, timesteps = self.levels(micro_batch, iteration)
            prompts = self.policy.prepare(self.policy.encode(micro_batch.prompts), timesteps, guided=False)
            steps = torch.arange(len(timesteps), device=self.policy.device).split(1)
            for group, step in enumerate(steps):  # the images of a prompt lie next to each other
                rows = to_device((micro_batch.row == group).nonzero().flatten(), self.policy.device)
                x, eps = clean[rows], noise[rows]
                noisy = torch.lerp(x, eps, sigmas[group])
                own = prompts.rows(torch.full_like(rows, group))
                velocity, _ = self.policy.predict(noisy, step, own)
                losses = (velocity.float() - (eps - x)).square().mean((1, 2, 3))
                (losses.sum() / total).backward()
                summed += losses.detach().double().sum()
        return summed

    def clean_latents(self, micro_batch: MicroBatch, iteration: int) -> torch.Tensor:
        """x₀ [M, C, h, w]: of every image's prompt the reference number floor(draw * n)."""
        seed, count = self.config.seed, self.config.images_per_iteration
        draws = torch.rand(count, generator=rng.generator(seed, "sft_reference", iteration))[micro_batch.image_ids]
        files = [self.references.files(prompt) for prompt in micro_batch.captions]
        chosen = [own[int(draw * len(own))] for own, draw in zip(files, draws.tolist())]
        return to_device(torch.stack([self._encoded(file) for file in chosen]), self.policy.device)

    def noise(self, micro_batch: MicroBatch, iteration: int) -> torch.Tensor:
        """ε [M, C, h, w], each row from its image number."""
        shape = (len(micro_batch.image_ids), *self.policy.latent_shape())
        seed = rng.derive_seed(self.config.seed, "sft_noise", iteration)
        return philox_normal(shape, seed=seed, sample_ids=to_device(micro_batch.image_ids, self.policy.device))

    def levels(self, micro_batch: MicroBatch, iteration: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(σ, timesteps), each [P] float32 on the device, by prompt group."""
        generator = rng.generator(self.config.seed, "sft_level", iteration)
        draws = torch.randn(self.config.rollout.prompts_per_iteration, generator=generator)
        sigmas, timesteps = self.policy.training_sigmas(torch.sigmoid(draws[micro_batch.prompt_groups]))
        return to_device(sigmas, self.policy.device), to_device(timesteps, self.policy.device)

    def _encoded(self, file: Path) -> torch.Tensor:
        """[C, h, w] on the host. One image at a time: its bits do not depend on those encoded with it."""
        key = self.references.content_key(file)
        if key not in self._latents:
            side = self.config.model.resolution
            image = self.references.load_images([file], size=(side, side))
            self._latents[key] = self.policy.encode_images(to_device(image, self.policy.device))[0].cpu()
            if len(self._latents) > _IMAGES_IN_MEMORY:
                self._latents.popitem(last=False)
        self._latents.move_to_end(key)
        return self._latents[key]

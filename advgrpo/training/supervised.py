"""Supervised fine-tuning on the references: the baseline without reinforcement learning.

The rectified-flow loss (arXiv 2209.03003; docs/method.md 1.1), per picture the mean over elements:

    x_σ = (1 - σ) x₀ + σ ε,    L = |v_θ(x_σ, σ) - (ε - x₀)|²,    σ = shift of sigmoid(z), z ~ N(0, 1)

x₀ are the latents of a reference of the picture's prompt, ε is unit noise; the levels are SD3's training distribution
(arXiv 2403.03206, section 3.1), one per prompt group. The text is never dropped: the unconditional velocity, which
guidance needs, is not trained.

Shapes: M pictures of a tile, P prompts of it, latents [., C, h, w] float32.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path

import torch

from advgrpo.config import Config
from advgrpo.data.references import ReferenceSet
from advgrpo.policy.base import Policy
from advgrpo.runtime import rng
from advgrpo.runtime.transfer import to_device
from advgrpo.training.update import Updater
from advgrpo.types import Tile
from advgrpo_kernels import philox_normal

_PICTURES_IN_MEMORY = 16_384  # latents on the host; 4 GiB at 512 pixels and 16 channels


class SupervisedUpdater:
    """Accumulates the loss's gradients over tiles; `Updater` reduces, clips and steps.

    Every draw is keyed by (seed, purpose, iteration, group or picture number), so that neither the number of processes
    nor the size of the tiles changes it.
    """

    def __init__(self, policy: Policy, updater: Updater, references: ReferenceSet, config: Config):
        self.policy, self.updater, self.references, self.config = policy, updater, references, config
        self._latents: OrderedDict[str, torch.Tensor] = OrderedDict()  # [C, h, w] by content

    def accumulate(self, tiles: Iterable[Tile], iteration: int, *, total: int) -> torch.Tensor:
        """Gradients of one optimizer window's tiles, whose pictures number `total` over all processes.

        Returns:
            The sum of this process's losses, a float64 scalar on the device.

        Raises:
            UserError: a reference can no longer be read.
        """
        self.updater.zero_gradients()
        summed = torch.zeros((), dtype=torch.float64, device=self.policy.device)
        for tile in tiles:
            clean, noise = self.clean_latents(tile, iteration), self.noise(tile, iteration)
            sigmas, timesteps = self.levels(tile, iteration)
            prompts = self.policy.prepare(self.policy.encode(tile.prompts), timesteps, guided=False)
            steps = torch.arange(len(timesteps), device=self.policy.device).split(1)
            for group, step in enumerate(steps):  # the pictures of a prompt lie next to each other
                rows = to_device((tile.row == group).nonzero().flatten(), self.policy.device)
                x, eps = clean[rows], noise[rows]
                noisy = torch.lerp(x, eps, sigmas[group])
                own = prompts.rows(torch.full_like(rows, group))
                velocity, _ = self.policy.velocity(noisy, step, own)
                losses = (velocity.float() - (eps - x)).square().mean((1, 2, 3))
                (losses.sum() / total).backward()
                summed += losses.detach().double().sum()
        return summed

    def clean_latents(self, tile: Tile, iteration: int) -> torch.Tensor:
        """x₀ [M, C, h, w]: of every picture's prompt the reference number floor(draw * n)."""
        seed, count = self.config.seed, self.config.images_per_iteration
        draws = torch.rand(count, generator=rng.generator(seed, "sft_reference", iteration))[tile.image_ids]
        files = [self.references.files(prompt) for prompt in tile.captions]
        chosen = [own[int(draw * len(own))] for own, draw in zip(files, draws.tolist())]
        return to_device(torch.stack([self._encoded(file) for file in chosen]), self.policy.device)

    def noise(self, tile: Tile, iteration: int) -> torch.Tensor:
        """ε [M, C, h, w], each row from its picture number."""
        shape = (len(tile.image_ids), *self.policy.latent_shape())
        seed = rng.derive_seed(self.config.seed, "sft_noise", iteration)
        return philox_normal(shape, seed=seed, sample_ids=to_device(tile.image_ids, self.policy.device))

    def levels(self, tile: Tile, iteration: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(σ, timesteps), each [P] float32 on the device, by prompt group."""
        generator = rng.generator(self.config.seed, "sft_level", iteration)
        draws = torch.randn(self.config.rollout.prompts_per_iteration, generator=generator)
        sigmas, timesteps = self.policy.noise_levels(torch.sigmoid(draws[tile.prompt_groups]))
        return to_device(sigmas, self.policy.device), to_device(timesteps, self.policy.device)

    def _encoded(self, file: Path) -> torch.Tensor:
        """[C, h, w] on the host. One picture at a time: its bits do not depend on those encoded with it."""
        key = self.references.content_key(file)
        if key not in self._latents:
            side = self.config.model.resolution
            picture = self.references.load_images([file], size=(side, side))
            self._latents[key] = self.policy.encode_images(to_device(picture, self.policy.device))[0].cpu()
            if len(self._latents) > _PICTURES_IN_MEMORY:
                self._latents.popitem(last=False)
        self._latents.move_to_end(key)
        return self._latents[key]

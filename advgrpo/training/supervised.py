"""Supervised fine-tuning (SFT) on the references: the baseline without reinforcement learning.

The rectified-flow loss (arXiv 2209.03003; docs/method.md 1.1), per image the mean over elements:

    x_σ = (1 - σ) x₀ + σ ε,    L = |v_θ(x_σ, σ) - (ε - x₀)|²,    σ = shift of sigmoid(z), z ~ N(0, 1)

x₀ are the latents of a reference of the image's prompt, ε is unit noise; the levels are SD3's training distribution
(arXiv 2403.03206, section 3.1), one per prompt group. The text is never dropped: the unconditional velocity, which
guidance needs, is not trained.

Shapes: M images of a micro-batch, P prompts of it, latents [., C, h, w] float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from advgrpo.config import RolloutSection
from advgrpo.data.per_reference import PerReference
from advgrpo.data.references import ReferenceSet
from advgrpo.policy.base import SupervisedTarget
from advgrpo.runtime import rng
from advgrpo.runtime.cache import LastUsed
from advgrpo.runtime.distributed import Distributed
from advgrpo.runtime.transfer import to_device
from advgrpo.training.clean_start import State
from advgrpo.training.micro_batches import MicroBatches
from advgrpo.training.objective import Iteration, Outcome, Parts
from advgrpo.training.restoring import Restorable
from advgrpo.training.update import Updater
from advgrpo.types import MicroBatch
from advgrpo_kernels import philox_normal

_IMAGES_IN_MEMORY = 16_384  # latents on the host; 4 GiB at 512 pixels and 16 channels


class SupervisedFineTuning:
    """`objective.Objective`: one optimizer step per minibatch, on references of the iteration's prompts.

    Every draw is keyed by (seed, purpose, iteration, group or image number), so that neither the number of processes
    nor the size of the micro-batches changes it.

    Args:
        policy, updater: what is trained, and what reduces, clips and steps.
        references: what it learns from.
        micro_batches: which images an iteration has: here as many references.
        settings: how many prompts and images that are.
        resolution: side of the images in pixels.
        seed: of the run.
    """

    def __init__(
        self,
        policy: SupervisedTarget,
        updater: Updater,
        references: ReferenceSet,
        micro_batches: MicroBatches,
        distributed: Distributed,
        *,
        settings: RolloutSection,
        resolution: int,
        seed: int,
    ):
        self.policy, self.updater, self.references = policy, updater, references
        self.micro_batches, self.distributed = micro_batches, distributed
        self.settings, self.resolution, self.seed = settings, resolution, seed
        self._latents = PerReference(self._encoded, LastUsed(_IMAGES_IN_MEMORY))

    @classmethod
    def build(cls, parts: Parts) -> SupervisedFineTuning:
        """Nothing but references is asked for."""
        return cls(
            parts.policy,
            parts.updater,
            parts.references,
            parts.micro_batches,
            parts.distributed,
            settings=parts.config.rollout,
            resolution=parts.config.model.resolution,
            seed=parts.config.seed,
        )

    def iterate(self, iteration: Iteration) -> Outcome:
        """Accumulate and step, minibatch by minibatch; the log is read once, at the end."""
        micro_batches, reports = self.micro_batches.of(iteration.number), []
        total = self.micro_batches.images_per_minibatch
        iteration.changes()
        with iteration.phase("update"):
            for minibatch in range(self.micro_batches.minibatches):
                own = [micro_batch for micro_batch in micro_batches if micro_batch.minibatch == minibatch]
                pieces = iteration.stoppable(own, "update: micro-batch")
                loss = self.accumulate(pieces, iteration.number, total=total)
                reports.append(torch.stack([loss, self.updater.step().double()]))
            everywhere = self.distributed.all_gather(torch.stack(reports)[None]).cpu()  # [processes, minibatches, 2]
            norms = everywhere[0, :, 1]
            self.updater.check(0.0, norms.tolist(), iteration.number)
        loss = self.micro_batches.mesh.one_of_each(everywhere)[..., 0].sum().item() / self.settings.images
        return Outcome({"sft_loss": loss, "grad_norm": norms.mean().item()})

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
            prompts = self.policy.prepare(self.policy.encode(micro_batch.prompts), timesteps, guidance=1.0)
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
        generator = rng.generator(self.seed, "sft_reference", iteration)
        draws = torch.rand(self.settings.images, generator=generator)[micro_batch.image_ids]
        files = [self.references.files(prompt) for prompt in micro_batch.captions]
        chosen = [own[int(draw * len(own))] for own, draw in zip(files, draws.tolist())]
        return to_device(torch.stack([self._clean(file) for file in chosen]), self.policy.device)

    def noise(self, micro_batch: MicroBatch, iteration: int) -> torch.Tensor:
        """ε [M, C, h, w], each row from its image number."""
        shape = (len(micro_batch.image_ids), *self.policy.latent_shape())
        seed = rng.derive_seed(self.seed, "sft_noise", iteration)
        return philox_normal(shape, seed=seed, sample_ids=to_device(micro_batch.image_ids, self.policy.device))

    def levels(self, micro_batch: MicroBatch, iteration: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(σ, timesteps), each [P] float32 on the device, by prompt group."""
        generator = rng.generator(self.seed, "sft_level", iteration)
        draws = torch.randn(self.settings.prompts_per_iteration, generator=generator)
        sigmas, timesteps = self.policy.training_sigmas(torch.sigmoid(draws[micro_batch.prompt_groups]))
        return to_device(sigmas, self.policy.device), to_device(timesteps, self.policy.device)

    def _clean(self, file: Path) -> torch.Tensor:
        """[C, h, w] on the host."""
        return self._latents.of_file(self.references, file, (self.resolution, self.resolution))

    def _encoded(self, batches: list[torch.Tensor], prompt: str) -> torch.Tensor:
        """[C, h, w] on the host. One image at a time: its bits do not depend on those encoded with it."""
        (image,) = batches
        return self.policy.encode_images(to_device(image, self.policy.device))[0].cpu()

    def state(self) -> State:
        """Nothing: every draw is keyed by the iteration."""
        return {}, {}

    def checked(self, tensors: dict[str, torch.Tensor], state: Mapping[str, Any]) -> Restorable:
        return Restorable()

    def load(self, found: Restorable) -> None:
        pass

"""What ours is measured against: one iteration of Adv-GRPO with diffusers, PEFT and PyTorch alone.

One loop and two recipes for it (`Recipe`):

* B0, the released loop as a competent engineer runs it: the stock transformer in bfloat16 on a GPU with unmerged LoRA
  and PyTorch's default attention, a scheduler object that finds its step by comparing timesteps, guidance by
  `torch.cat`, every row computed, transition and likelihood in plain PyTorch, autograd through the likelihood, float32
  VAE, references' features computed in every iteration, `clip_grad_norm_`, AdamW(foreach=True), and the moving average
  in a loop. It is faster than the released code: weights are in bfloat16 throughout, text embeddings are looked up,
  references lie decoded on the device, backbone features are computed once per image and serve reward and head training
  alike, one step index is looked up per step and not per image, nothing is logged inside the loops, and anomaly
  detection is off.
* B1, the best that could be assembled without us: the same loop with everything that is a library's switch or that
  public code does. One row per prompt before the window where its images share their noise (Flow-GRPO-Fast, arXiv
  2505.05470's code), merged LoRA on ODE steps, the fastest attention backend of PyTorch, the VAE in channels_last and
  on a GPU in bfloat16, features of references kept, fused AdamW, and on a GPU the blocks compiled by `torch.compile`,
  as diffusers' `compile_repeated_blocks` does it.

It shares no code with advgrpo but the configuration; tests hold its latents, log-probabilities, rewards and gradients
against the trainer's.

Shapes: M images of a micro-batch, B of an iteration, latents [M, C, h, w] float32, velocities the same, D features, n
chosen patches.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from advgrpo.config import Config

from .stock_model import LoraLinear, StockTransformer

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


SUPPORTED = {
    ("adversary", "kind"): ("dino",),
    ("adversary", "schedule"): ("always", "never", "when_fooled"),
    ("model", "train"): ("lora",),
}


@dataclass(frozen=True)
class Recipe:
    """What of a library's switches and of public practice a contender uses.

    Args:
        share_prefix: before the window one row per prompt is computed, where its images start from one noise.
        merge_lora: ODE steps run merged weights; the window's steps run what is trained.
        keep_references: features of a reference are computed when it is first seen, and kept.
        fused_optimizer: AdamW, clipping and the moving average over all tensors at once.
        fast_decoder: the VAE runs in channels_last, and on a GPU in bfloat16.
        attention: backends by preference; empty leaves the choice to PyTorch.
        compiled: every block of the transformer is compiled.
    """

    share_prefix: bool = False
    merge_lora: bool = False
    keep_references: bool = False
    fused_optimizer: bool = False
    fast_decoder: bool = False
    attention: tuple[SDPBackend, ...] = ()
    compiled: bool = False


B0 = Recipe()
B1 = Recipe(
    share_prefix=True,
    merge_lora=True,
    keep_references=True,
    fused_optimizer=True,
    fast_decoder=True,
    attention=(
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ),
)


def check_settings(config: Config) -> None:
    """Raises ValueError for a setting that would make a contender do other work than ours."""
    for (section, field_name), values in SUPPORTED.items():
        value = getattr(getattr(config, section), field_name)
        if value not in values:
            raise ValueError(f"B0 and B1 have no {section}.{field_name} = {value!r}; want one of {values}")


class FlowScheduler:
    """SD3's flow-matching Euler schedule with a fixed shift, as a diffusers scheduler object keeps it."""

    def __init__(self, device: torch.device, *, shift: float = 3.0, train_steps: int = 1000) -> None:
        self.device, self.shift, self.train_steps = device, shift, train_steps
        self.timesteps = self.sigmas = torch.empty(0)

    def set_timesteps(self, count: int) -> None:
        """The shift is applied to the ends of the training schedule and once more to what lies between them."""
        last = self._shifted(torch.tensor(1.0 / self.train_steps, dtype=torch.float64)).item()
        sigmas = self._shifted(torch.linspace(1.0, last, count, dtype=torch.float64)).float()
        self.timesteps = (sigmas * self.train_steps).to(self.device)
        self.sigmas = torch.cat([sigmas, torch.zeros(1)]).to(self.device)

    def _shifted(self, sigma: Tensor) -> Tensor:
        return self.shift * sigma / (1 + (self.shift - 1) * sigma)

    def index_for_timestep(self, timestep: Tensor) -> int:
        return int((self.timesteps == timestep).nonzero()[0].item())

    def euler_step(self, velocity: Tensor, timestep: Tensor, latents: Tensor) -> Tensor:
        index = self.index_for_timestep(timestep)
        return latents + (self.sigmas[index + 1] - self.sigmas[index]) * velocity.float()

    def transition(
        self, velocity: Tensor, timestep: Tensor, latents: Tensor, dynamics: str, noise_level: float
    ) -> tuple[Tensor, Tensor]:
        """Mean [M, ...] and standard deviation (scalar) of the next latents."""
        index = self.index_for_timestep(timestep)
        sigma, sigma_next, velocity = self.sigmas[index], self.sigmas[index + 1], velocity.float()
        if dynamics == "flow_cps":
            std = sigma_next * math.sin(noise_level * math.pi / 2)
            clean = latents - sigma * velocity
            noise = latents + velocity * (1 - sigma)
            return clean * (1 - sigma_next) + noise * torch.sqrt(sigma_next**2 - std**2), std
        sigma_max, dt = self.sigmas[1].item(), sigma_next - sigma
        diffusion = torch.full_like(sigma, noise_level)
        if dynamics == "flow_sde":
            diffusion = torch.sqrt(sigma / (1 - torch.where(sigma == 1, sigma_max, sigma))) * noise_level
        drift = diffusion**2 / (2 * sigma)
        mean = latents * (1 + drift * dt) + velocity * (1 + drift * (1 - sigma)) * dt
        return mean, diffusion * torch.sqrt(-dt)


def log_likelihood(value: Tensor, mean: Tensor, std: Tensor, likelihood: str) -> Tensor:
    """[M] the log-density of `value`, averaged over the elements of an image."""
    log_prob = -((value.detach() - mean) ** 2)
    if likelihood == "gaussian":
        log_prob = log_prob / (2 * std**2) - torch.log(std) - math.log(math.sqrt(2 * math.pi))
    return log_prob.mean(dim=tuple(range(1, log_prob.ndim)))


@dataclass
class Step:
    """One stochastic step of a micro-batch."""

    timestep: Tensor
    latents: Tensor  # [M, C, h, w]
    next_latents: Tensor
    log_prob: Tensor  # [M]


@dataclass
class MicroBatch:
    """Images that are computed together."""

    captions: list[str]  # [M]
    conditioning: tuple[Tensor, Tensor]  # what `Baseline.conditioning` says of them
    steps: list[Step]
    latents: Tensor  # [M, C, h, w] the last ones
    images: Tensor  # [M, 3, H, W] in [0, 1]


@dataclass
class Features:
    cls: Tensor  # [B, D] float32
    patches: Tensor  # [B, P, D] float32, or [B, n, D]

    def rows(self, index: Tensor) -> Features:
        return Features(self.cls[index], self.patches[index])

    @classmethod
    def cat(cls, parts: Sequence[Features]) -> Features:
        return cls(torch.cat([p.cls for p in parts]), torch.cat([p.patches for p in parts]))


@dataclass
class Replay:
    """Older generations' features, the newest last."""

    capacity: int
    kept: Features | None = None

    def add(self, new: Features) -> None:
        if self.kept is not None:
            new = Features(*(torch.cat(both) for both in zip(vars(self.kept).values(), vars(new).values())))
        self.kept = Features(new.cls[-self.capacity :], new.patches[-self.capacity :])


@dataclass
class Baseline:
    """The models of a run and its optimizers.

    Args:
        config: the same as ours runs with.
        transformer: with adapters (`add_lora`), on the device, in the compute dtype.
        decode: latents [M, C, h, w] -> images [M, 3, H, W] in [0, 1], float32.
        backbone: a frozen DINOv2, in its dtype.
        head: Linear, GELU, Linear in float32.
        texts: caption -> (text [S, E], pooled [E']) on the device, "" for the unconditional one.
        references: caption -> its reference images [n, 3, H, W] in [0, 1], on the device.
        recipe: how it computes; `compiled` and `fast_decoder` are up to who hands over transformer and decode.
    """

    config: Config
    transformer: StockTransformer
    decode: Callable[[Tensor], Tensor]
    backbone: nn.Module
    head: nn.Sequential
    texts: Mapping[str, tuple[Tensor, Tensor]]
    references: Mapping[str, Tensor]
    device: torch.device
    latent_shape: tuple[int, int, int]
    recipe: Recipe = B0
    shift: float = 3.0
    scheduler: FlowScheduler = field(init=False)

    def __post_init__(self) -> None:
        check_settings(self.config)
        update, adversary = self.config.update, self.config.adversary
        self.scheduler = FlowScheduler(self.device, shift=self.shift)
        self.trained: list[Tensor] = [p for p in self.transformer.parameters() if p.requires_grad]
        self.adapters = [m for m in self.transformer.modules() if isinstance(m, LoraLinear)]
        implementation = "fused" if self.recipe.fused_optimizer else "foreach"
        self.optimizer = torch.optim.AdamW(
            self.trained,
            lr=update.learning_rate,
            betas=update.betas,
            eps=update.eps,
            weight_decay=update.weight_decay,
            **{implementation: True},
        )
        self.averages = [p.detach().clone() for p in self.trained]
        self.head_optimizer = torch.optim.Adam(
            self.head.parameters(), lr=adversary.learning_rate, betas=adversary.betas
        )
        self.replay = Replay(adversary.replay_capacity)
        self._kept_references: dict[str, Features] = {}
        self.transformer.gradient_checkpointing = self.config.model.gradient_checkpointing
        self.mean, self.std = (torch.tensor(values, device=self.device).view(1, 3, 1, 1) for values in IMAGENET)

    def conditioning(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Text [M, S, E] and pooled [M, E'], the unconditional rows first where there is guidance."""
        rows = list(captions) if self._guidance == 1.0 else [""] * len(captions) + list(captions)
        text, pooled = zip(*(self.texts[caption] for caption in rows))
        return torch.stack(text), torch.stack(pooled)

    @property
    def _guidance(self) -> float:
        return self.config.rollout.guidance_scale

    def velocity(self, latents: Tensor, timestep: Tensor, conditioning: tuple[Tensor, Tensor]) -> Tensor:
        """Guided velocity [M, C, h, w]."""
        guided = self._guidance != 1.0
        inputs = torch.cat([latents, latents]) if guided else latents
        dtype = self.transformer.proj_out.weight.dtype
        with self._attention():
            velocity = self.transformer(inputs.to(dtype), *conditioning, timestep.expand(len(inputs)))
        if guided:
            unconditional, conditional = velocity.chunk(2)
            velocity = unconditional + self._guidance * (conditional - unconditional)
        return velocity

    def _attention(self) -> contextlib.AbstractContextManager[None]:
        backends = self.recipe.attention
        return sdpa_kernel(list(backends), set_priority=True) if backends else contextlib.nullcontext()

    @torch.no_grad()
    def sampler(
        self,
        captions: Sequence[str],
        initial: Tensor,
        window: Sequence[int],
        noise: Mapping[int, Tensor] | None = None,
    ) -> MicroBatch:
        """Denoise `initial` [M, C, h, w] for `captions`, with noise on the steps of `window`, and decode.

        `noise` gives the draws of those steps by number; by default they are drawn here. Merged weights are those of
        the last `merge`.
        """
        rollout = self.config.rollout
        self.scheduler.set_timesteps(rollout.num_steps)
        everyone, latents, steps = self.conditioning(captions), initial, []
        conditioning = everyone
        if self._shared_noise and self.recipe.share_prefix and window[0] > 0:
            distinct = list(dict.fromkeys(captions))
            conditioning, latents = self.conditioning(distinct), initial[[captions.index(one) for one in distinct]]
        for number, timestep in enumerate(self.scheduler.timesteps):
            if number == window[0] and conditioning is not everyone:
                conditioning, latents = everyone, latents[[distinct.index(one) for one in captions]]
            merged = self.recipe.merge_lora and number not in window
            with self.merged() if merged else contextlib.nullcontext():
                velocity = self.velocity(latents, timestep, conditioning)
            if number not in window:
                latents = self.scheduler.euler_step(velocity, timestep, latents)
                continue
            mean, std = self.scheduler.transition(velocity, timestep, latents, rollout.dynamics, rollout.eta)
            draw = torch.randn_like(mean) if noise is None else noise[number]
            following = mean + std * draw
            log_prob = log_likelihood(following, mean, std, rollout.likelihood)
            steps.append(Step(timestep, latents, following, log_prob))
            latents = following
        return MicroBatch(list(captions), everyone, steps, latents, self.decode(latents))

    @torch.no_grad()
    def features(self, images: Tensor) -> Features:
        """Backbone features of images [M, 3, H, W] in [0, 1]."""
        size = self.config.adversary.image_size
        if images.shape[-2:] != (size, size):
            images = F.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
        pixels = (images - self.mean) / self.std
        tokens = self.backbone(pixels.to(next(self.backbone.parameters()).dtype)).last_hidden_state
        return Features(tokens[:, 0].float(), tokens[:, 1:].float())

    def choose(self, features: Features) -> Features:
        """n random patches of every image."""
        rows, patches, _ = features.patches.shape
        order = torch.rand(rows, patches, device=self.device).argsort(dim=1)[:, : self.config.adversary.num_patches]
        index = order[:, :, None].expand(-1, -1, features.patches.shape[2])
        return Features(features.cls, features.patches.gather(1, index))

    def scores(self, chosen: Features, *, normalize: bool) -> tuple[Tensor, Tensor]:
        """The head's scores of class tokens [B] and of patches [B, n]."""
        cls, patches = chosen.cls, chosen.patches
        if normalize:
            cls, patches = F.normalize(cls, dim=-1), F.normalize(patches, dim=-1)
        return self.head(cls).squeeze(-1), self.head(patches).squeeze(-1)

    @torch.no_grad()
    def rewards(self, chosen: Features) -> Tensor:
        """[B]"""
        weights, normalize = self.config.adversary.reward_weights, self.config.adversary.normalize != "never"
        of_cls, of_patches = self.scores(chosen, normalize=normalize)
        return weights[0] * of_cls + weights[1] * of_patches.mean(dim=1)

    def head_loss(self, reference: Features, generated: Features) -> Tensor:
        """Hinge: references above 1, generations below -1; for class tokens and patches."""
        weights, normalize = self.config.adversary.loss_weights, self.config.adversary.normalize == "always"
        real, fake = (self.scores(side, normalize=normalize) for side in (reference, generated))
        losses = [0.5 * (F.relu(1 - r).mean() + F.relu(1 + f).mean()) for r, f in zip(real, fake)]
        return weights[0] * losses[0] + weights[1] * losses[1]

    def adversary(self, generated: Features, reference: Features, updates: int) -> list[Tensor]:
        """`updates` steps of the head on random batches, with older generations among the negatives; the losses."""
        adversary, losses = self.config.adversary, []
        count = min(adversary.batch_size, len(generated.cls))
        for _ in range(updates):
            picked = torch.randperm(len(generated.cls), device=self.device)[:count]
            real, fake = self.choose(reference.rows(picked)), self.choose(generated.rows(picked))
            if self.replay.kept is not None:
                old = min(int(adversary.replay_share * count), count - 1)
                slots = torch.randint(len(self.replay.kept.cls), (old,), device=self.device)
                kept = self.replay.kept.rows(slots)
                fake = Features(torch.cat([fake.cls[old:], kept.cls]), torch.cat([fake.patches[old:], kept.patches]))
            loss = self.head_loss(real, fake)
            self.head_optimizer.zero_grad()
            loss.backward()
            self.head_optimizer.step()
            losses.append(loss.detach())
        return losses

    def remember(self, generated: Features) -> None:
        """Some of this iteration's generations become later negatives: an eighth of the buffer at most."""
        count = min(len(generated.cls), math.ceil(self.replay.capacity / 8))
        if count:
            self.replay.add(self.choose(generated.rows(torch.randperm(len(generated.cls), device=self.device)[:count])))

    def advantages(self, rewards: Tensor) -> Tensor:
        """[B]; images of a prompt lie next to each other."""
        section, groups = self.config.advantage, rewards.view(-1, self.config.rollout.group_size)
        centred = groups - groups.mean(dim=1, keepdim=True)
        if section.std == "group":
            centred = centred / (groups.std(dim=1, correction=0, keepdim=True) + section.eps)
        elif section.std == "global":
            centred = centred / (rewards.std(correction=0) + section.eps)
        return centred.flatten().clamp(-section.clip, section.clip)

    def loss(self, micro_batch: MicroBatch, step: Step, advantages: Tensor) -> Tensor:
        """The clipped objective of one step of a micro-batch, by autograd through the likelihood."""
        rollout, update = self.config.rollout, self.config.update
        velocity = self.velocity(step.latents, step.timestep, micro_batch.conditioning)
        arguments = (step.timestep, step.latents, rollout.dynamics, rollout.eta)
        mean, std = self.scheduler.transition(velocity, *arguments)
        log_prob = log_likelihood(step.next_latents, mean, std, rollout.likelihood)
        ratio = torch.exp(log_prob - step.log_prob)
        clipped = torch.clamp(ratio, 1 - update.clip_range, 1 + update.clip_range)
        loss = torch.maximum(-advantages * ratio, -advantages * clipped).mean()
        if update.kl_weight > 0:
            with torch.no_grad(), self.base():
                base = self.velocity(step.latents, step.timestep, micro_batch.conditioning)
                reference, _ = self.scheduler.transition(base, *arguments)
            kl = ((mean - reference) ** 2).mean()
            loss = loss + update.kl_weight * (kl / (2 * std**2) if rollout.likelihood == "gaussian" else kl)
        return loss

    def base(self) -> contextlib.AbstractContextManager[None]:
        """Inside, there are no adapters."""
        return self._switched("enabled", False)

    def merged(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the weights of the last `merge` are used."""
        return self._switched("merged", True)

    @contextlib.contextmanager
    def _switched(self, switch: str, value: bool) -> Generator[None]:
        for adapter in self.adapters:
            setattr(adapter, switch, value)
        try:
            yield
        finally:
            for adapter in self.adapters:
                setattr(adapter, switch, not value)

    def merge(self) -> None:
        """Bring merged weights up to the adapters, where the recipe uses any."""
        if self.recipe.merge_lora:
            for adapter in self.adapters:
                adapter.merge()

    def accumulate(self, micro_batches: Sequence[MicroBatch], advantages: Sequence[Tensor]) -> None:
        """Gradients of one optimizer step: the mean over its images and steps."""
        total = sum(len(micro_batch.captions) * len(micro_batch.steps) for micro_batch in micro_batches)
        for micro_batch, own in zip(micro_batches, advantages):
            for step in micro_batch.steps:
                (self.loss(micro_batch, step, own) * (len(micro_batch.captions) / total)).backward()

    def update(self, micro_batches: Sequence[MicroBatch], advantages: Tensor) -> None:
        """One optimizer and moving-average step for each of the iteration's minibatches."""
        config = self.config
        by_micro_batch = advantages.split([len(micro_batch.captions) for micro_batch in micro_batches])
        share = len(micro_batches) // config.update.minibatches
        for first in range(0, len(micro_batches), share):
            self.accumulate(micro_batches[first : first + share], by_micro_batch[first : first + share])
            together = self.recipe.fused_optimizer or None  # None: as PyTorch chooses
            torch.nn.utils.clip_grad_norm_(self.trained, config.update.max_grad_norm, foreach=together)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self._average(1 - config.update.ema_decay)

    @torch.no_grad()
    def _average(self, share: float) -> None:
        """Move the averages by this share of the way to the parameters."""
        if self.recipe.fused_optimizer:
            torch._foreach_lerp_(self.averages, self.trained, share)
            return
        for average, parameter in zip(self.averages, self.trained):
            average.mul_(1 - share).add_(parameter, alpha=share)

    @property
    def _shared_noise(self) -> bool:
        return self.config.rollout.initial_noise == "shared"

    def rollout(self, prompts: Sequence[str], window: Sequence[int]) -> list[MicroBatch]:
        """group_size images of every prompt in micro-batches of micro_batch, their noise as rollout.initial_noise
        says."""
        self.merge()
        rollout = self.config.rollout
        captions = [prompt for prompt in prompts for _ in range(rollout.group_size)]
        shared = self._shared_noise
        noise = torch.randn(len(prompts) if shared else len(captions), *self.latent_shape, device=self.device)
        noise = noise.repeat_interleave(rollout.group_size, dim=0) if shared else noise
        size = rollout.micro_batch
        starts = range(0, len(captions), size)
        return [self.sampler(captions[i : i + size], noise[i : i + size], window) for i in starts]

    def score(self, micro_batches: Sequence[MicroBatch]) -> tuple[Features, Features, Tensor, Tensor]:
        """Features of the images and of one reference each, and the rewards [B] of both."""
        generated = Features.cat([self.features(micro_batch.images) for micro_batch in micro_batches])
        reference = Features.cat([self.drawn_references(micro_batch.captions) for micro_batch in micro_batches])
        return generated, reference, self.rewards(self.choose(generated)), self.rewards(self.choose(reference))

    def drawn_references(self, captions: Sequence[str]) -> Features:
        """Features [M, ...] of one reference of each caption."""
        draws = torch.rand(len(captions)).tolist()
        chosen = [(caption, int(draw * len(self.references[caption]))) for caption, draw in zip(captions, draws)]
        if not self.recipe.keep_references:
            return self.features(torch.stack([self.references[caption][number] for caption, number in chosen]))
        for caption in {*captions} - self._kept_references.keys():
            self._kept_references[caption] = self.features(self.references[caption])
        rows = [(self._kept_references[caption], number) for caption, number in chosen]
        return Features(torch.stack([f.cls[i] for f, i in rows]), torch.stack([f.patches[i] for f, i in rows]))

    def iteration(self, prompts: Sequence[str], window: Sequence[int]) -> dict[str, float]:
        """Rollout, rewards, discriminator updates when the schedule says so, generator update."""
        adversary = self.config.adversary
        micro_batches = self.rollout(prompts, window)
        generated, reference, rewards, of_reference = self.score(micro_batches)
        metrics = {"reward_generated": rewards.mean().item(), "reward_reference": of_reference.mean().item()}
        fooled = metrics["reward_generated"] > metrics["reward_reference"] - adversary.fooled_margin
        due = {"always": True, "never": False, "when_fooled": fooled}[adversary.schedule]
        self.adversary(generated, reference, adversary.updates_per_iteration if due else 0)
        self.remember(generated)
        self.update(micro_batches, self.advantages(rewards))
        return metrics

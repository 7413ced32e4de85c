"""What the builders of the tiny worlds share: steps and their log, the VAE, and rectified flow on its latents."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import StableDiffusion3Pipeline

from advgrpo.tiny.architecture import TINY

LONG_TEXT_SHARE = 0.03  # steps trained at the stock default of 256 T5 tokens, so that stock calls work unchanged
LONG_TEXT_TOKENS = 256
_RATE, _WARMUP, _EMA = 1.2e-3, 200, 0.999

Drawing = Callable[[int, torch.Generator], tuple[torch.Tensor, list[str]]]
"""(count, generator) -> images in [-1, 1] and their captions."""


class TrainingLog:
    """Prints and collects one row every `every` steps; `rows` becomes the loss curve."""

    def __init__(self, name: str, steps: int, every: int = 50):
        self.name, self.steps, self.every = name, steps, every
        self.rows: list[dict] = []
        self.started, self._sums, self._count = time.perf_counter(), {}, 0

    def step(self, step: int, **values: float) -> None:
        self._count += 1
        for key, value in values.items():
            self._sums[key] = self._sums.get(key, 0.0) + float(value)
        if step % self.every == self.every - 1 or step == self.steps - 1:
            row = {"step": step + 1, **{k: v / self._count for k, v in self._sums.items()}}
            row["seconds"] = round(time.perf_counter() - self.started, 1)
            self.rows.append(row)
            eta = row["seconds"] / (step + 1) * (self.steps - step - 1)
            shown = "  ".join(f"{k} {v:.4f}" for k, v in row.items() if k not in ("step", "seconds"))
            print(f"{self.name} {step + 1}/{self.steps}  {shown}  ETA {eta:.0f} s", flush=True)
            self._sums, self._count = {}, 0


def take_step(loss: torch.Tensor, parameters: Iterable[torch.nn.Parameter], optimizer, schedule) -> None:
    """One step of optimizer and learning rate down the gradient of `loss`, whose norm is held at 1."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    schedule.step()


def train_vae(vae: torch.nn.Module, steps: int, batch: int, generator: torch.Generator, draw: Drawing) -> list[dict]:
    """L1 + MSE + small KL; then latents are normalised through scaling_factor and shift_factor as in SD3."""
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    log = TrainingLog("vae", steps)
    for step in range(steps):
        images, _ = draw(batch, generator)
        posterior = vae.encode(images).latent_dist
        latents = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
        output = vae.decode(latents).sample
        mse = F.mse_loss(output, images)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss = F.l1_loss(output, images) + mse + 1e-3 * kl
        take_step(loss, vae.parameters(), optimizer, schedule)
        log.step(step, loss=loss.detach(), psnr=10 * torch.log10(4 / mse.detach()))
    with torch.no_grad():
        latents = torch.cat([vae.encode(draw(64, generator)[0]).latent_dist.mean for _ in range(8)])
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())
    return log.rows


def sample_sigmas(count: int, generator: torch.Generator) -> torch.Tensor:
    """Noise levels [B]: logit-normal shifted by 3 (SD3), one in ten uniform."""
    normal = torch.randn(count, generator=generator).sigmoid()
    shifted = 3 * normal / (1 + 2 * normal)
    uniform = torch.rand(count, generator=generator)
    return torch.where(torch.rand(count, generator=generator) < 0.1, uniform, shifted)


@dataclass(frozen=True)
class Latents:
    """Normalised latents of many images, encoded once, with their captions."""

    latents: torch.Tensor  # [N, 16, h, w]
    captions: list[str]

    @classmethod
    @torch.no_grad()
    def encode(cls, vae: torch.nn.Module, count: int, generator: torch.Generator, drawing: Drawing) -> Latents:
        parts, captions = [], []
        for _ in range(0, count, 64):
            images, own = drawing(64, generator)
            parts.append((vae.encode(images).latent_dist.mean - vae.config.shift_factor) * vae.config.scaling_factor)
            captions += own
        return cls(torch.cat(parts), captions)

    def sample(self, count: int, generator: torch.Generator) -> tuple[torch.Tensor, list[str]]:
        """`count` of them; one caption in ten is empty, for guidance."""
        chosen = torch.randint(len(self.captions), (count,), generator=generator)
        dropped = torch.rand(count, generator=generator) < 0.1
        captions = ["" if drop else self.captions[i] for i, drop in zip(chosen.tolist(), dropped.tolist())]
        return self.latents[chosen], captions


def _flow_loss(
    pipe: StableDiffusion3Pipeline, batch: int, generator: torch.Generator, data: Latents, short_text: int
) -> torch.Tensor:
    long_text = torch.rand((), generator=generator) < LONG_TEXT_SHARE
    latents, captions = data.sample(max(1, batch // 8) if long_text else batch, generator)
    tokens = LONG_TEXT_TOKENS if long_text else short_text
    text, _, pooled, _ = pipe.encode_prompt(
        captions, None, None, device="cpu", do_classifier_free_guidance=False, max_sequence_length=tokens
    )
    sigma = sample_sigmas(len(captions), generator)
    noise = torch.randn(latents.shape, generator=generator)
    noisy = torch.lerp(latents, noise, sigma.view(-1, 1, 1, 1))
    velocity = pipe.transformer(noisy, text, pooled, sigma * 1000, return_dict=False)[0]
    return F.mse_loss(velocity, noise - latents)


def constant(progress: float) -> float:
    """Of the learning rate, at a share of the steps."""
    return 1.0


def cosine(progress: float) -> float:
    """Of the learning rate, at a share of the steps: half a cosine, down to a tenth."""
    return 0.1 + 0.9 * (0.5 + 0.5 * math.cos(math.pi * progress))


def train_flow(
    pipe: StableDiffusion3Pipeline,
    steps: int,
    batch: int,
    generator: torch.Generator,
    data: Latents,
    rate: Callable[[float], float] = constant,
    *,
    short_text: int = TINY.t5_tokens,
) -> list[dict]:
    """Rectified flow, transformer and text encoders together; the pipeline ends with EMA weights.

    Args:
        rate: factor of the learning rate at a share of the steps, beside the warm-up.
        short_text: T5 tokens that the captions need.
    """
    modules = [pipe.transformer, pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3]
    parameters = [p for m in modules for p in m.parameters()]
    shadows = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=_RATE, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / _WARMUP, 1.0) * rate(min(step / steps, 1.0))
    )
    log = TrainingLog("flow", steps)
    for step in range(steps):
        loss = _flow_loss(pipe, batch, generator, data, short_text)
        take_step(loss, parameters, optimizer, schedule)
        with torch.no_grad():
            torch._foreach_lerp_(shadows, parameters, 1 - min(_EMA, (step + 1) / (step + 10)))
        log.step(step, loss=loss.detach())
    with torch.no_grad():
        torch._foreach_copy_(parameters, shadows)
    return log.rows

"""Pre-train the tiny SD3 pipeline: first its VAE, then transformer and text encoders by flow matching.

    python -m tools.tiny.build_pipeline --output advgrpo/tiny/assets/pipeline

About 25 minutes on two idle CPU cores (loss curve: docs/figures/tiny_pretraining.png). The data is a mix of crisp and
rough drawings (`shapes.sample_roughness`), so that the base model leaves visible room for reinforcement learning.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import StableDiffusion3Pipeline

from advgrpo.runtime.atomic import write_atomically
from advgrpo.tiny import architecture
from advgrpo.tiny.assets import save_half_precision
from advgrpo.tiny.shapes import render, sample_roughness, sample_scenes

LONG_TEXT_SHARE = 0.05  # steps trained at the stock default of 256 T5 tokens, so that stock calls work unchanged
LONG_TEXT_TOKENS = 256


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


def draw(count: int, generator: torch.Generator) -> tuple[torch.Tensor, list[str]]:
    """A batch of the pre-training mix: images in [-1, 1] and their captions."""
    scenes = sample_scenes(count, generator)
    images = render(scenes, generator, roughness=sample_roughness(count, generator))
    return images * 2 - 1, [s.caption for s in scenes]


def train_vae(
    vae: torch.nn.Module, steps: int, batch: int, generator: torch.Generator, draw: Drawing = draw
) -> list[dict]:
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


def _flow_loss(
    pipe: StableDiffusion3Pipeline, batch: int, generator: torch.Generator, draw: Drawing, short_text: int
) -> torch.Tensor:
    long_text = torch.rand((), generator=generator) < LONG_TEXT_SHARE
    images, captions = draw(batch // 4 if long_text else batch, generator)
    count = len(captions)
    with torch.no_grad():
        latents = pipe.vae.encode(images).latent_dist.mean
        latents = (latents - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
    dropped = torch.rand(count, generator=generator) < 0.1
    captions = ["" if drop else caption for caption, drop in zip(captions, dropped.tolist())]
    tokens = LONG_TEXT_TOKENS if long_text else short_text
    text, _, pooled, _ = pipe.encode_prompt(
        captions, None, None, device="cpu", do_classifier_free_guidance=False, max_sequence_length=tokens
    )
    sigma = sample_sigmas(count, generator)
    noise = torch.randn(latents.shape, generator=generator)
    noisy = torch.lerp(latents, noise, sigma.view(-1, 1, 1, 1))
    velocity = pipe.transformer(noisy, text, pooled, sigma * 1000, return_dict=False)[0]
    return F.mse_loss(velocity, noise - latents)


def train_flow(
    pipe: StableDiffusion3Pipeline,
    steps: int,
    batch: int,
    generator: torch.Generator,
    draw: Drawing = draw,
    short_text: int = architecture.T5_TOKENS,
) -> list[dict]:
    """Rectified flow, transformer and text encoders together; the pipeline ends with EMA weights.

    `short_text` is the number of T5 tokens that the captions need.
    """
    modules = [pipe.transformer, pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3]
    averages = [copy.deepcopy(m) for m in modules]
    parameters = [p for m in modules for p in m.parameters()]
    shadows = [p for m in averages for p in m.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1.2e-3, betas=(0.9, 0.99), weight_decay=0.01)
    warmup, decay = 200, int(0.6 * steps)
    rate = lambda step: min((step + 1) / warmup, (steps - step) / decay, 1.0)  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    log = TrainingLog("flow", steps)
    for step in range(steps):
        loss = _flow_loss(pipe, batch, generator, draw, short_text)
        take_step(loss, parameters, optimizer, schedule)
        with torch.no_grad():
            torch._foreach_lerp_(shadows, parameters, 1 - min(0.999, (step + 1) / (step + 10)))
        log.step(step, loss=loss.detach())
    for module, average in zip(modules, averages):
        module.load_state_dict(average.state_dict())
    return log.rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="pipeline folder to write (diffusers format)")
    parser.add_argument("--vae-steps", type=int, default=1500)
    parser.add_argument("--flow-steps", type=int, default=4500)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae-from", type=Path, help="take the VAE of this pipeline folder instead of training one")
    args = parser.parse_args()

    pipe = architecture.pipeline(seed=args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    curves: dict[str, list] = {}
    if args.vae_from:
        pipe.register_modules(vae=type(pipe.vae).from_pretrained(args.vae_from / "vae", use_safetensors=True))
    else:
        curves["vae"] = train_vae(pipe.vae, args.vae_steps, args.batch, generator)
        save_half_precision(pipe, args.output)
    pipe.vae.requires_grad_(False)

    curves["flow"] = train_flow(pipe, args.flow_steps, args.batch, generator)
    save_half_precision(pipe, args.output)
    write_atomically(args.output / "training.json", json.dumps(curves))
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()

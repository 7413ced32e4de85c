"""Train the tiny DINOv2 backbone without labels and measure it with linear probes.

    python -m tools.tiny.build_backbone --pipeline advgrpo/tiny/assets/pipeline --output FOLDER

Two losses on drawings of 600 things by the base's and the references' artists, half of them through the pipeline's VAE
(a generator cannot avoid its blur, which must not pass for bad drawing):

- the class token, and the mean of the patch tokens, tell two views of one drawing from all others of the batch (SimCLR,
  arXiv 2002.05709); views differ in background, size and place, crop, mirroring and colour. The corpus holds every
  drawing twice, whole and damaged (damage.py), as the web holds good pictures and bad ones: the two are other drawings;
- patch tokens tell the pixels of masked patches from the rest (SimMIM, arXiv 2111.09886).

No view is blurred: what drawings look like up close is what the adversary has to see. The gate, printed and kept in
training.json: a linear probe reads the name of a drawing on a background it was not fitted on, at least 0.2 better than
from the untrained twin. On one thread, so that a rebuild has the same bits; the steps of what is shipped took 27
minutes by the clock.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from transformers import Dinov2Model

from advgrpo.runtime.atomic import write_atomically
from advgrpo.tiny import architecture
from advgrpo.tiny.assets import save_half_precision
from advgrpo.tiny.scenes import BASE_ARTISTS, IMAGE_SIZE, NAMES, REFERENCE_ARTIST, Scene, compositions, render
from tools.tiny.corpus import Corpus
from tools.tiny.damage import KINDS, damage
from tools.tiny.training import TrainingLog, take_step

ARTISTS = (*BASE_ARTISTS, REFERENCE_ARTIST)
MEAN = torch.tensor((0.485, 0.456, 0.406)).view(1, 3, 1, 1)
STD = torch.tensor((0.229, 0.224, 0.225)).view(1, 3, 1, 1)
TEMPERATURE = 0.2
MASKED_SHARE = 0.4
POOLED = 4  # compositions of every drawing, drawn once
GATE = 0.2


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """What the VAE makes of images [B, 3, H, W] in [0, 1]."""
    latents = vae.encode(images * 2 - 1).latent_dist.mean
    return (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A random crop of half to all of the width, mirroring and colour, [B, 3, 48, 48] to the same."""
    count = len(images)
    uniform = lambda low, high: low + (high - low) * torch.rand(count, generator=generator)  # noqa: E731
    scale = uniform(0.5, 1.0)
    mirrored = torch.where(torch.rand(count, generator=generator) < 0.5, -1.0, 1.0)
    shift_x, shift_y = ((1 - scale) * uniform(-1.0, 1.0) for _ in range(2))
    zero = torch.zeros(count)
    rows = torch.stack([scale * mirrored, zero, shift_x, zero, scale, shift_y], dim=1).view(count, 2, 3)
    views = F.grid_sample(images, F.affine_grid(rows, images.shape, align_corners=False), align_corners=False,
                          padding_mode="border")  # fmt: skip
    brightness, contrast, saturation = (uniform(0.7, 1.3).view(-1, 1, 1, 1) for _ in range(3))
    grey = views.mean(1, keepdim=True)
    views = (grey + (views - grey) * saturation) * brightness
    middle = views.mean((1, 2, 3), keepdim=True)
    return (middle + (views - middle) * contrast).clamp(0, 1)


class Heads(torch.nn.Module):
    """Training-time read-outs; dropped afterwards."""

    def __init__(self, width: int, patch: int):
        super().__init__()
        projection = lambda: torch.nn.Sequential(  # noqa: E731
            torch.nn.Linear(width, 256), torch.nn.ReLU(), torch.nn.Linear(256, 64)
        )
        self.cls, self.patches = projection(), projection()
        self.pixels = torch.nn.Linear(width, 3 * patch * patch)

    def contrastive_loss(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Of tokens [B, 1 + P, D] of two views each."""
        cls = contrastive_loss(self.cls(first[:, 0]), self.cls(second[:, 0]))
        patches = (self.patches(tokens[:, 1:]).mean(1) for tokens in (first, second))
        return cls + contrastive_loss(*patches)


def contrastive_loss(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """NT-Xent of projections [B, D] of two views each."""
    both = F.normalize(torch.cat([first, second]), dim=1)
    nearness = (both @ both.T / TEMPERATURE).fill_diagonal_(-1e4)
    return F.cross_entropy(nearness, torch.arange(len(both)).roll(len(first)))


def masked_loss(model: Dinov2Model, heads: Heads, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """L1 of masked patches' pixels."""
    patch, side = model.config.patch_size, IMAGE_SIZE // model.config.patch_size
    masked = torch.rand(len(images), side * side, generator=generator) < MASKED_SHARE
    pixels = (images - MEAN) / STD
    tokens = model(pixels, bool_masked_pos=masked).last_hidden_state
    wanted = F.unfold(pixels, patch, stride=patch).transpose(1, 2)
    return F.l1_loss(heads.pixels(tokens[:, 1:])[masked], wanted[masked])


def train(model: Dinov2Model, vae: AutoencoderKL, steps: int, batch: int, seed: int) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    pool = _pool(vae, Corpus.draw(ARTISTS), generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        heads = Heads(model.config.hidden_size, model.config.patch_size)
    parameters = [*model.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    log = TrainingLog("backbone", steps, every=20)
    model.train()
    for step in range(steps):
        views = [augment(images, generator) for images in _pairs(pool, batch, generator)]
        first, second = (model((images - MEAN) / STD).last_hidden_state for images in views)
        contrast = heads.contrastive_loss(first, second)
        pixels = masked_loss(model, heads, views[0][: batch // 2], generator)
        take_step(contrast + pixels, parameters, optimizer, schedule)
        log.step(step, contrast=contrast.detach(), pixels=pixels.detach())
    model.eval()
    return log.rows


def _pool(vae: AutoencoderKL, corpus: Corpus, generator: torch.Generator) -> torch.Tensor:
    """Every drawing in POOLED compositions, whole and damaged, every other composition by the VAE.

    Returns:
        [drawings, 2, POOLED, 3, 48, 48] bytes; the compositions of one share the kind and strength of damage.
    """
    every = list(range(len(corpus)))
    kind = torch.randint(2 * len(KINDS), (len(every),), generator=generator)
    strength = torch.rand(len(every), generator=generator)
    whole, damaged = [], []
    for column in range(POOLED):
        for made, harmed in ((whole, False), (damaged, True)):
            images = corpus.composed(every, generator)
            images = damage(images, kind, strength, generator) if harmed else images
            if column % 2:
                images = torch.cat([reconstruct(vae, part) for part in images.split(64)])
            made.append((images * 255).round().byte())
    return torch.stack([torch.stack(whole, dim=1), torch.stack(damaged, dim=1)], dim=1)


def _pairs(pool: torch.Tensor, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Two compositions each of `count` drawings, whole and damaged: [2 count, 3, 48, 48] in [0, 1]."""
    which = torch.randint(len(pool), (count,), generator=generator).repeat(2)
    state = torch.arange(2).repeat_interleave(count)
    columns = torch.rand(len(which), POOLED, generator=generator).argsort(1)[:, :2]
    first, second = (pool[which, state, column].float() / 255 for column in columns.unbind(1))
    return first, second


@torch.no_grad()
def _cls_features(model: Dinov2Model, vae, compositions_, generator) -> tuple[torch.Tensor, torch.Tensor]:
    scenes = [Scene(name, *composition) for composition in compositions_ for name in NAMES]
    features = []
    for artist in ARTISTS:
        for start in range(0, len(scenes), 256):
            part = scenes[start : start + 256]
            images = reconstruct(vae, render(part, [artist] * len(part), generator))
            features.append(model((images - MEAN) / STD).last_hidden_state[:, 0])
    names = torch.tensor([NAMES.index(scene.name) for scene in scenes]).repeat(len(ARTISTS))
    return torch.cat(features), names


@torch.no_grad()
def probe(model: Dinov2Model, vae: AutoencoderKL, seed: int) -> float:
    """Accuracy of a ridge regression of names on class tokens, on a background it was not fitted on."""
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    known = [c for c in compositions() if c[2] in ("white", "blue", "pink") and c[1] in ("", "left", "top")]
    unknown = [c for c in compositions() if c[2] in ("grey", "green") and c[1] in ("", "right")]
    features, names = _cls_features(model, vae, known, generator)
    others, wanted = _cls_features(model, vae, unknown, generator)
    mean, scale = features.mean(0), features.std(0) + 1e-6
    features, others = ((x - mean) / scale for x in (features, others))
    features, others = (F.pad(x, (0, 1), value=1.0).double() for x in (features, others))
    gram = features.T @ features + 1.0 * torch.eye(features.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(gram, features.T @ F.one_hot(names, len(NAMES)).double())
    return ((others @ weights).argmax(1) == wanted).double().mean().item()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=Path, required=True, help="pipeline folder whose VAE is used")
    parser.add_argument("--output", type=Path, required=True, help="folder to write (Dinov2Model)")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=64, help="drawings per step, two views of each")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)

    torch.set_num_threads(1)
    vae = AutoencoderKL.from_pretrained(args.pipeline / "vae", use_safetensors=True).eval().requires_grad_(False)
    model = architecture.backbone(seed=args.seed)
    untrained = probe(model, vae, args.seed)
    curve = train(model, vae, args.steps, args.batch, args.seed)
    trained = probe(model, vae, args.seed)
    save_half_precision(model, args.output)
    figures = {"probe": trained, "probe_untrained": untrained}
    write_atomically(args.output / "training.json", json.dumps({"backbone": curve, "figures": figures}))
    verdict = "passed" if trained - untrained >= GATE else "MISSED"
    print(f"wrote {args.output}; gate {verdict}: linear probe {trained:.3f}, untrained {untrained:.3f}")


if __name__ == "__main__":
    main()

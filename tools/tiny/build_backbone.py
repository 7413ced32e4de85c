"""Train the tiny DINOv2 backbone and measure it with linear probes.

    python -m tools.tiny.build_backbone --pipeline advgrpo/tiny/assets/pipeline --output advgrpo/tiny/assets/backbone

The shipped weights took a second round (`--init`, 3,000 steps, seed 1; `make tiny-assets` runs both), at about 0.3 s a
step on one busy core. There is no web-scale data here to distil from, so the features are learned with
labels: the class token tells shape, colours, size, position and drawing quality; every patch token tells how much of
the object it covers and the drawing quality around it. Half of the images pass through the pipeline's VAE, so that
the VAE's own blur, which a generator cannot avoid, is not mistaken for bad drawing. The probes are fitted on the frozen
class token and scored on combinations never trained on.
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
from advgrpo.tiny.shapes import COLOURS, POSITIONS, SHAPES, SIZES, Scene, all_scenes, render, sample_roughness
from tools.tiny.build_pipeline import TrainingLog, take_step

ATTRIBUTES = {
    "shape": SHAPES,
    "colour": COLOURS,
    "background": COLOURS,
    "size": tuple(SIZES),
    "position": tuple(POSITIONS),
}
MEAN = torch.tensor((0.485, 0.456, 0.406)).view(1, 3, 1, 1)
STD = torch.tensor((0.229, 0.224, 0.225)).view(1, 3, 1, 1)
_GHOST_SHARE = 0.15  # two images blended: the typical failure of a sampler, and never a good drawing


def split_scenes() -> tuple[list[Scene], list[Scene]]:
    """Nine tenths of all combinations to train on, the rest for the probes."""
    scenes = all_scenes()
    order = torch.randperm(len(scenes), generator=torch.Generator().manual_seed(7)).tolist()
    cut = len(scenes) * 9 // 10
    return [scenes[i] for i in order[:cut]], [scenes[i] for i in order[cut:]]


def labels(scenes: list[Scene]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([values.index(getattr(s, name)) for s in scenes]) for name, values in ATTRIBUTES.items()}


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    latents = vae.encode(images * 2 - 1).latent_dist.mean
    return (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)


def draw(scenes: list[Scene], count: int, vae: AutoencoderKL, generator: torch.Generator):
    """Images, scenes, drawing error in [0, 1], ghosts, coverage per patch; every other image through the VAE."""
    chosen = [scenes[i] for i in torch.randint(len(scenes), (count,), generator=generator).tolist()]
    roughness = sample_roughness(count, generator)
    images, alpha = render(chosen, generator, roughness=roughness, return_coverage=True)
    ghosts = torch.rand(count, generator=generator) < _GHOST_SHARE
    weight = 0.3 + 0.4 * torch.rand(count, 1, 1, 1, generator=generator)
    blended = torch.lerp(images, images.roll(1, 0), weight)
    images = torch.where(ghosts.view(-1, 1, 1, 1), blended, images)
    images[::2] = reconstruct(vae, images[::2])
    error = torch.where(ghosts, torch.ones(count), roughness)
    return images, chosen, error, ghosts, F.avg_pool2d(alpha, 4).flatten(1)


class Heads(torch.nn.Module):
    """Training-time read-outs; dropped afterwards."""

    def __init__(self, width: int):
        super().__init__()
        self.attributes = torch.nn.ModuleDict({n: torch.nn.Linear(width, len(v)) for n, v in ATTRIBUTES.items()})
        self.cls_error = torch.nn.Linear(width, 1)
        self.patch = torch.nn.Linear(width, 2)  # coverage, error

    def loss(self, tokens: torch.Tensor, scenes: list[Scene], error, ghosts, coverage) -> torch.Tensor:
        cls, patches = tokens[:, 0], tokens[:, 1:]
        clean = ~ghosts
        total = sum(
            F.cross_entropy(self.attributes[name](cls[clean]), target[clean]) for name, target in labels(scenes).items()
        )
        total = total + 4 * F.mse_loss(self.cls_error(cls).squeeze(1), error)
        read = self.patch(patches)
        total = total + 4 * F.mse_loss(read[clean][..., 0], coverage[clean])
        return total + 2 * F.mse_loss(read[..., 1], error[:, None].expand(-1, patches.shape[1]))


def train(model: Dinov2Model, vae: AutoencoderKL, steps: int, batch: int, seed: int) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    scenes, _ = split_scenes()
    heads = Heads(model.config.hidden_size)
    parameters = [*model.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.1)
    log = TrainingLog("backbone", steps)
    model.train()
    for step in range(steps):
        images, chosen, error, ghosts, coverage = draw(scenes, batch, vae, generator)
        tokens = model((images - MEAN) / STD).last_hidden_state
        loss = heads.loss(tokens, chosen, error, ghosts, coverage)
        take_step(loss, parameters, optimizer, schedule)
        log.step(step, loss=loss.detach())
    model.eval()
    return log.rows


@torch.no_grad()
def _cls_features(model, scenes: list[Scene], vae, generator, repeats: int):
    features, targets, rough = [], [], []
    for _ in range(repeats):
        chosen = [scenes[i] for i in torch.randint(len(scenes), (128,), generator=generator).tolist()]
        roughness = torch.where(torch.rand(128, generator=generator) < 0.5, 0.0, 0.5)
        images = reconstruct(vae, render(chosen, generator, roughness=roughness))
        features.append(model((images - MEAN) / STD).last_hidden_state[:, 0])
        targets.append(labels(chosen))
        rough.append((roughness > 0).long())
    joined = {name: torch.cat([t[name] for t in targets]) for name in ATTRIBUTES}
    return torch.cat(features), {**joined, "quality": torch.cat(rough)}


def probe(model: Dinov2Model, vae: AutoencoderKL, seed: int, batches: int = 40) -> dict[str, float]:
    """Accuracy of ridge-regression read-outs of the class token on unseen combinations, from `batches` of 128.

    Half of the drawings are crisp and half rough (0.5); "quality" is telling which.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    seen, unseen = split_scenes()
    x, targets = _cls_features(model, seen, vae, generator, batches)
    x_test, targets_test = _cls_features(model, unseen, vae, generator, batches // 3)
    mean = x.mean(0)
    x, x_test = F.pad(x - mean, (0, 1), value=1.0), F.pad(x_test - mean, (0, 1), value=1.0)
    gram = x.T @ x + 1e-4 * len(x) * torch.eye(x.shape[1]) * x.var()
    accuracy = {}
    for name, target in targets.items():
        weights = torch.linalg.solve(gram, x.T @ F.one_hot(target).float())
        accuracy[name] = ((x_test @ weights).argmax(1) == targets_test[name]).float().mean().item()
    return accuracy


def _continued(earlier: list[dict], later: list[dict]) -> list[dict]:
    """Both rounds as one loss curve."""
    steps, seconds = earlier[-1]["step"], earlier[-1]["seconds"]
    return earlier + [{**row, "step": row["step"] + steps, "seconds": row["seconds"] + seconds} for row in later]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=Path, required=True, help="pipeline folder whose VAE is used")
    parser.add_argument("--output", type=Path, required=True, help="backbone folder to write")
    parser.add_argument("--init", type=Path, help="continue from this backbone's weights, with new training heads")
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    vae = AutoencoderKL.from_pretrained(args.pipeline / "vae", use_safetensors=True).requires_grad_(False).eval()
    model = architecture.backbone(seed=args.seed)
    untrained = probe(model.eval(), vae, args.seed)
    if args.init:
        model = Dinov2Model.from_pretrained(args.init, use_safetensors=True)
    curve = train(model, vae, args.steps, args.batch, args.seed)
    accuracy = probe(model, vae, args.seed)
    if args.init:
        curve = _continued(json.loads((args.init / "training.json").read_text())["backbone"], curve)
    args.output.mkdir(parents=True, exist_ok=True)
    save_half_precision(model, args.output)
    results = {"backbone": curve, "probe": accuracy, "probe_untrained": untrained}
    write_atomically(args.output / "training.json", json.dumps(results))
    for name, value in accuracy.items():
        print(f"linear probe {name}: {value:.3f} (untrained {untrained[name]:.3f})")


if __name__ == "__main__":
    main()

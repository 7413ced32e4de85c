"""Can an adversary on this backbone tell better from worse, before any reinforcement learning?

    python -m tools.tiny.emoji.audit_backbone --backbone advgrpo/tiny/assets/emoji/backbone

Draws groups of images of training prompts, trains a head (the adversary's: hinge on class token and patches) on half of
the prompts, and measures on the other half

- paired accuracy: how often a prompt's reference scores above its generation;
- within-group correlation of the reward with the judge's margin, the lead of the prompt's name over the next in the
  independent judge's eyes: what group-relative advantages can teach. Near 0, reinforcement learning can only drift.

`--backbone judge` asks the same of the judge's own features: what an adversary with a good backbone would find, and an
answer that no reward may use.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from advgrpo.runtime.libraries import quiet_libraries
from advgrpo.tiny import WORLDS
from advgrpo.tiny.emoji.judge import Judge
from advgrpo.tiny.emoji.scenes import NAMES, REFERENCE_ARTIST, Scene, render

GROUP = 8
_BATCH = 64
_WEIGHTS = (0.7, 0.3)  # of class token and patches in the reward, as adversary.reward_weights


@dataclass(frozen=True)
class Groups:
    """GROUP images of every prompt beside a reference each, prompt by prompt."""

    scenes: list[Scene]
    generated: torch.Tensor  # [N, 3, 48, 48]
    references: torch.Tensor  # [N, 3, 48, 48]

    @classmethod
    @torch.no_grad()
    def draw(cls, prompts: int, guidance: float, seed: int) -> Groups:
        from diffusers import StableDiffusion3Pipeline

        world = WORLDS["tiny:emoji"]
        pipe = StableDiffusion3Pipeline.from_pretrained(world.pipeline, use_safetensors=True)
        pipe.set_progress_bar_config(disable=True)
        captions = [c for c in world.prompts.read_text().splitlines()[:prompts] for _ in range(GROUP)]
        generator = torch.Generator().manual_seed(seed)
        side = world.image_size // 4
        latents = torch.randn(len(captions), 16, side, side, generator=generator)
        images = [
            pipe(
                captions[start : start + _BATCH], latents=latents[start : start + _BATCH], num_inference_steps=10,
                guidance_scale=guidance, max_sequence_length=world.max_sequence_length, output_type="pt",
                height=world.image_size, width=world.image_size,
            ).images
            for start in range(0, len(captions), _BATCH)
        ]  # fmt: skip
        scenes = [Scene.parse(caption) for caption in captions]
        return cls(scenes, torch.cat(images).float(), render(scenes, [REFERENCE_ARTIST] * len(scenes), generator))


def margins(judge: Judge, features: torch.Tensor, scenes: list[Scene]) -> torch.Tensor:
    """[N] cosine of the prompt's name less that of the nearest other name."""
    found = torch.zeros(len(scenes))
    for i, scene in enumerate(scenes):
        near = judge.nearness(features[i : i + 1], scene)[0][0]
        name = NAMES.index(scene.name)
        found[i] = near[name] - near[torch.arange(len(NAMES)) != name].max()
    return found


def tokens(backbone: str, images: torch.Tensor, scenes: list[Scene], judge: Judge) -> torch.Tensor:
    """[N, 1 + P, D] class token and patches of a Dinov2Model; of the judge its features alone, P = 0."""
    if backbone == "judge":
        return judge.features(images, scenes)[:, None]
    from advgrpo.vision.dino import DinoBackbone

    dino = DinoBackbone(backbone, image_size=images.shape[-1], dtype="float32", device=torch.device("cpu"))
    parts = [dino.features(part) for part in images.split(_BATCH)]
    return torch.cat([torch.cat([part["cls"][:, None], part["patches"]], dim=1) for part in parts])


def train_head(real: torch.Tensor, fake: torch.Tensor, steps: int, seed: int) -> torch.nn.Module:
    """A two-layer head by the adversary's hinge, on tokens [N, 1 + P, D] of references and generations."""
    torch.manual_seed(seed)
    head = torch.nn.Sequential(torch.nn.Linear(real.shape[-1], 128), torch.nn.GELU(), torch.nn.Linear(128, 1))
    optimizer = torch.optim.Adam(head.parameters(), 1e-3, betas=(0.5, 0.999))
    for _ in range(steps):
        rows = torch.randint(len(real), (32,))
        sides = [head(side[rows]).squeeze(-1) for side in (real, fake)]
        hinge = F.relu(1 - sides[0]) + F.relu(1 + sides[1])
        loss = hinge[:, 0].mean() + (hinge[:, 1:].mean() if hinge.shape[1] > 1 else 0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return head


@torch.no_grad()
def rewards(head: torch.nn.Module, features: torch.Tensor) -> torch.Tensor:
    """[N] weighted sum of the class token's score and the mean of the patches'."""
    scores = head(features).squeeze(-1)
    if scores.shape[1] == 1:
        return scores[:, 0]
    return _WEIGHTS[0] * scores[:, 0] + _WEIGHTS[1] * scores[:, 1:].mean(1)


def within_groups(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean over groups of the correlation of two values [N] among the group's images."""
    centred = [F.normalize(x.view(-1, GROUP) - x.view(-1, GROUP).mean(1, keepdim=True), dim=1) for x in (a, b)]
    return (centred[0] * centred[1]).sum(1).mean().item()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="tiny:emoji", help="Dinov2Model folder, tiny:emoji, or judge")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=400, help="of the head")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/advgrpo"))
    args = parser.parse_args(arguments)
    quiet_libraries()
    judge = Judge(cache=args.cache)
    groups = Groups.draw(args.prompts, args.guidance, args.seed)
    margin = margins(judge, judge.features(groups.generated, groups.scenes), groups.scenes)
    fake, real = (tokens(args.backbone, x, groups.scenes, judge) for x in (groups.generated, groups.references))
    half = args.prompts // 2 * GROUP
    mean, scale = fake[:half].mean((0, 1)), fake[:half].std((0, 1)) + 1e-4
    fake, real = ((x - mean) / scale for x in (fake, real))
    head = train_head(real[:half], fake[:half], args.steps, args.seed)
    own, of_references = rewards(head, fake[half:]), rewards(head, real[half:])
    print(
        f"{args.backbone} at guidance {args.guidance:g}: paired accuracy {(of_references > own).float().mean():.3f}, "
        f"within-group correlation with the judge's margin {within_groups(own, margin[half:]):+.3f}"
    )


if __name__ == "__main__":
    main()

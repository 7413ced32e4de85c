"""Can an adversary on this backbone tell better from worse, before any reinforcement learning?

    python -m tools.tiny.audit_backbone --backbone advgrpo/tiny/assets/backbone

Draws groups of images of training prompts, trains the adversary of the preset tiny, with its trainer, on half of
the prompts, and measures on the other half

- paired accuracy: how often a prompt's reference scores above its generation;
- within-group correlation of the reward with the judge's margin, the lead of the prompt's name over the next in the
  independent judge's eyes: what group-relative advantages can teach. Near 0, reinforcement learning can only drift.

`--backbone judge` asks the same of the judge's own features, which stand for class token and patch alike: what an
adversary with a good backbone would find, and an answer that no reward may use.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from advgrpo import config
from advgrpo.adversary.build import build_adversary
from advgrpo.adversary.feature_head import FeatureHeadAdversary
from advgrpo.adversary.trainer import DiscriminatorBatch, DiscriminatorTrainer
from advgrpo.config import AdversarySection
from advgrpo.runtime.libraries import quiet_libraries
from advgrpo.tiny import WORLDS
from advgrpo.tiny.judge import Judge
from advgrpo.tiny.scenes import NAMES, REFERENCE_ARTIST, Scene, render
from advgrpo.types import Features

GROUP = 8
_BATCH = 64


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

        world = WORLDS["tiny"]
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


class JudgeBackbone:
    """`feature_head.FrozenBackbone` of the judge: its features as a class token and as the only patch."""

    device, width, num_patches, cache_key = torch.device("cpu"), 1280, 1, "judge"

    def __init__(self, judge: Judge):
        self.judge = judge

    def features_of(self, images: torch.Tensor, scenes: list[Scene]) -> Features:
        """Of the squares that the scenes give the drawings, which `features` is not told of."""
        found = self.judge.features(images, scenes)
        return Features({"cls": found, "patches": found[:, None]})

    def features(self, images: torch.Tensor) -> Features:
        raise NotImplementedError("the judge looks at scenes: features_of")


def adversary_section(backbone: str) -> AdversarySection:
    """The preset's, on another backbone."""
    section = config.load(preset="tiny").adversary
    if backbone != "judge":
        return section.model_copy(update={"backbone": backbone})
    return section.model_copy(update={"num_patches": 1})


def adversary_on(section: AdversarySection, judge: Judge | None, seed: int) -> FeatureHeadAdversary:
    """Untrained; on the judge's features where it is given."""
    if judge is not None:
        return FeatureHeadAdversary(section, JudgeBackbone(judge), seed=seed)
    adversary = build_adversary(section, device=torch.device("cpu"), seed=seed)
    assert isinstance(adversary, FeatureHeadAdversary)
    return adversary


def features_of(adversary: FeatureHeadAdversary, images: torch.Tensor, scenes: list[Scene]) -> Features:
    """Frozen features of images [N, 3, 48, 48]."""
    if isinstance(adversary.backbone, JudgeBackbone):
        return adversary.backbone.features_of(images, scenes)
    return Features.cat([adversary.features(part, []) for part in images.split(_BATCH)])


def learn(adversary: FeatureHeadAdversary, generated: Features, references: Features, updates: int) -> None:
    """Discriminator updates on both sides' features, as in training."""
    trainer = DiscriminatorTrainer(adversary, reduce=lambda tensors: None, rank=0, world_size=1)
    batch = DiscriminatorBatch(torch.arange(len(generated)), generated, references, total=len(generated))
    trainer.check(trainer.train(batch, 0, updates), 0)


def rewards(adversary: FeatureHeadAdversary, features: Features) -> torch.Tensor:
    """[N] what the adversary gives."""
    return adversary.score(features, torch.arange(len(features)), purpose="audit", iteration=0).reward


def within_groups(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean over groups of the correlation of two values [N] among the group's images."""
    centred = [F.normalize(x.view(-1, GROUP) - x.view(-1, GROUP).mean(1, keepdim=True), dim=1) for x in (a, b)]
    return (centred[0] * centred[1]).sum(1).mean().item()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="tiny", help="Dinov2Model folder, tiny, or judge")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=400, help="discriminator updates")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/advgrpo"))
    args = parser.parse_args(arguments)
    quiet_libraries()
    judge = Judge(cache=args.cache)
    groups = Groups.draw(args.prompts, args.guidance, args.seed)
    margin = margins(judge, judge.features(groups.generated, groups.scenes), groups.scenes)
    own_judge = judge if args.backbone == "judge" else None
    adversary = adversary_on(adversary_section(args.backbone), own_judge, args.seed)
    fake, real = (features_of(adversary, x, groups.scenes) for x in (groups.generated, groups.references))
    half = args.prompts // 2 * GROUP
    seen, kept = torch.arange(half), torch.arange(half, len(fake))
    learn(adversary, fake.rows(seen), real.rows(seen), args.steps)
    own, of_references = (rewards(adversary, side.rows(kept)) for side in (fake, real))
    print(
        f"{args.backbone} at guidance {args.guidance:g}: paired accuracy {(of_references > own).float().mean():.3f}, "
        f"within-group correlation with the judge's margin {within_groups(own, margin[half:]):+.3f}"
    )


if __name__ == "__main__":
    main()

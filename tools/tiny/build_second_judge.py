"""Train the tiny world's second judge, a small CNN that names what is drawn (advgrpo/tiny/second_judge.py).

    python -m tools.tiny.build_second_judge --pipeline advgrpo/tiny/assets/pipeline \\
      --output advgrpo/tiny/assets/second_judge

On one thread, so that a rebuild has the same bits: some minutes of an idle CPU core; the shipped one took 30 by the
clock. It sees drawings by the judges' artists only, in four of five of the world's scenes, a little turned, bent,
mirrored and recoloured. The gates, printed and kept in training.json with the accuracy on what it was not trained on:
the other scenes of its own artists, all scenes of the references' artist and of the base's, and what the pipeline draws
for the tuning prompts at guidance 1, 2 and 3.

Shapes: B cuts [B, 3, 32, 32] float32 in [0, 1].
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import StableDiffusion3Pipeline

from advgrpo.runtime.atomic import write_atomically
from advgrpo.runtime.libraries import quiet_libraries
from advgrpo.runtime.rng import generator as seeded
from advgrpo.tiny import other_prompts
from advgrpo.tiny.judge import cut
from advgrpo.tiny.scenes import (
    BASE_ARTISTS,
    JUDGE_ARTISTS,
    NAMES,
    REFERENCE_ARTIST,
    Scene,
    all_scenes,
    render,
)
from advgrpo.tiny.second_judge import PIXELS, SecondJudge, load, network, save
from tools.tiny.build_preference import base_pictures
from tools.tiny.damage import moved_pixels, saturate, smooth
from tools.tiny.training import TrainingLog, take_step

GATES = {"own_artists": 0.95, "reference_artist": 0.6, "base_artists": 0.6}
SCALES = (1.0, 2.0, 3.0)
_RATE = 2e-3
_KEPT_APART = 5  # one scene in so many is not trained on


def split() -> tuple[list[Scene], list[Scene]]:
    """The scenes that are trained on, and those that are not: other compositions of the same names."""
    scenes = all_scenes()
    order = torch.randperm(len(scenes), generator=seeded(0, "second_judge_split")).tolist()
    apart = len(scenes) // _KEPT_APART
    return [scenes[i] for i in sorted(order[apart:])], [scenes[i] for i in sorted(order[:apart])]


def drawn(scenes: list[Scene], artists: tuple[str, ...], generator: torch.Generator) -> torch.Tensor:
    """Every scene by one artist after the other, [artists * scenes, 3, 48, 48]."""
    return torch.cat([render(scenes, [artist] * len(scenes), generator) for artist in artists])


def augment(cuts: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A little scaled, turned, moved and bent, half mirrored, recoloured."""
    count = len(cuts)
    uniform = lambda low, high: low + (high - low) * torch.rand(count, generator=generator)  # noqa: E731
    scale, angle, mirrored = uniform(0.85, 1.2), uniform(-0.25, 0.25), torch.sign(uniform(-1.0, 1.0))
    cos, sin = scale * angle.cos(), scale * angle.sin()
    rows = torch.stack([cos * mirrored, -sin, uniform(-0.1, 0.1), sin * mirrored, cos, uniform(-0.1, 0.1)], dim=1)
    grid = F.affine_grid(rows.view(count, 2, 3), cuts.shape, align_corners=False)
    views = F.grid_sample(cuts, grid, align_corners=False, padding_mode="border")
    views = moved_pixels(views, smooth(count, 2, 5, PIXELS, generator) * uniform(0.0, 0.08).view(-1, 1, 1, 1))
    views = saturate(views, uniform(0.5, 1.4)) * uniform(0.8, 1.2).view(-1, 1, 1, 1)
    tint = (torch.rand(count, 3, 1, 1, generator=generator) - 0.5) * 0.2
    return (views + tint).clamp(0, 1)


def train(steps: int, batch: int, seed: int) -> tuple[torch.nn.Module, list[dict]]:
    """The network, trained, and its curve."""
    generator = seeded(seed, "second_judge")
    scenes = split()[0]
    images = drawn(scenes, JUDGE_ARTISTS, generator)
    cuts = cut(images, scenes * len(JUDGE_ARTISTS), PIXELS)
    names = torch.tensor([NAMES.index(scene.name) for scene in scenes] * len(JUDGE_ARTISTS))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = network()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=_RATE, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=steps, pct_start=0.1)
    log = TrainingLog("second judge", steps)
    for step in range(steps):
        chosen = torch.randint(len(cuts), (batch,), generator=generator)
        logits = model(augment(cuts[chosen], generator))
        loss = F.cross_entropy(logits, names[chosen], label_smoothing=0.1)
        take_step(loss, parameters, optimizer, schedule)
        log.step(step, loss=loss.detach(), accuracy=(logits.argmax(1) == names[chosen]).float().mean())
    return model, log.rows


@torch.no_grad()
def measure(judge: SecondJudge, pictures_of: Path, seed: int) -> dict[str, float]:
    """Accuracy on what the judge was not trained on; see the module's docstring."""
    generator = seeded(seed, "second_judge_measure")
    figures = {}
    for name, scenes, artists in (
        ("own_artists", split()[1], JUDGE_ARTISTS),
        ("reference_artist", all_scenes(), (REFERENCE_ARTIST,)),
        ("base_artists", all_scenes(), BASE_ARTISTS),
    ):
        seen = judge.look(drawn(scenes, artists, generator), scenes * len(artists))
        figures[name] = seen.float().mean().item()
    pipe = StableDiffusion3Pipeline.from_pretrained(pictures_of, use_safetensors=True)
    prompts = other_prompts()["tiny:tuning"].read_text().splitlines() * 2
    for scale in SCALES:
        seen = judge.look(base_pictures(pipe, prompts, scale, seed), [Scene.parse(prompt) for prompt in prompts])
        figures[f"base_at_{scale:g}"] = seen.float().mean().item()
    return figures


def record(folder: Path, curve: list[dict], seed: int, pictures_of: Path) -> None:
    """Measure the judge in `folder`; figures, gates and curve go into its training.json."""
    figures = measure(SecondJudge(load(folder)), pictures_of, seed)
    gates = {name: {"least": least, "found": figures[name]} for name, least in GATES.items()}
    missed = [name for name, gate in gates.items() if gate["found"] < gate["least"]]
    write_atomically(folder / "training.json", json.dumps({"figures": figures, "gates": gates, "second_judge": curve}))
    print(f"wrote {folder}; gates {'MISSED: ' + ', '.join(missed) if missed else 'passed'}")
    print(", ".join(f"{name} {share:.3f}" for name, share in figures.items()))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=Path, required=True, help="pipeline whose pictures are judged")
    parser.add_argument("--output", type=Path, required=True, help="folder to write (model.safetensors, training.json)")
    parser.add_argument("--measure", action="store_true", help="only measure what is in the output folder, again")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)

    quiet_libraries()
    torch.set_num_threads(1)
    if args.measure:
        curve = json.loads((args.output / "training.json").read_text())["second_judge"]
    else:
        model, curve = train(args.steps, args.batch, args.seed)
        save(model, args.output)
    record(args.output, curve, args.seed, args.pipeline)


if __name__ == "__main__":
    main()

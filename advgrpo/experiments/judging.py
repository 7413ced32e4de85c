"""What the independent judge sees of a trained model, or of the base model: a file per prompt list and guidance scale.

Every model draws the same noise. A file that was made of other weights, prompts or settings is made again, so that
judging goes on where it stopped. Kept are numbers by prompt, from which any comparison can be resampled.

Shapes: P prompts, K images of each, R references of each.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from advgrpo.config import Config
from advgrpo.data.prompts import load_prompts
from advgrpo.data.sources import shipped_path
from advgrpo.errors import UserError
from advgrpo.evaluation.frontier import Point
from advgrpo.evaluation.judging import Prompts, TinyWitness, draw, refuse_shared, repeated
from advgrpo.monitor.image_statistics import image_statistics
from advgrpo.reporting.display import Display
from advgrpo.rewards.base import Reward
from advgrpo.runtime.atomic import write_atomically
from advgrpo.runtime.distributed import Distributed
from advgrpo.runtime.fingerprint import file_digest
from advgrpo.sampling.drawing import ModelOptions
from advgrpo.tiny.scenes import STYLE_ARTISTS, Scene
from advgrpo.training.models import load_model, settings_of
from advgrpo.training.resuming import base_fingerprint

LISTS = ("tuning", "report")
_SEED = 42  # of the noise, which no run's evaluation draws
_STAMP = "made_of"


@dataclass(frozen=True)
class Judging:
    """What everybody is judged on."""

    prompts: Mapping[str, str]  # "tuning": on which own best guidance is chosen; "report"
    references: str
    guidance_scales: tuple[float, ...]
    images_per_prompt: int


def check_lists(judging: Judging) -> None:
    """Before any work: UserError for a list that cannot be read or is none of the tiny world's, and for a prompt on
    which guidance is chosen and which is reported on as well."""
    flags = {"tuning": "--tuning-prompts", "report": "--prompts"}
    texts = {}
    for name, flag in flags.items():
        texts[name] = [prompt.text for prompt in load_prompts(shipped_path("held_out_prompts", judging.prompts[name]))]
        for text in texts[name]:
            try:
                Scene.parse(text)
            except ValueError as error:
                raise UserError(f"{flag} {judging.prompts[name]}: {error}; the judge knows no others") from None
    refuse_shared(texts["tuning"], texts["report"])


@dataclass(frozen=True)
class Subject:
    """Who is judged."""

    folder: Path  # for the files
    config: Config  # of its run
    lora: Path | None  # None: the base model

    @property
    def preference(self) -> str:
        """The preference model whose reward is measured; "" where none is."""
        return self.config.rewards.pickscore.path if "pickscore" in self.config.evaluation.metrics else ""


@dataclass(frozen=True)
class Judged:
    """One model on one prompt list at one guidance scale, by prompt."""

    kernel: torch.Tensor  # [P, P], whose mean over pairs is KID
    # [P] each: "retrieval", "diversity", "saturation", "references_saturation", "style:<name>", maybe "pickscore"
    values: Mapping[str, torch.Tensor]

    @property
    def as_point(self) -> Point:
        return Point(self.values["retrieval"], self.kernel, self.values["diversity"])


def missing(subject: Subject, judging: Judging) -> list[tuple[str, float]]:
    """(list, guidance) that are not there, or of something else."""
    stamp = _stamp(subject, judging)
    every = [(name, scale) for scale in judging.guidance_scales for name in LISTS]
    return [each for each in every if _stamp_of(_file(subject, *each)) != {**stamp, "at": list(each)}]


def read(subject: Subject, name: str, scale: float) -> Judged:
    """What `judge` has left."""
    with safe_open(_file(subject, name, scale), "pt") as file:
        values = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no mapping
    return Judged(values.pop("kernel"), values)


def judge(subject: Subject, judging: Judging, witness: TinyWitness, distributed: Distributed, display: Display) -> None:
    """Draw and look at all that is missing.

    Raises:
        UserError: no LoRA, no preference model, no references of a prompt.
    """
    left = missing(subject, judging)
    if not left:
        return
    prompts = {name: _prompts(judging.prompts[name], judging.references, witness) for name in LISTS}
    reward = _preference(subject.preference)
    evaluator = _evaluator(subject, [text for part in prompts.values() for text in part.texts], distributed, display)
    stamp = _stamp(subject, judging)
    for name, scale in left:
        images = draw(evaluator, prompts[name].texts, scale, judging.images_per_prompt, display)
        found = measure(images, prompts[name], witness, reward)
        text = {_STAMP: json.dumps({**stamp, "at": [name, scale]})}
        tensors = {"kernel": found.kernel, **found.values}
        file = _file(subject, name, scale)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, lambda path, tensors=tensors, text=text: save_file(tensors, path, text))


@cache
def _prompts(name: str, references: str, witness: TinyWitness) -> Prompts:
    """The same for every subject: the witness looks at references once."""
    return Prompts.read(name, references, witness)


@torch.no_grad()
def measure(images: torch.Tensor, prompts: Prompts, witness: TinyWitness, reward: Reward | None) -> Judged:
    """Everything about images [P, K, 3, H, W] in [0, 1]."""
    shape, texts, flat = tuple(images.shape[:2]), repeated(prompts.texts, images), images.flatten(0, 1)
    seen = witness.look(flat, texts)
    own = Point.of(seen[0].view(shape), seen[1].unflatten(0, shape), prompts.references)
    values = {
        "retrieval": own.accuracy,
        "diversity": own.diversity,
        "saturation": _saturation(images),
        "references_saturation": _saturation(prompts.images),
    }
    artists = witness.artists(seen[1], texts)
    for style, artist in STYLE_ARTISTS.items():
        hits = torch.tensor([each == artist for each in artists], dtype=torch.float64)
        values[f"style:{style}"] = hits.view(shape).mean(1)
    if reward is not None:
        values["pickscore"] = reward.score(flat, texts).double().view(shape).mean(1)
    return Judged(own.kernel, values)


def _saturation(images: torch.Tensor) -> torch.Tensor:
    """[P] of images [P, K, 3, H, W]."""
    return image_statistics(images.flatten(0, 1))["saturation"].double().view(images.shape[:2]).mean(1)


def _preference(path: str) -> Reward | None:
    if not path:
        return None
    from advgrpo.rewards.pickscore import PickScore

    return PickScore(path=path)


def _evaluator(subject: Subject, texts: list[str], distributed: Distributed, display: Display):
    from advgrpo.policy.pipelines import pipeline_folder

    config = subject.config
    options = ModelOptions(
        model=config.model.path,
        num_steps=config.evaluation.num_steps,
        resolution=config.model.resolution,
        max_sequence_length=config.model.max_sequence_length,
        batch_size=config.rollout.micro_batch,
        seed=_SEED,
        cache_dir=config.data.cache_dir,
    )
    folder = pipeline_folder(options.model, field="model.path")
    lora = str(subject.lora) if subject.lora else ""
    settings = settings_of(options, folder, lora, distributed.device)
    return load_model(options, settings, texts, distributed, display)


def _file(subject: Subject, name: str, scale: float) -> Path:
    return subject.folder / f"{name}-guidance-{scale:g}.safetensors"


def _stamp(subject: Subject, judging: Judging) -> dict:
    """What a file is made of."""
    weights = ""
    if subject.lora is not None:
        file = subject.lora / "pytorch_lora_weights.safetensors"
        if not file.is_file():
            raise UserError(f"{file} does not exist; remove {subject.lora.parent}, and the run is made again")
        weights = file_digest(file)
    return {
        "weights": weights,
        "model": base_fingerprint(subject.config),
        "steps": subject.config.evaluation.num_steps,
        "preference": subject.preference,
        "prompts": {
            name: file_digest(Path(shipped_path("held_out_prompts", file))) for name, file in judging.prompts.items()
        },
        "references": judging.references,
        "images_per_prompt": judging.images_per_prompt,
        "seed": _SEED,
    }


def _stamp_of(file: Path) -> dict | None:
    if not file.is_file():
        return None
    with safe_open(file, "pt") as content:
        return json.loads((content.metadata() or {}).get(_STAMP, "null"))

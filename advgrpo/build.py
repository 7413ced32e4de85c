"""From a checked configuration to the parts of a run: policy, adversary, rewards, metrics."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console

from .config import NEED_REFERENCES, Config
from .data.reference_features import ReferenceFeatures
from .data.sources import Sources, told
from .distributed import Distributed
from .errors import UserError
from .evaluation import PictureStatistic, check_metrics
from .fast import FastPaths
from .policy.dynamics import check_dynamics
from .policy.loading import load_policy
from .policy.pipelines import PREDICTIONS, pipeline_class
from .rewards import adversary_class, build_reward
from .rewards.base import Adversary, Reward
from .rewards.dino import DinoAdversary
from .rewards.dino_similarity import DinoSimilarity
from .rewards.pickscore import PickScoreAdversary
from .scoring import Scorer


def build_policy(config: Config, sources: Sources, distributed: Distributed, fast: FastPaths, console: Console):
    """The generator, with every prompt this process needs in the text cache."""
    cache = Path(config.data.cache_dir).expanduser()
    prediction = PREDICTIONS[pipeline_class(config.model.path)]
    check_dynamics(prediction, config.rollout.dynamics)
    if config.update.objective == "sft" and prediction != "velocity":
        raise UserError(
            "update.objective = sft fits a rectified flow's velocity, but this model predicts noise: use an SD3 model"
        )
    policy = load_policy(
        config.model,
        device=distributed.device,
        cache_dir=cache,
        seed=config.seed,
        fused=fast.fused,
        precision=config.rollout.precision,
    )
    mine = ["", *sources.prompts, *sources.held_out][distributed.rank :: distributed.world_size]
    missing = policy.text_cache.missing(mine)
    if missing:
        console.print(f"encoding {len(missing)} prompts into {cache}")
        policy.text_cache.fill(missing)
    return policy


def build_adversary(config: Config, device: torch.device) -> Adversary | None:
    """The learned reward of section `adversary`; None for kind "none" and for supervised fine-tuning."""
    section = config.adversary
    if not config.learns_adversary:
        return None
    if section.kind != "pickscore":
        return adversary_class(section.kind)(section, device=device, seed=config.seed)
    return PickScoreAdversary(
        section,
        seed=config.seed,
        path=section.backbone,
        processor=section.processor,
        trainable_layers=section.trainable_layers,
        objective=section.objective,
        learning_rate=section.learning_rate,
        betas=section.betas,
        device=device,
        dtype=getattr(torch, section.dtype),
    )


def build_rewards(config: Config, sources: Sources, device: torch.device) -> dict[str, Reward]:
    """The fixed rewards in use; none for supervised fine-tuning."""
    if config.update.objective == "sft":
        return {}
    return {name: _build_reward(name, config, sources, device) for name in config.rewards.fixed()}


def _build_reward(name: str, config: Config, sources: Sources, device: torch.device) -> Reward:
    """A reward with the options of its section, and what the prompt file adds to them."""
    options = {**config.rewards.sections()[name].options(), **told(name, sources.metadata)}
    return build_reward(name, device=device, dtype=getattr(torch, config.adversary.dtype), **options)


def build_observer(config: Config, adversary: Adversary | None, device: torch.device) -> DinoSimilarity | None:
    """DINO for independent statistics: the adversary's own backbone where that is DINO, else evaluation.backbone.

    Supervised fine-tuning has no adversary: it takes the backbone of the DINO that would be one, for evaluation only.
    """
    if isinstance(adversary, DinoAdversary):
        return DinoSimilarity(backbone=adversary.backbone)
    path, image_size = config.evaluation.backbone, config.evaluation.backbone_image_size
    if not path and config.adversary.kind == "dino":
        path, image_size = config.adversary.backbone, config.adversary.image_size
    unused = config.update.objective == "sft" and "dino_similarity" not in config.evaluation.metrics
    if not path or unused:
        return None
    dtype = getattr(torch, config.adversary.dtype)
    fields = ("evaluation.backbone", "evaluation.backbone_image_size")
    if path != config.evaluation.backbone:
        fields = ("adversary.backbone", "adversary.image_size")
    return DinoSimilarity(path=path, image_size=image_size, device=device, dtype=dtype, fields=fields)


def build_metrics(
    config: Config, sources: Sources, observer: DinoSimilarity | None, device: torch.device
) -> dict[str, Reward]:
    """What evaluation.metrics names; UserError for one this run cannot compute."""
    if not sources.held_out:
        return {}
    check_metrics(config.evaluation.metrics, config.rewards.sections())
    metrics: dict[str, Reward] = {}
    for name in config.evaluation.metrics:
        if name == "dino_similarity":
            if observer is None:
                raise UserError(
                    "evaluation.metrics: dino_similarity needs a DINO; set evaluation.backbone, since the adversary "
                    f"is {config.adversary.kind}"
                )
            metrics[name] = observer
        elif name == "rule_accuracy":
            metrics[name] = build_reward("rule", strict=True)
        elif name in PictureStatistic.NAMES:
            metrics[name] = PictureStatistic(name)
        else:
            metrics[name] = _build_reward(name, config, sources, device)
        if name in NEED_REFERENCES and sources.references is None:
            raise UserError(f"evaluation.metrics: {name} compares with references; set data.references")
    return metrics


def build_scorer(
    config: Config,
    sources: Sources,
    adversary: Adversary | None,
    observer: DinoSimilarity | None,
    distributed: Distributed,
) -> Scorer:
    """Rewards, references and their cached features in one place."""
    cache = Path(config.data.cache_dir).expanduser()
    features = None if adversary is None else ReferenceFeatures(sources.references, adversary, cache)
    rewards = build_rewards(config, sources, distributed.device)
    own = None if isinstance(adversary, DinoAdversary) else observer
    return Scorer(config, adversary, features, rewards, sources.references, own, distributed)

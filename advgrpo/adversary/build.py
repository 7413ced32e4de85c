"""Adversaries by kind. One that is a head on frozen features is its backbone and the head; nothing else differs."""

from __future__ import annotations

import torch

from advgrpo.adversary.base import Adversary
from advgrpo.adversary.feature_head import FeatureHeadAdversary, FrozenBackbone
from advgrpo.config import AdversarySection


def build_adversary(section: AdversarySection, *, device: torch.device, seed: int) -> Adversary:
    """The learned reward that section `adversary` describes.

    Args:
        section: its `kind` is not "none".
        seed: of the run.

    Raises:
        UserError: the model cannot be loaded, or a setting does not fit it.
    """
    if section.kind != "pickscore":
        return FeatureHeadAdversary(section, _backbone(section, device), seed=seed)
    from advgrpo.adversary.pickscore import PickScoreAdversary

    return PickScoreAdversary(
        section,
        seed=seed,
        path=section.backbone,
        processor=section.processor,
        trainable_layers=section.trainable_layers,
        objective=section.objective,
        learning_rate=section.learning_rate,
        betas=section.betas,
        device=device,
        dtype=getattr(torch, section.dtype),
    )


def _backbone(section: AdversarySection, device: torch.device) -> FrozenBackbone:
    """The frozen network of a kind; only its own libraries are imported."""
    settings = {"image_size": section.image_size, "dtype": section.dtype, "device": device}
    if section.kind == "dino":
        from advgrpo.vision.dino import DinoBackbone

        return DinoBackbone(section.backbone, layers=section.feature_layers, **settings)
    if section.kind == "siglip":
        from advgrpo.vision.siglip import SiglipBackbone

        return SiglipBackbone(section.backbone, **settings)
    raise ValueError(f"adversary.kind = {section.kind!r} has no backbone")

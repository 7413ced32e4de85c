"""SD3-family policy: SD3-medium, SD3.5-medium, SD3.5-large, and the shipped tiny pipeline.

Shapes: R rows, latents [R, C, H, W] float32, text [R, L, D], pooled [R, E].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

from advgrpo.config import ModelSection
from advgrpo.errors import UserError
from advgrpo.policy.diffusers_policy import TransformerPolicy
from advgrpo.policy.networks import StockNetwork
from advgrpo.types import Conditioning


class SD3Policy(TransformerPolicy):
    """`Policy`, `SupervisedTarget` and `Capturable` (base.py) for the SD3 family."""

    network_class = SD3Transformer2DModel
    text_parts = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")

    def _stock_network(self, seed: int) -> StockNetwork:
        return StockNetwork(self.transformer, self.model, seed, lambda pooled: {"pooled_projections": pooled})

    @classmethod
    def check_resolution(cls, resolution: int, network: Any, vae: Any, field: str = "model.resolution") -> None:
        unit = cls.pixels_of_latent(vae) * network.patch_size
        largest = network.pos_embed_max_size * unit
        if resolution % unit or resolution > largest:
            near = min(max(unit, round(resolution / unit) * unit), largest)
            raise UserError(
                f"{field} = {resolution}: this model wants a multiple of {unit}, at most {largest}, such as {near}"
            )

    @classmethod
    def check_parts(
        cls, model: ModelSection, index: Mapping[str, Any], network: Any, vae: Any, scheduler: Mapping[str, Any]
    ) -> None:
        cls.check_resolution(model.resolution, network, vae)
        if scheduler.get("use_dynamic_shifting"):
            raise UserError(
                f"model.path = {model.path!r}: its scheduler uses use_dynamic_shifting; SD3's shift is fixed"
            )

    def schedule(self, num_steps: int) -> tuple[torch.Tensor, torch.Tensor]:
        self._scheduler.set_timesteps(num_steps)
        return self._scheduler.sigmas.double(), self._scheduler.timesteps.float()

    def training_sigmas(self, quantiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """σ = s q / (1 + (s - 1) q) with the scheduler's shift s (arXiv 2403.03206, section 5.3.2)."""
        config = self._scheduler.config
        sigmas = config.shift * quantiles / (1 + (config.shift - 1) * quantiles)
        return sigmas.float(), (sigmas * config.num_train_timesteps).float()

    def _encode_batch(self, pipe: StableDiffusion3Pipeline, prompts: list[str]) -> Conditioning:
        text, _, pooled, _ = pipe.encode_prompt(
            prompts,
            None,
            None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.model.max_sequence_length,
        )
        return Conditioning(text, pooled)

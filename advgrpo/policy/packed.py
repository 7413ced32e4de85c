"""What FLUX.1 and Qwen-Image share: packed latents (packing.py), and a schedule that moves with the number of tokens.

Positions are rotary, from the patch's row and column, so no table limits the side.

Shapes: R rows, latents [R, C, H, W] float32 and packed [R, T, 4·C] with T = H/2 · W/2.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from advgrpo.errors import UserError
from advgrpo.policy.diffusers_policy import TransformerPolicy
from advgrpo.policy.packing import PATCH


class PackedPolicy(TransformerPolicy):
    """`TransformerPolicy` of a transformer over packed latents; UserError for a side that packing does not divide."""

    @classmethod
    def check_resolution(cls, resolution: int, network: Any, vae: Any, field: str = "model.resolution") -> None:
        unit = cls.pixels_of_latent(vae) * PATCH
        if resolution % unit:
            near = max(1, round(resolution / unit)) * unit
            raise UserError(f"{field} = {resolution}: this model wants a multiple of {unit}, such as {near}")

    @staticmethod
    def check_channels(field: str, read: int, made: int, latent_channels: int, other_tasks: str) -> None:
        """UserError where a transformer that maps `read` to `made` channels is not one from packed latents to such."""
        wanted = latent_channels * PATCH**2
        if not read == made == wanted:
            raise UserError(
                f"{field}: its transformer maps {read} to {made} channels, packed latents have {wanted}; want a "
                f"text-to-image model, not one for {other_tasks}"
            )

    @property
    def image_tokens(self) -> int:
        return (self.model.resolution // self.vae_scale // PATCH) ** 2

    def schedule(self, num_steps: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Evenly spaced σ from 1 to 1/T, shifted by `shift` and, where the scheduler has a shift_terminal, stretched so
        that the last of them is that; 0 at the image."""
        evenly = torch.linspace(1.0, 1.0 / num_steps, num_steps, dtype=torch.float64).tolist()
        self._scheduler.set_timesteps(sigmas=evenly, mu=self._mu(num_steps))
        return self._scheduler.sigmas.double(), self._scheduler.timesteps.float()

    def _mu(self, num_steps: int = 0) -> float:
        """Linear in the number of image tokens, through the scheduler's two points of it; a family's may depend on the
        number of steps as well, 0 for that of the training levels."""
        config = self._scheduler.config
        slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
        return config.base_shift + slope * (self.image_tokens - config.base_image_seq_len)

    @property
    def shift(self) -> float:
        """s of σ' = s σ / (1 + (s - 1) σ) at this resolution."""
        config = self._scheduler.config
        if not config.use_dynamic_shifting:
            return config.shift
        return math.exp(self._mu()) if config.time_shift_type == "exponential" else self._mu()

    def training_sigmas(self, quantiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Quantiles, shifted as the schedule is, and not stretched, which depends on the number of steps."""
        sigmas = self.shift * quantiles / (1 + (self.shift - 1) * quantiles)
        return sigmas.float(), (sigmas * self._scheduler.config.num_train_timesteps).float()

"""FLUX.1 policy: FLUX.1-dev, whose guidance is an input of the network, and FLUX.1-schnell, which has none.

A latent image is packed: every 2 x 2 patch of it is one token of 4·C numbers. Positions are rotary, from the patch's
row and column, so no table limits the side; text tokens all stand at position 0. The schedule's shift grows with the
number of image tokens. T5 gives the text, CLIP a pooled vector alone. Where the network has no guidance embedding the
policy's guidance is classifier-free, what diffusers calls true_cfg_scale with an empty negative prompt.

Shapes: R rows, latents [R, C, H, W] float32 and packed [R, T, 4·C] with T = H/2 · W/2, text [R, L, D], pooled [R, E].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel

from advgrpo.config import ModelSection
from advgrpo.errors import UserError
from advgrpo.policy.diffusers_policy import TransformerPolicy
from advgrpo.policy.guidance import Guided
from advgrpo.policy.networks import StockNetwork, StockPrepared
from advgrpo.types import Conditioning

PATCH = 2  # latents of a token's side; the configuration's own patch_size is that of packed latents, 1


def pack(latents: torch.Tensor) -> torch.Tensor:
    """[R, T, 4·C] of latents [R, C, H, W]: rows of patches, and of each patch channel, row, column."""
    rows, channels, height, width = latents.shape
    patches = latents.reshape(rows, channels, height // PATCH, PATCH, width // PATCH, PATCH).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(rows, -1, channels * PATCH**2)


def unpack(tokens: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Latents [R, C, H, W] of `pack`'s tokens [R, T, 4·C], of `size` (H, W)."""
    height, width = size
    patches = tokens.view(len(tokens), height // PATCH, width // PATCH, -1, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(len(tokens), -1, height, width)


def image_ids(size: tuple[int, int], device: torch.device) -> torch.Tensor:
    """Positions [T, 3] float32 of the tokens of latents of `size` (H, W): 0, row and column of the patch."""
    height, width = size[0] // PATCH, size[1] // PATCH
    row = torch.arange(height, device=device, dtype=torch.float32).repeat_interleave(width)
    column = torch.arange(width, device=device, dtype=torch.float32).repeat(height)
    return torch.stack([torch.zeros_like(row), row, column], dim=1)


class PackedNetwork(StockNetwork):
    """diffusers' FLUX transformer on latents that are packed for it and unpacked after it."""

    def run(self, latents: torch.Tensor, timesteps: torch.Tensor, prepared: StockPrepared) -> torch.Tensor:
        size, guidance = (latents.shape[-2], latents.shape[-1]), prepared.guidance
        packed = self.network(
            pack(latents),
            encoder_hidden_states=prepared.text,
            pooled_projections=prepared.pooled,
            timestep=timesteps / 1000,  # which the network takes times 1000 again
            img_ids=image_ids(size, latents.device),
            txt_ids=torch.zeros(prepared.text.shape[1], 3, device=latents.device),
            guidance=None if guidance is None else guidance.expand(len(latents)),
            return_dict=False,
        )[0]
        return unpack(packed, size)


class FluxPolicy(TransformerPolicy):
    """`Policy`, `SupervisedTarget` and `Capturable` (base.py) for FLUX.1.

    Raises:
        UserError: a transformer of another task (Fill, Canny, Depth), a side that packing does not divide, or a
            schedule with stretched ends.
    """

    network_class = FluxTransformer2DModel
    text_parts = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")

    def _stock_network(self, seed: int) -> StockNetwork:
        return PackedNetwork(self.transformer, self.model, seed)

    @classmethod
    def check_resolution(cls, resolution: int, network: Any, vae: Any, field: str = "model.resolution") -> None:
        unit = 2 ** (len(vae.block_out_channels) - 1) * PATCH
        if resolution % unit:
            near = max(1, round(resolution / unit)) * unit
            raise UserError(f"{field} = {resolution}: this model wants a multiple of {unit}, such as {near}")

    @classmethod
    def check_parts(
        cls, model: ModelSection, index: Mapping[str, Any], network: Any, vae: Any, scheduler: Mapping[str, Any]
    ) -> None:
        field = f"model.path = {model.path!r}"
        made, wanted = network.out_channels or network.in_channels, vae.latent_channels * PATCH**2
        if not network.in_channels == made == wanted:
            raise UserError(
                f"{field}: its transformer maps {network.in_channels} to {made} channels, packed latents have "
                f"{wanted}; want a text-to-image model, not one for filling, editing or control"
            )
        if scheduler.get("shift_terminal"):
            raise UserError(f"{field}: its scheduler has shift_terminal, which FLUX.1's schedule does not have")
        cls.check_resolution(model.resolution, network, vae)

    @property
    def embeds_guidance(self) -> bool:
        """Whether the scale is an input of the network, whose one prediction is guided."""
        return bool(self.transformer.config.guidance_embeds)

    @property
    def image_tokens(self) -> int:
        return (self.model.resolution // self.vae_scale // PATCH) ** 2

    def schedule(self, num_steps: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Evenly spaced σ from 1 to 1/T, shifted by `shift`; 0 at the image."""
        evenly = torch.linspace(1.0, 1.0 / num_steps, num_steps, dtype=torch.float64).tolist()
        self._scheduler.set_timesteps(sigmas=evenly, mu=self._mu())
        return self._scheduler.sigmas.double(), self._scheduler.timesteps.float()

    def _mu(self) -> float:
        """Linear in the number of image tokens, through the scheduler's two points of it."""
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
        """Quantiles, shifted as the schedule is."""
        sigmas = self.shift * quantiles / (1 + (self.shift - 1) * quantiles)
        return sigmas.float(), (sigmas * self._scheduler.config.num_train_timesteps).float()

    def prepare(self, conditioning: Conditioning, timesteps: torch.Tensor, *, guidance: float) -> Guided:
        """Where the network embeds it, guidance takes no second row; 1 is a scale like others."""
        if not self.embeds_guidance:
            return super().prepare(conditioning, timesteps, guidance=guidance)
        prompts = self.network.prepare(conditioning.text, conditioning.pooled, timesteps, guidance)
        return Guided(prompts, len(conditioning.text), guided=False)

    def _encode_batch(self, pipe: FluxPipeline, prompts: list[str]) -> Conditioning:
        text, pooled, _ = pipe.encode_prompt(
            prompts, device=self.device, max_sequence_length=self.model.max_sequence_length
        )
        return Conditioning(text, pooled)

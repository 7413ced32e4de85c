"""FLUX.1 policy: FLUX.1-dev, whose guidance is an input of the network, and FLUX.1-schnell, which has none.

Packing, positions and schedule are those of packed.py; text tokens all stand at position 0. T5 gives the text, CLIP a
pooled vector alone. Where the network has no guidance embedding the policy's guidance is classifier-free, what
diffusers calls true_cfg_scale with an empty negative prompt.

Shapes: R rows, latents [R, C, H, W] float32 and packed [R, T, 4·C] with T = H/2 · W/2, text [R, L, D], pooled [R, E].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel

from advgrpo.config import ModelSection
from advgrpo.errors import UserError
from advgrpo.policy.guidance import CLASSIFIER_FREE, EMBEDDED, GuidanceMethod
from advgrpo.policy.networks import StockNetwork, StockPrepared
from advgrpo.policy.packed import PackedPolicy
from advgrpo.policy.packing import PATCH, pack, unpack
from advgrpo.types import Conditioning


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


class FluxPolicy(PackedPolicy):
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
    def check_parts(
        cls, model: ModelSection, index: Mapping[str, Any], network: Any, vae: Any, scheduler: Mapping[str, Any]
    ) -> None:
        field = f"model.path = {model.path!r}"
        made = network.out_channels or network.in_channels
        cls.check_channels(field, network.in_channels, made, vae.latent_channels, "filling, editing or control")
        if scheduler.get("shift_terminal"):
            raise UserError(f"{field}: its scheduler has shift_terminal, which FLUX.1's schedule does not have")
        cls.check_resolution(model.resolution, network, vae)

    @property
    def guidance_method(self) -> GuidanceMethod:
        """Where the network embeds the scale, guidance takes no second row, and 1 is a scale like others."""
        return EMBEDDED if self.transformer.config.guidance_embeds else CLASSIFIER_FREE

    def _encode_batch(self, pipe: FluxPipeline, prompts: list[str]) -> Conditioning:
        text, pooled, _ = pipe.encode_prompt(
            prompts, device=self.device, max_sequence_length=self.model.max_sequence_length
        )
        return Conditioning(text, pooled)

"""FLUX.2 klein policy: an MMDiT over packed latents, Qwen3's text, classifier-free guidance by two rows.

Packing is that of packed.py. Positions have four axes, of which the second and third are a patch's row and column and
the fourth a text token's place. Text is three hidden states of a Qwen3 side by side, of the prompt in the model's chat
template, padded to `model.max_sequence_length`; padding is attended to, as in diffusers. There is no pooled vector.

The VAE's latents are normalised after they are packed, each of a patch's 4·C numbers by the mean and variance of the
VAE's own batch norm. Ours are the normalised ones, unpacked. The schedule's shift moves with the number of image tokens
and of steps, by a line through points that Black Forest Labs measured (diffusers' `compute_empirical_mu`).

diffusers' forward alone: SwiGLU (the kernels' `swiglu`), and modulation that blocks share, are not in ours
(fused/transformer.py).

Shapes: R rows, latents [R, C, H, W] float32, text [R, L, 3·D], no pooled vector: [R, 0].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

from advgrpo.config import ModelSection
from advgrpo.errors import UserError
from advgrpo.policy.flux import image_ids
from advgrpo.policy.networks import StockNetwork, StockPrepared
from advgrpo.policy.packed import PackedPolicy
from advgrpo.policy.packing import pack, unpack
from advgrpo.types import Conditioning

_TRAINING_STEPS = 50  # the pipeline's default, whose shift the levels of supervised fine-tuning have
_PLACES = 4  # axes of a position


class Flux2Network(StockNetwork):
    """diffusers' FLUX.2 transformer on latents that are packed for it and unpacked after it."""

    def run(self, latents: torch.Tensor, timesteps: torch.Tensor, prepared: StockPrepared) -> torch.Tensor:
        size, device = (latents.shape[-2], latents.shape[-1]), latents.device
        tokens = image_ids(size, device)
        text = torch.zeros(prepared.text.shape[1], _PLACES, device=device)
        text[:, -1] = torch.arange(len(text), device=device)
        packed = self.network(
            pack(latents),
            encoder_hidden_states=prepared.text,
            timestep=timesteps / 1000,  # which the network takes times 1000 again
            img_ids=torch.cat([tokens, tokens.new_zeros(len(tokens), 1)], dim=1),
            txt_ids=text,
            guidance=None,
            return_dict=False,
        )[0]
        return unpack(packed, size)


class Flux2Policy(PackedPolicy):
    """`Policy`, `SupervisedTarget` and `Capturable` (base.py) for FLUX.2 klein.

    Raises:
        UserError: FLUX.2-dev, a side that packing does not divide, a schedule with stretched ends, or a setting that
            another family serves (a decoder in bfloat16, kohya's names).
    """

    network_class = Flux2Transformer2DModel
    vae_class = AutoencoderKLFlux2
    text_parts = ("text_encoder", "tokenizer")

    def _stock_network(self, seed: int) -> StockNetwork:
        return Flux2Network(self.transformer, self.model, seed)

    @classmethod
    def check_parts(
        cls, model: ModelSection, index: Mapping[str, Any], network: Any, vae: Any, scheduler: Mapping[str, Any]
    ) -> None:
        field = f"model.path = {model.path!r}"
        if network.guidance_embeds:
            raise UserError(f"{field}: its transformer embeds the guidance, as FLUX.2-dev's; want a FLUX.2 klein")
        made = network.out_channels or network.in_channels
        cls.check_channels(field, network.in_channels, made, vae.latent_channels, "editing or control")
        if scheduler.get("shift_terminal"):
            raise UserError(f"{field}: its scheduler has shift_terminal, which FLUX.2's schedule does not have")
        if model.shard_base != "none":
            raise UserError(f"model.shard_base = {model.shard_base!r} has not been tried with FLUX.2; use none")
        if model.decoder_dtype == "bfloat16":
            raise UserError("model.decoder_dtype = 'bfloat16': FLUX.2's VAE decodes in float32; use auto")
        if model.lora.export_format == "kohya":
            raise UserError("model.lora.export_format = 'kohya' has no names for FLUX.2; use diffusers")
        cls.check_resolution(model.resolution, network, vae)

    def _encode_batch(self, pipe: Flux2KleinPipeline, prompts: list[str]) -> Conditioning:
        text, _ = pipe.encode_prompt(prompts, self.device, max_sequence_length=self.model.max_sequence_length)
        return Conditioning(text, text.new_zeros(len(prompts), 0))

    # The schedule.

    def _mu(self, num_steps: int = 0) -> float:
        return compute_empirical_mu(self.image_tokens, num_steps or _TRAINING_STEPS)

    # The VAE.

    def _normalisation(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of a patch's numbers, [4·C] float32."""
        norm = self.vae.bn
        return norm.running_mean, torch.sqrt(norm.running_var + self.vae.config.batch_norm_eps)

    def _decode_stock(self, latents: torch.Tensor) -> torch.Tensor:
        """Images [R, 3, H, W] float32 in [0, 1], by the stock VAE in float32."""
        mean, std = self._normalisation()
        size = latents.shape[-2], latents.shape[-1]
        images = self.vae.decode(unpack(pack(latents) * std + mean, size), return_dict=False)[0]
        return (images.float() / 2 + 0.5).clamp(0, 1)

    def _encode_stock(self, images: torch.Tensor) -> torch.Tensor:
        """[R, C, H, W] float32, the mean of the stock VAE's posterior, normalised."""
        mean, std = self._normalisation()
        posterior = self.vae.encode(images.to(self.device, torch.float32) * 2 - 1).latent_dist.mode()
        return unpack((pack(posterior) - mean) / std, (posterior.shape[-2], posterior.shape[-1]))

"""Qwen-Image policy: an MMDiT over packed latents, Qwen2.5-VL's text with a mask, guidance that keeps tokens' lengths.

Packing and schedule are those of packed.py. Text is the last hidden state of a prompt inside the pipeline's chat
template, without the template's first tokens, so that prompts have different lengths: they are padded to
`model.max_sequence_length` and the padding is not attended to. Each prompt is encoded alone, so its embedding does not
depend on which others it comes with. Guidance is what the pipeline calls true_cfg_scale, away from a prompt of one
space, as on the model's card (`guidance.rescaled_guidance`).

The VAE is one of videos, of which an image is one frame; latents are normalised channel by channel. Ours are without
the frame, [R, C, H, W].

Shapes: R rows, latents [R, C, H, W] float32, text [R, L, D] with mask [R, L], no pooled vector: [R, 0].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel

from advgrpo.config import ModelSection
from advgrpo.errors import UserError
from advgrpo.policy.guidance import GuidanceMethod
from advgrpo.policy.networks import StockNetwork, StockPrepared
from advgrpo.policy.packed import PackedPolicy
from advgrpo.policy.packing import PATCH, pack, unpack
from advgrpo.policy.pipelines import QWEN_NEGATIVE_PROMPT
from advgrpo.types import Conditioning

_RESCALED = GuidanceMethod(rescaled_patch=PATCH)
# Of the transformer's configuration: what Qwen-Image-Edit, Qwen-Image-Layered and distilled models have.
_OTHER_TASKS = ("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope")


class QwenNetwork(StockNetwork):
    """diffusers' Qwen-Image transformer on latents that are packed for it and unpacked after it."""

    def run(self, latents: torch.Tensor, timesteps: torch.Tensor, prepared: StockPrepared) -> torch.Tensor:
        height, width = latents.shape[-2:]
        packed = self.network(
            pack(latents),
            encoder_hidden_states=prepared.text,
            encoder_hidden_states_mask=prepared.mask,
            timestep=timesteps / 1000,  # which the network takes times 1000 again
            img_shapes=[[(1, height // PATCH, width // PATCH)]] * len(latents),
            return_dict=False,
        )[0]
        return unpack(packed, (height, width))


class QwenPolicy(PackedPolicy):
    """`Policy`, `SupervisedTarget` and `Capturable` (base.py) for Qwen-Image.

    Raises:
        UserError: a transformer of another task (Edit, Layered), a side that packing does not divide, or a decoder in
            bfloat16, which is ours for another VAE.
    """

    network_class = QwenImageTransformer2DModel
    vae_class = AutoencoderKLQwenImage
    text_parts = ("text_encoder", "tokenizer")
    negative_prompt = QWEN_NEGATIVE_PROMPT

    def _stock_network(self, seed: int) -> StockNetwork:
        return QwenNetwork(self.transformer, self.model, seed)

    @classmethod
    def check_parts(
        cls, model: ModelSection, index: Mapping[str, Any], network: Any, vae: Any, scheduler: Mapping[str, Any]
    ) -> None:
        field = f"model.path = {model.path!r}"
        other = [name for name in _OTHER_TASKS if getattr(network, name, False)]
        if other:
            raise UserError(f"{field}: its transformer has {other[0]}; want a text-to-image model, not one for editing")
        made = (network.out_channels or 0) * PATCH**2
        cls.check_channels(field, network.in_channels, made, vae.z_dim, "editing or control")
        if model.decoder_dtype == "bfloat16":
            raise UserError("model.decoder_dtype = 'bfloat16': Qwen-Image's VAE decodes in float32; use auto")
        cls.check_resolution(model.resolution, network, vae)

    @property
    def guidance_method(self) -> GuidanceMethod:
        return _RESCALED

    def _encode_batch(self, pipe: QwenImagePipeline, prompts: list[str]) -> Conditioning:
        """One prompt after the other, each padded to `model.max_sequence_length`."""
        most = self.model.max_sequence_length
        texts = [pipe.encode_prompt([prompt], self.device, max_sequence_length=most)[0][0] for prompt in prompts]
        lengths = torch.tensor([len(text) for text in texts], device=self.device)
        text = torch.stack([F.pad(text, (0, 0, 0, most - len(text))) for text in texts])
        mask = torch.arange(most, device=self.device) < lengths[:, None]
        return Conditioning(text, text.new_zeros(len(prompts), 0), mask)

    # The VAE.

    @staticmethod
    def pixels_of_latent(vae: Any) -> int:
        return 2 ** len(vae.temperal_downsample)

    @property
    def latent_channels(self) -> int:
        return self.vae.config.z_dim

    def _normalisation(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of the latents by channel, [C, 1, 1] float32."""
        config = self.vae.config
        values = torch.tensor([config.latents_mean, config.latents_std], device=self.device)
        return values[0, :, None, None], values[1, :, None, None]

    def _decode_stock(self, latents: torch.Tensor) -> torch.Tensor:
        """Images [R, 3, H, W] float32 in [0, 1], by the stock VAE in float32, one after the other."""
        mean, std = self._normalisation()
        frames = (latents * std + mean).unsqueeze(2).split(1)
        images = torch.cat([self.vae.decode(frame, return_dict=False)[0][:, :, 0] for frame in frames])
        return (images.float() / 2 + 0.5).clamp(0, 1)

    def _encode_stock(self, images: torch.Tensor) -> torch.Tensor:
        """[R, C, H, W] float32, the mean of the stock VAE's posterior, normalised."""
        mean, std = self._normalisation()
        frames = (images.to(self.device, torch.float32) * 2 - 1).unsqueeze(2)
        return (self.vae.encode(frames).latent_dist.mode()[:, :, 0] - mean) / std

    def _use_fast_decoder(self) -> None:
        """Ours is of AutoencoderKL."""

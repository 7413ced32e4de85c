"""SD1.5- and SDXL-class policy: a UNet that predicts the noise ε of a diffusion, sampled by DDIM (arXiv 2010.02502).

Loads folders of StableDiffusionPipeline (one CLIP) and StableDiffusionXLPipeline (two CLIPs, pooled text and image
size). Whatever scheduler the folder names (PNDM for SD1.5, Euler for SDXL), DDIM steps over its noise schedule with its
timestep spacing, as `DDIMScheduler.from_config(pipe.scheduler.config)` does; η = 0 away from the window.

Shapes: R rows, latents [R, C, H, W] float32, text [R, L, D], pooled [R, E], where E = 0 without a second CLIP.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, UNet2DConditionModel

from advgrpo.config import ModelSection
from advgrpo.errors import UserError
from advgrpo.policy.diffusers_policy import DiffusersPolicy
from advgrpo.policy.model_files import read_json
from advgrpo.policy.networks import StockNetwork
from advgrpo.types import Conditioning


class UNetPolicy(DiffusersPolicy):
    """`Policy` and `Capturable` (base.py) for SD1.5 and SDXL; what it predicts is the noise ε, levels are ᾱ.

    Raises:
        UserError: a model that does not predict ε, a scheduler whose step is not affine, a UNet of another task, or a
            setting that only the fused transformer has.
    """

    component = "unet"
    network_class = UNet2DConditionModel
    text_parts = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")

    def __init__(self, model: ModelSection, *, device: torch.device, cache_dir: Path, seed: int):
        super().__init__(model, device=device, cache_dir=cache_dir)
        self.is_xl = self.index["_class_name"] == "StableDiffusionXLPipeline"
        self._scheduler = ddim_scheduler(self.folder / "scheduler" / "scheduler_config.json", model.path)
        self.unet = self._load(UNet2DConditionModel, "unet", self.dtype)
        self.check_parts(model, self.index, self.unet.config, self.vae.config, self._scheduler.config)
        # Height and width before cropping, the crop's corner, and the size asked for: an uncropped square.
        side = model.resolution
        self._time_ids = torch.tensor([[side, side, 0, 0, side, side]], dtype=self.dtype, device=device)
        self._train(StockNetwork(self.unet, model, seed, self._pooled_arguments))

    @classmethod
    def check_resolution(cls, resolution: int, network: Any, vae: Any, field: str = "model.resolution") -> None:
        unit = cls.pixels_of_latent(vae)
        if resolution % unit:
            raise UserError(f"{field} = {resolution}: this model wants a multiple of {unit}")

    @classmethod
    def check_parts(
        cls, model: ModelSection, index: Mapping[str, Any], network: Any, vae: Any, scheduler: Mapping[str, Any]
    ) -> None:
        check_unet(model, index, network, vae)

    def _pooled_arguments(self, pooled: torch.Tensor) -> dict[str, Any]:
        if not self.is_xl:
            return {}
        time_ids = self._time_ids.expand(len(pooled), -1)
        return {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": time_ids}}

    def schedule(self, num_steps: int) -> tuple[torch.Tensor, torch.Tensor]:
        """ᾱ at the timesteps and at the image (the scheduler's final ᾱ), and the timesteps.

        A step goes to the timestep that the network is given next. diffusers' DDIMScheduler goes back by
        floor(train timesteps / num_steps) instead, which is the same for "leading" spacing, and for "trailing" where
        num_steps divides the train timesteps.
        """
        trained = self._scheduler.config.num_train_timesteps
        if num_steps >= trained:
            raise UserError(f"num_steps = {num_steps}: this model was trained on {trained} timesteps; want fewer steps")
        self._scheduler.set_timesteps(num_steps)
        timesteps, final = self._scheduler.timesteps, self._scheduler.final_alpha_cumprod
        levels = torch.cat([self._scheduler.alphas_cumprod[timesteps], final.view(1)])
        return levels.double(), timesteps.float()

    def _encode_batch(self, pipe: DiffusionPipeline, prompts: list[str]) -> Conditioning:
        options = {"device": self.device, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        if self.is_xl:
            text, _, pooled, _ = pipe.encode_prompt(prompts, **options)
            return Conditioning(text, pooled)
        text, _ = pipe.encode_prompt(prompts, **options)
        return Conditioning(text, text.new_zeros(len(prompts), 0))

    def unconditional(self) -> Conditioning:
        """The empty prompt's embeddings, or for SDXL zeros where its pipeline says so."""
        empty = super().unconditional()
        if not (self.is_xl and self.index.get("force_zeros_for_empty_prompt", True)):
            return empty
        return Conditioning(torch.zeros_like(empty.text), torch.zeros_like(empty.pooled))


def check_unet(model: ModelSection, index: Mapping[str, Any], unet: Any, vae: Any) -> None:
    """UserError for a UNet or VAE configuration of another task, or settings that a UNet does not have."""
    field, kind = f"model.path = {model.path!r}", index["_class_name"]
    is_xl = kind == "StableDiffusionXLPipeline"
    if not unet.in_channels == unet.out_channels == vae.latent_channels:
        raise UserError(
            f"{field}: its UNet maps {unet.in_channels} to {unet.out_channels} channels, latents have "
            f"{vae.latent_channels}; want a text-to-image model, not one for inpainting or editing"
        )
    if (unet.addition_embed_type == "text_time") != is_xl or unet.time_cond_proj_dim is not None:
        raise UserError(
            f"{field}: its UNet wants other conditions than a {kind} has (addition_embed_type "
            f"{unet.addition_embed_type!r}, time_cond_proj_dim {unet.time_cond_proj_dim}); distilled models and "
            "refiners are not supported"
        )
    if vae.get("latents_mean") is not None:
        raise UserError(f"{field}: its VAE has latents_mean; only latents scaled by scaling_factor are supported")
    for name, plain in (("attention", "auto"), ("base_precision", "model")):
        if getattr(model, name) != plain:
            raise UserError(f"model.{name} = {getattr(model, name)!r} is the fused transformer's; a UNet wants {plain}")
    if model.decoder_dtype == "bfloat16":
        raise UserError("model.decoder_dtype = 'bfloat16': a UNet model decodes in float32; use auto")
    UNetPolicy.check_resolution(model.resolution, unet, vae)


def ddim_scheduler(file: Path, path: str) -> DDIMScheduler:
    """DDIM over the noise schedule of a scheduler_config.json.

    Raises:
        UserError: naming model.path = `path`: no such file, a prediction other than ε, no diffusion's noise schedule,
            or clipping, which the closed-form step x' = a x + b ε + s z cannot express.
    """
    field = f"model.path = {path!r}"
    settings = read_json(file, field)
    prediction = settings.get("prediction_type", "epsilon")  # SD1.5's file is older than the setting
    if prediction != "epsilon":
        raise UserError(f"{field}: its scheduler has prediction_type = {prediction!r}; only 'epsilon' is supported")
    if "beta_schedule" not in settings:
        raise UserError(
            f"{field}: its {settings.get('_class_name')} has no beta_schedule; want the noise schedule of a diffusion"
        )
    for name in ("clip_sample", "thresholding", "rescale_betas_zero_snr"):
        if settings.get(name):
            raise UserError(f"{field}: its scheduler has {name} = true, which ddim with likelihoods does not support")
    return DDIMScheduler.from_config(settings, clip_sample=False)

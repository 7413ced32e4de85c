"""SD3-family policy: SD3-medium, SD3.5-medium, SD3.5-large, and the shipped tiny pipeline.

Loads a stock diffusers pipeline by folder or hub id. Text encoders are loaded only when a prompt is not in the cache
yet and dropped afterwards.

Shapes: R rows, latents [R, C, H, W] float32, text [R, L, D], pooled [R, E].
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)

from ..config import ModelSection
from ..errors import UserError
from ..types import Conditioning
from .adapters import FullWeights, LoraAdapters
from .text_cache import TextCache, folder_fingerprint

_TEXT_PARTS = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
_TEXT_BATCH = 32


def pipeline_folder(path: str, field: str = "model.path") -> Path:
    """The local folder of a pipeline given as "tiny", a folder, or a hub id; UserError naming `field` otherwise."""
    if path == "tiny":
        from ..tiny import pipeline_dir

        folder = Path(pipeline_dir())
    elif Path(path).expanduser().is_dir():
        folder = Path(path).expanduser()
    else:
        try:
            folder = Path(DiffusionPipeline.download(path))
        except Exception as error:
            raise UserError(
                f"{field} = {path!r} is neither a folder nor a hub model that can be downloaded ({error})"
            ) from error
    index = folder / "model_index.json"
    if not index.is_file():
        raise UserError(f"{field} = {path!r}: {index} is missing; want a diffusers pipeline folder")
    class_name = json.loads(index.read_text()).get("_class_name")
    if class_name != "StableDiffusion3Pipeline":
        raise UserError(f"{field} = {path!r} holds a {class_name}; want a StableDiffusion3Pipeline")
    return folder


class SD3Policy:
    """The `Policy` protocol over diffusers' SD3Transformer2DModel."""

    def __init__(self, model: ModelSection, *, device: torch.device, cache_dir: Path, seed: int, merged: bool):
        self.model, self.device = model, device
        self.folder = pipeline_folder(model.path)
        self.dtype = getattr(torch, model.dtype)
        try:
            transformer = self._part(SD3Transformer2DModel, "transformer", self.dtype)
            # The decoder stays in float32: bfloat16 costs picture quality that the reward would see.
            self.vae = self._part(AutoencoderKL, "vae", torch.float32).to(device).requires_grad_(False).eval()
            self._scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(self.folder, subfolder="scheduler")
        except OSError as error:
            raise UserError(f"model.path = {model.path!r}: {error}") from error
        transformer = transformer.to(device).requires_grad_(False).eval()
        self._check_resolution(transformer)
        if model.train == "lora":
            self.adapters = LoraAdapters(transformer, model.lora, seed)
        else:
            self.adapters = FullWeights(transformer)
        if model.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
            transformer.train()  # diffusers checkpoints in train mode only; SD3 has no dropout, so nothing else changes
        self.transformer = transformer
        self.merged = merged
        fingerprint = f"{folder_fingerprint(self.folder, _TEXT_PARTS)}:{model.max_sequence_length}:{model.dtype}"
        self._unconditional: Conditioning | None = None
        self.text_cache = TextCache(cache_dir / "text", fingerprint, self._encode_text)

    def _part(self, kind: type, name: str, dtype: torch.dtype):
        return kind.from_pretrained(self.folder, subfolder=name, dtype=dtype)

    def _check_resolution(self, transformer: SD3Transformer2DModel) -> None:
        unit = self.vae_scale * transformer.config.patch_size
        largest = transformer.config.pos_embed_max_size * unit
        if self.model.resolution % unit or self.model.resolution > largest:
            raise UserError(
                f"model.resolution = {self.model.resolution}: this model wants a multiple of {unit}, at most {largest}"
            )

    @property
    def vae_scale(self) -> int:
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def latent_shape(self) -> tuple[int, int, int]:
        side = self.model.resolution // self.vae_scale
        return self.transformer.config.in_channels, side, side

    def schedule(self, num_steps: int) -> tuple[torch.Tensor, torch.Tensor]:
        config = self._scheduler.config
        if config.get("use_dynamic_shifting"):
            raise UserError("model.path: its scheduler uses use_dynamic_shifting; only SD3's fixed shift is supported")
        self._scheduler.set_timesteps(num_steps)
        return self._scheduler.sigmas.double(), self._scheduler.timesteps.float()

    def encode(self, prompts: list[str]) -> Conditioning:
        """Embeddings on the policy's device, in its dtype; the empty prompt is the unconditional one."""
        loaded = self.text_cache.load(prompts)
        return Conditioning(loaded.text.to(self.device, self.dtype), loaded.pooled.to(self.device, self.dtype))

    def _encode_text(self, prompts: list[str]) -> Conditioning:
        components = json.loads((self.folder / "model_index.json").read_text())
        absent = {part: None for part in _TEXT_PARTS if components.get(part, [None])[0] is None}
        pipe = StableDiffusion3Pipeline.from_pretrained(
            self.folder, transformer=self.transformer, vae=self.vae, dtype=self.dtype, **absent
        )
        for part in _TEXT_PARTS[:3]:
            if getattr(pipe, part) is not None:
                getattr(pipe, part).to(self.device)
        rows = []
        with torch.no_grad():
            for start in range(0, len(prompts), _TEXT_BATCH):
                text, _, pooled, _ = pipe.encode_prompt(
                    prompts[start : start + _TEXT_BATCH],
                    None,
                    None,
                    device=self.device,
                    do_classifier_free_guidance=False,
                    max_sequence_length=self.model.max_sequence_length,
                )
                rows.append(Conditioning(text.cpu(), pooled.cpu()))
        return Conditioning(torch.cat([r.text for r in rows]), torch.cat([r.pooled for r in rows]))

    def velocity(self, latents, timestep, conditioning, *, guided):
        return self._forward(self.transformer, latents, timestep, conditioning, guided)

    def merged_velocity(self, latents, timestep, conditioning, *, guided):
        return self._forward(self.adapters.merged_transformer, latents, timestep, conditioning, guided)

    def _forward(self, network, latents, timestep, conditioning, guided):
        """(conditional, unconditional) velocity; with guidance both in one batch, unconditional rows first."""
        rows = len(latents)
        hidden = latents.to(self.dtype)
        text, pooled = conditioning.text, conditioning.pooled
        if guided:
            if self._unconditional is None:
                self._unconditional = self.encode([""])
            empty = self._unconditional
            hidden = torch.cat([hidden, hidden])
            text = torch.cat([empty.text.expand(rows, -1, -1), text])
            pooled = torch.cat([empty.pooled.expand(rows, -1), pooled])
        velocity = network(
            hidden_states=hidden,
            timestep=timestep.expand(len(hidden)),
            encoder_hidden_states=text,
            pooled_projections=pooled,
            return_dict=False,
        )[0]
        return (velocity[rows:], velocity[:rows]) if guided else (velocity, None)

    def merge(self) -> None:
        if self.merged:
            self.adapters.merge()

    def reference(self) -> AbstractContextManager[None]:
        return self.adapters.disabled()

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        config = self.vae.config
        latents = latents / config.scaling_factor + (config.shift_factor or 0.0)
        decoded = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]
        return (decoded.float() / 2 + 0.5).clamp(0, 1)

    def trainable_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        return self.adapters.parameters()

    def export(self, folder: Path) -> None:
        self.adapters.export(folder)

"""Aesthetic score: linear layers on the L2-normalised CLIP image embedding (LAION's aesthetic predictors).

Two layouts are read, both fitted on openai/clip-vit-large-patch14, both as safetensors: `sac+logos+ava1-l14-linearMSE`
(five linear layers without anything between them, `layers.N.weight` and `layers.N.bias`) and `sa_0_4_vit_l_14_linear`
(one layer, `weight` and `bias`). Scores are roughly 1 to 10.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file

from advgrpo.data.references import ReferenceSet
from advgrpo.errors import UserError
from advgrpo.rewards.base import Reward
from advgrpo.rewards.checks import check_batch, finite_scores
from advgrpo.vision.clip import ClipModel

_NAME = re.compile(r"(?:layers\.(\d+)\.)?weight")


class Aesthetic(Reward):
    """`base.Reward`: what the linear head says of the image; the prompt is not looked at.

    Args:
        head: safetensors file of the head.
        path: CLIPModel folder or hub id that the head was fitted on.
        processor: where tokenizer and image processor are, if not at `path`.
        device, dtype: where and in which precision CLIP runs; the head is float32.
        clip: a model that is loaded already, instead of `path`.

    Raises:
        UserError: the head is missing, a pickle, of another layout, or for another width of embedding.
    """

    name = "aesthetic"

    def __init__(
        self,
        *,
        head: str,
        path: str = "openai/clip-vit-large-patch14",
        processor: str | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        clip: ClipModel | None = None,
    ):
        layers = load_head(head)  # before the large model: a bad head is found at once
        self.clip = clip or ClipModel(path, processor=processor, device=device, dtype=dtype, field="aesthetic.path")
        width = self.clip.model.config.projection_dim
        if layers[0][0].shape[1] != width:
            raise UserError(
                f"aesthetic.head = {head!r} reads embeddings of {layers[0][0].shape[1]} numbers, but {self.clip.path} "
                f"makes {width}; use the CLIP that the head was fitted on"
            )
        self.layers = [(weight.to(self.clip.device), bias.to(self.clip.device)) for weight, bias in layers]

    @torch.no_grad()
    def score(self, images: torch.Tensor, prompts: list[str], references: ReferenceSet | None = None) -> torch.Tensor:
        """[B] float32 on the device of `images`; the references are not looked at."""
        check_batch(images, prompts)
        value = self.clip.image_embeddings(images)
        for weight, bias in self.layers:
            value = F.linear(value, weight, bias)
        return finite_scores(value.squeeze(1), images, prompts, self.name)


def load_head(head: str, field: str = "aesthetic.head") -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(weight [out, in], bias [out]) float32 of every layer in order; the last has one output.

    Raises:
        UserError: as Aesthetic, naming `field`.
    """
    file = Path(head).expanduser()
    if file.suffix != ".safetensors":
        converted = file.with_suffix(".safetensors").name
        raise UserError(
            f"{field} = {head!r} is not safetensors, and pickles are never read here; convert it once: python "
            f'-c "import torch; from safetensors.torch import save_file; save_file(torch.load({str(file)!r}, '
            f'weights_only=True), {converted!r})"'
        )
    try:
        tensors = load_file(file)
    except IsADirectoryError:
        raise UserError(f"{field} = {head!r} is a folder; give the head's safetensors file") from None
    except FileNotFoundError:
        raise UserError(f"{field} = {head!r} does not exist; give the head's safetensors file") from None
    except SafetensorError as error:
        raise UserError(f"{field} = {head!r} is not a readable safetensors file: {error}") from error
    found = sorted((int(match[1] or 0), name) for name in tensors if (match := _NAME.fullmatch(name)))
    layers = [
        (tensors[name].float(), tensors.get(name.removesuffix("weight") + "bias", torch.empty(0)).float())
        for _, name in found
    ]
    _check_layers(head, tensors, layers, field)
    return layers


def _check_layers(
    head: str, tensors: dict[str, torch.Tensor], layers: list[tuple[torch.Tensor, torch.Tensor]], field: str
) -> None:
    width = layers[0][0].shape[-1] if layers else 0
    fits = len(tensors) == 2 * len(layers) > 0
    for weight, bias in layers:
        fits = fits and weight.dim() == 2 and weight.shape[1] == width and bias.shape == weight.shape[:1]
        width = weight.shape[0]
    if not fits or width != 1:
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in sorted(tensors.items()))
        raise UserError(
            f"{field} = {head!r} is not a chain of linear layers down to one score (weight and bias, or "
            f"layers.N.weight and layers.N.bias); it holds {shapes or 'nothing'}"
        )
    if not all(t.isfinite().all() for layer in layers for t in layer):
        raise UserError(f"{field} = {head!r} holds numbers that are not finite; convert the head again")

"""Images as a vision tower wants them: what its `preprocessor_config.json` says, on tensors and on their device.

The same as transformers' CLIPImageProcessor and SiglipImageProcessor within 1.1 of 256 levels: PIL rounds to levels
between the two passes of its resize and after it, tensors do not. PIL also clips between the passes: they differ more
where an edge overshoots black or white: 5 levels at the edges of flat drawings (0.008 on average) from 512 to 224 px.

Shapes: B images [B, 3, H, W] float32 in [0, 1], at the model's side [B, 3, h, w].
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers.utils import cached_file

from advgrpo.errors import UserError
from advgrpo.runtime.transfer import to_device

_FILES = ("preprocessor_config.json", "processor_config.json")  # the second is newer transformers' way of saving
_MODES = {2: "bilinear", 3: "bicubic"}  # PIL's numbers


class ImagePreprocess:
    """Resize (antialiased), centre crop, mean and standard deviation.

    Args:
        short_side: resize the shorter side to this and keep the aspect ratio; or
        size: (height, width) to resize to whatever the aspect ratio.
        crop: (height, width) cut from the centre after the resize; None for no crop.
        mean, std: of each channel, for images in [0, 1].
        mode: "bicubic" or "bilinear".
    """

    def __init__(
        self,
        *,
        short_side: int | None = None,
        size: tuple[int, int] | None = None,
        crop: tuple[int, int] | None = None,
        mean: tuple[float, ...] = (0.0, 0.0, 0.0),
        std: tuple[float, ...] = (1.0, 1.0, 1.0),
        mode: str = "bicubic",
        device: torch.device | str = "cpu",
    ):
        if short_side is not None and size is not None:
            raise ValueError("give short_side or size, not both")
        self.short_side, self.size, self.crop, self.mode = short_side, size, crop, mode
        self.device = torch.device(device)
        self._mean = torch.tensor(mean, dtype=torch.float32, device=device).view(1, 3, 1, 1)
        self._std = torch.tensor(std, dtype=torch.float32, device=device).view(1, 3, 1, 1)

    @classmethod
    def load(
        cls, path: str, *, field: str, device: torch.device | str = "cpu", size: tuple[int, int] | None = None
    ) -> ImagePreprocess:
        """Read the processor settings in a folder or hub repository; `field` names the setting in errors.

        `size` overrules them: images are resized to it and not cropped.

        Raises:
            UserError: no such file, or settings that are not CLIP's or SigLIP's kind.
        """
        settings, file = _read(path, field)
        try:
            arguments = _arguments(settings)
            if size is not None:
                arguments |= {"size": size, "short_side": None, "crop": None}
            return cls(device=device, **arguments)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{field} = {path!r}: {file} is not an image processor of CLIP's or SigLIP's kind ({error!r})"
            ) from error

    @property
    def settings(self) -> str:
        """Everything the result depends on beside the image, for cache keys."""
        values = [*self._mean.flatten().tolist(), *self._std.flatten().tolist()]
        return f"{self.short_side}:{self.size}:{self.crop}:{self.mode}:{values}"

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """What images of this size are resized to, before the crop."""
        if self.size is not None:
            return self.size
        if self.short_side is None:
            return height, width
        if height <= width:
            return self.short_side, int(self.short_side * width / height)
        return int(self.short_side * height / width), self.short_side

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] in [0, 1] -> [B, 3, h, w] float32, normalised, on this object's device.

        Raises:
            ValueError: another shape or an integer type; an image that is smaller than the crop after the resize.
        """
        if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(f"want float images [B, 3, H, W] in [0, 1], got {images.dtype} {list(images.shape)}")
        images = to_device(images, self.device).float()
        size = self.output_size(*images.shape[-2:])
        if tuple(images.shape[-2:]) != size:
            images = F.interpolate(images, size=size, mode=self.mode, antialias=True, align_corners=False).clamp(0, 1)
        if self.crop is not None:
            top, left = (size[0] - self.crop[0]) // 2, (size[1] - self.crop[1]) // 2
            if top < 0 or left < 0:
                raise ValueError(f"images of {size} are smaller than the crop {self.crop}")
            images = images[..., top : top + self.crop[0], left : left + self.crop[1]]
        return (images - self._mean) / self._std


def _read(path: str, field: str) -> tuple[dict, str]:
    for name in _FILES:
        try:
            file = cached_file(path, name, _raise_exceptions_for_missing_entries=False)
        except OSError as error:
            raise UserError(f"{field} = {path!r} is neither a folder nor a model on the hub: {error}") from error
        if file is None:
            continue
        try:
            settings = json.loads(Path(file).read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{field} = {path!r}: {file} is not JSON ({error})") from error
        return settings.get("image_processor", settings), file
    raise UserError(f"{field} = {path!r} has no {_FILES[0]}; copy it from the model the weights were trained from")


def _arguments(settings: dict) -> dict:
    """ImagePreprocess's arguments from transformers' settings, of today and of the first CLIP repositories."""
    arguments: dict = {}
    if settings.get("do_resize", True):
        size = settings["size"]
        if isinstance(size, int):
            size = {"shortest_edge": size}
        if "shortest_edge" in size and "longest_edge" not in size:
            arguments["short_side"] = int(size["shortest_edge"])
        else:
            arguments["size"] = (int(size["height"]), int(size["width"]))
        arguments["mode"] = _MODES[settings.get("resample", 3)]
    if settings.get("do_center_crop", False):
        crop = settings["crop_size"]
        arguments["crop"] = (crop, crop) if isinstance(crop, int) else (int(crop["height"]), int(crop["width"]))
    if settings.get("do_rescale", True) and abs(settings.get("rescale_factor", 1 / 255) - 1 / 255) > 1e-6:
        raise ValueError(f"rescale_factor {settings['rescale_factor']} is not 1/255")
    if settings.get("do_normalize", True):
        arguments["mean"], arguments["std"] = tuple(settings["image_mean"]), tuple(settings["image_std"])
    return arguments

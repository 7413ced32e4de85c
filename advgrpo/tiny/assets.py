"""Writing what is shipped: fp16 safetensors under the stock file names, readable by everyone, and images."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import torch
from PIL import Image

from advgrpo.runtime.atomic import write_atomically

_LOADED_FROM = re.compile(r'^ *"_name_or_path": "[^"]*",\n', re.MULTILINE)


def save_half_precision(model, folder: Path) -> None:
    """Save a diffusers pipeline or a transformers model with fp16 weights that load as float32.

    The stock file names carry no variant suffix and the text encoders' configs say float32, so plain
    `from_pretrained(folder)` gives float32 modules; a folder that it was loaded from is not named. safetensors writes
    mode 0600; packages need 0644.
    """
    copy.deepcopy(model).to(torch.float16).save_pretrained(folder)
    for config in (*folder.glob("model_index.json"), *folder.glob("config.json"), *folder.glob("*/config.json")):
        text = config.read_text().replace('"dtype": "float16"', '"dtype": "float32"')
        write_atomically(config, _LOADED_FROM.sub("", text))
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


def write_image(path: Path, image: torch.Tensor) -> None:
    """A PNG of [3, H, W] bytes."""
    image = Image.fromarray(image.permute(1, 2, 0).numpy())
    write_atomically(path, lambda file: image.save(file, "PNG", optimize=True))

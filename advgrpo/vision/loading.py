"""Loading frozen transformers models by folder or hub id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from advgrpo.errors import UserError


def expanded(path: str) -> str:
    """`path` with ~ replaced where that is a folder; a hub id as it is."""
    folder = Path(path).expanduser()
    return str(folder) if folder.is_dir() else path


def model_config(path: str, *, model_types: tuple[str, ...], field: str, model_class: str) -> dict[str, Any]:
    """config.json of a folder or hub id, which for the latter is all that is downloaded.

    Raises:
        UserError: no such model, or another architecture than `model_class` reads.
    """
    try:
        config = PretrainedConfig.get_config_dict(expanded(path))[0]
    except (OSError, ValueError) as error:
        raise UserError(f"{field} = {path!r} cannot be loaded as a {model_class}: {error}") from error
    found = config.get("model_type")
    if found not in model_types:
        raise UserError(
            f"{field} = {path!r} is a {found or 'folder without a model_type in config.json'}, not a "
            f"{' or '.join(model_types)} that {model_class} can read"
        )
    return config


def load_pretrained(model_class: type, path: str, *, model_types: tuple[str, ...], field: str, dtype: torch.dtype):
    """`model_class.from_pretrained`, frozen and in evaluation mode, that refuses what transformers only warns about.

    Args:
        path: folder (~ is expanded) or hub id.
        model_types: the `model_type`s in config.json that `model_class` reads.
        field: the setting that `path` came from, for errors.

    Raises:
        UserError: no such model, another architecture, or weights that are missing or of another shape: transformers
            would fill those with random numbers and go on.
    """
    model_config(path, model_types=model_types, field=field, model_class=model_class.__name__)
    try:
        folder = expanded(path)
        model, report = model_class.from_pretrained(folder, dtype=dtype, use_safetensors=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{field} = {path!r} cannot be loaded as a {model_class.__name__}: {error}") from error
    absent = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
    if absent:
        raise UserError(
            f"{field} = {path!r} lacks {len(absent)} weights of a {model_class.__name__} or has them in another shape, "
            f"first {absent[0]}; complete the file"
        )
    return model.requires_grad_(False).eval()

"""Which diffusers pipelines can be trained, and where one lies: a folder, a hub id, or a shipped one's name."""

from __future__ import annotations

import json
from pathlib import Path

from ..errors import UserError
from ..tiny import WORLDS

# Pipeline class -> what its network predicts: the velocity of a rectified flow, or the noise ε of a diffusion.
PREDICTIONS = {
    "StableDiffusion3Pipeline": "velocity",
    "StableDiffusionPipeline": "noise",
    "StableDiffusionXLPipeline": "noise",
}


def pipeline_folder(path: str, field: str = "model.path") -> Path:
    """The local folder of a pipeline given as "tiny", a folder, or a hub id.

    Raises:
        UserError: naming `field`: no such model, or a pipeline that is not in `PREDICTIONS`.
    """
    folder = _local_folder(path)
    if folder is None:
        from diffusers import DiffusionPipeline  # here: the benchmark at full size runs without diffusers

        try:
            folder = Path(DiffusionPipeline.download(path))
        except Exception as error:
            raise _not_found(path, field, error) from error
    _class_of(_read_index(folder, path, field), path, field)
    return folder


def pipeline_class(path: str, field: str = "model.path") -> str:
    """Class name of a pipeline, a key of `PREDICTIONS`, from its model_index.json alone.

    Raises:
        UserError: as `pipeline_folder`.
    """
    folder = _local_folder(path)
    if folder is not None:
        return _class_of(_read_index(folder, path, field), path, field)
    from diffusers import DiffusionPipeline

    try:
        index = DiffusionPipeline.load_config(path)
    except Exception as error:
        raise _not_found(path, field, error) from error
    return _class_of(index, path, field)


def _local_folder(path: str) -> Path | None:
    if path in WORLDS:
        return WORLDS[path].pipeline
    folder = Path(path).expanduser()
    return folder if folder.is_dir() else None


def _not_found(path: str, field: str, error: Exception) -> UserError:
    return UserError(f"{field} = {path!r} is neither a folder nor a hub model that can be downloaded ({error})")


def _read_index(folder: Path, path: str, field: str) -> dict:
    file = folder / "model_index.json"
    if not file.is_file():
        raise UserError(f"{field} = {path!r}: {file} is missing; want a diffusers pipeline folder")
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{field} = {path!r}: {file} is not JSON ({error}); download the model again") from error


def _class_of(index: dict, path: str, field: str) -> str:
    name = index.get("_class_name")
    if name not in PREDICTIONS:
        raise UserError(f"{field} = {path!r} holds a {name}; want one of {', '.join(PREDICTIONS)}")
    return name

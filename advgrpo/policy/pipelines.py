"""Which diffusers pipelines can be trained, and where one lies: a folder, a hub id, or a shipped one's name."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from advgrpo.errors import UserError
from advgrpo.policy.model_files import local_folder, read_json
from advgrpo.tiny import WORLDS


class Family(NamedTuple):
    """What of a pipeline class is asked before its policy (loading.py) is imported."""

    prediction_type: str = "flow_prediction"  # the velocity of a rectified flow; epsilon: the noise of a diffusion
    guidance: float = 4.5  # that its model card draws at; where it is distilled in, 1 (`native_guidance`)
    own_forward: bool = False  # whether ours (fused/transformer.py) computes its transformer
    gated: bool = False  # whether its feed-forwards are SwiGLU
    masked_text: bool = False  # whether some of its text tokens are not attended to
    captured_by_itself: bool = False  # whether update.graphs = auto may: tests hold captured steps to the eager bits


FAMILIES = {
    "StableDiffusion3Pipeline": Family(own_forward=True, captured_by_itself=True),
    "FluxPipeline": Family(guidance=3.5, own_forward=True),
    "Flux2KleinPipeline": Family(guidance=4.0, gated=True),
    "QwenImagePipeline": Family(guidance=4.0, own_forward=True, masked_text=True),
    "StableDiffusionPipeline": Family("epsilon"),
    "StableDiffusionXLPipeline": Family("epsilon"),
}
PREDICTION_TYPES = {name: family.prediction_type for name, family in FAMILIES.items()}
QWEN_NEGATIVE_PROMPT = " "  # of its card: without one its pipeline draws unguided


def pipeline_folder(path: str, field: str = "model.path") -> Path:
    """The local folder of a pipeline given as "tiny", a folder, or a hub id.

    Raises:
        UserError: naming `field`: no such model, or a pipeline that is not in `PREDICTION_TYPES`.
    """
    folder = local_pipeline(path)
    if folder is None:
        from diffusers import DiffusionPipeline  # here: the benchmark at full size runs without diffusers

        try:
            folder = Path(DiffusionPipeline.download(path, use_safetensors=True))
        except Exception as error:
            raise _not_found(path, field, error) from error
    _check_class(_read_index(folder, path, field), path, field)
    return folder


def pipeline_index(path: str, field: str = "model.path") -> dict[str, Any]:
    """model_index.json of a pipeline, which names its class, a key of `PREDICTION_TYPES`, and its parts.

    Raises:
        UserError: as `pipeline_folder`.
    """
    folder = local_pipeline(path)
    if folder is not None:
        return _check_class(_read_index(folder, path, field), path, field)
    from diffusers import DiffusionPipeline

    try:
        index = DiffusionPipeline.load_config(path)
    except Exception as error:
        raise _not_found(path, field, error) from error
    return _check_class(index, path, field)


def pipeline_class(path: str, field: str = "model.path") -> str:
    """Class name of a pipeline; raises as `pipeline_index`."""
    return pipeline_index(path, field)["_class_name"]


def native_resolution(folder: Path) -> int:
    """Pixels of a side that the network was made for; 0 where its configuration does not say."""
    for part in ("transformer", "unet"):
        file = folder / part / "config.json"
        if file.is_file():
            latents = read_json(file, str(folder)).get("sample_size")
            levels = read_json(folder / "vae" / "config.json", str(folder)).get("block_out_channels")
            if isinstance(latents, int) and isinstance(levels, list):
                return latents * 2 ** (len(levels) - 1)
    return 0


def native_guidance(folder: Path) -> float:
    """The scale that a pipeline's model card draws at; FLUX.1-schnell's and a distilled FLUX.2 klein's is distilled
    in: 1."""
    index = pipeline_index(str(folder))
    distilled = index.get("is_distilled", False)  # FLUX.2 klein
    if index["_class_name"] == "FluxPipeline":
        distilled = not read_json(folder / "transformer" / "config.json", str(folder)).get("guidance_embeds")
    return 1.0 if distilled else FAMILIES[index["_class_name"]].guidance


def local_pipeline(path: str) -> Path | None:
    """The folder of a shipped pipeline's name or of a path; None for what may be a hub id."""
    if path in WORLDS:
        return WORLDS[path].pipeline
    return local_folder(path)


def behind_a_gate(error: BaseException | None, path: str) -> str:
    """Where `error` is the hub's refusal of a model whose licence has to be accepted: that, and what to do. Else ""."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError

    while error is not None and not isinstance(error, GatedRepoError):
        error = error.__cause__ or error.__context__  # diffusers' own errors stand above it
    if error is None:
        return ""
    why = "there is no token"
    if error.response.status_code == 403:
        why = "the account of this machine's token has not, or the token may not read it"
    page = f"{constants.ENDPOINT}/{path}"
    return (
        f"is behind a licence: accept it at {page} and run `hf auth login`, or set HF_TOKEN, for that account ({why})"
    )


def _not_found(path: str, field: str, error: Exception) -> UserError:
    if Path(path).expanduser().exists():
        return UserError(f"{field} = {path!r} is a file; want a diffusers pipeline folder or a hub id")
    if gate := behind_a_gate(error, path):
        return UserError(f"{field} = {path!r} {gate}")
    return UserError(
        f"{field} = {path!r} is neither a folder nor a hub model that can be downloaded ({error}); correct it, or, for "
        "a model behind a licence such as Stable Diffusion 3.5 or FLUX.1-dev, accept that on its page and run "
        "`hf auth login`"
    )


def _read_index(folder: Path, path: str, field: str) -> dict[str, Any]:
    file = folder / "model_index.json"
    if not file.is_file():
        raise UserError(f"{field} = {path!r}: {file} is missing; want a diffusers pipeline folder")
    return read_json(file, f"{field} = {path!r}")


def _check_class(index: dict[str, Any], path: str, field: str) -> dict[str, Any]:
    name = index.get("_class_name")
    if name not in PREDICTION_TYPES:
        raise UserError(f"{field} = {path!r} holds a {name}; want one of {', '.join(PREDICTION_TYPES)}")
    return index

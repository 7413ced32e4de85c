"""What is compared: pipelines, LoRAs, runs, folders of pictures, each found to be one before anything is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from advgrpo import config as configuration
from advgrpo.compare.settings import Compare
from advgrpo.data.images import open_image
from advgrpo.data.prompts import load_prompts
from advgrpo.data.references import read_index
from advgrpo.errors import UserError
from advgrpo.policy.adapters import read_lora_for
from advgrpo.policy.lora_file import LORA_FILE, LoraFile
from advgrpo.policy.pipelines import pipeline_class, pipeline_folder
from advgrpo.sampling.drawing import Drawn
from advgrpo.tiny import WORLDS
from advgrpo.training.preflight import check_model, check_size

INDEX = "references.json"
_FIELD = "sides"
_KINDS = (
    "a pipeline (model_index.json), a run (config.yaml with lora/, transformer/ or unet/), a LoRA "
    f"({LORA_FILE}) or pictures ({INDEX})"
)


@dataclass(frozen=True)
class Drawer:
    """A side that has to be drawn: a pipeline, and what is laid over it.

    Attributes:
        model: the pipeline, as it was given; `folder` is where it lies.
        dtype: of the weights, by torch's name.
        lora: loaded at strength 1.
        network: folder of fully trained weights that take the place of the pipeline's, and the part that they are.
    """

    model: str
    folder: Path
    kind: str  # class name of the pipeline
    drawn: Drawn
    dtype: str
    lora: LoraFile | None = None
    network: tuple[str, Path] | None = None


@dataclass(frozen=True)
class Pictures:
    """A side that is drawn already.

    Attributes:
        files: [prompts, images_per_prompt].
    """

    folder: Path
    files: list[list[Path]]


@dataclass(frozen=True)
class Side:
    """One of those that are compared.

    Attributes:
        given: as on the command line.
        name: what the report calls it; the page never does.
    """

    given: str
    name: str
    source: Drawer | Pictures


def read_prompts(options: Compare) -> list[str]:
    """The prompts of the file, each once; UserError for none or a bad one."""
    return list(dict.fromkeys(prompt.text for prompt in load_prompts(options.prompts)))


def read_sides(options: Compare, prompts: Sequence[str], device: str) -> list[Side]:
    """Every side, checked as far as files can tell.

    Args:
        device: "cpu" or "cuda", which decides the weights' dtype.

    Raises:
        UserError: fewer than two sides, one given twice, no such model, or pictures that are missing or damaged.
    """
    given = options.sides
    if len(given) < 2:
        raise UserError(f"{_FIELD}: {len(given)} given; want at least two to compare, each {_KINDS}")
    if len(set(given)) < len(given):
        twice = next(each for each in given if given.count(each) > 1)
        raise UserError(f"{_FIELD}: {twice!r} is given twice; it would be compared with itself")
    names = options.names or given
    if len(names) != len(given) or len(set(names)) < len(names) or not all(name.strip() for name in names):
        raise UserError(f"--names {' '.join(names)}: want {len(given)} different names, one for each side in turn")
    return [Side(each, name, _source(each, options, prompts, device)) for each, name in zip(given, names)]


def _source(given: str, options: Compare, prompts: Sequence[str], device: str) -> Drawer | Pictures:
    folder = Path(given).expanduser()
    if given in WORLDS or not folder.exists() or (folder / "model_index.json").is_file():  # shipped, on the hub, here
        return _pipeline(given, options, device)
    if (folder / INDEX).is_file():
        return _pictures(folder, options, prompts)
    if (folder / LORA_FILE).is_file() or folder.suffix == ".safetensors":
        return _pipeline(options.model, options, device, lora=folder, field="--model")
    if (folder / "config.yaml").is_file():
        return _run(folder, options, device)
    raise UserError(f"{_FIELD} = {given!r} is none of what can be compared: {_KINDS}")


def _run(folder: Path, options: Compare, device: str) -> Drawer:
    """The LoRA or the network that a run has left, on the model that it trained."""
    saved = folder / "config.yaml"
    model = configuration.build(configuration.read_yaml(saved), str(saved)).model
    if model.train == "lora":
        if not (folder / "lora" / LORA_FILE).is_file():
            raise UserError(f"{_FIELD} = {str(folder)!r} has no lora/{LORA_FILE} yet; let the run come to its end")
        return _pipeline(model.path, options, device, lora=folder / "lora", field=f"{saved}: model.path")
    part = next((each for each in ("transformer", "unet") if (folder / each / "config.json").is_file()), None)
    if part is None:
        raise UserError(f"{_FIELD} = {str(folder)!r} has no transformer/ or unet/ yet; let the run come to its end")
    return _pipeline(model.path, options, device, network=(part, folder / part), field=f"{saved}: model.path")


def _pipeline(
    model: str,
    options: Compare,
    device: str,
    *,
    lora: Path | None = None,
    network: tuple[str, Path] | None = None,
    field: str = _FIELD,
) -> Drawer:
    check_model(model, field)
    folder = pipeline_folder(model, field=field)
    own = options.model_copy(update={"model": model})
    drawn = own.drawn(folder)
    check_size(folder, drawn.resolution, model_field=field, field="--resolution")
    dtype = "bfloat16" if device == "cuda" and not own.world else "float32"
    file = None if lora is None else read_lora_for(folder, lora, _FIELD)
    return Drawer(model, folder, pipeline_class(model, field), drawn, dtype, file, network)


def _pictures(folder: Path, options: Compare, prompts: Sequence[str]) -> Pictures:
    index, count = read_index(folder / INDEX), options.images_per_prompt
    for prompt in prompts:
        if len(index.get(prompt, ())) < count:
            have = len(index.get(prompt, ()))
            raise UserError(
                f"{_FIELD} = {str(folder)!r}: {INDEX} has {have} pictures of the prompt {prompt!r}, and "
                f"--images-per-prompt {count} are compared; add some, or leave the prompt out of {options.prompts}"
            )
    files = [[folder / name for name in index[prompt][:count]] for prompt in prompts]
    for each in files:
        for file in each:
            open_image(file)  # decoded once here, so that a damaged one is found before others are drawn
    return Pictures(folder, files)

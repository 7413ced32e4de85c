"""The README.md beside a trained LoRA: what it was made from, what it scores, how to load it, and its licence.

It is written in the form that the Hugging Face hub reads, at the end of a run and by `advgrpo.export --card`. It names
files of the run by their names alone: a card is made to be published, and paths tell of the machine.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image, PngImagePlugin

from advgrpo import config as configuration
from advgrpo.config import Config, RolloutSection, nearest
from advgrpo.data.images import ImageError, read_header
from advgrpo.data.record_source import HUB
from advgrpo.errors import UserError, one_line
from advgrpo.plan.known_models import FLUX2_TRANSFORMERS, QWEN_TRANSFORMERS
from advgrpo.policy.lora_file import LORA_FILE
from advgrpo.policy.pipelines import QWEN_NEGATIVE_PROMPT, local_pipeline, pipeline_class
from advgrpo.report.run_files import CONFIG_FILE, SUMMARY_FILE, read_summary
from advgrpo.reporting.metric_names import with_interval
from advgrpo.runtime.atomic import write_atomically

CARD, GRID = "README.md", "samples.png"
SAMPLES = 4  # single images for the hub's gallery
MARK = "<!-- Written by advgrpo, anew by every export; without this line it is left as it is. -->"
_PROMPT = "prompt"  # key of a sample's PNG text
_MOST = 12  # settings that the card says differ from the preset's
_SHIPPED = ("tiny", "tiny:words")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class License:
    """In the hub's words; `name` and `link` where the identifier is "other"."""

    identifier: str
    title: str
    link: str = ""
    name: str = ""


_UNKNOWN = "that-of-the-base-model"
_STABILITY = "stabilityai/stable-diffusion-3.5-"
_KNOWN = {
    **{
        f"{_STABILITY}{size}": License(
            "other",
            "Stability AI Community License",
            f"https://huggingface.co/{_STABILITY}{size}/blob/main/LICENSE.md",
            "stabilityai-ai-community",
        )
        for size in ("medium", "large", "large-turbo")
    },
    "stabilityai/stable-diffusion-xl-base-1.0": License(
        "openrail++",
        "CreativeML Open RAIL++-M License",
        "https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0/blob/main/LICENSE.md",
    ),
    "stable-diffusion-v1-5/stable-diffusion-v1-5": License(
        "creativeml-openrail-m",
        "CreativeML OpenRAIL-M license",
        "https://huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5",
    ),
    **{
        name: License("apache-2.0", "Apache License 2.0")
        for name in (*_SHIPPED, *QWEN_TRANSFORMERS, *FLUX2_TRANSFORMERS)
    },
}


@dataclass(frozen=True)
class RunFacts:
    """What a card says of a run."""

    title: str
    config: Config
    summary: Mapping[str, Any]  # summary.json; empty for a run that has not ended
    iterations: int | None
    base_model: str = ""  # its hub id; empty: none is known

    @classmethod
    def of(cls, config: Config, summary: Mapping[str, Any], iterations: int | None, base_model: str = "") -> RunFacts:
        """`base_model`: where model.path is a folder."""
        path = config.model.path
        on_hub = path if _HUB_ID.fullmatch(path) and not Path(path).expanduser().exists() else ""
        title = Path(config.output_dir).resolve().name
        return cls(title, config, summary, iterations, base_model or on_hub)

    @classmethod
    def read(cls, lora: Path, base_model: str = "") -> RunFacts:
        """Of the run whose OUT/lora this is.

        Raises:
            UserError: it lies in no output folder of a run, or that is damaged.
        """
        folder = lora.resolve().parent
        if not (folder / CONFIG_FILE).is_file():
            raise UserError(
                f"LORA = {str(lora)!r}: a card needs the run's files, and {folder} has no config.yaml; give the "
                "OUT/lora of a run"
            )
        config = configuration.load(file=folder / CONFIG_FILE)
        summary = read_summary(folder / SUMMARY_FILE)
        config = config.model_copy(update={"output_dir": str(folder)})  # where it is now
        return cls.of(config, summary, summary.get("iterations"), base_model)


def write_samples(lora: Path, images: Sequence[tuple[str, torch.Tensor]]) -> None:
    """The first image of the first prompts as PNG files that know their prompt.

    Args:
        images: (prompt, [n, 3, H, W] in [0, 1]) each.
    """
    for number, (prompt, of_prompt) in enumerate(images[:SAMPLES], start=1):
        info = PngImagePlugin.PngInfo()
        info.add_itxt(_PROMPT, prompt)
        pixels = of_prompt[0].clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).cpu().numpy()
        image = Image.fromarray(pixels)
        write_atomically(
            lora / f"sample-{number}.png",
            lambda file, image=image, info=info: image.save(file, "PNG", pnginfo=info),
        )


def write_card(lora: Path, facts: RunFacts, grid: Path | None = None) -> Path | None:
    """Write README.md, and samples.png as a copy of `grid`, into the LoRA's folder.

    Returns:
        The card; None where a README.md is there that this program did not write.
    """
    card = lora / CARD
    if card.exists() and MARK not in card.read_text(encoding="utf-8", errors="replace"):
        return None
    if grid is not None and grid.is_file():
        write_atomically(lora / GRID, grid.read_bytes())
    write_atomically(card, render(facts, list(_samples(lora)), (lora / GRID).is_file()))
    return card


def newest_grid(folder: Path) -> Path | None:
    """Of a run's sample grids: the final one, else that of the latest iteration."""
    samples = folder / "samples"
    grids = [samples / "final.png", *sorted(samples.glob("iteration-*.png"), reverse=True)]
    return next((grid for grid in grids if grid.is_file()), None)


def publishable(lora: Path) -> list[str]:
    """What of a LoRA's folder belongs to it: weights, card and the images that the card shows."""
    images = [GRID, *(f"sample-{number}.png" for number in range(1, SAMPLES + 1))]
    weights = [LORA_FILE, *(f"{name}.safetensors" for name in ("comfyui", "kohya"))]
    return [name for name in (CARD, *weights, *images) if (lora / name).is_file()]


def _samples(lora: Path) -> Iterator[tuple[str, str]]:
    """(prompt, file name) of the single images."""
    for number in range(1, SAMPLES + 1):
        file = lora / f"sample-{number}.png"
        try:
            read_header(file, formats=("PNG",))
            with Image.open(file, formats=["PNG"]) as image:
                image.load()
                prompt = getattr(image, "text", {}).get(_PROMPT)
        except (ImageError, OSError, SyntaxError, ValueError):
            continue
        if isinstance(prompt, str):
            yield str(prompt), file.name  # Pillow's own kind of str


def license_of(facts: RunFacts) -> License:
    """That of the base model, from which the LoRA is derived; where nobody here knows it, that is what it says."""
    path = facts.config.model.path
    known = _KNOWN.get(facts.base_model) or _KNOWN.get(path)
    if known is not None:
        return known
    stated = _stated(Path(path).expanduser() / CARD)
    if stated is not None:
        return stated
    link = f"https://huggingface.co/{facts.base_model}" if facts.base_model else ""
    return License("other", "the licence of the base model", link, _UNKNOWN)


def _stated(card: Path) -> License | None:
    """What the card of a base model's folder says."""
    try:
        found = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", card.read_text(encoding="utf-8"), re.DOTALL)
        header = yaml.safe_load(found[1]) if found else None
    except (OSError, ValueError, yaml.YAMLError):
        return None
    identifier = header.get("license") if isinstance(header, dict) else None
    if not isinstance(identifier, str):
        return None
    name, link = (str(header.get(key) or "") for key in ("license_name", "license_link"))
    link = link if link.startswith("https://") else ""  # a file of that folder is not beside the LoRA
    return License(identifier, name or identifier, link, name if identifier == "other" else "")


def render(facts: RunFacts, samples: Sequence[tuple[str, str]] = (), has_grid: bool = False) -> str:
    """The card's text: YAML for the hub, then Markdown."""
    parts = [
        f"---\n{_front_matter(facts, samples)}---",
        MARK,
        f"# {facts.title}",
        _what_it_is(facts),
        *(["<Gallery />"] if samples else []),
        *([_grid_section(facts)] if has_grid else []),
        _use_section(facts),
        _metrics_section(facts),
        _training_section(facts),
        _license_section(facts),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(facts: RunFacts, samples: Sequence[tuple[str, str]]) -> str:
    license = license_of(facts)
    header: dict[str, Any] = {"base_model": facts.base_model, "base_model_relation": "adapter"}
    if not facts.base_model:
        header = {}
    header |= {"library_name": "diffusers", "pipeline_tag": "text-to-image", "license": license.identifier}
    if license.identifier == "other":
        header |= {"license_name": license.name} | ({"license_link": license.link} if license.link else {})
    header["tags"] = ["text-to-image", "diffusers", "lora", "reinforcement-learning", "advgrpo"]
    if samples:
        header["widget"] = [{"text": prompt, "output": {"url": name}} for prompt, name in samples]
    return yaml.safe_dump(header, sort_keys=False, allow_unicode=True, width=1000)


def _what_it_is(facts: RunFacts) -> str:
    base = f"[{facts.base_model}](https://huggingface.co/{facts.base_model})" if facts.base_model else "a local model"
    if facts.config.model.path in _SHIPPED:
        base = "advgrpo's tiny model of drawings"
    how = facts.config.objective.described or _rewards(facts.config)
    ended = "" if facts.summary else " The run has not ended; nothing was measured at this point."
    return f"A LoRA of {base}, trained with advgrpo by {how}.{ended}"


def _rewards(config: Config) -> str:
    used = [name for name, section in config.rewards.sections().items() if section.used]
    used = [f"the adversary ({config.adversary.kind})" if name == "adversary" else name for name in used]
    return f"reinforcement learning ({config.objective.method}) on {', '.join(used)}"


def _grid_section(facts: RunFacts) -> str:
    evaluation = facts.config.evaluation
    sampled = f"{evaluation.num_steps} steps, guidance {evaluation.guidance_scale:g}"
    return f"## Samples\n\nHeld-out prompts, the same noise for base and LoRA; {sampled}.\n\n![Samples]({GRID})"


def _use_section(facts: RunFacts) -> str:
    evaluation, model = facts.config.evaluation, facts.config.model
    guidance = f"guidance_scale={evaluation.guidance_scale:g}"
    if _is_qwen_image(model.path):
        guidance = f'true_cfg_scale={evaluation.guidance_scale:g}, negative_prompt="{QWEN_NEGATIVE_PROMPT}"'
    prompt = f"num_inference_steps={evaluation.num_steps}, {guidance}"
    size = f"height={model.resolution}, width={model.resolution}"
    return f"""## Use

Its strength is folded into the weights: 1.0 is what was trained.

```python
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{facts.base_model or "BASE_MODEL"}", torch_dtype=torch.bfloat16).to("cuda")
pipe.load_lora_weights("THIS_REPOSITORY_OR_FOLDER")
image = pipe(prompt="a prompt", {prompt}, {size}).images[0]
```"""


def _is_qwen_image(path: str) -> bool:
    """As far as it is known without a network; a folder may have gone, or lost its files, since the run."""
    folder = local_pipeline(path)
    known = folder is not None and (folder / "model_index.json").is_file()
    return path in QWEN_TRANSFORMERS or (known and pipeline_class(path) == "QwenImagePipeline")


def _metrics_section(facts: RunFacts) -> str:
    base, final = (facts.summary.get(stage) or {} for stage in ("base", "final"))
    if not final:
        return ""
    rows = "\n".join(
        f"| {name} | {with_interval(facts.summary, 'base', name)} | {with_interval(facts.summary, 'final', name)} |"
        for name in final
        if name in base
    )
    per_prompt = facts.config.evaluation.images_per_prompt
    return f"""## Held-out metrics

Means over prompts never trained on, {per_prompt} images each, with 95 % intervals over prompts. A metric that is also
a reward measures what was optimised, not quality.

| metric | base | LoRA |
|---|---|---|
{rows}"""


def _images_per_iteration(rollout: RolloutSection) -> str:
    branches = rollout.window.branches
    of_prompt = f"{branches} branches × {rollout.group_size}" if rollout.window.branching else f"{rollout.group_size}"
    return f"{rollout.prompts_per_iteration // branches} prompts × {of_prompt}"


def _training_section(facts: RunFacts) -> str:
    config, data = facts.config, facts.config.data
    preset, changes = nearest_preset(config)
    rows = {
        "preset": f"`{preset}`"
        + (" with " + ", ".join(f"`{change}`" for change in changes[:_MOST]) if changes else ""),
        "settings changed besides": f"{len(changes) - _MOST}" if len(changes) > _MOST else "",
        "iterations": str(facts.iterations or ""),
        "seed": str(config.seed),
        "prompts": _address(data.prompts),
        "references": _address(data.style or data.references),
        "held-out prompts": _address(data.held_out_prompts),
        "LoRA": f"rank {config.model.lora.rank}, alpha {config.model.lora.alpha:g} (folded)",
        "images per iteration": _images_per_iteration(config.rollout),
        "not trained because": one_line(str(facts.summary.get("not_trained_because", ""))),
        "versions": ", ".join(f"{name} {value}" for name, value in (facts.summary.get("versions") or {}).items()),
    }
    table = "\n".join(f"| {name} | {value.replace('|', chr(92) + '|')} |" for name, value in rows.items() if value)
    return f"## Training\n\n| | |\n|---|---|\n{table}"


def _address(source: str) -> str:
    """A hub address as it is; of a file or folder of this machine the name alone."""
    return f"`{one_line(source if source.startswith((HUB, 'tiny')) else Path(source).name)}`" if source else ""


def nearest_preset(config: Config) -> tuple[str, list[str]]:
    """The preset that differs in the fewest settings of the method, and what differs, as "name = value"."""
    name, changes = nearest.nearest_preset(config)
    return name, [f"{change.name} = {_value(change.here)}" for change in changes]


def _value(value: Any) -> str:
    """Of a path the name alone."""
    if isinstance(value, str) and Path(value).is_absolute():
        value = Path(value).name
    return one_line(json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value, 60)


def _license_section(facts: RunFacts) -> str:
    license = license_of(facts)
    if license.name == _UNKNOWN:
        owner = f"[{facts.base_model}]({license.link})" if license.link else "its author"
        under, where = "under that model's licence", f"ask {owner} for it"
    else:
        named = f"[{license.title}]({license.link})" if license.link else license.title
        under, where = f"under the same licence: the {named}", "read it before you use or pass on the LoRA"
    return f"## Licence\n\nThis LoRA is derived from its base model and is {under}; {where}."

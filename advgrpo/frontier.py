r"""Compare LoRAs with their base model at several guidance scales: accuracy, distance to the references, diversity.

python -m advgrpo.frontier --loras runs/tiny/lora --output runs/tiny/frontier
python -m advgrpo.frontier --loras runs/a/lora runs/b/lora --prompts tiny:names --output runs/frontier

LoRAs are seeds of one recipe: intervals are over seeds and prompts (advgrpo/evaluation/frontier.py). Every model draws
the same noise. Its own best guidance is chosen on other prompts (--tuning-prompts) than are reported.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field
from rich.console import Console
from rich.table import Table

from advgrpo import config as configuration
from advgrpo.errors import UserError
from advgrpo.evaluation.frontier import Difference, Front, Point, best_guidance, compare, kid
from advgrpo.evaluation.judging import Accuracy, Prompts, TinyWitness, Witness, draw, point, refuse_shared
from advgrpo.reporting.display import Display
from advgrpo.reporting.plots import draw_front
from advgrpo.runtime.atomic import write_atomically
from advgrpo.runtime.callable_module import make_callable
from advgrpo.runtime.command import plain_console, run_command
from advgrpo.runtime.distributed import Distributed
from advgrpo.runtime.folders import writable
from advgrpo.runtime.libraries import quiet_libraries
from advgrpo.sampling.drawing import ModelOptions
from advgrpo.tiny import WORLDS
from advgrpo.training.models import load_model, settings_of

if TYPE_CHECKING:
    from advgrpo.evaluation.evaluator import Evaluator


class Frontier(ModelOptions):
    """Compare LoRAs with their base model at several guidance scales."""

    model: Annotated[str, Field(min_length=1)] = "tiny"
    """The pipeline that the LoRAs adapt; the tiny world's, which has a judge."""
    loras: tuple[str, ...]
    """Folders with pytorch_lora_weights.safetensors, such as OUT/lora; several are seeds of one recipe."""
    output: Path
    """Folder for frontier.json and frontier.png."""
    guidance_scales: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0)
    """Classifier-free guidance to draw at."""
    prompts: str = "tiny:report"
    """Prompt file of what is reported; "tiny:report" and "tiny:names" for the shipped ones."""
    tuning_prompts: str = "tiny:tuning"
    """Prompt file on which every model's own best guidance is chosen: other prompts."""
    judge: Accuracy = "retrieval"
    """Whose verdict is the accuracy: the nearest drawing in EfficientNet-Lite0's features, in which the distance is
    always measured, or whether one of the five nearest names is the prompt's, the colour of the background, or the
    second judge's, a classifier."""
    images_per_prompt: Annotated[int, Field(ge=2, le=1000)] = 2
    """Images of every prompt."""
    resamples: Annotated[int, Field(ge=100, le=1_000_000)] = 4000
    """Bootstrap resamples of seeds and prompts."""


def fronts(
    evaluator: Evaluator, prompts: Mapping[str, Prompts], witness: Witness, options: Frontier, display: Display
) -> dict[str, dict[float, Point]]:
    """Every prompt list at every guidance scale."""
    found: dict[str, dict[float, Point]] = {name: {} for name in prompts}
    for scale in options.guidance_scales:
        for name, part in prompts.items():
            images = draw(evaluator, part.texts, scale, options.images_per_prompt, display)
            found[name][scale] = point(images, part, witness)
    return found


@dataclass(frozen=True)
class Compared:
    """What a comparison finds."""

    equal: list[Difference]  # at equal guidance
    best: Difference  # each at its own best, chosen on the tuning prompts
    base: Front
    models: list[Front]


def summarise(base: Mapping[str, Front], models: Sequence[Mapping[str, Front]], options: Frontier) -> Compared:
    """From fronts on "tuning" and "report" prompts."""
    how = {"resamples": options.resamples, "seed": options.seed}
    equal = [
        compare([model["report"][scale] for model in models], base["report"][scale], (scale, scale), **how)
        for scale in options.guidance_scales
    ]
    own = [best_guidance(model["tuning"]) for model in models]
    of_base = best_guidance(base["tuning"])
    commonest = max(sorted(set(own)), key=own.count)
    chosen = [model["report"][scale] for model, scale in zip(models, own)]
    best = compare(chosen, base["report"][of_base], (commonest, of_base), **how)
    return Compared(equal, best, base["report"], [model["report"] for model in models])


def table(found: Compared, witness: Witness, options: Frontier) -> Table:
    seeds = f"{len(found.models)} LoRA{'s' * (len(found.models) > 1)}"
    over = "seeds and prompts" if len(found.models) > 1 else "prompts"
    title = f"{seeds} less base on {options.prompts}: mean [95 % interval over {over}]"
    shown = Table("guidance", witness.accuracy, witness.distance.split(" in ")[0], "diversity, ratio", title=title)
    for name, each in [*((f"{d.guidance[0]:g}", d) for d in found.equal), ("own best", found.best)]:
        own = f" ({each.guidance[0]:g}, base {each.guidance[1]:g})" if each is found.best else ""
        cells = (each.accuracy.text("+.3f"), each.kid.text("+.0f"), each.diversity_ratio.text(".2f"))
        shown.add_row(name + own, *cells)
    return shown


def front_rows(front: Front) -> list[dict[str, float]]:
    """A front's points as numbers: guidance, accuracy, kid, diversity."""
    return [
        {
            "guidance": scale,
            "accuracy": each.accuracy.mean().item(),
            "kid": kid(each.kernel).item(),
            "diversity": each.diversity.mean().item(),
        }
        for scale, each in front.items()
    ]


def report(found: Compared, options: Frontier, digests: Sequence[str]) -> dict:
    """What frontier.json holds; `digests` tell which LoRAs these were."""
    return {
        "settings": options.model_dump(mode="json"),
        "digests": list(digests),
        "equal": [asdict(each) for each in found.equal],
        "best": asdict(found.best),
        "base": front_rows(found.base),
        "models": {lora: front_rows(front) for lora, front in zip(options.loras, found.models)},
    }


def compare_models(options: Frontier, console: Console) -> Compared:
    """Draw, judge, compare; writes frontier.json and frontier.png."""
    from advgrpo.policy.lora_file import lora_digest
    from advgrpo.policy.pipelines import pipeline_folder

    if options.world is not WORLDS["tiny"]:
        raise UserError(f"--model {options.model}: only tiny has an independent judge; leave it")
    if any(scale < 1 for scale in options.guidance_scales) or not options.guidance_scales:
        raise UserError(f"--guidance-scales {options.guidance_scales}: want one or more, each at least 1")
    writable(options.output, "--output")
    cache = Path(options.cache_dir).expanduser()
    writable(cache, "--cache-dir")
    distributed, display = Distributed.start(options.device), Display(console)
    folder = pipeline_folder(options.model, field="--model")
    settings = [settings_of(options, folder, lora, distributed.device, flag="--loras") for lora in options.loras]
    witness = TinyWitness(cache, options.judge)
    prompts = {name: Prompts.read(getattr(options, f"{field}prompts"), "tiny", witness)
               for name, field in (("tuning", "tuning_"), ("report", ""))}  # fmt: skip
    refuse_shared(prompts["tuning"].texts, prompts["report"].texts)
    texts = [text for part in prompts.values() for text in part.texts]
    digests = [lora_digest(Path(lora)) for lora in options.loras]
    models, base = [], None
    for lora in settings:
        evaluator = load_model(options, lora, texts, distributed, display)
        base = base or fronts(evaluator.base(), prompts, witness, options, display)
        models.append(fronts(evaluator, prompts, witness, options, display))
    found = summarise(base, models, options)
    numbers = report(found, options, digests)
    write_atomically(options.output / "frontier.json", json.dumps(numbers, indent=1) + "\n")
    draw_front(numbers, options.output / "frontier.png", (witness.accuracy, witness.distance))
    console.print(table(found, witness, options))
    console.print(f"wrote {options.output}/frontier.json and frontier.png")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes of `command.run_command`."""
    return run_command(_frontier, arguments)


def _frontier(arguments: list[str]) -> int:
    options = configuration.parse_options(Frontier, arguments, program="python -m advgrpo.frontier", about=__doc__)
    quiet_libraries()
    compare_models(options, plain_console())
    return 0


if __name__ == "__main__":
    sys.exit(main())

make_callable(__name__)

r"""Score a model's images with several metrics, with intervals, and compare it with a second model on the same noise.

python -m advgrpo.evaluate --lora runs/tiny/lora --against base --metrics rule,dino_similarity --output runs/tiny/scores
python -m advgrpo.evaluate --model stabilityai/stable-diffusion-3.5-medium --lora A --against B --prompts p.txt \
    --metrics pickscore,aesthetic --metric-options.aesthetic.head aesthetic_head.safetensors --output scores
"""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import yaml
from pydantic import Field
from rich.console import Console
from rich.table import Column, Table

from advgrpo import config as configuration
from advgrpo.config import MOST_PER_PROMPT, NEED_REFERENCES
from advgrpo.config.judge_checks import IMAGE_STATISTICS, JUDGE_METRICS
from advgrpo.config.reading import UNREADABLE
from advgrpo.data.images import Fit
from advgrpo.data.prompt_lengths import cut_prompts
from advgrpo.data.prompts import load_prompts
from advgrpo.data.references import ReferenceSet
from advgrpo.data.sources import Sources, metadata_of, shipped_path
from advgrpo.errors import UserError
from advgrpo.evaluation.statistics import Comparison, Interval, bootstrap_mean, paired_bootstrap
from advgrpo.reporting.display import Display
from advgrpo.reporting.plots import draw_grid
from advgrpo.rewards import REWARDS, build_reward, prompt_options
from advgrpo.runtime.atomic import write_atomically
from advgrpo.runtime.callable_module import make_callable
from advgrpo.runtime.command import plain_console, run_command
from advgrpo.runtime.distributed import Distributed
from advgrpo.runtime.folders import writable
from advgrpo.runtime.libraries import quiet_libraries
from advgrpo.sampling.drawing import ModelOptions
from advgrpo.tiny import WORLDS
from advgrpo.training.models import load_model, settings_of

if TYPE_CHECKING:  # diffusers and transformers are loaded once the flags are right and their notices silenced
    from advgrpo.evaluation.evaluator import Evaluator
    from advgrpo.rewards.base import Reward

_OPTION = "--metric-options."
_RULE_ACCURACY = "rule_accuracy"
_WITHOUT_OPTIONS = (_RULE_ACCURACY, *JUDGE_METRICS, *IMAGE_STATISTICS)
_TINY_METRICS: dict[str, dict[str, Any]] = {
    "dino_similarity": {"path": "tiny", "image_size": 48},
    "pickscore": {"path": "tiny"},
    "clip": {"path": "tiny"},
    "clip_similarity": {"path": "tiny"},
    "clip_reference_similarity": {"path": "tiny"},
    "ocr": {"detection_size": 192},
}


class Evaluate(ModelOptions):
    """Score a model's images with several metrics, and compare it with a second model on the same noise."""

    metrics: str
    """Names separated by commas: rewards (pickscore, ocr, dino_similarity, clip, aesthetic, rule, ...), rule_accuracy,
    retrieval and retrieval_top5 of the tiny world's independent judge, classifier_accuracy of its
    second, the statistics saturation, dark_share and edge_density, and names of your own, whose options have `import`
    (--metric-options.NAME.import file.py:CLASS) or the `url` of a judge."""
    output: Path
    """Folder for evaluation.json and grid.png."""
    lora: str = ""
    """Folder with pytorch_lora_weights.safetensors, such as OUT/lora; empty scores the base model."""
    against: str = ""
    """Second model, drawn from the same noise: "base", or another LoRA folder."""
    prompts: str = ""
    """Prompt file; empty, with a tiny model, means its held-out prompts."""
    references: str = ""
    """Folder with references.json for metrics that compare with references; "tiny" for the shipped ones."""
    fit: Fit = "refuse"
    """References that are not square: refuse, crop, letterbox or stretch, as data.fit of the training."""
    metric_options_file: Path | None = None
    """YAML {metric: {option: value}}; single options are flags, --metric-options.METRIC.OPTION VALUE."""
    images_per_prompt: Annotated[int, Field(ge=1, le=MOST_PER_PROMPT)] = 4
    """Images of every prompt."""
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Coverage of the intervals."""
    resamples: Annotated[int, Field(ge=100, le=1_000_000)] = 4000
    """Bootstrap resamples of the prompts."""

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(name.strip() for name in self.metrics.split(",") if name.strip()))


MetricOptions = dict[str, dict[str, Any]]
Scores = dict[str, torch.Tensor]  # metric -> [prompts, images_per_prompt] float64


def split_metric_options(arguments: list[str]) -> tuple[list[str], MetricOptions]:
    """Take `--metric-options.METRIC.OPTION VALUE` (or `=VALUE`) out of the flags; values are read as YAML.

    Raises:
        UserError: a flag without METRIC.OPTION or without a value, or given twice.
    """
    rest, options, queue = [], {}, list(arguments)
    while queue:
        flag = queue.pop(0)
        if not flag.startswith(_OPTION):
            rest.append(flag)
            continue
        name, given, value = flag.partition("=")
        metric, dot, option = name.removeprefix(_OPTION).replace("-", "_").partition(".")
        if not (metric and dot and option):
            raise UserError(f"{flag}: want --metric-options.METRIC.OPTION VALUE")
        if not given:
            if not queue:
                raise UserError(f"{flag}: the value is missing")
            value = queue.pop(0)
        if option in options.setdefault(metric, {}):
            raise UserError(f"{name} is given twice")
        try:
            options[metric][option] = yaml.safe_load(value)
        except UNREADABLE:
            raise UserError(
                f"{name} {value}: the value cannot be read; put text with special signs in quotes"
            ) from None
    return rest, options


def metric_options(options: Evaluate, flags: MetricOptions) -> MetricOptions:
    """Defaults of the tiny world, then the file, then flags; UserError for metrics that are not evaluated."""
    file = configuration.read_yaml(options.metric_options_file) if options.metric_options_file else {}
    for metric, given in file.items():
        if not isinstance(given, dict):
            raise UserError(f"{options.metric_options_file}: {metric} wants a mapping of options, got {given!r}")
    for metric, given in [*file.items(), *flags.items()]:
        if metric not in options.names:
            raise UserError(f"options are given for the metric {metric!r}, which --metrics {options.metrics} lacks")
        if given and metric in _WITHOUT_OPTIONS:
            raise UserError(
                f"{_OPTION}{metric}.{next(iter(given))}: the metric {metric} takes no options; leave it out"
            )
    defaults = _TINY_METRICS if options.world else {}
    return {name: {**defaults.get(name, {}), **file.get(name, {}), **flags.get(name, {})} for name in options.names}


def own_metrics(given: MetricOptions) -> dict[str, str]:
    """Kinds of metrics that are no reward's name, by what their options have."""
    marks = {"import": "custom", "url": "remote", "base_url": "vlm_judge"}
    built_in = (*REWARDS, _RULE_ACCURACY, *JUDGE_METRICS, *IMAGE_STATISTICS)
    new = {name: each for name, each in given.items() if name not in built_in}
    return {name: kind for name, each in new.items() for mark, kind in marks.items() if mark in each}


def check(options: Evaluate, own: Collection[str] = ()) -> None:
    """UserError for anything in the flags that would fail after a model is loaded.

    Args:
        own: metrics of the user's, besides those that are known.
    """
    if not options.names:
        raise UserError("--metrics is empty: name at least one, such as rule,dino_similarity")
    known = [*REWARDS, _RULE_ACCURACY, *JUDGE_METRICS, *IMAGE_STATISTICS, *own]
    for name in options.names:
        if name not in known:
            hint = configuration.did_you_mean(name, known, cutoff=0.4)
            raise UserError(f"--metrics {options.metrics}: unknown metric {name!r}{hint}")
    if options.against == "base" and not options.lora:
        raise UserError("--against base compares the base model with itself: pass --lora")
    if options.against and options.against == options.lora:
        raise UserError(f"--against {options.against} is --lora itself: pass another LoRA, or base")
    if not options.prompts and options.world is None:
        raise UserError("--prompts is empty: pass a prompt file")
    compares = any(name in NEED_REFERENCES for name in options.names)
    if compares and not options.references and options.world is None:
        raise UserError(f"--references is empty, but {' or '.join(NEED_REFERENCES)} compares with references")


def read_data(options: Evaluate) -> Sources:
    """Prompts to evaluate on and, where a metric or the flags want them, their references."""
    # `check` has refused empty prompts and references of other models than the shipped
    world = next((name for name, world in WORLDS.items() if world is options.world), "")
    named = options.prompts or world
    lines = load_prompts(shipped_path("held_out_prompts", named))
    prompts = [p.text for p in lines]
    folder = options.references
    if not folder and any(name in NEED_REFERENCES for name in options.names):
        folder = world
    references = None
    if folder:
        references = ReferenceSet.load(shipped_path("references", folder), prompts, fit=options.fit)
    return Sources([], prompts, references, metadata_of(lines))


def build_metrics(
    options: MetricOptions,
    device: torch.device,
    sources: Sources,
    own: Mapping[str, str] | None = None,
    *,
    cache: Path,
    size: int = 64,
) -> dict[str, Reward]:
    """The rewards, each checked against the prompts it will see.

    Args:
        cache: folder in which what a judge compares with is kept.
        own: see `own_metrics`.
        size: side of the images, on which custom rewards are tried out.
    """
    from advgrpo.evaluation.evaluator import ImageStatistic
    from advgrpo.rewards.custom import CustomReward
    from advgrpo.rewards.retrieval import judge_metrics

    own, built = own or {}, {}
    judged = judge_metrics(options, cache)
    for name, given in options.items():
        if name in IMAGE_STATISTICS:
            built[name] = ImageStatistic(name)
            continue
        if name in judged:
            built[name] = judged[name]
            built[name].check_prompts(sources.held_out)
            continue
        owner, kind = f"{_OPTION}{name}", own.get(name, name)
        if kind == "custom":
            rest = {key: value for key, value in given.items() if key != "import"}
            how = {"name": name, "options": rest, "owner": owner, "metadata": sources.metadata, "device": device}
            built[name] = CustomReward(str(given["import"]), **how)
            built[name].try_out(sources.held_out, sources.references, size, device)
            continue
        kind, given = ("rule", {"strict": True}) if name == _RULE_ACCURACY else (kind, given)
        given = {**given, "name": name} if name in own else given
        try:
            built[name] = build_reward(
                kind, device=device, owner=owner, **prompt_options(kind, sources.metadata), **given
            )
        except UserError as error:
            raise UserError(f"--metrics {name}: {error} (options are --metric-options.{name}.OPTION VALUE)") from error
        built[name].check_prompts(sources.held_out)
    return built


@torch.no_grad()
def score_model(
    evaluator: Evaluator, metrics: dict[str, Reward], references: ReferenceSet | None, per_prompt: int, display: Display
) -> Scores:
    """Every metric of every image; an image that cannot be scored is an error, never a number."""
    count = len(evaluator.prompts)
    at_once = max(1, evaluator.micro_batch // per_prompt)
    scores = {name: torch.empty(count, per_prompt, dtype=torch.float64) for name in metrics}
    with display.steps("drawing and scoring", count) as tell:
        for start in range(0, count, at_once):
            numbers = range(start, min(start + at_once, count))
            prompts = [evaluator.prompts[number] for number in numbers for _ in range(per_prompt)]
            images = evaluator.images(prompts, torch.cat([evaluator.ids(number, per_prompt) for number in numbers]))
            for name, metric in metrics.items():
                rows = metric.score(images, prompts, references).double().cpu()
                scores[name][numbers.start : numbers.stop] = rows.view(-1, per_prompt)
            tell(numbers.stop)
    return scores


@dataclass
class Result:
    """One metric: the model's mean, the second model's, and their comparison."""

    model: Interval
    against: Interval | None = None
    comparison: Comparison | None = None


def summarise(scores: dict[str, Scores], options: Evaluate) -> dict[str, Result]:
    """Intervals of every metric, prompts being resampled; `scores` holds one or two models' by name."""
    how = {"confidence": options.confidence, "resamples": options.resamples, "seed": options.seed}
    own, *others = scores.values()
    results = {}
    for name in own:
        results[name] = Result(bootstrap_mean(own[name], **how))
        for other in others:
            results[name].against = bootstrap_mean(other[name], **how)
            results[name].comparison = paired_bootstrap(own[name], other[name], **how)
    return results


def result_table(results: dict[str, Result], names: list[str], options: Evaluate) -> Table:
    """One row per metric: means with intervals; with a second model also difference and win rate."""
    title = f"{' against '.join(names)}: mean [{options.confidence:.0%} interval over prompts]"
    table = Table(Column("metric", no_wrap=True), "model", title=title)
    for heading in ("against", "difference", "win rate") if len(names) > 1 else ():
        table.add_column(heading)
    for name, result in results.items():
        cells = [result.model.text()]
        if result.comparison is not None:
            cells += [result.against.text(), result.comparison.difference.text("+.4f")]
            cells.append(result.comparison.win_rate.text(".1%"))
        table.add_row(name, *cells)
    return table


def report(
    options: Evaluate,
    metric_settings: MetricOptions,
    scores: dict[str, Scores],
    results: dict[str, Result],
    prompts: list[str],
) -> dict:
    """What evaluation.json holds."""
    per_prompt = [
        {
            "prompt": prompt,
            "scores": {model: {name: of[name][i].tolist() for name in of} for model, of in scores.items()},
        }
        for i, prompt in enumerate(prompts)
    ]
    from advgrpo.training.run import versions

    return {
        "settings": {**options.model_dump(mode="json"), "metric_options": metric_settings},
        "versions": versions(),
        "models": list(scores),
        "results": {name: asdict(result) for name, result in results.items()},
        "prompts": per_prompt,
    }


def grid_rows(columns: dict[str, list], references: ReferenceSet | None) -> list:
    """draw_grid's rows from every model's `Evaluator.grid_images`, with up to four references."""
    rows = []
    for number, (prompt, images) in enumerate(next(iter(columns.values()))):
        blocks = [(name, of[number][1]) for name, of in columns.items()]
        if references is not None:
            size = tuple(images.shape[-2:])
            blocks.append(("references", references.load_images(references.files(prompt)[:4], size=size)))
        rows.append((prompt, blocks))
    return rows


@dataclass
class Evaluation:
    """What an evaluation finds."""

    results: dict[str, Result]  # by metric
    report: dict[str, Any]  # what evaluation.json holds


def evaluate_models(options: Evaluate, flags: MetricOptions, console: Console) -> Evaluation:
    """Draw, score, compare; writes evaluation.json and grid.png."""
    from advgrpo.policy.pipelines import pipeline_folder
    from advgrpo.training.preflight import check_model, check_reward, check_size

    metric_settings = metric_options(options, flags)
    own = own_metrics(metric_settings)
    check(options, own)
    for name, given in metric_settings.items():
        if own.get(name) != "custom":
            check_reward(own.get(name, name), given, f"{_OPTION}{name}")
    sources = read_data(options)
    prompts, references = sources.held_out, sources.references
    writable(options.output, "--output")
    cache = Path(options.cache_dir).expanduser()
    writable(cache, "--cache-dir")
    check_model(options.model, "--model")
    distributed = Distributed.start(options.device)
    if distributed.world_size > 1:
        raise UserError("advgrpo.evaluate runs in one process: start it without torchrun")
    device, folder = distributed.device, pipeline_folder(options.model, field="--model")
    drawn = options.drawn(folder)
    check_size(folder, drawn.resolution, model_field="--model", field="--resolution")
    for cut in cut_prompts(folder, prompts, drawn.max_sequence_length):
        console.print(f"note: {cut.describe(len(prompts))}", soft_wrap=True)
    loras = {options.lora or "base": ("--lora", options.lora)}
    if options.against:
        loras[options.against] = ("--against", "" if options.against == "base" else options.against)
    models = {name: settings_of(options, folder, lora, device, flag=flag) for name, (flag, lora) in loras.items()}
    metrics = build_metrics(metric_settings, device, sources, own, cache=cache, size=drawn.resolution)
    scores, images, display = {}, {}, Display(console)
    evaluator = None
    for name, settings in models.items():
        again = evaluator is not None and not settings.model.lora.start_from  # the base of the model that is loaded
        evaluator = evaluator.base() if again else load_model(options, settings, prompts, distributed, display)
        scores[name] = score_model(evaluator, metrics, references, options.images_per_prompt, display)
        images[name] = evaluator.grid_images()
    results = summarise(scores, options)
    found = report(options, metric_settings, scores, results, prompts)
    write_atomically(options.output / "evaluation.json", json.dumps(found, indent=1) + "\n")
    draw_grid(grid_rows(images, references), options.output / "grid.png")
    console.print(result_table(results, list(scores), options))
    console.print(f"wrote {options.output}/evaluation.json and grid.png")
    return Evaluation(results, found)


def evaluate(
    lora: str | Path = "",
    *,
    metrics: Sequence[str],
    output: str | Path,
    metric_options: Mapping[str, Mapping[str, Any]] | None = None,
    console: Console | None = None,
    **options: Any,
) -> dict[str, Result]:
    """Score a model's images, and compare it with a second one on the same noise.

    Args:
        lora: folder of a LoRA, such as `Result.lora`; "" scores the base model.
        metrics: names, such as ["rule", "dino_similarity"].
        output: folder for evaluation.json and grid.png.
        metric_options: options by metric, such as {"aesthetic": {"head": "head.safetensors"}}.
        console: where progress and the table go; None prints them.
        options: the other flags of `python -m advgrpo.evaluate`, by name: model, against, prompts, seed, ...

    Returns:
        By metric, means with intervals over prompts, and with `against` the difference and the win rate.

    Raises:
        UserError: an unknown option or metric, or whatever is wrong with files and models.
    """
    names = {"metrics": ",".join(metrics), "output": Path(output), "lora": str(lora)}
    given = configuration.options_of(Evaluate, {**options, **names})
    own = {name: dict(each) for name, each in (metric_options or {}).items()}
    return evaluate_models(given, own, plain_console() if console is None else console).results


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes of `command.run_command`."""
    return run_command(_evaluate, arguments)


def _evaluate(arguments: list[str]) -> int:
    rest, flags = split_metric_options(arguments)
    options = configuration.parse_options(Evaluate, rest, program="python -m advgrpo.evaluate", about=__doc__)
    quiet_libraries()
    evaluate_models(options, flags, plain_console())
    return 0


if __name__ == "__main__":
    sys.exit(main())

make_callable(__name__)

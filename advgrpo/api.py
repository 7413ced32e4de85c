"""advgrpo from Python: train, evaluate and generate, as often as you like in one process, and in a notebook.

    from advgrpo import Callback, Config, evaluate, generate, train

    result = train(Config.load("tiny", {"iterations": 20, "output_dir": "runs/mine"}))
    scores = evaluate(result.lora, against="base", metrics=["rule"], output="runs/mine/scores")
    drawn = generate("a small red star on the left of a blue background", lora=result.lora, base=True)

They do what the commands of the same name do, with the same settings, checks and errors: bad input is an
`advgrpo.errors.UserError`. Under torchrun `train` is called by every process.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console

from advgrpo import config as configuration
from advgrpo.config import Config
from advgrpo.runtime.command import plain_console
from advgrpo.training.callbacks import Callback

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from advgrpo.evaluate.__main__ import Result as MetricResult


@dataclass(frozen=True)
class Result:
    """What a training leaves."""

    folder: Path  # the output folder, with samples/, curves.png, checkpoints/ and what follows
    lora: Path | None  # what `evaluate`, `generate` and stock diffusers load; None after full fine-tuning
    metrics: list[dict[str, Any]]  # one dictionary per iteration, as in metrics.jsonl
    summary: dict[str, Any]  # summary.json: held-out metrics before and after, speed, versions; {} where it was stopped
    stopped: str  # why it ended early; "" where it did not


@dataclass(frozen=True)
class Drawing:
    """Images of some prompts."""

    prompts: list[str]
    images: dict[str, torch.Tensor]  # "base", "lora": [prompts, images_per_prompt, 3, H, W] float32 in [0, 1]

    def grid(self) -> Image:
        """One picture of all of them, a row per prompt."""
        from advgrpo.reporting.plots import grid_image

        return grid_image(
            [(prompt, [(name, of[i]) for name, of in self.images.items()]) for i, prompt in enumerate(self.prompts)]
        )


def train(
    config: Config | None = None,
    *,
    callbacks: Iterable[Callback] = (),
    resume: Literal["auto"] | bool = False,
    console: Console | None = None,
) -> Result:
    """Train, from the first iteration or from a checkpoint in `config.output_dir`.

    Args:
        config: `Config.load(...)`; None is the embedded tiny run.
        callbacks: told of iterations, evaluations and checkpoints; one can end the run.
        resume: True goes on from the newest checkpoint, as if the run had never stopped; "auto" does so where there is
            one.
        console: where progress goes; None prints it, `Console(quiet=True)` does not.

    Returns:
        The result; the same on every process, but that only process 0's has metrics and summary.

    Raises:
        UserError: whatever is wrong with settings, files or models, before any work.
        RunFailure: the training went wrong; the state of the last whole iteration is saved.
    """
    from advgrpo.reporting.tracking import METRICS_FILE, load_metrics
    from advgrpo.runtime.distributed import Distributed
    from advgrpo.training.resuming import SUMMARY_FILE
    from advgrpo.training.run import Run

    config = Config.load() if config is None else config
    distributed = Distributed.start(config.device, timeout_seconds=config.collective_timeout)
    console = plain_console(quiet=not distributed.is_main) if console is None else console
    folder = Path(config.output_dir)
    try:
        with distributed.guard():
            run = Run(config, distributed, resume=resume, console=console, callbacks=callbacks)
            run.train()
            rows = load_metrics(folder / METRICS_FILE) if distributed.is_main else []
            summary = folder / SUMMARY_FILE
            found = json.loads(summary.read_text()) if distributed.is_main and summary.exists() else {}
    finally:
        distributed.close()
    return Result(folder, folder / "lora" if config.model.train == "lora" else None, rows, found, run.stopped)


def evaluate(
    lora: str | Path = "",
    *,
    metrics: Sequence[str],
    output: str | Path,
    metric_options: Mapping[str, Mapping[str, Any]] | None = None,
    console: Console | None = None,
    **options: Any,
) -> dict[str, MetricResult]:
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
    from advgrpo.evaluate.__main__ import Evaluate, evaluate_models

    names = {"metrics": ",".join(metrics), "output": Path(output), "lora": str(lora)}
    given = configuration.options_of(Evaluate, {**options, **names})
    own = {name: dict(each) for name, each in (metric_options or {}).items()}
    return evaluate_models(given, own, plain_console() if console is None else console).results


def generate(
    prompts: str | Sequence[str], *, lora: str | Path = "", output: str | Path | None = None, **options: Any
) -> Drawing:
    """Images of a base model, a trained LoRA, or both from the same noise.

    Args:
        prompts: one, or several.
        lora: folder of a LoRA; "" draws the base model.
        output: image file for the grid; None writes none.
        options: the other flags of `python -m advgrpo.generate`, by name: base, model, seed, images_per_prompt, ...

    Raises:
        UserError: an unknown option, or whatever is wrong with files and models.
        RunFailure: an image is not finite.
    """
    from advgrpo.generate import Generate, draw_images

    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    given = {**options, "prompt": tuple(prompts), "lora": str(lora)}
    if output is not None:
        given["output"] = Path(output)
    images = draw_images(configuration.options_of(Generate, given), write=output is not None)
    return Drawing(prompts, images)

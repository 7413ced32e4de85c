"""Time to quality: `python -m bench.quality [--seeds 1 2 3] [--minutes 25]`.

How many pictures, and how many seconds of training, until a run in the embedded world has gained what the default run
gains: three contenders, one judge that is in no reward, held-out prompts.

* ours: the default, as `python -m advgrpo.train` trains it. `--ours` names runs that are there, such as those of
  `advgrpo.experiments run dino`; how often and on how many pictures they were evaluated may differ, nothing else.
* released: the schedule of the authors' DINO run (`RELEASED`, each setting as in the preset sd35m-dino-released), on
  stock diffusers and PEFT as B0 is (`fast: false`). Model, prompts, references, guidance, pictures of an iteration and
  judge are the world's. It ends when it has had its `--minutes`, or has its length.
* B1: the best without us. It computes what ours computes (tests/bench/test_baseline.py holds latents, likelihoods,
  rewards and gradients together), so it draws the same pictures, and is not trained here; its seconds are ours times
  the ratio that `bench.step` measured (`--step`).

Every run is an ordinary one in a folder of its own, kept when finished and continued when cut short: the same command
goes on where the last one ended, also with more `--minutes`. Evaluations cost no counted second. `--report` makes no
run. OUT gets quality.json, quality.md and quality.png.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from advgrpo import config as configuration
from advgrpo.config import Config
from advgrpo.errors import UserError
from advgrpo.reporting.tracking import METRICS_FILE, load_metrics
from advgrpo.runtime.checkpoint import iteration_of, latest_checkpoint
from advgrpo.runtime.command import INTERRUPTED, run_command
from advgrpo.training.callbacks import Callback
from advgrpo.training.run import CONFIG_FILE

WORLD = "tiny"
RELEASED_PRESET = "sd35m-dino-released"
# The settings of RELEASED_PRESET that are of its schedule; what is left out is of the model or of the world.
RELEASED_SCHEDULE = {
    "iterations": None,
    "global_steps": None,
    "rollout": ("initial_noise", "window", "dynamics", "eta", "likelihood"),
    "advantage": ("std",),
    "update": ("clip_range", "learning_rate", "minibatches", "ema_decay", "ema_rule", "ema_mini_batches"),
    "adversary": (
        *("hidden_size", "num_patches", "patch_sampling", "reward_weights", "loss_weights", "normalize"),
        *("learning_rate", "betas", "schedule", "alternate_period", "updates_per_iteration", "batch_size"),
        *("reference_choice", "replay_capacity"),
    ),
}
OURS, RELEASED = "ours", "released"
PICTURES = 2  # of each held-out prompt in every evaluation
EVALUATIONS = {OURS: 6, RELEASED: 30}  # iterations between them
OVER = "its share of the time is over"
# Of the released schedule over ours, written down before the first run. Nine of ten rollouts train the head alone, so
# it needs ten times the pictures if an iteration that trains the generator teaches as much as one of ours. A picture of
# its takes 1.4 times the seconds: by bench/results/cpu/step.json B0's iteration with a noise per image takes twice ours
# with shared noise, and nine of ten have no update. Its head takes a step of 1e-4 an iteration, ours ten of 1e-3: more
# is likely, and the target out of reach in 25 minutes, which are some 370 iterations, 37 of them the generator's.
PREDICTED = {"pictures": 10.0, "seconds": 14.0}


@dataclass(frozen=True)
class Run:
    """A folder, and the settings of the run in it."""

    folder: Path
    config: Config


@dataclass(frozen=True)
class Plan:
    """Which runs are made, and where.

    Args:
        world: settings that both contenders share, over which the released schedule is laid.
        metric: the judge's, of the held-out prompts.
        minutes: of training that the released schedule gets, all its seeds together.
        device: "cpu" or "cuda".
        there: folders of finished runs that are ours, instead of those that would be made.
    """

    world: Mapping[str, Any]
    work: Path
    seeds: Mapping[str, Sequence[int]]
    minutes: float
    device: str = "cpu"
    metric: str = "retrieval"
    there: tuple[Path, ...] = ()

    def folder(self, contender: str, seed: int) -> Path:
        return self.work / contender / f"seed-{seed}"

    def runs(self, contender: str) -> list[Run]:
        """Those that are compared; UserError for a folder of `there` that holds none of the default."""
        if contender == OURS and self.there:
            return [Run(folder, self.config(OURS, saved_config(folder).seed)) for folder in self.there]
        return [Run(self.folder(contender, seed), self.config(contender, seed)) for seed in self.seeds[contender]]

    def config(self, contender: str, seed: int) -> Config:
        """The run's whole configuration."""
        common = {
            "seed": seed,
            "device": self.device,
            "output_dir": str(self.folder(contender, seed)),
            "evaluation": {
                "every": EVALUATIONS[contender],
                "images_per_prompt": PICTURES,
                "during_images_per_prompt": PICTURES,
                "metrics": [self.metric],
            },
            "output": {"tensorboard": False},
        }
        settings = dict(self.world)
        if contender == RELEASED:
            for change in (released_schedule(), self._sizes(), {"fast": False}):
                settings = configuration.merge(settings, change)
        return configuration.build(configuration.merge(settings, common), f"contender {contender}")

    def _sizes(self) -> dict[str, Any]:
        """What follows from the world's size: all pictures of an iteration train the head at once, as there."""
        rollout = self.world["rollout"]
        return {"adversary": {"batch_size": rollout["prompts_per_iteration"] * rollout["group_size"]}}

    @property
    def seconds(self) -> float:
        """That one seed of the released schedule may train; ours trains to its end."""
        return 60 * self.minutes / len(self.seeds[RELEASED])


def released_schedule() -> dict[str, Any]:
    """RELEASED_SCHEDULE's settings with the preset's values."""
    preset = configuration.read_preset(RELEASED_PRESET)
    return {
        name: preset[name] if fields is None else {each: preset[name][each] for each in fields}
        for name, fields in RELEASED_SCHEDULE.items()
    }


def seconds_of(row: Mapping[str, Any], config: Config) -> float:
    """What an iteration took: of the processors on a CPU, which neighbours disturb less, of the clock on a GPU."""
    return row["cpu_seconds"] if config.device == "cpu" else row["seconds"]


class Watch(Callback):
    """Says what the judge sees while a run trains, and ends it, after an evaluation, when its time is over.

    Args:
        taken: seconds of the iterations that the log has, by their number. A crash leaves some there that no checkpoint
            has; the run does them again, and they count once.
    """

    def __init__(self, name: str, config: Config, metric: str, limit: float, taken: dict[int, float], console: Console):
        self.name, self.config, self.metric, self.limit, self.taken = name, config, metric, limit, taken
        self.console = console

    @property
    def spent(self) -> float:
        return sum(self.taken.values())

    def on_evaluation(self, stage, scores, iteration):
        if stage != "during":  # then the iteration before it is not logged yet
            self._tell(scores, iteration)

    def on_iteration(self, metrics, flags):
        done, name = metrics["iteration"] + 1, f"eval_{self.metric}"
        self.taken = {number: seconds for number, seconds in self.taken.items() if number < done - 1}
        self.taken[done - 1] = seconds_of(metrics, self.config)
        if name in metrics:
            self._tell(metrics, done)
        return OVER if done % self.config.evaluation.every == 0 and self.spent >= self.limit else None

    def _tell(self, scores, done: int) -> None:
        value, length = scores[f"eval_{self.metric}"], self.config.iterations
        spent = sum(seconds for number, seconds in self.taken.items() if number < done)
        self.console.print(f"{self.name}: {done}/{length}, {spent:.0f} s, {self.metric} {value:.3f}", markup=False)


def make(plan: Plan, contender: str, seed: int, console: Console) -> bool:
    """Train one run to its end, or to the end of its time; False where it was interrupted.

    Raises:
        UserError: the folder holds a run with other settings.
    """
    import advgrpo

    run, name = Run(plan.folder(contender, seed), plan.config(contender, seed)), f"{contender}, seed {seed}"
    if (run.folder / CONFIG_FILE).exists():
        check_settings(run)
    limit = plan.seconds if contender == RELEASED else float("inf")
    watch = Watch(name, run.config, plan.metric, limit, taken_until_checkpoint(run), console)
    if (run.folder / "summary.json").exists() or watch.spent >= limit:
        console.print(f"{name}: there already", markup=False)
        return True
    run.folder.mkdir(parents=True, exist_ok=True)
    with (run.folder / "log.txt").open("a") as log:
        result = advgrpo.train(run.config, callbacks=[watch], resume="auto", console=Console(file=log, width=200))
    return not result.stopped or OVER in result.stopped


def taken_until_checkpoint(run: Run) -> dict[int, float]:
    """Seconds of the iterations that the last checkpoint has, by their number: from there the run goes on."""
    last = latest_checkpoint(run.folder / "checkpoints")
    done = 0 if last is None else iteration_of(last) or 0
    return {number: seconds for number, seconds in taken(run).items() if number < done} if done else {}


def taken(run: Run) -> dict[int, float]:
    """Seconds of the iterations that were logged, by their number; UserError without metrics.jsonl."""
    return {row["iteration"]: seconds_of(row, run.config) for row in load_metrics(run.folder / METRICS_FILE)}


def saved_config(folder: Path) -> Config:
    """Of the run in a folder; UserError where there is none."""
    return configuration.build(configuration.read_yaml(folder / CONFIG_FILE), str(folder / CONFIG_FILE))


def check_settings(run: Run) -> None:
    """UserError where the folder holds another run: only where it is kept, and how often and on how many pictures it is
    looked at, may differ."""
    saved, wanted = saved_config(run.folder).model_dump(mode="json"), run.config.model_dump(mode="json")
    for each in (saved, wanted):
        each["output_dir"] = each["data"]["cache_dir"] = each["device"] = each["output"] = ""
        each["evaluation"] = {name: each["evaluation"][name] for name in ("num_steps", "guidance_scale")}
    if other := [name for name in wanted if saved[name] != wanted[name]]:
        raise UserError(f"{run.folder} holds another run ({', '.join(other)}); remove it, or name another folder")


def command(arguments: list[str]) -> int:
    """Exit codes of `run_command`."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ours", type=Path, nargs="+", default=[], help="folders of runs of the default, instead")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of ours")
    parser.add_argument("--released-seeds", type=int, nargs="+", default=[1], help="of the released schedule")
    parser.add_argument("--minutes", type=float, default=25, help="of training for the released schedule in all")
    parser.add_argument("--share", type=float, default=0.75, help="of the default's gain that is the target")
    parser.add_argument("--work", type=Path, default=Path("runs/quality"), help="folder of the runs")
    parser.add_argument("--out", type=Path, default=Path("bench/results/cpu"))
    parser.add_argument("--step", type=Path, default=Path("bench/results/cpu/step.json"), help="what bench.step wrote")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--report", action="store_true", help="only write up the runs that are there")
    flags = parser.parse_args(arguments)
    if not 0 < flags.share <= 1 or flags.minutes <= 0:
        parser.error(f"--share {flags.share:g} --minutes {flags.minutes:g}: want a share in (0, 1] and some minutes")
    seeds = {OURS: flags.seeds, RELEASED: flags.released_seeds}
    for flag, given in zip(("--seeds", "--released-seeds"), seeds.values()):
        if len(set(given)) < len(given) or min(given) < 0:
            parser.error(f"{flag} {' '.join(map(str, given))}: want different numbers of at least 0")
    from . import quality_report

    plan = Plan(configuration.read_preset(WORLD), flags.work.resolve(), seeds, flags.minutes, flags.device)
    plan = replace(plan, there=tuple(flags.ours))
    ratio, console = quality_report.step_ratio(flags.step), Console(soft_wrap=True)
    for run in plan.runs(OURS) if plan.there else ():
        check_settings(run)
    for contender, given in () if flags.report else seeds.items():
        for seed in () if contender == OURS and plan.there else given:
            if not make(plan, contender, seed, console):
                return INTERRUPTED
    quality_report.write(plan, flags.share, ratio, flags.out, console)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    return run_command(command, arguments, interrupted="interrupted: call again to continue")


if __name__ == "__main__":
    sys.exit(main())

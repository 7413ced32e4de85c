r"""The paper's comparisons in miniature: every arm trained with several seeds, judged, compared, and written up.

python -m advgrpo.experiments run all                            # every run, then docs/results/
python -m advgrpo.experiments run hacking repair --seeds 0 1 2
python -m advgrpo.experiments run all --shard 0/2                # the first half; start 1/2 beside it, then report
python -m advgrpo.experiments run dino --seeds 2 3 --iterations 40
python -m advgrpo.experiments report all                         # from the runs that are there
python -m advgrpo.experiments pages                              # from docs/results/results.json alone

Finished runs are kept and interrupted ones continued, so that the same command goes on where the last one ended.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field
from rich.console import Console

from advgrpo import config as configuration
from advgrpo.config import Options, Positional
from advgrpo.errors import UserError
from advgrpo.experiments.plan import (
    EXPERIMENTS,
    GUIDANCE,
    GUIDANCE_SCALES,
    IMAGES_PER_PROMPT,
    REPORT_PROMPTS,
    TUNING_PROMPTS,
    WORLD,
    chains,
    select,
    take_shard,
)
from advgrpo.runtime.command import INTERRUPTED, plain_console, run_command
from advgrpo.runtime.folders import writable
from advgrpo.runtime.libraries import quiet_libraries


class Pages(Options):
    """Write pages and figures anew from results.json, without any run."""

    output: Path = Path("docs/results")
    """Folder with results.json."""


class Report(Options):
    """Write tables, figures and numbers of the runs that are there."""

    names: Annotated[tuple[str, ...], Positional] = ("all",)
    """all, or some of the experiments."""
    output: Path = Path("docs/results")
    """Folder for the pages, figures and results.json."""
    work: Path = Path("runs/experiments")
    """Folder of the runs."""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, lt=2**63)], ...], Field(min_length=1)] = (0, 1, 2)
    """Every arm is trained once with each; intervals are over them."""
    iterations: Annotated[int, Field(ge=1, le=2**31 - 1)] = 100
    """Iterations of every run."""
    guidance_scales: Annotated[tuple[Annotated[float, Field(ge=1, le=100)], ...], Field(min_length=1)] = GUIDANCE_SCALES
    """Classifier-free guidance at which the judge sees every model; 2, at which they train, must be one."""
    prompts: Annotated[str, Field(min_length=1)] = REPORT_PROMPTS
    """Prompt file of what is reported."""
    tuning_prompts: Annotated[str, Field(min_length=1)] = TUNING_PROMPTS
    """Prompt file on which every model's own best guidance is chosen: other prompts."""
    images_per_prompt: Annotated[int, Field(ge=2, le=1000)] = IMAGES_PER_PROMPT
    """Images of every prompt that the judge sees."""
    resamples: Annotated[int, Field(ge=100, le=1_000_000)] = 10_000
    """Bootstrap resamples of seeds and prompts; a verdict among all claims needs some 2,000."""
    config: Path | None = None
    """YAML laid over every arm: other models, data or sizes."""
    keep: bool = False
    """Arms with more runs in the results.json that is there keep its numbers, instead of being left out."""


class Make(Report):
    """Make the runs, then write the report."""

    jobs: Annotated[int, Field(ge=1, le=256)] = 1
    """Processes side by side; the machine's cores are shared out among them."""
    shard: str = "0/1"
    """I/N: only this share of the runs, and no report."""


def make(options: Make, console: Console) -> int:
    """Exit code: 0, or 1 when an arm failed."""
    from advgrpo.experiments.runs import make_all

    every = chains(select(options.names), options.seeds)
    mine, runs = take_shard(every, options.shard), plan(options)
    if options.jobs > 1:
        code = _make_side_by_side(options)
    else:
        failed = make_all(mine, runs, console)
        for job in failed:
            console.print(f"failed: {job}: {runs.failure(job)}")
        code = int(bool(failed))
    if code == INTERRUPTED or options.shard != "0/1":
        return code
    return max(code, report(options, console))


def _make_side_by_side(options: Make) -> int:
    """One process per job, each with a share of the shard's runs; the worst of their exit codes."""
    number, count = (int(part) for part in options.shard.split("/"))
    threads = str(max(1, (os.cpu_count() or 1) // options.jobs))
    environment = {**os.environ, "OMP_NUM_THREADS": threads}
    command = [sys.executable, "-m", "advgrpo.experiments", "run", *options.names, "--work", str(options.work)]
    command += ["--seeds", *map(str, options.seeds), "--iterations", str(options.iterations)]
    command += ["--guidance-scales", *map(str, options.guidance_scales), "--prompts", options.prompts]
    command += ["--tuning-prompts", options.tuning_prompts, "--images-per-prompt", str(options.images_per_prompt)]
    command += ["--config", str(options.config)] if options.config else []
    shards = [f"{number + count * job}/{count * options.jobs}" for job in range(options.jobs)]
    processes = [subprocess.Popen([*command, "--shard", shard], env=environment) for shard in shards]

    def forward(number: int, _frame: object) -> None:
        for process in processes:
            process.send_signal(number)

    before = signal.signal(signal.SIGTERM, forward)  # the children save a checkpoint and end; so does the wait below
    try:
        return max(abs(process.wait()) for process in processes)
    except KeyboardInterrupt:  # the terminal has sent it to the children as well: let them save
        for process in processes:
            process.wait()
        return INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, before)


def report(options: Report, console: Console) -> int:
    """Exit code: 0, or 1 when runs are missing."""
    from advgrpo.experiments.report import write_report

    missing = write_report(
        select(options.names), plan(options), options.seeds, options.output, options.resamples, keep=options.keep
    )
    for job, reason in missing.items():
        console.print(f"missing: {job}: {reason}")
    console.print(f"wrote {options.output}/README.md")
    return int(bool(missing))


def pages(options: Pages, console: Console) -> int:
    """Exit code: 0."""
    from advgrpo.experiments.report import write_pages

    writable(options.output, "--output")
    write_pages(options.output)
    console.print(f"wrote {options.output}/README.md")
    return 0


def plan(options: Report):
    """Where the runs are and what they are made with; a bad file is one error here, not one per run."""
    from advgrpo.experiments.judging import Judging, check_lists
    from advgrpo.experiments.runs import Plan

    if GUIDANCE not in options.guidance_scales:
        scales = " ".join(f"{scale:g}" for scale in options.guidance_scales)
        raise UserError(f"--guidance-scales {scales}: arms train at {GUIDANCE:g}, where they are compared; add it")
    if len(set(options.seeds)) < len(options.seeds):
        raise UserError(f"--seeds {' '.join(map(str, options.seeds))}: a seed is given twice; leave one out")
    for folder, flag in ((options.output, "--output"), (options.work, "--work")):
        writable(folder, flag)
    lists = {"tuning": options.tuning_prompts, "report": options.prompts}
    judging = Judging(lists, WORLD, tuple(sorted(set(options.guidance_scales))), options.images_per_prompt)
    check_lists(judging)
    runs = Plan(options.work.resolve(), options.iterations, judging, options.config)
    for job, *_ in chains(select(options.names), options.seeds[:1]):  # whose followers need its LoRA
        configuration.check(runs.config(job))
    return runs


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes of `command.run_command`; 1 also when a run failed or is missing."""
    return run_command(_experiments, arguments, interrupted="interrupted: call again to continue")


def _experiments(arguments: list[str]) -> int:
    commands = {"run": Make, "report": Report, "pages": Pages}
    about = f"{__doc__}\nExperiments: {', '.join(EXPERIMENTS)}"
    options = configuration.parse_command(commands, arguments, program="python -m advgrpo.experiments", about=about)
    quiet_libraries()
    from advgrpo.experiments.runs import Stopped

    console = plain_console(soft_wrap=True)
    if isinstance(options, Pages):
        return pages(options, console)
    try:
        return make(options, console) if isinstance(options, Make) else report(options, console)
    except Stopped as error:
        print(f"interrupted: {error}", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())

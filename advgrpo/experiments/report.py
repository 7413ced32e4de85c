"""Pages, figures and results.json of the experiments, from the runs that are there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from advgrpo.data.sources import Sources
from advgrpo.experiments.figures import draw_comparison
from advgrpo.experiments.pages import index, page
from advgrpo.experiments.plan import EXPERIMENTS, METRIC_LABELS, Experiment, Job
from advgrpo.experiments.results import Results, numbers
from advgrpo.experiments.runs import Plan
from advgrpo.reporting.plots import draw_grid
from advgrpo.runtime.atomic import write_atomically


def write_report(names: Sequence[str], plan: Plan, seeds: Sequence[int], output: Path) -> dict[Job, str]:
    """Write NAME.md, NAME.png and NAME-samples.png per experiment, README.md and results.json.

    Entries of experiments that are not named stay in results.json and in the index. An experiment without any finished
    run has no page.

    Returns:
        The runs that are missing, with the reason.
    """
    output.mkdir(parents=True, exist_ok=True)
    file = output / "results.json"
    known = json.loads(file.read_text()) if file.is_file() else {}
    missing: dict[Job, str] = {}
    for name in names:
        results = Results(name, plan, seeds)
        missing |= results.missing
        if not results.runs:
            continue
        known[name] = numbers(results)
        _draw(results, output)
        write_atomically(output / f"{name}.md", page(results, known[name]))
    known = {name: known[name] for name in EXPERIMENTS if name in known}
    write_atomically(file, json.dumps(known, indent=1) + "\n")
    write_atomically(output / "README.md", index(known))
    return missing


def _draw(results: Results, output: Path) -> None:
    experiment = results.experiment
    curves = {
        experiment.arms[arm]: [results.curve(Job(arm, seed)) for seed in results.seeds(arm)] for arm in results.arms
    }
    levels = results.of_references(next(iter(results.runs)))
    shared = len({_reference_source(results, job) for job in results.runs}) == 1
    panels = {metric: METRIC_LABELS[metric] for metric in experiment.metrics}
    draw_comparison(curves, panels, levels if shared else {}, output / f"{results.name}.png")
    draw_grid(sample_rows(results, experiment), output / f"{results.name}-samples.png")


def _reference_source(results: Results, job: Job) -> str:
    data = results.runs[job].config.data
    return data.style or data.references


def sample_rows(results: Results, experiment: Experiment) -> list[tuple[str, list[tuple[str, torch.Tensor]]]]:
    """draw_grid's rows: base, every arm and the references, all arms of one seed and therefore from the same noise.

    Where arms have different references, those follow the last of the arms that share them.
    """
    arms = results.arms
    seed = next((s for s in results.seeds(arms[0]) if all(s in results.seeds(arm) for arm in arms)), None)
    jobs = [Job(arm, results.seeds(arm)[0] if seed is None else seed) for arm in arms]
    prompts = Sources.read(results.runs[jobs[0]].config).held_out
    samples = [results.plan.samples(job) for job in jobs]
    each = 4 if len(jobs) < 3 else 3
    sources = [_reference_source(results, job) for job in jobs]
    same = len(set(sources)) == 1
    sets = [results.references(job) for job in (jobs[:1] if same else jobs)]
    size = tuple(samples[0]["base"].shape[-2:])
    rows = []
    for number in range(len(samples[0]["base"])):
        blocks = [("base", samples[0]["base"][number, :each])]
        for position, (job, images) in enumerate(zip(jobs, samples)):
            blocks.append((experiment.arms[job.arm], images["trained"][number, :each]))
            if not same and sources[position] not in sources[position + 1 :]:
                files = sets[position].files(prompts[number])[:each]
                blocks.append((f"{experiment.arms[job.arm]}: references", sets[position].load_images(files, size=size)))
        if same:
            files = sets[0].files(prompts[number])[:each]
            blocks.append(("references", sets[0].load_images(files, size=size)))
        rows.append((prompts[number], blocks))
    return rows

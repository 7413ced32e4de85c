"""Pages, figures and results.json of the experiments, from the runs that are there; pages again from the numbers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from advgrpo.data.sources import Sources
from advgrpo.errors import UserError
from advgrpo.experiments.earlier import keep_earlier
from advgrpo.experiments.figures import draw_curves, draw_fronts
from advgrpo.experiments.pages import index, page
from advgrpo.experiments.plan import EXPERIMENTS, Job
from advgrpo.experiments.results import RESAMPLES, Results, numbers, sample_seed
from advgrpo.experiments.runs import Plan
from advgrpo.reporting.plots import draw_below, draw_grid
from advgrpo.runtime.atomic import write_atomically
from advgrpo.runtime.reading import parse_json, read_text

NUMBERS = "results.json"


def write_report(
    names: Sequence[str],
    plan: Plan,
    seeds: Sequence[int],
    output: Path,
    resamples: int = RESAMPLES,
    *,
    keep: bool = False,
) -> dict[Job, str]:
    """Write results.json and NAME-samples.png per experiment, then `write_pages`.

    Entries of experiments that are not named stay as they are. An experiment without any finished run has no entry, and
    a page that says so. `keep`: arms keep their numbers of an earlier report (earlier.py).

    Returns:
        The runs that are missing, with the reason.
    """
    output.mkdir(parents=True, exist_ok=True)
    known = read_numbers(output) if (output / NUMBERS).is_file() else {}
    missing: dict[Job, str] = {}
    for name in names:
        results = Results(name, plan, seeds, resamples)
        missing |= results.missing
        if not results.runs:
            continue
        found, earlier = numbers(results), known.get(name)
        known[name] = keep_earlier(found, earlier) if keep else found
        _draw_samples(results, known[name]["arms"], (earlier or {}).get("arms", {}), output / f"{name}-samples.png")
    known = {name: known[name] for name in EXPERIMENTS if name in known}
    write_atomically(output / NUMBERS, json.dumps(known, indent=1) + "\n")
    write_pages(output)
    return missing


def _draw_samples(results: Results, reported: dict[str, dict], earlier: dict[str, dict], file: Path) -> None:
    """The picture of the reported arms. The images of those that are kept are gone, but the earlier picture shows them:
    it stays, with the arms whose runs are not of that report below.

    Args:
        reported: arm -> its numbers, now.
        earlier: the same of the earlier report.
    """
    made = [arm for arm, entry in reported.items() if entry["runs"]]
    if made == results.arms or not file.is_file():
        draw_grid(sample_rows(results, results.arms), file)
    elif new := [arm for arm in results.arms if reported[arm]["runs"] != earlier.get(arm, {}).get("runs")]:
        with Image.open(file) as picture:
            draw_below(picture, sample_rows(results, new), file)


def read_numbers(output: Path) -> dict[str, dict]:
    """results.json of a folder; UserError where there is none, or one that is damaged."""
    file = output / NUMBERS
    if not file.is_file():
        raise UserError(f"--output {output}: it has no {NUMBERS}; run the experiments first")
    again = "run the experiments again, or take it from version control"
    return parse_json(read_text(file, "numbers", again), f"--output {output}: {NUMBERS}", again)


def write_pages(output: Path) -> None:
    """NAME.md of every experiment, NAME.png and NAME-front.png of those in results.json, and README.md.

    The claims' verdicts rest on each other, so all pages are written.
    """
    known = read_numbers(output)
    for name in EXPERIMENTS:
        if name in known:
            draw_curves(known[name], output / f"{name}.png")
            draw_fronts(known[name], output / f"{name}-front.png", EXPERIMENTS[name].metrics)
        write_atomically(output / f"{name}.md", page(name, known))
    write_atomically(output / "README.md", index(known))


def _reference_source(results: Results, job: Job) -> str:
    data = results.runs[job].config.data
    return data.style or data.references


def sample_rows(results: Results, arms: Sequence[str]) -> list[tuple[str, list[tuple[str, torch.Tensor]]]]:
    """draw_grid's rows: base, these arms and the references, all arms of one seed and therefore from the same noise.

    Where arms have different references, those follow the last of the arms that share them.
    """
    experiment, seed = results.experiment, sample_seed(results)
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

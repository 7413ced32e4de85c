"""The experiments' Markdown. Nothing is computed here; what numbers alone would not say is the experiment's note."""

from __future__ import annotations

from collections import Counter

from advgrpo.experiments.plan import ARMS, DISTANCES, EXPERIMENTS, METRIC_LABELS, Claim, Experiment, Job
from advgrpo.experiments.results import Results

_VERDICTS = ("as expected", "contradicts", "undecided")
_WORDS = {"as expected": "as expected", "contradicts": "**contradicts** the expectation", "undecided": "undecided"}


def page(results: Results, found: dict) -> str:
    """One experiment's page."""
    name, experiment = results.name, results.experiment
    parts = [
        heading(experiment, found),
        "## Result",
        _table(results),
        _table_legend(results),
        "## Expected and found",
        _claims(results),
        "Intervals are Student's t, 95 %, over seeds, of the paired change (same seed, prompts and noise). With "
        f"{len(found['seeds'])} seeds they are wide: *undecided* means that the interval does not settle it, not that "
        "nothing happened.",
        "## Curves",
        "Mean over seeds, range between them shaded. Points during training rest on 2 images per prompt, the first "
        f"and last on {_images_per_prompt(results)}.",
        f"![curves]({name}.png)",
        "## Samples",
        f"Report prompts, one noise for all models (seed {_sample_seed(results)}).",
        f"![samples]({name}-samples.png)",
        "## How it was made",
        _how(results, found),
    ]
    if results.missing:
        parts += ["## Missing", "\n".join(f"- {job}: {reason}" for job, reason in results.missing.items())]
    return "\n\n".join(parts) + "\n"


def heading(experiment: Experiment, found: dict) -> str:
    """The page's beginning, up to its tables: what was asked, what the paper says, and how the expectations fared."""
    parts = [
        f"# {experiment.title}",
        experiment.question,
        f"**The paper.** {experiment.paper} (SD3.5-medium at full size: directions can be compared, figures cannot.)",
        *([f"**Note.** {experiment.note}"] if experiment.note else []),
        summary(found),
    ]
    return "\n\n".join(parts)


def summary(found: dict) -> str:
    """A sentence that counts how the expectations fared."""
    counts = Counter(claim["verdict"] for claim in found["claims"])
    parts = [f"{counts[verdict]} {_WORDS[verdict]}" for verdict in _VERDICTS if counts[verdict]]
    total = len(found["claims"])
    return f"**Found.** Of {total} expectations: {', '.join(parts)} ({len(found['seeds'])} seeds)."


def _table(results: Results) -> str:
    lines = ["| metric | arm | base | final | change [95 % interval] |", "|---|---|---|---|---|"]
    for metric in results.experiment.metrics:
        for arm in results.arms:
            base, final = (results.mean(arm, metric, stage) for stage in ("base", "final"))
            change = results.change(arm, metric)
            label = results.experiment.arms[arm]
            lines.append(f"| {METRIC_LABELS[metric]} | {label} | {base:.3f} | {final:.3f} | {change} |")
    return "\n".join(lines)


def _table_legend(results: Results) -> str:
    levels: dict[str, list[str]] = {}
    for arm in results.arms:
        of_references = results.of_references(Job(arm, results.seeds(arm)[0]))
        for metric, value in of_references.items():
            if {metric, f"{metric}_distance"} & set(results.experiment.metrics):
                levels.setdefault(metric, []).append(f"{value:.3f}")
    parts = ["Means over seeds, on the report prompts."]
    for metric, values in levels.items():
        same = len(set(values)) == 1
        given = (
            values[0]
            if same
            else ", ".join(f"{v} ({results.experiment.arms[a]})" for a, v in zip(results.arms, values))
        )
        parts.append(f"The references' {METRIC_LABELS[metric]} is {given}.")
    if set(DISTANCES) & set(results.experiment.metrics):
        parts.append("A distance is that of the images' mean from the references' mean; smaller is closer.")
    return " ".join(parts)


def _claims(results: Results) -> str:
    lines = ["| expected | found | |", "|---|---|---|"]
    for claim in results.experiment.claims:
        change = results.change(claim.arm, claim.metric, claim.against)
        if change is None:
            lines.append(f"| {_expectation(results, claim)} | no finished runs | undecided |")
            continue
        direction = change.direction
        if claim.against:
            direction = {"rises": "higher", "falls": "lower"}.get(direction, direction)
        lines.append(f"| {_expectation(results, claim)} | {change}: {direction} | {_WORDS[change.verdict(claim)]} |")
    return "\n".join(lines)


_COMPARED = {
    "rises": "is higher than",
    "falls": "is lower than",
    "does not fall": "is not lower than",
    "does not rise": "is not higher than",
    "stays": "equals",
}


def _expectation(results: Results, claim: Claim) -> str:
    labels = results.experiment.arms
    margin = f" (within {claim.margin:g})" if claim.margin else ""
    subject = f"{labels[claim.arm]}: {METRIC_LABELS[claim.metric]}"
    if claim.against:
        return f"{subject} {_COMPARED[claim.expected]} with {labels[claim.against]}{margin}"
    return f"{subject} {claim.expected}{margin}"


def _images_per_prompt(results: Results) -> int:
    return next(iter(results.runs.values())).config.evaluation.images_per_prompt


def _sample_seed(results: Results) -> str:
    seeds = [set(results.seeds(arm)) for arm in results.arms]
    common = set.intersection(*seeds)
    return str(min(common)) if common else "differs between arms"


def _how(results: Results, found: dict) -> str:
    seeds = " ".join(map(str, found["seeds"]))
    options = f"--seeds {seeds} --iterations {found['iterations']}"
    config = f" --config {results.plan.file.name}" if results.plan.file else ""
    commands = f"```\npython -m advgrpo.experiments run {results.name} {options}{config}\n```"
    arms = "\n".join(
        f"- {label}: preset `{ARMS[arm].preset}`"
        + (f" with `{ARMS[arm].overrides}`" if ARMS[arm].overrides else "")
        + (f", started from the LoRA of `{ARMS[arm].start_from}`" if ARMS[arm].start_from else "")
        for arm, label in results.experiment.arms.items()
    )
    summaries = [run.summary for run in results.runs.values()]
    machines = sorted({_machine(s["machine"]) for s in summaries})
    versions = sorted({", ".join(f"{name} {v}" for name, v in s["versions"].items()) for s in summaries})
    seconds = sum(s["training_seconds"] for s in summaries)
    made = (
        f"{len(summaries)} runs of {found['iterations']} iterations, {seconds / 60:.0f} minutes of training in total, "
        f"finished {min(s['finished'] for s in summaries)[:10]}; {'; '.join(machines)}; {'; '.join(versions)}."
    )
    return f"{commands}\n\n{arms}\n\n{made}"


def _machine(machine: dict) -> str:
    return f"{machine['platform']}, {machine['cpus']} CPU cores" + (f", {machine['gpu']}" if machine["gpu"] else "")


def index(known: dict[str, dict]) -> str:
    """README.md of the results: every experiment with how its expectations fared."""
    lines = [
        "# Results",
        "The paper's comparisons in miniature, on the shipped tiny models: every number is a mean over seeds, on 48 "
        "report prompts that no setting was chosen on. Pages are written by `python -m advgrpo.experiments "
        "report`; their verdicts follow from the intervals. [results.json](results.json) has every number of "
        "every run.",
        "| experiment | as expected | contradicts | undecided | seeds × iterations |\n|---|---|---|---|---|\n"
        + "\n".join(_index_row(name, found) for name, found in known.items()),
    ]
    notes = {name: EXPERIMENTS[name].note for name in known if EXPERIMENTS[name].note}
    if notes:
        lines.append("Beside the counts:")
        lines.append("\n".join(f"- [{EXPERIMENTS[name].title}]({name}.md): {note}" for name, note in notes.items()))
    absent = [name for name in EXPERIMENTS if name not in known]
    if absent:
        lines.append(f"Not made yet: {', '.join(absent)}.")
    return "\n\n".join(lines) + "\n"


def _index_row(name: str, found: dict) -> str:
    counts = Counter(claim["verdict"] for claim in found["claims"])
    cells = " | ".join(str(counts[verdict]) for verdict in _VERDICTS)
    return f"| [{found['title']}]({name}.md) | {cells} | {len(found['seeds'])} × {found['iterations']} |"

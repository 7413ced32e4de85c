"""The experiments' Markdown, from results.json alone. Nothing is compared here but p-values with each other (Holm), and
costs and curves with those of the cheapest arm; what numbers would not say is the experiment's note."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from advgrpo.experiments.comparing import (
    CONFIRMED,
    CONTRADICTED,
    LEVEL,
    MIN_SEEDS,
    UNDECIDED,
    Evidence,
    Verdict,
    verdicts,
)
from advgrpo.experiments.plan import (
    ARMS,
    EXPERIMENTS,
    GUIDANCE,
    GUIDANCE_SCALES,
    IMAGES_PER_PROMPT,
    METRIC_LABELS,
    REPORT_PROMPTS,
    TUNING_PROMPTS,
    WORLD,
    Claim,
    Experiment,
)
from advgrpo.intervals import Interval
from advgrpo.tiny import WORLDS

Known = Mapping[str, dict]  # results.json: experiment -> results.numbers

_WORDS = {CONFIRMED: "confirmed", CONTRADICTED: "**contradicted**", UNDECIDED: "undecided"}
_FORMS = {"kid": ".1f", "diversity": ".1%", "pickscore": ".4f"}  # of a metric's changes; others have three decimals


def judged(known: Known) -> dict[str, list[tuple[Claim, dict, Verdict]]]:
    """Every claim of the plan with its entry and its verdict among all; an empty entry where it was not run."""
    every = [(name, claim) for name, experiment in EXPERIMENTS.items() for claim in experiment.claims]
    entries = [_entry(known.get(name, {}), claim) for name, claim in every]
    found = verdicts([Evidence(**entry["evidence"]) if "evidence" in entry else None for entry in entries])
    result: dict[str, list] = {name: [] for name in EXPERIMENTS}
    for (name, claim), entry, verdict in zip(every, entries, found):
        result[name].append((claim, entry, verdict))
    return result


def _entry(of_experiment: dict, claim: Claim) -> dict:
    """What results.json has of a claim as it is in the plan today."""
    own = asdict(claim)
    return next((e for e in of_experiment.get("claims", []) if own.items() <= e.items()), {})


def page(name: str, known: Known) -> str:
    """One experiment's page, also where nothing of it was run."""
    found, claims, experiment = known.get(name), judged(known)[name], EXPERIMENTS[name]
    parts = [heading(experiment, found, claims)]
    if claims:
        parts += ["## Expected and found", _claims(experiment, claims), _legend()]
    if found is not None:
        parts += _evidence(name, found)
    return "\n\n".join(parts) + "\n"


def _evidence(name: str, found: dict) -> list[str]:
    """What a page with numbers has below its claims."""
    parts = [
        "## Changes from the base model",
        _changes(EXPERIMENTS[name], found),
        "Means over seeds and prompts, 95 % intervals over both (two-way bootstrap). *Own best*: every model at the "
        "guidance where the tuning prompts find it best.",
        *_differences(EXPERIMENTS[name], found),
        "## Fronts",
        f"Every model at guidance {_listed(found['guidance_scales'])}; thin lines are seeds. Left is nearer "
        "to the references; up is better, but for a distance.",
        f"![fronts]({name}-front.png)",
        "## While training",
        _costs(found),
        f"Held-out prompts, {_held_out_images(found)}; mean over seeds, range between them shaded.",
        f"![curves]({name}.png)",
        "## Samples",
        _samples(found),
        f"![samples]({name}-samples.png)",
        "## How it was made",
        _how(name, found),
    ]
    if found["missing"]:
        parts += ["## Not run", "\n".join(f"- {job}: {reason}" for job, reason in found["missing"].items())]
    return parts


def heading(experiment: Experiment, found: dict | None, claims: Sequence[tuple[Claim, dict, Verdict]]) -> str:
    """The page's beginning, up to its tables: what was asked, what the paper says, and how the claims fared."""
    return "\n\n".join(
        [
            f"# {experiment.title}",
            experiment.question,
            f"**The paper.** {experiment.paper} (SD3.5-medium at full size: compare directions, not figures.)",
            *([f"**Note.** {experiment.note}"] if experiment.note else []),
            _summary(found, claims),
            *_contradictions(experiment, claims),
            *_not_run(experiment, found),
        ]
    )


def _summary(found: dict | None, claims: Sequence[tuple[Claim, dict, Verdict]]) -> str:
    """A sentence that counts how the claims fared."""
    counts = Counter(verdict.word for _, _, verdict in claims)
    parts = [f"{counts[word]} {_WORDS[word]}" for word in _WORDS if counts[word]]
    untested = sum(verdict.p is None for _, _, verdict in claims)
    note = f", {untested} of them not tested" if untested else ""
    if found is None:
        return (
            f"**Found.** Nothing yet: none of the {len(claims)} claims below was tested."
            if claims
            else "**Found.** Nothing yet."
        )
    seeds = len(found["seeds"])
    made = f"{seeds} seed{'s' * (seeds != 1)} × {_lengths(found)} iterations"
    if not claims:
        return f"**Found.** What the tables say: no claim is tested here ({made})."
    return f"**Found.** Of {len(claims)} claims: {', '.join(parts)}{note} ({made})."


def _contradictions(experiment: Experiment, claims: Sequence[tuple[Claim, dict, Verdict]]) -> list[str]:
    against = [(claim, entry) for claim, entry, verdict in claims if verdict.word == CONTRADICTED]
    return [
        f"**Contradicts what the paper leads to expect:** {expectation(experiment, claim)}. Found: "
        f"{_interval(claim.metric, entry['found'], signed=claim.expected != 'reaches')}."
        for claim, entry in against
    ]


def _not_run(experiment: Experiment, found: dict | None) -> list[str]:
    made = set() if found is None else {name for name, arm in found["arms"].items() if arm["runs"]}
    absent = [label for name, label in experiment.arms.items() if name not in made]
    return [f"**Not run:** {', '.join(absent)}."] if absent else []


def _legend() -> str:
    total = sum(len(experiment.claims) for experiment in EXPERIMENTS.values())
    return (
        f"p is Holm's, over all {total} claims of the plan together; at most {LEVEL:g} is a verdict. Claims that were "
        f"not run, or with fewer than {MIN_SEEDS} seeds, are not tested and count all the same. *Undecided* means that "
        "these seeds and prompts do not settle it, not that nothing happened. *Cost*: CPU time, images drawn and "
        "references shown, in units of the other arm's."
    )


def _claims(experiment: Experiment, claims: Sequence[tuple[Claim, dict, Verdict]]) -> str:
    lines = ["| expected | found [95 %] | p | cost | verdict |", "|---|---|---|---|---|"]
    for claim, entry, verdict in claims:
        signed = claim.expected != "reaches"
        found = _interval(claim.metric, entry["found"], signed=signed) if "found" in entry else "not run"
        p = "–" if verdict.p is None else f"{verdict.p:.3f}"
        word = _WORDS[verdict.word]
        lines.append(f"| {expectation(experiment, claim)} | {found} | {p} | {_cost_ratio(entry)} | {word} |")
    return "\n".join(lines)


def _cost_ratio(entry: dict) -> str:
    """As "CPU 1.8×, drawn 1×, shown 0.5×"; against the base model, which costs nothing, a dash."""
    names = {"cpu_seconds": "CPU", "images_drawn": "drawn", "references_shown": "shown"}
    pairs = [(names[name], *values) for name, values in entry.get("compute", {}).items() if any(values)]
    parts = [f"{name} {one / other:.2g}×" if other else f"{name} {one:.0f} against 0" for name, one, other in pairs]
    return ", ".join(parts) or "–"


_COMPARED = {
    "rises": "is higher than",
    "falls": "is lower than",
    "does not fall": "is not lower than",
    "does not rise": "is not higher than",
    "stays": "equals",
}
_ALONE = {**{word: word for word in _COMPARED}, "reaches": "is at least"}


def expectation(experiment: Experiment, claim: Claim) -> str:
    """A claim as a sentence without its end."""
    labels, where = experiment.arms, "" if claim.where == "equal" else ", each at its own best guidance"
    form = ".0%" if claim.metric in ("diversity", "style_share") else "g"
    margin = f" (within {claim.margin:{form}})" if claim.margin else ""
    subject = f"{labels[claim.arm]}: {METRIC_LABELS[claim.metric]}"
    if claim.expected == "reaches":
        return f"{subject} is at least {claim.margin:{form}}"
    if claim.against:
        return f"{subject} {_COMPARED[claim.expected]} with {labels[claim.against]}{margin}{where}"
    return f"{subject} {_ALONE[claim.expected]}{margin}{where}"


def _interval(metric: str, found: dict, *, signed: bool = True) -> str:
    return Interval(**found).text(("+" if signed else "") + _FORMS.get(metric, ".3f"))


def _changes(experiment: Experiment, found: dict) -> str:
    lines = _table_head("arm", found)
    for metric in experiment.metrics:
        lines += _base_row(metric, found)
        for arm in found["arms"].values():
            best = sorted({run["own_best"] for run in arm["runs"].values()})
            lines.append(_change_row(metric, arm["label"], arm["changes"], found, f" (at {_listed(best)})"))
    return "\n".join(lines)


def _differences(experiment: Experiment, found: dict) -> list[str]:
    """A section, where claims compare arms."""
    if not found["differences"]:
        return []
    lines = _table_head("arms", found)
    for metric in experiment.metrics:
        for each in found["differences"]:
            label = f"{experiment.arms[each['arm']]} less {experiment.arms[each['against']]}"
            lines.append(_change_row(metric, label, each["changes"], found))
    return ["## Differences between arms", "\n".join(lines)]


def _table_head(who: str, found: dict) -> list[str]:
    names = [f"guidance {g:g}" + (", as trained" if g == GUIDANCE else "") for g in found["guidance_scales"]]
    return [f"| metric | {who} | {' | '.join([*names, 'own best'])} |", "|---|---|" + "---|" * (len(names) + 1)]


def _change_row(metric: str, label: str, changes: dict, found: dict, after: str = "") -> str:
    scales = [f"{scale:g}" for scale in found["guidance_scales"]]
    cells = ["not run"] * (len(scales) + 1)
    if metric in changes:
        cells = [_interval(metric, changes[metric][scale]) for scale in (*scales, "best")]
        cells[-1] += after
    return f"| {METRIC_LABELS[metric]} | {label} | {' | '.join(cells)} |"


def _base_row(metric: str, found: dict) -> list[str]:
    """The base model's own values; of a share in a style, one row per style."""
    base = found["base"]
    if base is None:
        return []
    styles = sorted({arm["style"] for arm in found["arms"].values() if arm["style"]})
    keys = {f"style:{style}": f"*base*, {style}" for style in styles} if metric == "style_share" else {metric: "*base*"}
    return [f"| {METRIC_LABELS[metric]} | {label} | {_base_cells(key, base)} |" for key, label in keys.items()]


def _base_cells(key: str, base: dict) -> str:
    form = ".1f" if key == "kid" else ".3f"
    best = next(point[key] for point in base["front"] if point["guidance"] == base["own_best"])
    cells = [f"{point[key]:{form}}" for point in base["front"]]
    return " | ".join([*cells, f"{best:{form}} (at {base['own_best']:g})"])


def _costs(found: dict) -> str:
    """What every arm took, and what it had at the cheapest one's CPU time, at its peak and at its end."""
    made = {name: list(arm["runs"].values()) for name, arm in found["arms"].items() if arm["runs"]}
    if not made:
        return "No arm was run."
    cheapest = min(_mean(run["cpu_seconds"] for run in runs) for runs in made.values())
    head = (
        "| arm | seeds | images drawn | references shown | CPU seconds | × the cheapest | held-out retrieval: start | "
        f"at {cheapest:.0f} CPU seconds | peak (iteration) | end |"
    )
    lines = [head, "|" + "---|" * 10]
    for name, runs in made.items():
        seconds = _mean(run["cpu_seconds"] for run in runs)
        curves = [run["curve"] for run in runs]
        peaks = [max(curve, key=lambda point: point["retrieval"]) for curve in curves]
        cells = [
            found["arms"][name]["label"],
            str(len(runs)),
            f"{_mean(run['images_drawn'] for run in runs):.0f}",
            f"{_mean(run['references_shown'] for run in runs):.0f}",
            f"{seconds:.0f}",
            f"{seconds / cheapest:.2f}" if cheapest else "–",
            f"{_mean(curve[0]['retrieval'] for curve in curves):.3f}",
            f"{_mean(_reached(curve, cheapest) for curve in curves):.3f}",
            f"{_mean(p['retrieval'] for p in peaks):.3f} ({_listed(p['iteration'] for p in peaks)})",
            f"{_mean(curve[-1]['retrieval'] for curve in curves):.3f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    after = ""
    if _any(found, "start_from"):
        after += " A repair's costs come on top of those of the run that it starts from."
    if _any(found, "teacher"):
        after += " Distillation's costs come on top of those of its teacher's run."
    after += _scaled_costs(found)
    return "\n".join(lines) + "\n\nMeans over seeds. Between evaluations the curve is interpolated." + after


def _scaled_costs(found: dict) -> str:
    """Which arms' CPU seconds are of another machine or day, and how they were made comparable; "" for none."""
    scales: dict[str, list[str]] = {}
    for arm in found["arms"].values():
        for scale in {f"{run['cpu_scale']:.2f}" for run in arm["runs"].values() if "cpu_scale" in run}:
            scales.setdefault(scale, []).append(arm["label"])
    apart = [arm["label"] for arm in found["arms"].values() if any("cpu_elsewhere" in r for r in arm["runs"].values())]
    said = f" CPU seconds of {', '.join(apart)} are of another report, and cannot be compared." if apart else ""
    if not scales:
        return said
    parts = "; ".join(f"times {scale} for {', '.join(labels)}" for scale, labels in scales.items())
    return said + (
        " CPU seconds of runs of another machine or day are what they would be beside the other arms, by how much an "
        f"arm that was run on both took on each: {parts}."
    )


def _any(found: dict, follows: str) -> bool:
    return any(arm.get(follows) for arm in found["arms"].values())


def _reached(curve: Sequence[Mapping[str, float]], seconds: float) -> float:
    """Held-out retrieval at a CPU time, along a straight line between two evaluations."""
    for before, after in itertools.pairwise(curve):
        span = after["cpu_seconds"] - before["cpu_seconds"]
        if after["cpu_seconds"] >= seconds and span > 0:
            share = max(0.0, (seconds - before["cpu_seconds"]) / span)
            return before["retrieval"] + share * (after["retrieval"] - before["retrieval"])
    return curve[-1]["retrieval"]


def _held_out_images(found: dict) -> str:
    """How many pictures of each prompt a curve's points rest on, as "2 pictures each"."""
    runs = [run for arm in found["arms"].values() for run in arm["runs"].values()]
    kept = [run["held_out_images"] for run in runs if "held_out_images" in run]
    counts = {(each["ends"], each["between"]) for each in kept}
    if curves := [run["curve"] for run in runs if "held_out_images" not in run]:
        ends = _fewest_images([point for curve in curves for point in (curve[0], curve[-1])])
        between = [point for curve in curves for point in curve[1:-1]]
        counts.add((ends, _fewest_images(between) if between else ends))
    said = []
    for ends, between in sorted(counts):
        pictures = f"{ends} picture{'s' * (ends != 1)} each"
        after = f" before and after training but {between} in between, where points are noisier and peaks flatter"
        said.append(pictures + after * (ends != between))
    return ", or, by run, ".join(said)


def _fewest_images(points: Sequence[Mapping[str, float]]) -> int:
    """The fewest pictures of each held-out prompt that give all these shares of pictures, for results of before their
    number was kept.

    Raises:
        ValueError: no number up to 8 does.
    """
    prompts = len(WORLDS[WORLD].held_out_prompts.read_text().splitlines())
    shares = [point["retrieval"] * prompts for point in points]
    for images in range(1, 9):
        if all(abs(share * images - round(share * images)) < 1e-4 for share in shares):
            return images
    raise ValueError(f"results without held_out_images: no number of pictures of {prompts} prompts gives their shares")


def _samples(found: dict) -> str:
    seed = found["sample_seed"]
    which = "arms of different seeds" if seed is None else f"one noise for all models (seed {seed})"
    return f"Held-out prompts at guidance {GUIDANCE:g}, {which}."


def _how(name: str, found: dict) -> str:
    seeds = " ".join(map(str, found["seeds"]))
    options = f"--seeds {seeds} --iterations {found['iterations']}{_other_options(found)}"
    commands = f"```\npython -m advgrpo.experiments run {name} {options}\n```"
    arms = "\n".join(
        f"- {arm['label']}: preset `{arm['preset']}`"
        + (f" with `{arm['overrides']}`" if arm["overrides"] else "")
        + (f", started from the LoRA of `{arm['start_from']}`" if arm["start_from"] else "")
        + (f", taught by the LoRA of `{arm['teacher']}`" if arm.get("teacher") else "")
        for arm in found["arms"].values()
    )
    runs = [run for arm in found["arms"].values() for run in arm["runs"].values()]
    machines = sorted({_machine(run["machine"]) for run in runs})
    versions = sorted({", ".join(f"{name} {v}" for name, v in run["versions"].items()) for run in runs})
    minutes = sum(run["cpu_seconds"] / run.get("cpu_scale", 1.0) for run in runs) / 60
    days = sorted({run["finished"][:10] for run in runs})
    made = (
        f"{len(runs)} runs of {_lengths(found)} iterations, {minutes:.1f} CPU minutes of training in total, "
        f"finished {' to '.join(dict.fromkeys((days[0], days[-1])))}; judged on `{found['prompts']['report']}`, "
        f"{found['images_per_prompt']} pictures a prompt; {'; '.join(machines)}; {'; '.join(versions)}."
    )
    settings = found.get("laid_over_settings")  # results of before they were kept have none
    laid_over = f"`{found['laid_over']}`, laid over each: `{json.dumps(settings)}`\n\n" if settings else ""
    return f"{commands}\n\n{arms}\n\n{laid_over}{made}"


def _lengths(found: dict) -> str:
    """Iterations of the arms that were run, as "60" or "60 and 200"."""
    made = [arm for arm in found["arms"].values() if arm["runs"]]
    return " and ".join(map(str, sorted({arm.get("iterations", found["iterations"]) for arm in made})))


def _other_options(found: dict) -> str:
    """Those that are not what they are by default."""
    given = {
        "--prompts": (found["prompts"]["report"], REPORT_PROMPTS),
        "--tuning-prompts": (found["prompts"]["tuning"], TUNING_PROMPTS),
        "--guidance-scales": (_spaced(found["guidance_scales"]), _spaced(GUIDANCE_SCALES)),
        "--images-per-prompt": (str(found["images_per_prompt"]), str(IMAGES_PER_PROMPT)),
        "--config": (found["laid_over"], ""),
    }
    return "".join(f" {flag} {value}" for flag, (value, plain) in given.items() if value != plain)


def _spaced(values: Sequence[float]) -> str:
    return " ".join(f"{value:g}" for value in values)


def _machine(machine: dict) -> str:
    return f"{machine['platform']}, {machine['cpus']} CPU cores" + (f", {machine['gpu']}" if machine["gpu"] else "")


def _listed(values) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _mean(values) -> float:
    found = list(values)
    return sum(found) / len(found)


def index(known: Known) -> str:
    """README.md of the results: every claim of the plan with its verdict, and what was not run."""
    every = judged(known)
    counts = Counter(verdict.word for claims in every.values() for _, _, verdict in claims)
    total = sum(counts.values())
    lines = [
        "# Results",
        "The paper's comparisons in miniature, in the tiny world, judged by a network that is in no reward, on "
        "prompts that nothing was chosen on. Pages are written by `python -m advgrpo.experiments pages` from "
        "[results.json](results.json).",
        f"Of {total} claims: {', '.join(f'{counts[word]} {_WORDS[word]}' for word in _WORDS)}. A claim has a verdict "
        f"where its p-value, adjusted by Holm's method over all {total}, is at most {LEVEL:g}.",
        "| experiment | seeds × iterations | confirmed | contradicted | undecided | of them not tested |\n"
        "|---|---|---|---|---|---|\n" + "\n".join(_index_row(name, known, claims) for name, claims in every.items()),
        "## Claims",
        "| experiment | expected | found [95 %] | p | verdict |\n|---|---|---|---|---|\n"
        + "\n".join(row for name, claims in every.items() for row in _verdict_rows(name, claims)),
    ]
    notes = {name: experiment.note for name, experiment in EXPERIMENTS.items() if experiment.note}
    if notes:
        lines += ["Beside the verdicts:", "\n".join(f"- {_link(name)}: {note}" for name, note in notes.items())]
    absent = not_run(known)
    if absent:
        lines.append(f"**Not run:** {', '.join(absent)}.")
    return "\n\n".join(lines) + "\n"


def not_run(known: Known) -> list[str]:
    """Arms of the plan without a single run."""
    made = {name for found in known.values() for name, arm in found["arms"].items() if arm["runs"]}
    return [arm for arm in ARMS if arm not in made]


def _link(name: str) -> str:
    return f"[{EXPERIMENTS[name].title}]({name}.md)"


def _index_row(name: str, known: Known, claims: Sequence[tuple[Claim, dict, Verdict]]) -> str:
    counts = Counter(verdict.word for _, _, verdict in claims)
    cells = [str(counts[word]) for word in _WORDS] + [str(sum(verdict.p is None for _, _, verdict in claims))]
    made = f"{len(known[name]['seeds'])} × {_lengths(known[name])}" if name in known else "not run"
    return f"| {_link(name)} | {made} | {' | '.join(cells)} |"


def _verdict_rows(name: str, claims: Sequence[tuple[Claim, dict, Verdict]]) -> list[str]:
    experiment, rows = EXPERIMENTS[name], []
    for claim, entry, verdict in claims:
        signed = claim.expected != "reaches"
        found = _interval(claim.metric, entry["found"], signed=signed) if "found" in entry else "not run"
        p = "–" if verdict.p is None else f"{verdict.p:.3f}"
        rows.append(
            f"| [{name}]({name}.md) | {expectation(experiment, claim)} | {found} | {p} | {_WORDS[verdict.word]} |"
        )
    return rows

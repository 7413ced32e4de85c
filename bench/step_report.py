"""What `bench.step` prints and draws: ours over B1 and over B0, the waterfall, and the goals of docs/performance.md."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .timing import FEWEST

UNITS = ("sampler", "adversary", "update", "iteration")
SIDES = ("ours", "b1", "b0")
SHARED = "_shared"  # what a unit's name ends with where the images of a prompt start from one noise
# What of ours computes in FP8: nothing; the ODE steps; the window's steps and the update as well. And what the name of
# such a unit has at its end, before `SHARED`. Which units there are of each:
Precision = Literal["model", "sampling", "everywhere"]
PRECISIONS: dict[Precision, str] = {"model": "", "sampling": "_fp8", "everywhere": "_fp8_everywhere"}
IN_FP8: dict[Precision, tuple[str, ...]] = {"sampling": ("sampler", "iteration"), "everywhere": ("update", "iteration")}
UNMEASURED = "unmeasured"
ELSEWHERE = {
    "P8": "python -m bench.profile",
    "P9": "python -m bench.kernels",
    "P10": "tests/kernels/test_launch_counts.py",
    "P11": "python -m bench.profile",
}


def in_precision(name: str, precision: Precision) -> str:
    """The name of a unit where ours computes so."""
    unit, shared = name.removesuffix(SHARED), name.endswith(SHARED)
    return f"{unit}{PRECISIONS[precision]}{SHARED if shared else ''}"


def label(name: str) -> str:
    """A unit's name for people."""
    for end, said in ((SHARED, ", shared noise"), ("_eager", ", not captured"), ("_fp8", " FP8"), ("_", " ")):
        name = name.replace(end, said)
    return name


@dataclass(frozen=True)
class Goal:
    """At least how many times as fast as a contender a unit is on one H200, with the same algorithm on both sides.

    Args:
        name: of the goal; the letter at its end tells over whom, with which noise and in which precision.
        unit: key of the report.
        side: "b1" or "b0".
        row: of the waterfall that says it as well; "" for none.
    """

    name: str
    unit: str
    side: str
    target: float
    row: str = ""

    @property
    def what(self) -> str:
        return f"{label(self.unit)} over {self.side.upper()}"


GAINS = (
    Goal("P1a", "sampler", "b1", 1.25),
    Goal("P1b", "sampler_shared", "b1", 1.25),
    Goal("P2a", "sampler_fp8", "b1", 1.6),
    Goal("P2b", "sampler_fp8_shared", "b1", 1.6),
    Goal("P5a", "update", "b1", 1.6),
    Goal("P5b", "update_shared", "b1", 1.6),
    Goal("P7a", "iteration", "b1", 1.35),
    Goal("P7b", "iteration_shared", "b1", 1.35),
    Goal("P14a", "iteration_fp8", "b1", 1.6),
    Goal("P14b", "iteration_fp8_shared", "b1", 1.6),
    Goal("P5d", "update_fp8_everywhere", "b1", 1.6),
    Goal("P5e", "update_fp8_everywhere_shared", "b1", 1.6),
    Goal("P14d", "iteration_fp8_everywhere", "b1", 1.6),
    Goal("P14e", "iteration_fp8_everywhere_shared", "b1", 1.6),
    Goal("P1c", "sampler", "b0", 2.0, "graph"),
    Goal("P2c", "sampler_fp8", "b0", 2.6, "FP8"),
    Goal("P5c", "update", "b0", 2.8),
    Goal("P7c", "iteration", "b0", 2.2),
    Goal("P14c", "iteration_fp8", "b0", 2.6),
    Goal("P5f", "update_fp8_everywhere", "b0", 2.8),
    Goal("P14f", "iteration_fp8_everywhere", "b0", 2.6),
)
OTHERS = (
    ("P3", "FP8 forward over the bf16 roofline", "<= 1.10x", "< 1.00x"),
    ("P8", "kernel nodes and syncs per trajectory", "<= 6000, 0", "<= 2600, 0"),
    ("P9", "Gaussian step, share of copy bandwidth", ">= 80 %", ">= 90 %"),
    ("P10", "launches: loss, reward, head step", "<= 2, 3, 6", ""),
    ("P11", "GPU idle over an iteration", "<= 3 %", "<= 1 %"),
    ("P12", "peak memory over B0", "<= 1", "40 GB"),
    ("P13", "max |dlog p|, clip fraction before the first step", "0; 0", ""),
)
# What is said of a figure of OTHERS, and whether the goal is met.
JUDGED: dict[str, Callable[..., tuple[str, bool]]] = {
    "P3": lambda over: (f"{over:.3f}x", over <= 1.10),
    "P8": lambda nodes, syncs: (f"{nodes:.0f}, {syncs:.0f}", nodes <= 6000 and syncs == 0),
    "P9": lambda share: (f"{share:.0%}", share >= 0.8),
    "P11": lambda idle: (f"{idle:.1%}", idle <= 0.03),
}
GOALS = (*((goal.name, goal.what, f">= {goal.target:g}x", "") for goal in GAINS), *OTHERS)


def goals(report: dict) -> list[dict]:
    """A row per goal: id, what, target, stretch, measured, met (None where this machine, or this run, cannot tell)."""
    on_gpu, full = report["environment"]["device"] == "cuda", report["size"] == "full"
    measured: dict[str, tuple[str, bool | None]] = {}
    if "on_policy" in report:
        mismatch = report["on_policy"]
        values = (mismatch["log_prob_mismatch_max"], mismatch["pre_update_clip_fraction"])
        measured["P13"] = (f"{values[0]:g}; {values[1]:g}", values == (0, 0))
    if on_gpu and full:
        for goal in GAINS:
            found = _gain(report, goal) or _gain_of_row(report, goal)
            if found:
                measured[goal.name] = found
        if "fp8_forward_over_roofline" in report:
            measured["P3"] = JUDGED["P3"](report["fp8_forward_over_roofline"])
        if "peak_memory_gb" in report:
            own, theirs = (report["peak_memory_gb"].get(side) for side in ("ours", "b0"))
            if theirs:
                measured["P12"] = (f"{own:.1f} / {theirs:.1f} GB", own <= theirs)
    rows = []
    for goal, what, target, stretch in GOALS:
        value, met = measured.get(goal, (UNMEASURED, None))
        if goal in ELSEWHERE:
            value = f"see {ELSEWHERE[goal]}"
        rows.append({"id": goal, "what": what, "target": target, "stretch": stretch, "measured": value, "met": met})
    return rows


def _gain(report: dict, goal: Goal) -> tuple[str, bool | None] | None:
    """A unit's ratio, judged by the lower end of its interval, which fewer than three rounds do not have."""
    entry = report.get(goal.unit, {})
    gain = entry.get(f"over_{goal.side}")
    if gain is None:
        return None
    if entry["rounds"] < min(FEWEST, entry["rounds_wanted"]):
        return f"{gain['ratio']:.2f}x ({entry['rounds']} rounds only)", None
    return f"{gain['ratio']:.2f}x (from {gain['low']:.2f})", gain["low"] >= goal.target


def _gain_of_row(report: dict, goal: Goal) -> tuple[str, bool] | None:
    """The same from the waterfall, where the unit itself was not asked for: medians, without an interval."""
    rates = {each["step"]: each["images_per_second"] for each in report.get("waterfall", [])}
    gain = rates[goal.row] / rates["B0"] if rates.get(goal.row) else None
    return None if gain is None else (f"{gain:.2f}x (waterfall)", gain >= goal.target)


def _of_a_gpu(report: dict) -> dict:
    """`report`, or nothing of one that says nothing of a GPU at full size; `bench.kernels` has no other size there."""
    on_gpu = report.get("environment", {}).get("device") == "cuda"
    return report if on_gpu and report.get("size", "full") == "full" else {}


def from_elsewhere(rows: Sequence[Mapping], reports: Mapping[str, dict]) -> list[dict]:
    """Rows of `goals` with what other parts of the same session have measured, by the names of `reports`."""
    profile, kernels = (_of_a_gpu(reports.get(name, {})) for name in ("profile", "kernels"))
    measured: dict[str, tuple[str, bool]] = {}
    if "trajectory" in profile:
        measured["P8"] = JUDGED["P8"](profile["trajectory"]["kernels"], profile["trajectory"]["host_syncs"])
    if "idle_share" in profile:
        measured["P11"] = JUDGED["P11"](profile["idle_share"])
    for entry in kernels.get("entries", ()):
        if entry["case"] == "gaussian_step" and entry["limit"] == "copy":
            measured["P9"] = JUDGED["P9"](entry["share_of_limit"])
    found = []
    for row in rows:
        value, met = measured.get(row["id"], (row["measured"], row["met"]))
        found.append({**row, "measured": value, "met": met})
    return found


def predicted_goals(predicted: Mapping[str, float]) -> Iterator[str]:
    """A Markdown row for every goal that is predicted, and whether the prediction meets it."""
    for goal in GAINS:
        gain = predicted[f"step.{goal.unit}.over_{goal.side}.ratio"]
        verdict = "met" if gain >= goal.target else "missed"
        yield f"| {goal.name} | {goal.what} | {goal.target:g}x | {gain:.2f}x | {verdict} |"
    figures = {
        "P3": ("step.fp8_forward_over_roofline",),
        "P8": ("profile.trajectory.kernels", "profile.trajectory.host_syncs"),
        "P9": ("kernels.gaussian_step.share_of_limit",),
        "P11": ("profile.idle_share",),
    }
    for name, what, target, _ in OTHERS:
        if name in figures:
            value, met = JUDGED[name](*(predicted[figure] for figure in figures[name]))
            yield f"| {name} | {what} | {target} | {value} | {'met' if met else 'missed'} |"


def predicted_rates(predicted: Mapping[str, float]) -> Iterator[str]:
    """Markdown rows of the predicted rates: ours, B1's and B0's, which has no shared noise."""

    def rates(unit: str, form: str, *sides: str) -> str:
        cells = (f" {predicted[f'step.{unit}.{side}']:{form}}" if side in sides else "" for side in SIDES[1:])
        return "".join(f"|{cell} " for cell in cells) + "|"

    def ours(unit: str, form: str) -> str:
        return f"{predicted[f'step.{unit}.ours']:{form}}"

    mfu, fast, slow = f"{100 * predicted['step.sampler_mfu']:.0f} %", ".1f", ".3f"
    yield (
        f"| sampler, SD3.5-medium at 512 px, ten steps, guided | **{ours('sampler', fast)} images/s, MFU {mfu}** of "
        f"989 TFLOP/s {rates('sampler', fast, 'b1', 'b0')}"
    )
    yield f"| the same with FP8 on ODE steps | {ours('sampler_fp8', fast)} images/s | | |"
    both = f"{ours('sampler_shared', fast)} and {ours('sampler_fp8_shared', fast)}"
    yield f"| sampler with shared noise, bf16 and FP8 | {both} images/s {rates('sampler_shared', fast, 'b1')}"
    yield f"| update with a noise per image | {ours('update', fast)} images/s {rates('update', fast, 'b1', 'b0')}"
    both = f"{ours('update_shared', fast)} images/s; {ours('update_shared_eager', fast)} without its CUDA graphs"
    yield f"| update with shared noise | {both} {rates('update_shared', fast, 'b1')}"
    trained = ours("update_fp8_everywhere", fast), ours("update_fp8_everywhere_shared", fast)
    yield f"| update in FP8, a noise per image and shared noise | {trained[0]} and {trained[1]} images/s | | |"
    for noise, end, sides in (("a noise per image", "", ("b1", "b0")), ("shared noise", SHARED, ("b1",))):
        found = [ours(in_precision(f"iteration{end}", precision), slow) for precision in PRECISIONS]
        yield (
            f"| iteration with {noise}: bf16, FP8 on ODE steps, FP8 everywhere | "
            f"{found[0]}, {found[1]} and {found[2]}/s {rates(f'iteration{end}', slow, *sides)}"
        )


def interval(gain: dict | None) -> str:
    """A ratio with its interval, as text; empty without one."""
    return f"{gain['ratio']:.2f}x [{gain['low']:.2f}, {gain['high']:.2f}]" if gain else ""


def unit_line(name: str, entry: dict | None, checks: dict) -> str:
    """Ours over the others, the best of them first; then the rates, the refused and the worst of the checks."""
    refused = [f"{side.upper()} refused: {_parity(check)}" for side, check in checks.items() if not check.passed]
    if entry is None:
        return f"{name:17} {'; '.join(refused)}"
    others = [side for side in SIDES[1:] if f"over_{side}" in entry]
    gains = "  ".join(f"over {side.upper()} {interval(entry[f'over_{side}'])}" for side in others)
    rates = "  ".join(f"{side} {entry[side]:.3f}" for side in ("ours", *others))
    worst = max((checks[side] for side in others), key=lambda check: check.error)
    lines = [f"{gains}", f"{rates} {entry['unit']}  {_parity(worst)}", *refused]
    if entry["rounds"] < entry["rounds_wanted"]:
        lines.append(f"{entry['rounds']} of {entry['rounds_wanted']} rounds")
    return "\n".join(f"{name if i == 0 else '':17} {line}" for i, line in enumerate(lines))


def _parity(check) -> str:
    return f"parity {check.error:.1e} of {check.allowed:.0e} ({check.what})"


def tables(report: dict) -> str:
    """Ours over the others, waterfall and goals as text."""
    b1 = "B1, compiled" if report["b1_compiled"] else "B1"
    lines = ["", f"{'ours, same algorithm':28}{'over ' + b1:24}over B0"]
    for name in measured_units(report):
        gains = [interval(report[name].get(f"over_{side}")) for side in SIDES[1:]]
        lines.append(f"  {label(name):26}{gains[0]:24}{gains[1]}".rstrip())
    lines += ["", "sampler, one change after the other (images/s, over B0)"]
    waterfall = report.get("waterfall", [])
    base = waterfall[0]["images_per_second"] if waterfall else None
    for row in waterfall:
        rate = row["images_per_second"]
        shown = "not on this device" if rate is None else f"{rate:9.2f}  {rate / base:5.2f}x"
        lines.append(f"  {row['step']:10}{shown}")
    if "sampler_mfu" in report:
        rate, mfu = report["sampler"]["ours"], report["sampler_mfu"]
        lines += ["", f"sampler: {rate:.2f} images/s, {mfu:.1%} of the peak's FLOP/s (MFU)"]
    lines += ["", f"{'goal':5}{'':50}{'target':>12}{'stretch':>12}  measured"]
    for row in report["goals"]:
        verdict = {True: "  met", False: "  MISSED", None: ""}[row["met"]]
        lines.append(
            f"{row['id']:5}{row['what']:50}{row['target']:>12}{row['stretch']:>12}  {row['measured']}{verdict}"
        )
    lines += [f"{name} left out: {why}" for name, why in report["left_out"].items()]
    lines += [f"{name} FAILED: {why.splitlines()[0]}" for name, why in report["failed"].items()]
    if "note" in report["environment"]:
        lines.append(report["environment"]["note"])
    return "\n".join(lines)


def measured_units(report: dict) -> list[str]:
    """Those with figures: with a noise per image, then with one per prompt, and what of them has another form."""
    ends = [f"{precision}{noise}" for noise in ("", SHARED) for precision in PRECISIONS.values()]
    names = [f"{unit}{end}" for end in (*ends, f"{SHARED}_eager") for unit in UNITS]
    return [name for name in names if name in report]


def draw(report: dict, file: Path) -> None:
    """Ratios with their intervals, and the waterfall."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    ratios, falls = figure.subplots(1, 2)
    names = measured_units(report)
    for side, offset, colour in (("b1", -0.2, "tab:blue"), ("b0", 0.2, "0.7")):
        found = [(x + offset, report[name][f"over_{side}"]) for x, name in enumerate(names) if side in report[name]]
        values = [gain["ratio"] for _, gain in found]
        errors = [
            [max(0.0, value - gain["low"]) for value, (_, gain) in zip(values, found)],
            [max(0.0, gain["high"] - value) for value, (_, gain) in zip(values, found)],
        ]
        places = [x for x, _ in found]
        ratios.bar(places, values, 0.4, yerr=errors, capsize=3, color=colour, label=f"over {side.upper()}")
        for x, value in zip(places, values):
            ratios.annotate(f"{value:.2f}x", (x, 0.05), ha="center", rotation=90, fontsize=8)
    ratios.axhline(1, color="0.4", linewidth=1)
    ratios.set_xticks(range(len(names)), [label(name).replace(", ", ",\n") for name in names], fontsize=8)
    ratios.set_ylabel("ours over the others (medians, 95 % interval)")
    ratios.legend()
    rows = [row for row in report.get("waterfall", []) if row["images_per_second"] is not None]
    falls.bar([row["step"] for row in rows], [row["images_per_second"] for row in rows], color="tab:orange")
    falls.set_ylabel("sampler, images/s")
    environment = report["environment"]
    where = environment.get("gpu") or environment.get("note")
    figure.suptitle(f"{report['size']} model, {where}, torch {environment['torch']}", fontsize=10)
    figure.savefig(file, dpi=120)

"""What `bench.step` prints and draws: a line per unit, the waterfall, and the goals of docs/performance.md."""

from __future__ import annotations

from pathlib import Path

from .timing import FEWEST

UNITS = ("sampler", "adversary", "update", "iteration")
UNMEASURED = "unmeasured"
ELSEWHERE = {
    "P8": "python -m bench.profile",
    "P9": "python -m bench.kernels",
    "P10": "tests/kernels/test_launch_counts.py",
    "P11": "python -m bench.profile",
}
GOALS = (
    ("P1", "sampler over B0, bf16", "1.9x", "2.3x"),
    ("P2", "sampler over B0, FP8 on ODE steps", "2.4x", "3.2x"),
    ("P3", "FP8 forward over the bf16 roofline", "<= 1.10x", "< 1.00x"),
    ("P5", "generator update over B0", "2.8x", "4x"),
    ("P7", "iteration over B0", "2.4x", "3.1x"),
    ("P8", "kernel nodes and syncs per trajectory", "<= 6000, 0", "<= 2600, 0"),
    ("P9", "Gaussian step, share of copy bandwidth", "80 %", "90 %"),
    ("P10", "launches: loss, reward, head step", "2, 3, 6", ""),
    ("P11", "GPU idle over an iteration", "<= 3 %", "<= 1 %"),
    ("P12", "peak memory over B0", "<= 1", "40 GB"),
    ("P13", "max |dlog p|, clip fraction before the first step", "0; 0", ""),
)


def goals(report: dict) -> list[dict]:
    """A row per goal: id, what, target, stretch, measured, met (None where this machine, or this run, cannot tell)."""
    on_gpu, full = report["environment"]["device"] == "cuda", report["size"] == "full"
    measured: dict[str, tuple[str, bool | None]] = {}
    if "on_policy" in report:
        mismatch = report["on_policy"]
        values = (mismatch["log_prob_mismatch_max"], mismatch["pre_update_clip_fraction"])
        measured["P13"] = (f"{values[0]:g}; {values[1]:g}", values == (0, 0))
    if on_gpu and full:
        for goal, unit, target, row in (
            ("P1", "sampler", 1.9, "dedupe"),
            ("P2", "sampler_fp8", 2.4, "FP8"),
            ("P5", "update", 2.8, ""),
            ("P7", "iteration", 2.4, ""),
        ):
            found = _gain(report, unit, target) or _gain_of_row(report, row, target)
            if found:
                measured[goal] = found
        if "fp8_forward_over_roofline" in report:
            over = report["fp8_forward_over_roofline"]
            measured["P3"] = (f"{over:.2f}x", over <= 1.10)
        if "peak_memory_gb" in report:
            own, theirs = report["peak_memory_gb"]["ours"], report["peak_memory_gb"]["baseline"]
            measured["P12"] = (f"{own:.1f} / {theirs:.1f} GB", own <= theirs)
    rows = []
    for goal, what, target, stretch in GOALS:
        value, met = measured.get(goal, (UNMEASURED, None))
        if goal in ELSEWHERE:
            value = f"see {ELSEWHERE[goal]}"
        rows.append({"id": goal, "what": what, "target": target, "stretch": stretch, "measured": value, "met": met})
    return rows


def _gain(report: dict, unit: str, target: float) -> tuple[str, bool | None] | None:
    """A unit's ratio, judged by the lower end of its interval, which fewer than three rounds do not have."""
    if unit not in report:
        return None
    entry = report[unit]
    if entry["rounds"] < min(FEWEST, entry["rounds_wanted"]):
        return f"{entry['ratio']:.2f}x ({entry['rounds']} rounds only)", None
    return f"{entry['ratio']:.2f}x (from {entry['ratio_low']:.2f})", entry["ratio_low"] >= target


def _gain_of_row(report: dict, row: str, target: float) -> tuple[str, bool] | None:
    """The same from the waterfall, where the unit itself was not asked for: medians, without an interval."""
    rates = {each["step"]: each["images_per_second"] for each in report.get("waterfall", [])}
    gain = rates[row] / rates["B0"] if rates.get(row) else None
    return None if gain is None else (f"{gain:.2f}x (waterfall)", gain >= target)


def unit_line(name: str, entry: dict | None, check) -> str:
    error = f"parity {check.error:.1e} of {check.allowed:.0e} ({check.what})"
    if entry is None:
        return f"{name:10} refused: {error}"
    rates = f"ours {entry['ours']:9.3f}  B0 {entry['baseline']:9.3f} {entry['unit']:13}"
    line = f"{name:10} {rates} {entry['ratio']:5.2f}x [{entry['ratio_low']:.2f}, {entry['ratio_high']:.2f}]  {error}"
    if "over_shared" in entry:
        shared = entry["over_shared"]
        line += f"\n{'':10} over B0 with the same shared prefix: {shared['ratio']:.2f}x"
        line += f" [{shared['low']:.2f}, {shared['high']:.2f}]"
    if entry["rounds"] < entry["rounds_wanted"]:
        line += f"\n{'':10} {entry['rounds']} of {entry['rounds_wanted']} rounds"
    return line


def tables(report: dict) -> str:
    """Waterfall and goals as text."""
    lines = ["", "sampler, one change after the other (images/s, over B0)"]
    waterfall = report.get("waterfall", [])
    base = waterfall[0]["images_per_second"] if waterfall else None
    for row in waterfall:
        rate = row["images_per_second"]
        shown = "not on this device" if rate is None else f"{rate:9.2f}  {rate / base:5.2f}x"
        lines.append(f"  {row['step']:10}{shown}")
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


def draw(report: dict, file: Path) -> None:
    """Ratios with their intervals, and the waterfall."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    ratios, falls = figure.subplots(1, 2)
    names = [name for name in UNITS if name in report]
    values = [report[name]["ratio"] for name in names]
    errors = [
        [max(0.0, value - report[name]["ratio_low"]) for name, value in zip(names, values)],
        [max(0.0, report[name]["ratio_high"] - value) for name, value in zip(names, values)],
    ]
    ratios.bar(names, values, yerr=errors, capsize=4, color="tab:blue")
    ratios.axhline(1, color="0.4", linewidth=1)
    ratios.set_ylabel("over B0 (medians, 95 % interval)")
    for x, value in enumerate(values):
        ratios.annotate(f"{value:.2f}x", (x, value / 2), ha="center", color="white")
    rows = [row for row in report.get("waterfall", []) if row["images_per_second"] is not None]
    falls.bar([row["step"] for row in rows], [row["images_per_second"] for row in rows], color="tab:orange")
    falls.set_ylabel("sampler, images/s")
    environment = report["environment"]
    where = environment.get("gpu") or environment.get("note")
    figure.suptitle(f"{report['size']} model, {where}, torch {environment['torch']}", fontsize=10)
    figure.savefig(file, dpi=120)

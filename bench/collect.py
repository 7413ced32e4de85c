"""What came back of a GPU session as results: `python -m bench.collect DIR... [--results DIR]`.

Takes the folders of one or several commands of `bench/gpu_session.py` on one GPU and writes RESULTS/<gpu>/: the parts'
JSON (of a part that ran twice that of the folder named later), README.md with predicted and measured figures, goals,
kernels, training, times of the parts and everything that was refused or failed, and the pictures step.png and
kernels.png. The trace and the logs stay where they are: they are large, and the table names what they gave.

Nothing is judged here that was not measured: what a session left out stands as unmeasured. Folders of different GPUs
are refused.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from . import model, step_report

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("check", "step", "profile", "train", "kernels", "tune")
REHEARSED = "rehearsal"  # in place of a GPU's name


def read(folders: Sequence[Path]) -> tuple[str, dict[str, dict], dict[str, dict]]:
    """(GPU, reports by part, times by part of session.json).

    Raises:
        ValueError: a folder without session.json or with a damaged file, or folders of different GPUs.
    """
    gpus, reports, times = set(), {}, {}
    for folder in folders:
        session = _load(folder / "session.json")
        gpus.add(session.get("machine", {}).get("gpu") or REHEARSED)
        times |= session["parts"]
        for part in PARTS:
            if (folder / f"{part}.json").exists():
                reports[part] = _load(folder / f"{part}.json")
    if len(gpus) > 1:
        raise ValueError(f"folders of different GPUs: {', '.join(sorted(gpus))}; collect each alone")
    return gpus.pop(), reports, times


def _load(file: Path) -> dict:
    try:
        return json.loads(file.read_text())
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}; want a folder that bench/gpu_session.py has left") from None
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from None


def slug(gpu: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def page(gpu: str, reports: Mapping[str, dict], times: Mapping[str, dict], rows: Sequence[model.Row]) -> Iterator[str]:
    """README.md, line by line."""
    yield f"# {gpu}"
    if gpu == REHEARSED:
        yield "\n**A rehearsal without a GPU at small size: none of these figures says anything about speed.**"
    environment = next((r["environment"] for r in reports.values() if "environment" in r), {})
    yield "\n" + ", ".join(f"{name} {value}" for name, value in environment.items() if value is not None)
    findings = [row for row in rows if row.finding]
    known = sum(row.measured is not None for row in rows)
    yield f"\n## Predicted and measured\n{known} of {len(rows)} predicted figures measured, {len(findings)} of them"
    yield f"more than {model.TOLERANCE:.0%} off. Predictions: `python -m bench.model`, from counted work.\n"
    yield from model.lines(rows)
    if "step" in reports:
        yield from _step(reports["step"], reports)
    if "kernels" in reports:
        yield from _kernels(reports["kernels"])
    if "train" in reports:
        yield from _train(reports["train"])
    yield "\n## The session\n| part | predicted s | took s | steps and their exit |\n|---|---|---|---|"
    for name, row in times.items():
        ends = ", ".join(f"{step['name']} {step.get('exit', 'left out')}" for step in row["steps"])
        yield f"| {name} | {row['predicted']} | {row.get('seconds', 'left out')} | {ends} |"
    yield from _what_failed(reports)


def _step(report: dict, reports: Mapping[str, dict]) -> Iterator[str]:
    """Ours over B1 first: what one gains who could have had that; goals with what other parts say of them."""
    compiled = "compiled" if report["b1_compiled"] else "not compiled"
    yield f"\n## Whole steps\nThe same algorithm on all sides; B1's blocks are {compiled}.\n"
    yield "| | over B1 [95 %] | over B0 [95 %] | ours | B1 | B0 | rounds |\n|---|---|---|---|---|---|---|"
    for name in step_report.measured_units(report):
        entry = report[name]
        gains = " | ".join(step_report.interval(entry.get(f"over_{side}")) for side in ("b1", "b0"))
        rates = " | ".join(f"{entry[side]:.3f}" if side in entry else "" for side in ("b1", "b0"))
        label = step_report.label(name)
        yield f"| {label} | {gains} | {entry['ours']:.3f} {entry['unit']} | {rates} | {entry['rounds']} |"
    if "sampler_mfu" in report:
        rate, mfu = report["sampler"]["ours"], report["sampler_mfu"]
        yield f"\nSD3.5-medium at 512 px, 10 steps, guided: {rate:.2f} images/s, MFU {mfu:.1%} of 989 TFLOP/s."
    yield "\n![ratios and waterfall](step.png)\n\n| goal | what | target | measured | |\n|---|---|---|---|---|"
    for row in step_report.from_elsewhere(report.get("goals", []), reports):
        met = {True: "met", False: "**missed**", None: ""}[row["met"]]
        yield f"| {row['id']} | {row['what']} | {row['target']} | {row['measured']} | {met} |"


def _kernels(report: dict) -> Iterator[str]:
    yield "\n## Kernels\n| case | us | over eager [95 %] | over torch.compile | share of the limit |"
    yield "|---|---|---|---|---|"
    for entry in report["entries"]:
        eager, compiled = entry["over_eager"], entry["over_compiled"]
        over = f"{eager['ratio']:.2f}x [{eager['low']:.2f}, {eager['high']:.2f}]"
        against = f"{compiled['ratio']:.2f}x" if compiled else ""
        share = f"{entry['share_of_limit']:.0%} of {entry['limit']}"
        yield f"| {entry['case']} | {entry['ours_us']['median']:.1f} | {over} | {against} | {share} |"
    if report["entries"]:
        yield "\n![share of the limit](kernels.png)"


def _train(report: dict) -> Iterator[str]:
    yield "\n## Training"
    for name, what in (("world", "the embedded world"), ("random", "SD3.5-medium with random weights")):
        rows = report.get(name, {}).get("rows", [])
        if rows:
            middle = sorted(row["seconds"] for row in rows)[len(rows) // 2]
            drift = max(row["log_prob_mismatch_max"] for row in rows)
            yield f"- {what}: {len(rows)} iterations, median {middle:.3g} s, largest drift before a step {drift:g}"
            if report[name].get("lora_bytes"):
                yield "  - its LoRA is in the session's folder, for `advgrpo.frontier --loras FOLDER --output DIR`"
            held = [row["held_gb"] for row in rows if "held_gb" in row]
            planned = report[name].get("planned_gb")
            if held and planned:
                most = max(planned.values())
                yield f"  - memory: planned {most:.1f} GB, held {max(held):.1f} GB ({max(held) / most:.2f} of the plan)"


def _what_failed(reports: Mapping[str, dict]) -> Iterator[str]:
    said = []
    for part, report in reports.items():
        said += [f"- {part}: {name} refused" for name in report.get("refused", [])]
        for key in ("failed", "left_out"):
            found = report.get(key) or {}
            pairs = found.items() if isinstance(found, dict) else ((name, "no time was left") for name in found)
            said += [f"- {part}: {name} {key.replace('_', ' ')}: {str(why).splitlines()[0]}" for name, why in pairs]
    yield "\n## Refused, failed, left out\n" + ("\n".join(said) or "Nothing.")


def draw_kernels(report: dict, file: Path) -> None:
    """Each case's share of the limit that binds it."""
    from matplotlib.figure import Figure

    entries = sorted(report["entries"], key=lambda entry: entry["share_of_limit"])
    figure = Figure(figsize=(9, 0.35 * len(entries) + 1.5), layout="constrained")
    axes = figure.subplots()
    colours = ["tab:blue" if entry["limit"] == "copy" else "tab:orange" for entry in entries]
    axes.barh([entry["case"] for entry in entries], [entry["share_of_limit"] for entry in entries], color=colours)
    axes.axvline(0.8, color="0.4", linewidth=1, linestyle="--")
    axes.set_xlabel("share of the copy bandwidth (blue) or of the matrix product (orange) measured in the same run")
    figure.savefig(file, dpi=120)


def collect(folders: Sequence[Path], results: Path) -> Path:
    """Write the results of one GPU; returns their folder."""
    gpu, reports, times = read(folders)
    target = results / slug(gpu)
    target.mkdir(parents=True, exist_ok=True)
    for part, report in reports.items():
        (target / f"{part}.json").write_text(json.dumps(report, indent=1) + "\n")
    (target / "session.json").write_text(json.dumps(times, indent=1) + "\n")
    if "sampler" in reports.get("step", {}):
        step_report.draw(reports["step"], target / "step.png")
    if reports.get("kernels", {}).get("entries"):
        draw_kernels(reports["kernels"], target / "kernels.png")
    predicted = json.loads(model.FILE.read_text())
    rows = model.compare(predicted, reports if gpu != REHEARSED else {})
    (target / "README.md").write_text("\n".join(page(gpu, reports, times, rows)) + "\n")
    return target


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.collect", description=__doc__.split("\n\n")[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="what a command of the session left")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", help="where (bench/results)")
    args = parser.parse_args(argv)
    try:
        target = collect(args.folders, args.results)
    except ValueError as error:
        parser.error(str(error))
    print((target / "README.md").read_text())
    print(f"written: {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

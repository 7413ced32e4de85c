"""Do figures hold: `python -m bench.gate STEP.json`, or `python -m bench.gate OLD.json NEW.json`.

One file is a result of `python -m bench.step --json` on a CPU: whole iterations of ours over B1's and over B0's, with
the same algorithm on both sides, must not fall below what `HELD` says. Judged is the lower end of the 95 % interval,
over at least three rounds. With `--goals` it must not fall below the goals, which are higher.

Two files are results of `python -m bench.kernels --json`. Gated are the ratios to the baselines timed in the same run,
not microseconds, so a slower clock is no regression. A ratio has regressed when it fell by more than 5 % **and** its
whole 95 % interval lies below the old one.

Exit status 1 where something does not hold, regressed, is missing or was refused; 2 when the files cannot be compared.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from .timing import FEWEST

TOLERANCE = 0.05
BASELINES = ("over_eager", "over_compiled")
# Unit of bench.step, over whom, at least, the goal. Lower ends of idle CPUs: 1.21, 1.30 and 1.49 with MKL's products,
# 1.76, 1.93 and 2.01 where ours run; of busy ones 1.23, 1.37 and 1.57; without the CPU's kernels 0.97, 1.04 and 1.06.
HELD = (
    ("iteration", "b1", 1.0, 1.15),
    ("iteration", "b0", 1.15, 1.35),
    ("iteration_shared", "b1", 0.95, 1.15),
)


def held(report: dict, *, goals: bool = False) -> list[dict[str, object]]:
    """A row per threshold: unit, over, ratio and low (None where it was not measured), at_least, goal, verdict, by the
    threshold or by the goal."""
    rows: list[dict[str, object]] = []
    for unit, side, at_least, goal in HELD:
        gain = report.get(unit, {}).get(f"over_{side}") or {"ratio": None, "low": None}
        verdict = _of_interval(gain["low"], report.get(unit, {}).get("rounds", 0), goal if goals else at_least)
        found = {"ratio": gain["ratio"], "low": gain["low"]}
        rows.append({"unit": unit, "over": side, **found, "at_least": at_least, "goal": goal, "verdict": verdict})
    return rows


def _of_interval(low: float | None, rounds: int, at_least: float) -> str:
    """One round has no interval, and two have one by chance: its lower end says nothing."""
    if low is None:
        return "MISSING"
    if rounds < FEWEST:
        return "TOO FEW ROUNDS"
    return "ok" if low >= at_least else "BELOW"


def compare(old: dict, new: dict) -> list[dict[str, object]]:
    """A row per old ratio: op, case, baseline, old and new ratio, change, verdict ok | better | WORSE | MISSING."""
    new_entries = {(entry["op"], entry["case"]): entry for entry in new["entries"]}
    rows = []
    for entry in old["entries"]:
        current = new_entries.get((entry["op"], entry["case"]), {})
        for baseline in BASELINES:
            before, after = entry.get(baseline), current.get(baseline)
            if before is not None:
                label = {"op": entry["op"], "case": entry["case"], "baseline": baseline.removeprefix("over_")}
                rows.append({**label, "old": before["ratio"], **_verdict(before, after)})
    return rows


def _verdict(before: dict, after: dict | None) -> dict[str, object]:
    if after is None:
        return {"new": None, "change": None, "verdict": "MISSING"}
    change = after["ratio"] / before["ratio"] - 1
    verdict = "ok"
    if change < -TOLERANCE and after["high"] < before["low"]:
        verdict = "WORSE"
    elif change > TOLERANCE and after["low"] > before["high"]:
        verdict = "better"
    return {"new": after["ratio"], "change": change, "verdict": verdict}


def incomparable(old: dict, new: dict) -> str | None:
    """Why two results cannot be compared, or None."""
    if not all("entries" in result for result in (old, new)):
        return "they are not both of bench.kernels; a result of bench.step is judged alone"
    for key in ("device", "gpu"):
        before, after = (result["environment"].get(key) for result in (old, new))
        if before != after:
            return f"{key} differs: {before!r} and {after!r}"
    if old["schema"] != new["schema"]:
        return f"schema differs: {old['schema']} and {new['schema']}"
    return None


def _hold(report: dict, *, goals: bool) -> int:
    """Print what holds of a result of bench.step; the exit status."""
    print(f"{'unit':18}{'over':6}{'x':>6}{'from':>7}{'at least':>10}{'goal':>6}  verdict")
    rows = held(report, goals=goals)
    for row in rows:
        ratio, low = (f"{row[key]:.2f}" if row[key] is not None else "-" for key in ("ratio", "low"))
        limits = f"{row['at_least']:10.2f}{row['goal']:6.2f}"
        print(f"{row['unit']:18}{row['over']:6}{ratio:>6}{low:>7}{limits}  {row['verdict']}")
    for name in report["refused"]:
        print(f"{name}: refused, it does not compute the same")
    return 1 if report["refused"] or any(row["verdict"] != "ok" for row in rows) else 0


def _compare(old_file: Path, new_file: Path) -> int:
    """Print how two results of bench.kernels differ; the exit status."""
    old, new = (json.loads(path.read_text()) for path in (old_file, new_file))
    if problem := incomparable(old, new):
        print(f"cannot compare {old_file} with {new_file}: {problem}", file=sys.stderr)
        return 2
    rows = compare(old, new)
    print(f"{'case':26}{'baseline':10}{'old x':>8}{'new x':>8}{'change':>9}  verdict")
    for r in rows:
        after = "-" if r["new"] is None else f"{r['new']:.2f}"
        change = "-" if r["change"] is None else f"{r['change']:+.1%}"
        print(f"{r['case']:26}{r['baseline']:10}{r['old']:8.2f}{after:>8}{change:>9}  {r['verdict']}")
    failed = [r for r in rows if r["verdict"] in ("WORSE", "MISSING")]
    for name in new["refused"]:
        print(f"{name}: refused, its tests fail")
    known = {(r["op"], r["case"]) for r in rows}
    for entry in new["entries"]:
        if (entry["op"], entry["case"]) not in known:
            print(f"{entry['case']}: new, nothing to compare with")
    print(f"{len(failed)} of {len(rows)} ratios failed" if failed else f"all {len(rows)} ratios hold")
    return 1 if failed or new["refused"] else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="STEP.json, or OLD.json NEW.json")
    parser.add_argument("--goals", action="store_true", help="of STEP.json: hold it to the goals")
    args = parser.parse_args(argv)
    files: list[Path] = args.files
    if args.goals and len(files) > 1:
        parser.error("--goals are of one file, of bench.step")
    if len(files) > 2:
        parser.error(f"{len(files)} files: want one of bench.step, or two of bench.kernels")
    for path in files:
        if not path.is_file():
            parser.error(f"{path} is no file")  # exit status 2
    return _compare(*files) if len(files) == 2 else _hold(json.loads(files[0].read_text()), goals=args.goals)


if __name__ == "__main__":
    sys.exit(main())

"""Compare two results of `python -m bench.kernels --json`: `python -m bench.gate OLD.json NEW.json`.

Gated are the ratios to the baselines timed in the same run, not microseconds, so a slower clock is no regression. A
ratio has regressed when it fell by more than 5 % **and** its whole 95 % interval lies below the old one. Exit status 1
on a regression, an entry that is missing, or a refused op; 2 when the files cannot be compared.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

TOLERANCE = 0.05
BASELINES = ("over_eager", "over_compiled")


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
    for key in ("device", "gpu"):
        before, after = (result["environment"].get(key) for result in (old, new))
        if before != after:
            return f"{key} differs: {before!r} and {after!r}"
    if old["schema"] != new["schema"]:
        return f"schema differs: {old['schema']} and {new['schema']}"
    return None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gate", description=__doc__)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    args = parser.parse_args(argv)
    for path in (args.old, args.new):
        if not path.is_file():
            parser.error(f"{path} is no file")  # exit status 2
    old, new = (json.loads(path.read_text()) for path in (args.old, args.new))
    if problem := incomparable(old, new):
        print(f"cannot compare {args.old} with {args.new}: {problem}", file=sys.stderr)
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


if __name__ == "__main__":
    sys.exit(main())

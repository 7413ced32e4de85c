"""Run every benchmark case of ours once: `python -m bench.smoke [--device D] [--op NAME] [--full]`.

At tiny shapes for compute-sanitizer; at full ones (`--full`) for a profiler's counters.
"""

from __future__ import annotations

import argparse
import sys

import torch

from .registry import REGISTRY, lookup
from .workload import SD35_MEDIUM_512, TINY, Bench


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.smoke", description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--op", action="append", metavar="NAME", help="an op of the registry; repeat for several")
    parser.add_argument("--full", action="store_true", help="SD3.5-medium's shapes instead of tiny ones")
    args = parser.parse_args(argv)
    try:
        ops = [lookup(name) for name in args.op] if args.op else list(REGISTRY.values())
    except ValueError as error:
        parser.error(str(error))
    bench = Bench(SD35_MEDIUM_512 if args.full else TINY, args.device)
    failed = []
    for op in ops:
        for name, build in op.cases.items():
            torch.manual_seed(0)
            try:
                build(bench).ours()
            except RuntimeError as error:
                failed.append(name)
                print(f"{name}: {error}")
    if args.device == "cuda":
        torch.cuda.synchronize()
    print(f"{len(failed)} cases failed: {', '.join(failed)}" if failed else "every case ran")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

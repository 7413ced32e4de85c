"""Run every benchmark case of ours once at tiny shapes, for compute-sanitizer: `python -m bench.smoke [--device D]`."""

from __future__ import annotations

import argparse
import sys

import torch

from .registry import REGISTRY
from .workload import TINY, Bench


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.smoke", description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    failed = []
    for op in REGISTRY.values():
        for name, build in op.cases.items():
            torch.manual_seed(0)
            try:
                build(Bench(TINY, args.device)).ours()
            except RuntimeError as error:
                failed.append(name)
                print(f"{name}: {error}")
    if args.device == "cuda":
        torch.cuda.synchronize()
    print(f"{len(failed)} cases failed: {', '.join(failed)}" if failed else "every case ran")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

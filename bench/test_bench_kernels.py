"""pytest-benchmark entry points: `pytest bench/test_bench_kernels.py --benchmark-only [-k NAME]`.

Not collected by default. The same rule as `python -m bench.kernels`: an op whose tests fail is not timed.
"""

import functools

import pytest
import torch

from bench.kernels import failure
from bench.registry import REGISTRY
from bench.workload import SD35_MEDIUM_512, TINY, Bench

pytest.importorskip("pytest_benchmark")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [(op, case) for op in REGISTRY.values() for case in op.cases]

verdict = functools.cache(failure)


@pytest.mark.parametrize("variant", ["ours", "eager"])
@pytest.mark.parametrize(("op", "case"), CASES, ids=[case for _, case in CASES])
def test_bench(benchmark, op, case, variant):
    output = verdict(op.test, DEVICE)
    if output:
        pytest.fail(f"{op.test} fails: not timed\n{output}")
    benchmark.group = case
    benchmark.extra_info["device"] = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu: not a GPU figure"
    run = getattr(op.cases[case](Bench(SD35_MEDIUM_512 if DEVICE == "cuda" else TINY, DEVICE)), variant)

    def call():
        run()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    call()
    benchmark(call)

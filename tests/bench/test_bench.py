"""The benchmarks: they cover every op, time only what passes its tests, and the gate sees a regression.

Planted bugs that turned this file red: a gate that ignores the spread, the 5 %, missing entries, refused ops, the
GPU's name or the compiled baseline; failing tests timed anyway, a file without tests taken as passed, exit 0 when
refused; an op left out, a baseline without the bias, bytes without the output, no taking turns, the ratio inverted.
"""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import advgrpo_kernels
from bench import gate, kernels, timing
from bench.agreement import agreement, tensors
from bench.budget import Budget, OutOfTime
from bench.registry import REGISTRY, UNTIMED, Op, lookup
from bench.workload import TINY, Bench, Workload

ROOT = Path(__file__).parents[2]
CASES = [(op, case) for op in REGISTRY.values() for case in op.cases]


def test_every_public_op_is_benchmarked_or_says_why_not():
    names = {name for name in advgrpo_kernels.__all__ if name.islower() and not name.endswith("_ref")} - {"layers"}
    assert names == REGISTRY.keys() | UNTIMED.keys()
    assert not REGISTRY.keys() & UNTIMED.keys()


@pytest.mark.parametrize("op", REGISTRY.values(), ids=lambda op: op.name)
def test_every_op_has_its_tests(op):
    assert (ROOT / op.test).is_file()


@pytest.mark.parametrize(("op", "case"), CASES, ids=[case for _, case in CASES])
def test_both_sides_of_a_case_compute_the_same(op, case):
    """Otherwise the ratio compares two different things."""
    workload = op.cases[case](Bench(TINY, "cpu"))
    assert workload.bytes > 0
    found = agreement(case, op.cases[case], Bench(TINY, "cpu"))
    assert found.passed, found
    if workload.same is not None:  # the baseline draws its own numbers, or does not quantise
        ours, eager = tensors(workload.ours()), tensors(workload.eager())
        assert [t.shape for t in ours] == [t.shape for t in eager]


def off_by(error):
    """A case whose ours is off by `error`, where the largest value is 1."""

    def build(bench):
        x = bench.randn(64).clamp(-1, 1)
        x[0] = 1
        return Workload(ours=lambda: x * (1 + error), eager=lambda: x.clone(), bytes=1)

    return build


@pytest.mark.parametrize(("error", "passed"), [(0.0, True), (1e-6, True), (1e-4, False), (float("nan"), False)])
def test_agreement_with_float64_decides_what_is_timed(error, passed, monkeypatch, capsys):
    monkeypatch.setitem(REGISTRY, "planted", Op("planted", "tests", {"planted": off_by(error)}))
    status = kernels.main(["--op", "planted", "--device", "cpu", "--repeats", "2"])
    assert status == (0 if passed else 1)
    assert ("planted                   refused" in capsys.readouterr().out) == (not passed)


def test_bytes_and_flops_by_hand():
    bench = Bench(TINY, "cpu")
    assert REGISTRY["gaussian_step"].cases["gaussian_step"](bench).bytes == 4 * (4 * 8 * 8) * (4 + 4 + 4 + 4)
    linear = REGISTRY["fp8_linear"].cases["fp8_linear"](bench)
    assert linear.flops == 2 * (2 * 16) * (2 * 16) * 64
    assert linear.bytes == 32 * 32 + 64 * 32 + 2 * 32 * 64


def test_unknown_ops_name_the_nearest(capsys):
    with pytest.raises(ValueError, match="did you mean gaussian_step"):
        lookup("gausian_step")
    with pytest.raises(SystemExit, match="2"):
        kernels.main(["--op", "gausian_step"])
    assert "did you mean gaussian_step" in capsys.readouterr().err


def test_a_device_that_is_not_there_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        kernels.main(["--device", "cuda"])


@pytest.mark.parametrize("source", ["def test_it():\n    assert False, 'planted'\n", "", None])
@pytest.mark.in_ci(1)
def test_an_op_whose_tests_do_not_pass_is_not_timed(source, tmp_path, monkeypatch, capsys):
    """Tests that fail, a file without tests, and no file at all."""
    file = tmp_path / "test_planted.py"
    if source is not None:
        file.write_text(source)
    timed = []
    op = Op("planted", str(file), {"planted": timed.append})
    monkeypatch.setitem(REGISTRY, "planted", op)
    assert kernels.main(["--op", "planted", "--device", "cpu", "--tests"]) == 1
    assert timed == []
    out = capsys.readouterr().out
    assert "refused" in out
    assert source is None or "planted" in out


def test_an_op_that_cannot_run_here_is_refused(monkeypatch, capsys):
    """An op of csrc/ without its compiled library raises rather than time its PyTorch twin."""

    def build(bench):
        raise RuntimeError("needs a build with ADVGRPO_BUILD_CUDA=1")

    monkeypatch.setitem(REGISTRY, "planted", Op("planted", "tests", {"planted": build}))
    assert kernels.main(["--op", "planted", "--device", "cpu"]) == 1
    assert "refused: RuntimeError: needs a build" in capsys.readouterr().out


def test_the_same_op_is_timed_when_they_pass(tmp_path, monkeypatch):
    file = tmp_path / "test_planted.py"
    file.write_text("def test_it():\n    pass\n")
    monkeypatch.setitem(REGISTRY, "planted", Op("planted", str(file), {"planted": off_by(0.0)}))
    result = tmp_path / "out" / "new.json"
    arguments = ["--op", "planted", "--device", "cpu", "--json", str(result), "--repeats", "3", "--tests"]
    assert kernels.main(arguments) == 0
    (entry,) = json.loads(result.read_text())["entries"]
    assert entry["case"] == "planted"


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A CPU run over all ops."""
    file = tmp_path_factory.mktemp("bench") / "old.json"
    assert kernels.main(["--device", "cpu", "--repeats", "4", "--json", str(file)]) == 0
    return json.loads(file.read_text())


def test_report_says_what_it_was_measured_on(report):
    assert report["environment"]["note"] == "cpu: not a GPU figure"
    assert report["environment"]["torch"] == torch.__version__
    assert report["calibration"]["copy_gb_s"] > 0
    assert {entry["op"] for entry in report["entries"]} == REGISTRY.keys()
    for entry in report["entries"]:
        assert entry["over_eager"]["low"] <= entry["over_eager"]["ratio"] <= entry["over_eager"]["high"]
        assert entry["ours_us"]["p10"] <= entry["ours_us"]["median"] <= entry["ours_us"]["p90"]
        assert entry["compiled_us"] is None
        assert entry["limit"] == ("matmul" if entry["flops"] > 50 * entry["bytes"] else "copy")


def test_without_time_every_case_is_named_and_checked_all_the_same(tmp_path, capsys):
    file = tmp_path / "r.json"
    assert kernels.main(["--op", "gelu", "--device", "cpu", "--seconds", "0", "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    assert report["left_out"] == ["gelu"]
    assert report["agreement"]["gelu"]["passed"]
    assert report["entries"] == []
    assert kernels.main(["--op", "gelu", "--device", "cpu", "--check", "--json", str(file)]) == 0
    assert "calibration" not in json.loads(file.read_text())


def gated(report, tmp_path, change):
    """Exit status of the gate between a report with narrow intervals and a changed copy."""
    old = copy.deepcopy(report)
    for entry in old["entries"]:
        entry["over_eager"] = {"ratio": 2.0, "low": 1.97, "high": 2.03}
    new = copy.deepcopy(old)
    change(new)
    paths = [tmp_path / "old.json", tmp_path / "new.json"]
    for path, content in zip(paths, (old, new)):
        path.write_text(json.dumps(content))
    return gate.main([str(path) for path in paths])


def set_ratio(value, low, high):
    def change(new):
        new["entries"][0]["over_eager"] = {"ratio": value, "low": low, "high": high}

    return change


@pytest.mark.parametrize(
    ("change", "status", "word"),
    [
        (lambda new: None, 0, "ratios hold"),
        (set_ratio(1.8, 1.77, 1.83), 1, "WORSE"),
        (set_ratio(1.94, 1.935, 1.945), 0, "ok"),  # beyond the spread, but 3 %
        (set_ratio(1.8, 1.5, 1.98), 0, "ok"),  # 10 %, but within the spread
        (set_ratio(2.4, 2.3, 2.5), 0, "better"),
        (lambda new: new["entries"].pop(2), 1, "MISSING"),
        (lambda new: new["entries"][1].update(over_eager=None), 1, "MISSING"),
        (lambda new: new.update(refused=["gelu"]), 1, "gelu: refused"),
        (lambda new: new["entries"][0].update(case="renamed"), 1, "renamed: new"),
    ],
)
def test_gate(report, tmp_path, capsys, change, status, word):
    assert gated(report, tmp_path, change) == status
    assert word in capsys.readouterr().out


def test_gate_does_not_compare_different_devices(report, tmp_path, capsys):
    assert gated(report, tmp_path, lambda new: new["environment"].update(gpu="NVIDIA H200")) == 2
    assert "gpu differs: None and 'NVIDIA H200'" in capsys.readouterr().err


def test_gate_counts_the_compiled_baseline(report, tmp_path):
    def slower(new):
        new["entries"][0]["over_compiled"] = {"ratio": 0.9, "low": 0.89, "high": 0.91}

    old = copy.deepcopy(report)
    old["entries"][0]["over_compiled"] = {"ratio": 1.2, "low": 1.19, "high": 1.21}
    new = copy.deepcopy(old)
    slower(new)
    rows = gate.compare(old, new)
    assert [(r["case"], r["baseline"]) for r in rows if r["verdict"] == "WORSE"] == [("gaussian_step", "compiled")]


def step_report(rounds: int = 3, **lows: float) -> dict:
    """A result of bench.step with these lower ends, by unit and over whom."""
    report: dict = {"refused": []}
    for name, low in lows.items():
        unit, over = name.split("__")
        report.setdefault(unit, {"rounds": rounds})[f"over_{over}"] = {"ratio": low + 0.5, "low": low, "high": low + 1}
    return report


def test_the_gate_holds_whole_steps_by_their_lower_ends(tmp_path, capsys):
    file = tmp_path / "step.json"
    held = {f"{unit}__{side}": at_least for unit, side, at_least, _ in gate.HELD}
    assert {side for _, side, *_ in gate.HELD} == {"b1", "b0"}
    worse = {name: {**held, name: low - 0.01} for name, low in held.items()}
    missing = {name: {other: low for other, low in held.items() if other != name} for name in held}
    for lows, status in [(held, 0), *((each, 1) for each in (*worse.values(), *missing.values()))]:
        file.write_text(json.dumps(step_report(**lows)))
        assert gate.main([str(file)]) == status
    said = capsys.readouterr().out
    assert said.count("BELOW") == said.count("MISSING") == len(held)
    file.write_text(json.dumps(step_report(rounds=2, **held)))
    assert gate.main([str(file)]) == 1  # the lower end of an interval over two ratios is the lesser one
    assert capsys.readouterr().out.count("TOO FEW ROUNDS") == len(held)
    file.write_text(json.dumps(step_report(**held) | {"refused": ["update of b1"]}))
    assert gate.main([str(file)]) == 1
    for words in ([str(file)] * 3, [str(file), str(file), "--goals"]):
        with pytest.raises(SystemExit):
            gate.main(words)


def test_the_committed_cpu_result_reaches_the_goals_and_one_below_them_would_not(tmp_path):
    committed = ROOT / "bench" / "results" / "cpu" / "step.json"
    assert gate.main([str(committed), "--goals"]) == 0
    report = json.loads(committed.read_text())
    for unit, side, at_least, goal in gate.HELD:
        worse = copy.deepcopy(report)
        worse[unit][f"over_{side}"]["low"] = goal - 0.01
        assert goal - 0.01 > at_least
        (tmp_path / "step.json").write_text(json.dumps(worse))
        assert [gate.main([str(tmp_path / "step.json"), *words]) for words in ([], ["--goals"])] == [0, 1]


def test_ratio_interval_covers_the_ratio_and_shrinks_with_the_noise():
    rng = np.random.default_rng(1)
    ours, noisy = (1 + spread * rng.random(200) for spread in (0.01, 0.5))
    narrow, wide = timing.ratio(2 * ours, ours), timing.ratio(2 * noisy, noisy[::-1].copy())
    assert narrow.ratio == pytest.approx(2.0)
    assert wide.low < 2.0 < wide.high
    assert wide.high - wide.low > 10 * (narrow.high - narrow.low)


def test_variants_take_turns():
    calls = []
    variants = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = timing.interleave(variants, "cpu", repeats=3, warmup=1)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"
    assert all(len(values) == 3 for values in times.values())


@pytest.fixture
def cuda_by_hand(monkeypatch):
    """What is asked of CUDA, in order, and a host whose clock the calls themselves move."""
    done, now = [], [0.0]
    event = lambda **_: SimpleNamespace(record=lambda: done.append("event"), synchronize=lambda: None)  # noqa: E731
    buffer = SimpleNamespace(sum=lambda: done.append("read"), zero_=lambda: done.append("write"))
    monkeypatch.setattr(timing, "_flush_buffer", lambda: buffer)
    monkeypatch.setattr(timing.time, "monotonic", lambda: now[0])
    for name, call in {"synchronize": lambda: None, "Event": event}.items():
        monkeypatch.setattr(torch.cuda, name, call)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: done.append(f"sleep {cycles / timing.CYCLES:.3f}"))

    def call(name: str, seconds: float):
        def run():
            done.append(name)
            now[0] += seconds

        return run

    return done, call


def test_a_call_is_timed_behind_a_clean_cache_with_the_host_ahead(cuda_by_hand):
    done, call = cuda_by_hand
    variants = {"ours": call("ours", 0.0001), "eager": call("eager", 0.002), "slow": call("slow", 3.0)}
    turns = timing.Turns(variants, "cuda", host_ahead=True)
    turns.warm_up()
    done.clear()
    turns.play(1, Budget(None))
    slept = {"ours": "0.000", "eager": "0.004", "slow": "0.100"}  # twice what the host took, and no longer than that
    assert done == [what for name in variants for what in ("read", f"sleep {slept[name]}", "event", name, "event")]


def test_what_a_round_takes_counts_the_sleep_before_there_was_one(cuda_by_hand):
    """Where the warm-up alone would fit into what is left of the run, the rounds are not begun."""
    done, call = cuda_by_hand
    budget = Budget(None)
    budget.end = 3 * 0.02 + 0.05  # seconds of this clock: of three rounds of 0.02 + 0.04, not one more than the warm-up
    with pytest.raises(OutOfTime, match=r"3 rounds of 0\.1 s do not fit in the 0\.1 s"):
        timing.interleave({"ours": call("ours", 0.02)}, "cuda", repeats=3, warmup=1, budget=budget)
    assert done == ["ours"]


def test_of_a_whole_step_the_hosts_time_counts(cuda_by_hand):
    done, call = cuda_by_hand
    turns = timing.Turns({"step": call("step", 0.002)}, "cuda")
    turns.warm_up()
    done.clear()
    turns.play(1, Budget(None))
    assert done == ["read", "event", "step", "event"]


@pytest.mark.slow
@pytest.mark.weekly
def test_pytest_benchmark_entry_points():
    pytest.importorskip("pytest_benchmark")
    command = [sys.executable, "-m", "pytest", "bench/test_bench_kernels.py", "-k", "group_advantages", "-q"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    done = subprocess.run(
        [*command, "--benchmark-disable", "-p", "no:cacheprovider"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert "2 passed" in done.stdout, done.stdout + done.stderr

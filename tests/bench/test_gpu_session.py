"""`bench/gpu_session.sh` keeps what it finds: on a lent GPU a command is cut off after ten minutes.

Bugs planted in a copy, each seen red: PYTHONPATH replaced; `python` instead of `python3`; buffered output; logs left
side by side in $OUT; no limit handed to a step; the report written only at the end; smoke without an end of its own;
more parts than smoke and step by default; ATTENTION not handed on; a sanitizer that cannot use the device run anyway;
a bench module, or tests/gpu, that imports diffusers.
"""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "bench" / "gpu_session.sh"
FILES_THAT_COME_BACK = 8
STUB = """#!/usr/bin/env bash
[ "$1" = -c ] && exit 0
echo "$PYTHONPATH|$PYTHONUNBUFFERED|$*" >>"$CALLS"
while [ $# -gt 0 ]; do
    case $1 in --json|--png|--trace) echo '{}' >"$2" ;; esac
    [ "$1" = tests/gpu ] && [ -n "${HANGS:-}" ] && exec sleep 60
    shift
done
echo said something
"""
ALL = ("smoke", "step", "kernels", "profile", "test")


@pytest.fixture
def stubbed(tmp_path):
    """Runs the script with a python3 that records how it is called; returns the calls and the folder of results."""
    commands = tmp_path / "bin"
    commands.mkdir()
    (commands / "python3").write_text(STUB)
    (commands / "python3").chmod(0o755)
    out, calls = tmp_path / "out", tmp_path / "calls"

    def run(*parts: str, **settings: str) -> tuple[list[list[str]], Path, str]:
        environment = {"PATH": f"{commands}:{os.environ['PATH']}", "OUT": str(out), "CALLS": str(calls)}
        environment |= {"DEVICE": "cpu", "PYTHONPATH": "/carried/site", **settings}
        done = subprocess.run(["bash", SCRIPT, *parts], env=environment, capture_output=True, text=True, timeout=60)
        lines = calls.read_text().splitlines() if calls.exists() else []
        return [line.split("|") for line in lines], out, done.stdout

    return run


def test_all_parts_together_leave_few_files_and_find_what_was_carried(stubbed):
    calls, out, _ = stubbed(*ALL)
    assert [c[2].split()[:3] for c in calls] == [
        ["-m", "bench.kernels", "--device"],
        ["-m", "pytest", "tests/gpu"],
        ["-m", "bench.step", "--size"],
        ["-m", "bench.kernels", "--device"],
        ["-m", "bench.profile", "--size"],
        ["-m", "pytest", "tests/kernels"],
    ]
    for path, unbuffered, _ in calls:
        assert path == ".:kernels:/carried/site"
        assert unbuffered == "1"
    names = {path.name for path in out.iterdir()}
    assert {"session.log", "logs.tar.gz", "check.json", "rehearsal-step.json"} <= names
    assert len(names) <= FILES_THAT_COME_BACK
    assert (out / "session.log").read_text().count("said something") == 6
    with tarfile.open(out / "logs.tar.gz") as logs:
        assert "logs/step.log" in logs.getnames()


def test_whole_steps_come_before_tests_and_know_how_long_they_may_take(stubbed):
    calls, _, _ = stubbed("step", LIMIT="200")
    words = calls[0][2].split()
    assert 100 <= int(words[words.index("--seconds") + 1]) <= 160


def test_smoke_that_hangs_makes_way_for_the_figures(stubbed):
    calls, _, said = stubbed(LIMIT="60", SMOKE="6", HANGS="yes")
    assert [c[2].split()[1] for c in calls] == ["pytest", "bench.step"]  # under 5 seconds nothing is begun
    assert "check-ops: left out" in said
    assert "check-parts: exit 124" in said
    words = calls[-1][2].split()
    assert 5 <= int(words[words.index("--seconds") + 1]) <= 20 - 6


def test_by_default_smoke_and_whole_steps_run_and_fit_ten_minutes(stubbed):
    calls, _, said = stubbed()
    assert [c[2].split()[1] for c in calls] == ["bench.kernels", "pytest", "bench.step"]
    allowed = [int(line.split("at most ")[1].split()[0]) for line in said.splitlines() if "at most" in line]
    assert allowed[0] <= 90
    assert allowed[1] <= 180
    assert 350 < allowed[2] <= 560  # nothing of smoke's time is lost that smoke does not take
    words = calls[-1][2].split()
    assert int(words[words.index("--seconds") + 1]) <= allowed[2] - 30  # to draw and print


def test_attention_is_handed_on(stubbed):
    calls, _, _ = stubbed("step", "profile", ATTENTION="flash")
    assert all("--attention flash" in c[2] for c in calls)


@pytest.mark.parametrize(("status", "runs"), [(1, 0), (0, 3)])
def test_a_sanitizer_that_cannot_use_the_device_costs_nothing(stubbed, tmp_path, status, runs):
    fake = tmp_path / "bin" / "compute-sanitizer"
    probe = f'[ "$1" = python3 ] && {{ echo no device here; exit {status}; }}'
    fake.write_text(f'#!/usr/bin/env bash\n{probe}\necho "||$*" >>"$CALLS"\n')
    fake.chmod(0o755)
    calls, _, said = stubbed("sanitize")
    assert ("left out: no device here" in said) == (status == 1)
    assert [c[2].split()[1] for c in calls] == ["memcheck", "racecheck", "initcheck"][:runs]


def test_what_runs_there_imports_nothing_that_is_not_there():
    absent = ["diffusers", "peft", "tyro", "accelerate", "datasets", "tensorboard", "wandb", "scipy", "nvtx"]
    modules = [f"bench.{name}" for name in ("step", "kernels", "profile", "smoke", "gate")]
    lines = [f"import sys; sys.modules.update(dict.fromkeys({absent}))"]
    lines += [f"import {name}" for name in (*modules, "tests.gpu.test_device_path", "tests.conftest")]
    environment = os.environ | {"PYTHONPATH": f".{os.pathsep}kernels"}
    command = [sys.executable, "-c", "\n".join(lines)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


def test_a_part_that_no_longer_fits_is_left_out_and_said(stubbed):
    calls, _, said = stubbed("step", LIMIT="8")
    assert calls == []
    assert "step: left out" in said


def test_an_unknown_part_is_named(stubbed):
    assert "unknown part stp: smoke, step" in stubbed("stp")[2]


def test_what_was_measured_survives_a_kill(tmp_path):
    environment = os.environ | {"OUT": str(tmp_path), "DEVICE": "cpu", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(["bash", SCRIPT, "step"], env=environment, start_new_session=True, cwd=ROOT)
    file, deadline = tmp_path / "rehearsal-step.json", time.monotonic() + 200
    try:
        while time.monotonic() < deadline and "sampler" not in (json.loads(file.read_text()) if file.exists() else {}):
            assert running.poll() is None, (tmp_path / "session.log").read_text()
            time.sleep(0.05)
    finally:
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()
    report = json.loads(file.read_text())
    assert report["sampler"]["rounds"] >= 1
    assert report["sampler"]["ours"] > 0
    assert report["on_policy"]["log_prob_mismatch_max"] == 0
    assert "device cpu" in (tmp_path / "session.log").read_text()

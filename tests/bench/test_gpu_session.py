"""`bench/gpu_session.py` keeps what it finds: on a lent GPU a command is cut off after ten minutes.

Bugs planted in a copy, each seen red: PYTHONPATH replaced; `python` instead of `python3`; buffered output; logs left
side by side; no limit handed to a step; the report written only at the end; smoke without an end of its own; more parts
than smoke and step by default; --attention not handed on; a sanitizer that cannot use the device run anyway; a bench
module, or tests/gpu, that imports diffusers; a step that outlives a killed session; a watchdog that ends the process
but not what it started; small size, or the CPU's tests, on a GPU; compiled kernels that are carried but not unpacked;
Triton's interpreter left on; a test marked gpu in a file that no part names.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import gpu_session, rehearsal

ROOT = Path(__file__).parents[2]
STUB = """#!/usr/bin/env bash
if [ "$1" = -c ]; then
    case $2 in *find_spec*) [ -z "${LACKS:-}" ] || [ -d "$LACKS" ]; exit ;; esac
    echo '{"python": "3", "torch": "2", "triton": "3", "gpu": '"${GPU:-null}}"
    exit 0
fi
settings="${TRITON_CACHE_DIR:-}|${ADVGRPO_KERNELS_LIBRARY:-}|${TRITON_INTERPRET:-}"
echo "$PYTHONPATH|$PYTHONUNBUFFERED|$*|$settings" >>"$CALLS"
while [ $# -gt 0 ]; do
    case $1 in
        --json|--trace) echo '{}' >"$2" ;;
        --target) mkdir -p "$2" ;;
        csrc/build.py) touch "$2" ;;
    esac
    if [ "$1" = tests/gpu ] && [ -n "${HANGS:-}" ]; then trap '' INT; sleep 60 & echo $! >"$HANGS"; wait; fi
    shift
done
echo said something
"""


@pytest.fixture
def stubbed(tmp_path):
    """Runs a command with a python3 that records how it is called: (calls, folder of results, what was said, exit)."""
    program(tmp_path, "python3", STUB)
    out, calls = tmp_path / "out", tmp_path / "calls"

    def run(*words: str, device="cpu", root: Path = ROOT, **settings: str) -> tuple[list[list[str]], Path, str, int]:
        calls.unlink(missing_ok=True)
        environment = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "OUT": str(out), "CALLS": str(calls)}
        environment |= {"PYTHONPATH": "/carried/site", **settings}
        command = [sys.executable, "-m", "bench.gpu_session", *words, "--device", device]
        environment["PYTHONPATH"] += f"{os.pathsep}{root}"
        done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=60)
        lines = calls.read_text().splitlines() if calls.exists() else []
        return [line.split("|") for line in lines], out, done.stdout + done.stderr, done.returncode

    return run


def program(folder: Path, name: str, text: str) -> None:
    """On the PATH of `stubbed`."""
    file = folder / "bin" / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    file.chmod(0o755)


@pytest.fixture
def gpu_machine(tmp_path) -> Path:
    """What a session needs of the tree, and what was carried, in a folder that may be written to."""
    from bench.warm_cache import pack

    root = tmp_path / "tree"
    for name in ("bench/__init__.py", "bench/gpu_session.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    for name in ("csrc/merge.cu", ".whl/pydantic-2-none-any.whl", "home/ABC/_k.cubin", "home/ABC/__grp___k.json"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text('{"child_paths": {"_k.cubin": "_k.cubin"}}')
    pack(root / "home", root / ".whl/triton-cache.tar.gz")
    program(tmp_path, "nvidia-smi", "#!/usr/bin/env bash\necho a fake nvidia-smi\n")
    program(tmp_path, "nvcc", "#!/usr/bin/env bash\n")
    program(tmp_path, "ncu", '#!/usr/bin/env bash\necho "||ncu ${*//|/ }" >>"$CALLS"\n')
    return root


def test_parts_leave_few_files_and_find_what_was_carried(stubbed):
    calls, out, said, code = stubbed("smoke", "step", "profile")
    assert code == 0, said
    ours = [c[2].split()[:3] for c in calls if "bench.smoke" not in c[2]]
    assert ours == [
        ["-m", "bench.kernels", "--device"],
        ["-m", "pytest", "tests/gpu"],
        ["-m", "bench.step", "--device"],
        ["-m", "bench.profile", "--device"],
    ]
    for path, unbuffered, *_ in calls:
        assert path.startswith(".:kernels:/carried/site")
        assert unbuffered == "1"
    names = {path.name for path in out.iterdir()}
    assert {*gpu_session.OWN_FILES, "check.json", "step.json", "profile.json", "trace.json.gz"} == names
    assert rehearsal.problems_of(out, ["smoke", "step", "profile"]) == []
    assert (out / "session.log").read_text().count("said something") == len(calls)
    with tarfile.open(out / "logs.tar.gz") as logs:
        assert {"logs/check-ops.log", "logs/check-parts.log", "logs/step.log"} <= set(logs.getnames())
    parts = json.loads((out / "session.json").read_text())["parts"]
    assert [step["exit"] for row in parts.values() for step in row["steps"]] == [0] * len(calls)
    assert all(row["seconds"] <= row["limit"] and row["predicted"] > 0 for row in parts.values())


def test_on_a_gpu_everything_is_of_full_size_and_runs_what_was_carried(stubbed, gpu_machine):
    """Not a rehearsal's words: `--device cuda` with programs that only say who they are."""
    machine = {"device": "cuda", "root": gpu_machine, "GPU": '"a fake GPU"', "TRITON_INTERPRET": "1"}
    machine["LACKS"] = str(gpu_machine / "build/gpu/site")
    calls, out, said, code = stubbed("smoke", "step", "profile", "test", **machine)
    assert code == 0, said
    kept, ours = gpu_machine / "build/gpu", [call[2] for call in calls]
    library, cache = str(kept / "advgrpo_cuda.so"), kept / "triton"
    wheels, build = (next(words for words in ours if what in words) for what in ("pip install", "csrc/build.py"))
    assert wheels.endswith(f"--target {kept / 'site'} {gpu_machine / '.whl/pydantic-2-none-any.whl'}")
    assert build == f"csrc/build.py {library}"
    wanted = (
        "-m bench.kernels --device cuda --check",
        "-m pytest tests/gpu -v -m gpu ",
        "-m bench.step --device cuda ",
        "-m bench.profile --device cuda --size full",
        "ncu --clock-control none",
        "-m pytest tests/policy/test_transformer.py tests/policy/test_attention.py -q -m gpu ",
        "-m pytest tests/kernels tests/runtime/test_graphs.py -q -m not slow",
    )
    ran = [words for words in ours if words not in (wheels, build)]
    assert len(ran) == len(wanted)
    for words, start in zip(ran, wanted):
        assert words.startswith(start)
    assert "--size full" in ran[2]
    assert "-m bench.smoke --device cuda --full" in ran[4]
    for path, *settings in (call for call in calls if call[0]):
        assert path.startswith(".:kernels:/carried/site")
        assert path.endswith(str(kept / "site"))
        assert [settings[0], *settings[2:]] == ["1", str(cache), library, ""]
    assert "1 compiled kernels unpacked" in said
    found = json.loads((cache / "ABC/__grp___k.json").read_text())["child_paths"]
    assert found == {"_k.cubin": str(cache / "ABC/_k.cubin")}
    with tarfile.open(out / "logs.tar.gz") as logs:
        assert b"a fake nvidia-smi" in logs.extractfile("logs/nvidia-smi.log").read()
    assert json.loads((out / "session.json").read_text())["machine"]["gpu"] == "a fake GPU"
    again, _, said, code = stubbed("step", **machine)  # the machine is still held
    assert code == 0, said
    assert [call[2].split()[1] for call in again] == ["bench.step"]
    assert "unpacked" not in said


def test_a_machine_whose_gpu_torch_does_not_see_runs_nothing(stubbed, gpu_machine):
    calls, _, said, code = stubbed("smoke", device="cuda", root=gpu_machine)
    assert (calls, code) == ([], 1)
    assert "torch sees no GPU: --device cpu rehearses without one" in said


def test_whole_steps_know_how_long_they_may_take(stubbed):
    calls, *_ = stubbed("step", "--limit", "200")
    words = calls[0][2].split()
    assert 100 <= int(words[words.index("--seconds") + 1]) <= 160


@pytest.mark.weekly
def test_smoke_that_hangs_makes_way_for_the_figures(stubbed, tmp_path, monkeypatch):
    """The watchdog ends what the step has started as well, though it ignores the interrupt: so long does it take."""
    calls, out, said, code = stubbed("smoke", "step", "--limit", "17", HANGS=str(tmp_path / "child"))
    assert code == 1
    assert [c[2].split()[1] for c in calls] == ["bench.kernels", "pytest"]
    assert "check-parts: stopped" in said
    assert "step: left out" in said
    child = int((tmp_path / "child").read_text())
    assert not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2]
    parts = json.loads((out / "session.json").read_text())["parts"]
    assert parts["smoke"]["steps"][-1]["exit"] == 124
    assert parts["step"]["left_out"]


def test_by_default_smoke_and_whole_steps_run_and_fit_ten_minutes(stubbed):
    calls, _, said, _ = stubbed()
    assert [c[2].split()[1] for c in calls] == ["bench.kernels", "pytest", "bench.step"]
    allowed = [int(line.split("at most ")[1].split()[0]) for line in said.splitlines() if ", at most" in line]
    smoke, check_ops, check_parts, part, step = allowed
    assert smoke <= 180
    assert check_ops <= 90
    assert check_parts <= 180
    assert 350 < step <= part <= 480
    words = calls[-1][2].split()
    assert int(words[words.index("--seconds") + 1]) <= step - 30  # to build, draw and print


def test_every_part_is_predicted_below_its_limit_and_leaves_what_comes_back():
    for name, part in gpu_session.PARTS.items():
        assert 0 < part.predicted <= part.limit <= gpu_session.LONGEST_PART, name
    default = sum(gpu_session.PARTS[name].predicted for name in gpu_session.DEFAULT)
    assert default + gpu_session.TO_PACK <= 570
    for parts in rehearsal.COMMANDS:
        gpu_session.parse([*parts, "--out", "somewhere"])
    assert {part for parts in rehearsal.COMMANDS for part in parts} == set(gpu_session.PARTS)


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """A session on a GPU machine that has neither a compiler nor a profiler; what it says is in `said`."""
    monkeypatch.setattr(gpu_session.shutil, "which", lambda name: None)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    args = SimpleNamespace(device="cuda", attention=None)
    environment = {"ADVGRPO_KERNELS_LIBRARY": "advgrpo_cuda.so"}
    session = SimpleNamespace(args=args, on_gpu=True, size="full", left=500.0, out=tmp_path, environment=environment)
    session.said = []
    session.say = session.said.append
    return session


def test_every_test_that_needs_a_gpu_is_run_by_some_part(bare):
    steps = [step.words for part in gpu_session.PARTS.values() for step in part.steps(bare, 400)]
    run = [word for words in steps if "pytest" in words for word in words if word.startswith("tests/")]
    marked = [file for file in (ROOT / "tests").rglob("test_*.py") if re.search(r"mark\.gpu", file.read_text())]
    assert len(marked) > 15
    for file in marked:
        name = file.relative_to(ROOT).as_posix()
        assert any(f"{name}/".startswith(f"{place}/") for place in run), f"no part of bench/gpu_session.py runs {name}"


def test_without_a_compiler_the_parts_run_without_csrc(bare):
    (step,) = gpu_session.PARTS["step"].steps(bare, 400)
    assert step.words[1] == "bench.step"
    assert bare.environment == {}
    assert bare.said == ["no nvcc: merge_lora and multi_tensor_adamw of csrc/ are refused"]


def test_what_cannot_come_back_is_refused_or_said(stubbed, tmp_path, capsys, monkeypatch):
    with pytest.raises(SystemExit):
        gpu_session.parse(["smoke", "step", "profile", "train", "kernels", "tune", "--out", "somewhere"])
    assert "11 files, of which 8 come back; name fewer parts" in capsys.readouterr().err
    folder = tmp_path / "large"
    folder.mkdir()
    for i in range(9):
        (folder / f"{i}.json").write_text("{}")
    monkeypatch.setattr(gpu_session, "MOST_BYTES", 1)
    problems = gpu_session.cannot_come_back(folder)
    assert len(problems) == 10
    assert "9 files, 8 come back" in problems[-1]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="what travels is what git knows, and this is no checkout")
def test_the_tree_leaves_room_for_what_is_carried():
    """The wheels of bench/gpu_wheels.txt and the compiled kernels were 9.8 MiB in December 2026."""
    command = ["git", "ls-files", "-z"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    tree = [ROOT / name for name in names if (ROOT / name).is_file()]
    assert len(tree) > 1000
    assert sum(file.stat().st_size for file in tree) <= rehearsal.MOST_TREE - 12 * 2**20


def test_attention_is_handed_on(stubbed):
    calls, *_ = stubbed("step", "profile", "--attention", "flash")
    assert all("--attention flash" in c[2] for c in calls if "smoke" not in c[2])


@pytest.mark.parametrize(("status", "runs"), [(1, 0), (0, 3)])
def test_a_sanitizer_that_cannot_use_the_device_costs_nothing(stubbed, tmp_path, status, runs):
    fake = tmp_path / "bin" / "compute-sanitizer"
    probe = f'[ "$1" = python3 ] && {{ echo no device here; exit {status}; }}'
    fake.write_text(f'#!/usr/bin/env bash\n{probe}\necho "||$*" >>"$CALLS"\n')
    fake.chmod(0o755)
    calls, _, said, _ = stubbed("sanitize")
    assert ("left out: no device here" in said) == (status == 1)
    assert [c[2].split()[1] for c in calls] == ["memcheck", "racecheck", "initcheck"][:runs]


@pytest.mark.weekly
def test_what_runs_there_imports_nothing_that_is_not_there():
    absent = ["diffusers", "peft", "tyro", "accelerate", "datasets", "tensorboard", "wandb", "scipy", "nvtx"]
    modules = [f"bench.{name}" for name in ("step", "kernels", "profile", "smoke", "gate", "train", "tune", "collect")]
    lines = [f"import sys; sys.modules.update(dict.fromkeys({absent}))"]
    lines += [f"import {name}" for name in (*modules, "tests.gpu.test_device_path", "tests.conftest")]
    environment = os.environ | {"PYTHONPATH": f".{os.pathsep}kernels"}
    command = [sys.executable, "-c", "\n".join(lines)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


def test_the_session_itself_needs_the_standard_library_alone():
    command = [sys.executable, "-S", "-E", "-m", "bench.gpu_session", "--help"]  # no site-packages
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "smoke, step, profile" in done.stdout


def test_a_part_that_no_longer_fits_is_left_out_and_said(stubbed):
    calls, _, said, code = stubbed("step", "--limit", "8")
    assert (calls, code) == ([], 1)
    assert "step: left out" in said


def test_an_unknown_part_is_named(stubbed):
    assert "unknown part stp: smoke, step" in stubbed("stp")[2]


def test_compiled_kernels_are_found_where_they_are_unpacked(tmp_path):
    from bench.warm_cache import pack

    entry = tmp_path / "home" / "ABC"
    entry.mkdir(parents=True)
    files = {"_k.cubin": b"\x7fELF", "_k.json": b"{}", "_k.ptx": b"text"}
    for name, data in files.items():
        (entry / name).write_bytes(data)
    group = {"child_paths": {name: str(entry / name) for name in files}}
    (entry / "__grp___k.json").write_text(json.dumps(group))
    (tmp_path / "home" / "launcher").mkdir()
    assert pack(tmp_path / "home", tmp_path / "cache.tar.gz") == 1
    there = tmp_path / "there"
    assert gpu_session.unpack_cache(tmp_path / "cache.tar.gz", there) == 1
    paths = json.loads((there / "ABC" / "__grp___k.json").read_text())["child_paths"]
    assert paths == {name: str(there / "ABC" / name) for name in ("_k.cubin", "_k.json")}
    assert (there / "ABC" / "_k.cubin").read_bytes() == b"\x7fELF"
    assert not (there / "ABC" / "_k.ptx").exists()


@pytest.mark.weekly
def test_what_was_measured_survives_a_kill(tmp_path):
    command = [sys.executable, "-m", "bench.gpu_session", "step", "--device", "cpu", "--python", sys.executable]
    environment = os.environ | {"OUT": str(tmp_path), "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL)
    file, deadline = tmp_path / "step.json", time.monotonic() + 200
    try:
        while time.monotonic() < deadline and "sampler" not in (json.loads(file.read_text()) if file.exists() else {}):
            assert running.poll() is None, (tmp_path / "session.log").read_text()
            time.sleep(0.05)
    finally:
        running.send_signal(signal.SIGKILL)
        running.wait()
    time.sleep(0.5)
    at_work = subprocess.run(["pgrep", "-f", str(file)], capture_output=True, text=True).stdout.split()
    assert at_work == [], "a step that outlives its session keeps the GPU"
    report = json.loads(file.read_text())
    assert report["sampler"]["rounds"] >= 1
    assert report["sampler"]["ours"] > 0
    assert report["on_policy"]["log_prob_mismatch_max"] == 0
    assert "device cpu" in (tmp_path / "session.log").read_text()

"""What .github/ calls exists, its matrix is what pyproject.toml allows, and no stranger gets a token that writes.

GitHub alone can run a workflow; this reads them. Bugs planted in a copy, each seen red: a make target, module, script
and option that do not exist; a lane of torch outside the bounds, and the ends of the bounds in no lane; a Python below
requires-python; a title pasted into a shell; a write permission beside a checkout, and for pull requests; an action
pinned to a branch; a job without a time limit; a verdict that holds though the session failed, and the other way round.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from tests.projects import KERNELS, PROJECT, ROOT, all_requirements, requirements, without_upper_bounds

WORKFLOWS = {
    path.name: yaml.safe_load(path.read_text()) for path in sorted((ROOT / ".github/workflows").glob("*.y*ml"))
}
TEMPLATES = {p.name: yaml.safe_load(p.read_text()) for p in sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.y*ml"))}
JOBS = {f"{file}:{name}": job for file, flow in WORKFLOWS.items() for name, job in flow["jobs"].items()}
STEPS = [(where, step) for where, job in JOBS.items() for step in job["steps"]]
RUNS = [(where, step["run"]) for where, step in STEPS if "run" in step]
OWN_PACKAGES = {"advgrpo": ROOT, "bench": ROOT, "tests": ROOT, "advgrpo_kernels": ROOT / "kernels"}
MODULES_OF_OTHERS = {"pip", "pytest"}
INTERPOLATED = {"matrix.torch", "github.event.pull_request.number"}  # nothing that a stranger writes


def triggers(file: str) -> set[str]:
    return set(WORKFLOWS[file][True])  # YAML 1.1 reads `on` as true


def module_file(name: str) -> Path | None:
    """The file of `python -m name` for a module of ours."""
    place = OWN_PACKAGES[name.split(".")[0]] / name.replace(".", "/")
    return next((f for f in (place.with_suffix(".py"), place / "__main__.py") if f.is_file()), None)


def modules(text: str) -> set[str]:
    return set(re.findall(r"\bpython[\d.]*\"? -m ([\w.]+)", text))


def test_there_is_something_to_check():
    assert {"ci.yml", "newest.yml", "gpu.yml", "gpu-comment.yml"} <= set(WORKFLOWS)
    assert len(RUNS) > 10


@pytest.mark.parametrize(("where", "text"), RUNS)
def test_what_a_step_runs_exists(where, text):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([\w-]+)", text)) <= targets
    for module in modules(text) - MODULES_OF_OTHERS:
        assert module_file(module), f"{where}: python -m {module}"
    checkouts = [
        s["with"]["path"] for s in JOBS[where]["steps"] if "path" in s.get("with", {}) and "checkout" in s["uses"]
    ]
    for script in re.findall(r"(?<![\w$/.])[\w.-]+(?:/[\w.-]+)*\.(?:sh|py)\b", text):
        parts = script.split("/")
        file = ROOT.joinpath(*parts[parts[0] in checkouts :])
        assert os.access(file, os.X_OK), f"{where}: {script}"
    installed = {*requirements(PROJECT, "dev"), "python"}
    assert set(re.findall(r"\.venv/bin/([\w-]+)", text)) <= installed


@pytest.mark.parametrize(("where", "text"), RUNS)
def test_what_a_step_runs_is_a_shells_and_has_nothing_of_strangers_in_it(where, text):
    assert set(re.findall(r"\$\{\{\s*(.+?)\s*\}\}", text)) <= INTERPOLATED
    plain = re.sub(r"\$\{\{.+?\}\}", "x", text)
    done = subprocess.run(["bash", "-n"], input=plain, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("where", JOBS)
def test_jobs_end_and_use_versions(where):
    assert 0 < JOBS[where]["timeout-minutes"] <= 60
    for step in JOBS[where]["steps"]:
        assert re.fullmatch(r"actions/[\w-]+@v\d+", step.get("uses", "actions/none@v1"))


@pytest.mark.parametrize("where", JOBS)
def test_who_may_write_runs_nothing_of_the_repository(where):
    file = where.split(":")[0]
    granted = {**WORKFLOWS[file]["permissions"], **JOBS[where].get("permissions", {})}
    writes = {name for name, level in granted.items() if level != "read"}
    assert writes <= {"issues", "pull-requests"}
    if writes:
        assert not triggers(file) & {"pull_request", "pull_request_target", "push"}
        assert not any("uses" in step for step in JOBS[where]["steps"])
    if "self-hosted" in JOBS[where]["runs-on"]:
        assert WORKFLOWS[file][True]["pull_request"]["types"] == ["labeled"]
        assert "label.name" in JOBS[where]["if"]


def test_what_waits_for_another_workflow_names_one():
    names = {flow["name"] for flow in WORKFLOWS.values()}
    assert set(WORKFLOWS["gpu-comment.yml"][True]["workflow_run"]["workflows"]) <= names


def ends(bounds: SpecifierSet) -> tuple[Version, Version]:
    """(lower bound, upper bound), of >= and <."""
    versions = {s.operator: Version(s.version) for s in bounds}
    return versions[">="], versions["<"]


def test_the_matrix_spans_what_the_trainer_allows():
    lanes = JOBS["ci.yml:tests"]["strategy"]["matrix"]["include"]
    pythons = sorted({Version(lane["python"]) for lane in lanes})
    torches = sorted({Version(lane["torch"]) for lane in lanes})
    bounds = requirements(PROJECT)["torch"].specifier
    low, high = ends(bounds)
    assert all(torch in bounds for torch in torches)
    assert (torches[0], torches[-1].minor + 1) == (low, high.minor)
    supported = SpecifierSet(PROJECT["project"]["requires-python"])
    assert supported == SpecifierSet(f">={pythons[0]}")
    assert [python.minor for python in pythons] == list(range(pythons[0].minor, pythons[-1].minor + 1))
    used = {str(step["with"]["python-version"]) for _, step in STEPS if "python-version" in step.get("with", {})}
    assert all(Version(python) in supported for python in used if re.fullmatch(r"[\d.]+", python))


def test_the_kernels_oldest_python_has_the_first_lane_of_their_matrix():
    (setup,) = [s for s in JOBS["ci.yml:kernels"]["steps"] if "setup-python" in s.get("uses", "")]
    pythons = setup["with"]["python-version"].split()
    assert SpecifierSet(KERNELS["project"]["requires-python"]) == SpecifierSet(f">={pythons[0]}")
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^MATRIX \?= \$\(PYTHON\):2\.6", makefile, re.MULTILINE)  # the versions: test_packaging.py
    assert f"PYTHON=python{pythons[0]}" in " ".join(run for where, run in RUNS if where == "ci.yml:kernels")
    assert set(re.findall(r"^ +(python[\d.]+):", makefile, re.MULTILINE)) <= {f"python{each}" for each in pythons}


def test_the_newest_dependencies_have_no_upper_bounds():
    lines = without_upper_bounds(PROJECT, "dev")
    names = {re.match(r"[\w.-]+", line)[0] for line in lines}
    assert {"torch", "diffusers", "rapidocr", "pytest", "ruff"} <= names
    assert "advgrpo" not in names
    assert not re.search(r"<|==|~=", "".join(line.split(";")[0] for line in lines))
    pinned = {name for name, each in all_requirements(PROJECT).items() if "==" in str(each.specifier)}
    assert all(">=" in line for line in lines if line not in pinned)


@pytest.mark.parametrize("name", TEMPLATES)
def test_issue_templates_are_forms_whose_commands_exist(name):
    if name == "config.yml":
        return
    form = TEMPLATES[name]
    assert {"name", "description", "body"} <= set(form)
    ids = [field["id"] for field in form["body"] if field["type"] != "markdown"]
    assert len(ids) == len(set(ids)) > 0
    for field in form["body"]:
        assert field["type"] in ("markdown", "input", "textarea", "dropdown", "checkboxes")
        assert "value" in field["attributes"] if field["type"] == "markdown" else field["attributes"]["label"]
    text = (ROOT / ".github/ISSUE_TEMPLATE" / name).read_text()
    for line in text.splitlines():
        for module in modules(line):
            source = module_file(module).read_text()
            flags = re.findall(r"(?<= )--[\w-]+", line) if module.startswith("bench.") else []
            assert all(f'"{flag}"' in source for flag in flags), line


STUB = """#!/usr/bin/env bash
[ "$1" = -c ] && { echo '{"gpu": null}'; exit 0; }
case "$*" in
    *bench.gpu_session*) exec "$REAL_PYTHON" "$@" ;;
    *bench.gate*) echo "gate says"; exit "${GATE:-0}" ;;
    *tests/gpu*) exit "${SMOKE_FAILS:-0}" ;;
esac
while [ $# -gt 0 ]; do
    [ "$1" = --json ] && [ -z "${NO_FIGURES:-}" ] && echo '{}' >"$2"
    shift
done
exit 0
"""


@pytest.mark.parametrize(
    ("settings", "code", "said"),
    [
        ({}, 0, "holds; smoke and kernels of the session: pass"),
        ({"GATE": "1"}, 1, "fails; smoke and kernels of the session: pass"),
        ({"SMOKE_FAILS": "1"}, 1, "holds; smoke and kernels of the session: fail"),
        ({"NO_FIGURES": "1"}, 1, "nothing to compare: no kernels.json from base"),
    ],
    ids=["holds", "worse", "broken", "no figures"],
)
def test_the_verdict_on_a_pull_request(settings, code, said, tmp_path):
    commands, out = tmp_path / "bin", tmp_path / "out"
    commands.mkdir()
    (commands / "python3").write_text(STUB)
    (commands / "python3").chmod(0o755)
    environment = {"PATH": f"{commands}:{os.environ['PATH']}", "OUT": str(out), "DEVICE": "cpu", **settings}
    environment["REAL_PYTHON"] = sys.executable
    script = ROOT / "bench/gpu_compare.sh"
    done = subprocess.run([script, ROOT, ROOT], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stdout
    verdict = (out / "verdict.md").read_text()
    assert said in verdict
    assert ("gate says" in verdict) == ("NO_FIGURES" not in settings)

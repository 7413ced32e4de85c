"""`make train` from training to the report's verdict: its commands as the Makefile has them, but for sizes. Weekly.

Bugs planted, each seen red: another command in the judge's place; the judge's verdict in a folder that the report does
not read.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from advgrpo import tiny
from advgrpo.intervals import Interval
from tests.report.test_report import Outline

ROOT = Path(__file__).parents[2]
SMALLER = {
    "advgrpo.train": "--iterations 2 --data.held-out-prompts held_out.txt --data.cache-dir cache "
    "--evaluation.images-per-prompt 1",
    "advgrpo.frontier": "--prompts report.txt --tuning-prompts tuning.txt --guidance-scales 2 --resamples 200 "
    "--cache-dir cache",
    "advgrpo.report": "",
}


def commands() -> list[list[str]]:
    """What `make train` without ARGS runs: [module, *arguments] of each line that starts Python."""
    recipe = re.search(r"^train:.*\n((?:\t.*\n|ifeq.*\n|endif\n)+)", (ROOT / "Makefile").read_text(), re.M)[1]
    lines = [line.lstrip("\t@").replace("$(ARGS)", "") for line in recipe.splitlines() if line.startswith("\t")]
    python = "$(BIN)/python -m "
    assert all(line.startswith(python) for line in lines), lines
    return [shlex.split(line.removeprefix(python)) for line in lines]


@pytest.mark.weekly
@pytest.mark.slow
def test_the_gain_is_in_terminal_and_report(tmp_path):
    lists = {"held_out": tiny.WORLDS["tiny"].held_out_prompts}
    lists |= {name: tiny.other_prompts()[f"tiny:{name}"] for name in ("report", "tuning")}
    for name, file in lists.items():
        (tmp_path / f"{name}.txt").write_text("\n".join(file.read_text().splitlines()[:4]))
    assert [module for module, *_ in commands()] == list(SMALLER)
    shown = {}
    for module, *arguments in commands():
        line = [sys.executable, "-m", module, *arguments, *SMALLER[module].split()]
        path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": path, "COLUMNS": "200"}
        done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        shown[module] = " ".join(done.stdout.split())

    run = tmp_path / "runs" / "tiny"
    summary = json.loads((run / "summary.json").read_text())
    judged = json.loads((run / "frontier" / "frontier.json").read_text())
    assert summary["iterations"] == 2
    outline = Outline((run / "report.html").read_text()).said
    for metric in ("dino_similarity", "retrieval"):
        base, final = (f"{summary[stage][metric]:.4f}" for stage in ("base", "final"))
        gain = Interval(**summary["gain"][metric])
        assert f"{metric}: base {base} ±" in shown["advgrpo.train"]
        assert f"-> final {final} ±" in shown["advgrpo.train"]
        assert f"gain {gain.mean:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}]" in shown["advgrpo.train"]
    (equal,) = judged["equal"]
    accuracy, kid = Interval(**equal["accuracy"]), Interval(**equal["kid"])
    assert f"│ 2 │ {accuracy.text('+.3f')} │ {kid.text('+.0f')} │" in shown["advgrpo.frontier"]
    assert "1 LoRA less base on report.txt" in shown["advgrpo.frontier"]
    assert f"2 {accuracy.text('+.3f')} {kid.text('+.1f')} ".replace("-", "−") in outline
    assert f"wrote {Path('runs/tiny/report.html')}" in shown["advgrpo.report"]

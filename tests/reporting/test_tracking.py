"""metrics.jsonl and the progress line; tests/reporting/test_trackers.py has TensorBoard, wandb and trackio.

Bugs planted in a copy, each seen red: a damaged file refused; not moved aside; only JSON errors caught; no fsync.
"""

import io
import json
import os

import pytest
import torch
from rich.console import Console

from advgrpo.errors import UserError
from advgrpo.reporting.display import Display
from advgrpo.reporting.tracking import RunLog, load_metrics
from advgrpo.types import Flag


def record(iteration, **more):
    return {"iteration": iteration, "reward_generated": 0.1 * iteration, "reward_reference": 1 / 3, **more}


def silent():
    return Display(Console(file=io.StringIO()))


def track(folder, iterations, *, start=0, total=10, console=None, **options):
    console = console or Console(file=io.StringIO())
    with RunLog(folder, total_iterations=total, start_iteration=start, display=Display(console), **options) as tracker:
        for i in iterations:
            tracker.log(record(i))
    return console.file.getvalue()


def test_one_object_per_iteration_at_once(tmp_path):
    with RunLog(tmp_path / "run", total_iterations=3, display=silent()) as tracker:
        for i in range(3):
            tracker.log(record(i))
            assert load_metrics(tmp_path / "run" / "metrics.jsonl") == [record(k) for k in range(i + 1)]


def test_a_resumed_file_equals_an_uninterrupted_one(tmp_path):
    track(tmp_path / "whole", range(6))
    track(tmp_path / "parts", range(5))
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 5, "rew')  # killed in the middle of a line
    track(tmp_path / "parts", range(3, 6), start=3)
    whole, parts = (tmp_path / name / "metrics.jsonl" for name in ("whole", "parts"))
    assert parts.read_bytes() == whole.read_bytes()


def test_non_finite_numbers_are_null(tmp_path):
    with RunLog(tmp_path, total_iterations=1, display=silent()) as tracker:
        tracker.log(record(0, kl=float("nan"), grad_norm=float("-inf"), discriminator_loss=None, flag=True))
    text = (tmp_path / "metrics.jsonl").read_text()
    read = json.loads(text, parse_constant=pytest.fail)
    assert (read["kl"], read["grad_norm"], read["discriminator_loss"], read["flag"]) == (None, None, None, True)


def test_bad_records(tmp_path):
    with RunLog(tmp_path, total_iterations=1, display=silent()) as tracker:
        with pytest.raises(TypeError, match="metric 'loss' is a Tensor"):
            tracker.log(record(0, loss=torch.tensor(1.0)))
        with pytest.raises(ValueError, match='integer "iteration", got None'):
            tracker.log({"loss": 1.0})
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_only_rank_0_writes(tmp_path):
    output = track(tmp_path / "run", range(3), is_main=False)
    assert output == ""
    assert not (tmp_path / "run").exists()


DAMAGE = {
    "nonsense": b"nonsense",
    "zeros": bytes(40),
    "not UTF-8": b'{"iteration": 1, "\xff": 0}',
    "nested": b"[" * 100_000,
    "digits": b'{"iteration": ' + b"9" * 5000 + b"}",
    "no iteration": b'{"seconds": 1}',
    "a list": b'{"iteration": 1, "seconds": []}',
    "a control character": b"\x1b[2J",
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_file_is_put_aside_and_what_can_be_read_goes_on(tmp_path, what):
    content = b'{"iteration": 0}\n' + DAMAGE[what] + b'\n{"iteration": 2}\n{"iteration": 3}\n'
    (tmp_path / "metrics.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2 is not a metrics record: '.*'; repair"):
        load_metrics(tmp_path / "metrics.jsonl")
    said = track(tmp_path, [3], start=3, console=Console(file=io.StringIO(), width=400))
    assert "line 2 is not a metrics record" in said
    assert "it is now metrics.jsonl.old-1, and its 2 readable records go on" in said
    assert "\x1b" not in said
    assert (tmp_path / "metrics.jsonl.old-1").read_bytes() == content
    assert [row["iteration"] for row in load_metrics(tmp_path / "metrics.jsonl")] == [0, 2, 3]


def test_records_are_forced_to_the_disk_before_a_checkpoint(tmp_path, monkeypatch):
    forced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: forced.append(os.fstat(descriptor).st_size))
    with RunLog(tmp_path, total_iterations=1, display=silent()) as tracker:
        tracker.log(record(0))
        forced.clear()
        tracker.sync()
        assert forced == [(tmp_path / "metrics.jsonl").stat().st_size]
        assert forced[0] > 0


def test_unwritable_files(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        track(tmp_path / "file", [])
    with pytest.raises(UserError, match="does not exist"):
        load_metrics(tmp_path / "none.jsonl")


def test_plain_lines_without_a_terminal(tmp_path):
    output = track(tmp_path, range(2), total=12).splitlines()
    assert len(output) == 2
    assert output[1].startswith("iteration 2/12  r_gen +0.100  r_ref +0.333  0:0")
    assert output[1].endswith(" left")


def test_a_mix_shows_every_reward_instead_of_their_sum(tmp_path):
    console = Console(file=io.StringIO(), width=200)
    tracker = RunLog(tmp_path, total_iterations=9, display=Display(console))
    mix = {"reward_adversary": -1.5, "reward_rule": 0.25, "reward_rule_of_references": 0.9}
    tracker.log(record(0, **mix, images_per_second=5.0))
    assert "r_gen -1.500  r_ref +0.333  rule +0.250  images/s 5.0" in console.file.getvalue()
    tracker.log(record(1, reward_ocr=0.5, reward_dino_similarity=0.75))
    assert "r_gen +0.100  r_ref +0.333  dino_similarity +0.750  ocr +0.500" in console.file.getvalue()
    tracker.log(record(2, reward_ocr=0.5))
    assert "ocr" not in console.file.getvalue().splitlines()[-1]


def test_a_line_shows_every_figure_and_the_time_left(tmp_path, monkeypatch):
    clock = iter([100.0, 160.0])
    monkeypatch.setattr("advgrpo.reporting.display.time.monotonic", lambda: next(clock))
    console = Console(file=io.StringIO())
    tracker = RunLog(tmp_path, total_iterations=100, start_iteration=4, display=Display(console))
    tracker.log(record(5, discriminator_accuracy=0.875, images_per_second=12.34))  # two iterations took 60 s: 94 x 30 s
    tracker.print_line("[saved] checkpoint")
    assert console.file.getvalue() == (
        "iteration 6/100  r_gen +0.500  r_ref +0.333  adversary 88%  images/s 12.3  0:47:00 left\n[saved] checkpoint\n"
    )


def flag(name):
    return Flag(name, 0.5, 0.3, f"{name} is wrong", "Raise rollout.group_size (now 4) [to 8]", stop=False)


def test_flags_are_shown_when_they_appear_and_when_they_clear(tmp_path):
    console = Console(file=io.StringIO())
    flags = [[], [flag("a")], [flag("a"), flag("b")], [flag("b")], []]
    with RunLog(tmp_path, total_iterations=5, display=Display(console)) as tracker:
        for i, active in enumerate(flags):
            tracker.log(record(i), active)
    shown = [line for line in console.file.getvalue().splitlines() if "red flag" in line]
    advice = "Raise rollout.group_size (now 4) [to 8]"
    assert shown == [
        f"iteration 2: red flag a: a is wrong. {advice}",
        f"iteration 3: red flag b: b is wrong. {advice}",
        "iteration 4: red flag a has cleared",
        "iteration 5: red flag b has cleared",
    ]
    assert [row["flags"] for row in load_metrics(tmp_path / "metrics.jsonl")] == [[], ["a"], ["a", "b"], ["b"], []]


def test_a_live_bar_on_a_terminal(tmp_path):
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    output = track(tmp_path, range(3), total=3, console=console)
    assert "iteration 3/3" in output
    assert "r_gen +0.200" in output
    assert "\x1b[" in output

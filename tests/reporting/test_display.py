"""The live region: what a person sees at 80 columns.

Planted bugs that turn it red: the bar's width left out of `taken`; `fitted` without its short labels; a second live
region for `steps` inside the iterations.
"""

import io
import re

import pytest
from rich.console import Console

from advgrpo.reporting.display import Display, duration, figures, fitted

ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
MIX = {
    "reward_adversary": -1.103,
    "reward_reference": 0.215,
    "reward_pickscore": 0.353,
    "reward_aesthetic": 5.25,
    "discriminator_accuracy": 0.88,
    "images_per_second": 5.94,
}


def record(i, **more):
    return {
        "iteration": i,
        "reward_generated": -1.103,
        "reward_reference": 0.215,
        "discriminator_accuracy": 0.88,
        **more,
    }


def frames(width, use):
    """Lines drawn on a terminal of `width` columns, without colours; blanks at the end removed."""
    console = Console(file=io.StringIO(), force_terminal=True, width=width, legacy_windows=False)
    use(Display(console))
    return [line.rstrip() for line in re.split(r"[\r\n]+", ANSI.sub("", console.file.getvalue())) if line.strip()]


@pytest.mark.parametrize("width", [60, 80, 100, 120, 200])
@pytest.mark.parametrize("metrics", [record(14, images_per_second=5.94), {"iteration": 14, **MIX}], ids=["one", "mix"])
def test_number_total_bar_and_time_left_are_shown_at_every_width(width, metrics, monkeypatch):
    clock = iter([0.0, 14 * 60.0])
    monkeypatch.setattr("advgrpo.reporting.display.time.monotonic", lambda: next(clock))

    def use(display):
        with display.iterations(150, 0):
            display.show(metrics)

    last = frames(width, use)[-1]
    assert last.startswith("iteration 15/150 ━")
    assert "2:06:00 left" in last
    assert "…" not in last
    assert len(last) <= width
    if width >= 80:
        assert re.search(r"gen -1\.103 +(r_)?ref \+0\.215", last)


def test_a_mix_is_shown_whole_where_there_is_room():
    (line,) = [fitted(figures(MIX), 200)]
    expected = "r_gen -1.103  r_ref +0.215  adversary 88%  aesthetic +5.250  pickscore +0.353  images/s 5.9"
    assert line == expected
    assert fitted(figures(MIX), len(expected)) == expected
    assert fitted(figures(MIX), len(expected) - 1).startswith("gen -1.103 ref +0.215 adv 88%")
    assert fitted(figures(MIX), 22) == "gen -1.103 ref +0.215"
    assert fitted(figures(MIX), 3) == ""


def test_work_inside_the_iterations_has_a_line_of_its_own():
    def use(display):
        with display.iterations(2, 0):
            with display.steps("evaluating", 3) as tell:
                tell(2)
                display._live.refresh()
            display.show(record(0))

    drawn = frames(80, use)
    assert any(line.startswith("evaluating 2/3 ━") for line in drawn)
    assert drawn[-1].startswith("iteration 1/2")


def test_without_a_terminal_long_work_says_something_every_ten_seconds(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("advgrpo.reporting.display.time.monotonic", lambda: now[0])
    console = Console(file=io.StringIO(), width=40)
    with Display(console).steps("evaluating [base]", 60) as tell:
        for done in range(1, 61):
            now[0] += 0.5
            tell(done)
    assert console.file.getvalue().splitlines() == [
        "evaluating [base] 20/60  0:00:20 left",
        "evaluating [base] 40/60  0:00:10 left",
        "evaluating [base] 60/60  0:00:00 left",
    ]


def test_a_quiet_console_is_left_alone():
    console = Console(file=io.StringIO(), force_terminal=True, quiet=True)
    with Display(console).iterations(3, 0), Display(console).steps("evaluating", 3) as tell:
        tell(1)
    assert console.file.getvalue() == ""


def test_durations():
    assert duration(3725.4) == "1:02:05"

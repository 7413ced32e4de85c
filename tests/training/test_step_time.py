"""How `bench.step` spends a limited time, on a clock that the measured work itself advances.

The durations are estimates for SD3.5-medium on one H200; what a lent GPU leaves for whole steps is 150 to 540 seconds.

Planted bugs that turned this file red: the waterfall before what the goals are read from; no more rounds where time is
left; a part begun that cannot end; peak memory measured beside a third model; a verdict after one round.
"""

import argparse
import types

import numpy as np
import pytest

from bench import budget, step, step_report, timing
from bench.parity import Check

BUILD, VERIFY, MAKE_UNITS, ON_POLICY = 25.0, 30.0, 9.0, 4.0  # seconds
SIDES = {"sampler": (2.6, 6.0), "iteration": (3.8, 9.0), "update": (1.0, 3.0), "adversary": (0.4, 0.5)}  # ours, B0
ROWS = {"B0": 6.0, "merge": 5.0, "fuse": 4.0, "attention": 3.2, "graph": 3.0, "dedupe": 2.6, "FP8": 2.0}
ALL = (*SIDES, "sampler_fp8", "peak_memory_gb", "fp8_forward_over_roofline", "waterfall")
FIGURES = tuple(name for name in ALL if name not in ("peak_memory_gb", "fp8_forward_over_roofline"))


class Clock:
    """Stands for the module `time` in bench: no second passes but those that are spent."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    process_time = monotonic

    def spend(self, seconds: float):
        def run() -> None:
            self.now += seconds

        return run


class FakeSession(step.Session):
    """A session of the full size on a GPU whose work is nothing but its duration."""

    clock: Clock

    def __init__(self, seconds: float, slower: float, set_up: float) -> None:
        self.size, self.device, self.repeats, self.slower = "full", "cuda", 7, slower
        self.options, self.budget = argparse.Namespace(share_prefix=True), budget.Budget(seconds)
        self.turns, self.events = {}, []
        self.report = budget.Report(
            None, size="full", environment={"device": "cuda"}, refused=[], left_out={}, failed={}
        )
        self.clock.now += set_up
        self.building = BUILD
        config = types.SimpleNamespace(rollout=types.SimpleNamespace(num_steps=10))
        self.c = types.SimpleNamespace(images=32, config=config)

    @property
    def units(self):
        if not self.events:
            self.clock.now += MAKE_UNITS
            self.events.append("units")
        return {name: self._unit(*both) for name, both in SIDES.items()}

    @property
    def fp8(self):
        if "fp8" not in self.events:
            self.clock.now += BUILD
            self.events.append("fp8")
            vars(self)["fp8"] = True  # as a cached property leaves it

    def _unit(self, ours: float, baseline: float) -> step.Unit:
        run = [self.clock.spend(self.slower * seconds) for seconds in (ours, baseline)]
        return step.Unit(*run, 32, "images/s")

    def _on_policy(self) -> None:
        self.clock.now += ON_POLICY

    def _sampler_fp8(self) -> None:
        _ = self.fp8
        unit = self._unit(2.0, 6.0)
        self._play("sampler FP8", unit.sides(), lambda times: self._put("sampler_fp8", step.figures(unit, times, 7)))

    def _fp8_forward(self) -> None:
        _ = self.fp8
        self.clock.now += 2.0
        self._put("fp8_forward_over_roofline", 1.0)

    def _peak_memory(self) -> None:
        self.clock.now += self.slower * sum(SIDES["iteration"])
        self.events.append("peak memory")
        self._put("peak_memory_gb", {"ours": 50.0, "baseline": 60.0})

    def _waterfall_rows(self):
        _ = self.fp8
        return {name: self.clock.spend(self.slower * seconds) for name, seconds in ROWS.items()}


@pytest.fixture
def spend(monkeypatch):
    """Runs a session of so many seconds; the session, and how long it took."""
    clock = Clock()

    def timed(run):
        started = clock.now
        run()
        return lambda elapsed=clock.now - started: elapsed * 1e6

    def verify(c):
        clock.now += VERIFY
        return {name: Check(0.0, 1.0, "all") for name in step_report.UNITS}

    for module in (budget, timing, step):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(timing, "_cuda_clock", timed)
    monkeypatch.setattr(timing.torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(step, "verify", verify)
    monkeypatch.setattr(FakeSession, "clock", clock, raising=False)

    def run(seconds: float, *, slower: float = 1.0, set_up: float = BUILD) -> tuple[FakeSession, float]:
        started = clock.now
        session = FakeSession(seconds, slower, set_up)
        session.run(list(step_report.UNITS))
        return session, clock.now - started

    return run


def rounds(session: FakeSession) -> dict[str, int]:
    """Of every figure there is."""
    entry = {name: session.report[name] for name in FIGURES if name in session.report}
    return {name: (each[0] if name == "waterfall" else each)["rounds"] for name, each in entry.items()}


def test_behind_three_minutes_of_smoke_every_goal_has_its_figure(spend):
    """570 s of a command, 180 s of them smoke, 40 s kept for the end."""
    session, took = spend(350)
    assert set(ALL) <= set(session.report)
    assert session.report["left_out"] == session.report["failed"] == {}
    assert all(count >= timing.FEWEST for count in rounds(session).values())
    assert took <= 350
    met = {row["id"]: row["met"] for row in step_report.goals(session.report)}
    assert all(met[goal] is not None for goal in ("P1", "P2", "P3", "P5", "P7", "P12"))


def test_a_slow_start_costs_rounds_of_the_waterfall_and_no_goal(spend):
    session, took = spend(350, set_up=60)
    found = rounds(session)
    assert found.pop("waterfall") in (1, 2)
    assert all(count >= timing.FEWEST for count in found.values())
    assert took <= 350


def test_with_time_left_everything_gets_all_its_rounds(spend):
    session, took = spend(2000)
    assert set(rounds(session).values()) == {7}
    assert took < 700


@pytest.mark.parametrize("slower", [1.0, 2.0])
@pytest.mark.parametrize("seconds", [60, 110, 150, 200, 270, 350, 430, 530])
def test_the_time_is_used_and_not_overrun(spend, seconds, slower):
    session, took = spend(seconds, slower=slower)
    found, left_out = rounds(session), session.report["left_out"]
    assert took <= seconds + MAKE_UNITS + slower * sum(SIDES["sampler"])  # the script keeps 30 s for such an end
    if found:
        assert seconds - took < slower * sum(SIDES["iteration"])
    if "waterfall" not in left_out:  # it comes last, because no goal needs it
        assert not left_out
        assert all(count >= timing.FEWEST for name, count in found.items() if name != "waterfall")
    if seconds >= 150:
        assert found["sampler"] >= timing.FEWEST
        assert "iteration" in found or slower * seconds < 400


def test_time_that_is_left_goes_to_the_parts_in_turn(spend):
    found = rounds(spend(430)[0])
    assert max(found.values()) > timing.FEWEST
    cheap = [found[name] for name in ("sampler", "update", "adversary", "sampler_fp8")]
    assert max(cheap) - min(cheap) <= 1


def test_peak_memory_is_measured_before_there_is_a_third_model(spend):
    events = spend(2000)[0].events
    assert events.index("peak memory") < events.index("fp8")


def test_one_round_is_a_figure_without_a_verdict(spend):
    session, _ = spend(88)
    assert rounds(session)["sampler"] == 1
    assert "iteration" in session.report["left_out"]
    row = next(row for row in step_report.goals(session.report) if row["id"] == "P1")
    assert (row["measured"], row["met"]) == ("2.31x (1 rounds only)", None)
    assert np.isclose(session.report["sampler"]["ratio"], 6 / 2.6)

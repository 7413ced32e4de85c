"""Evaluations prompt by prompt: what a run gained over its base model."""

import math

import pytest

from advgrpo.reporting.evaluations import Evaluated, comparable, gains, load_evaluations, record_evaluation

BASE, FINAL = [0.1, 0.5, 0.3], [0.3, 0.6, 0.6]

GOES_ON = Evaluated("during", 3, 1, {}, {}, {})  # after the end


def line(stage: str, scores: dict, of_all: dict | None = None) -> Evaluated:
    return Evaluated(stage, 0 if stage == "base" else 2, 1, {}, scores, {}, of_all or {})


def test_a_gain_is_of_pairs_over_all_images_with_students_interval():
    first = {"judge": [0.0, 0.0, 0.0]}
    found = gains([line("base", first, {"judge": BASE}), line("during", first), line("final", first, {"judge": FINAL})])
    assert found["judge"].mean == pytest.approx(0.2)
    half = 4.302653 * 0.1 / math.sqrt(3)  # Student's with two degrees of freedom; .2, .1 and .3 have a spread of .1
    assert (found["judge"].low, found["judge"].high) == (pytest.approx(0.2 - half), pytest.approx(0.2 + half))


def test_where_all_evaluations_have_as_many_images_their_scores_are_the_pairs():
    assert gains([line("base", {"judge": BASE}), line("final", {"judge": FINAL})])["judge"].mean == pytest.approx(0.2)


@pytest.mark.parametrize(
    "lines",
    [
        [line("base", {"judge": BASE}), line("during", {"judge": FINAL})],  # not ended
        [line("base", {"judge": BASE}), line("final", {"judge": FINAL}), GOES_ON],
        [line("final", {"judge": FINAL})],
        [],
        [line("base", {"judge": [math.nan, 0.5, 0.3]}), line("final", {"judge": FINAL})],
        [line("base", {"judge": [0.1]}), line("final", {"judge": [0.3]})],  # no interval over one prompt
        [line("base", {"judge": BASE[:2]}), line("final", {"judge": FINAL})],
    ],
)
def test_where_there_are_no_pairs_there_is_no_gain(lines):
    assert gains(lines) == {}


def test_a_base_that_is_judged_again_takes_its_place_and_what_the_run_has_done_since_stays(tmp_path):
    """Seen red with everything after the start dropped, and with the future of a run that was taken back kept."""
    file = tmp_path / "evaluations.jsonl"
    places = [("base", 0), ("start", 0), ("during", 2), ("during", 4), ("final", 6)]
    for stage, iteration in places:
        record_evaluation(file, Evaluated(stage, iteration, 1, {}, {}, {}))
    again = Evaluated("base", 0, 1, {"eval_new": 0.5}, {}, {})
    others = record_evaluation(file, again, done=4)
    assert [(each.stage, each.iteration) for each in others] == places[1:4]
    lines = load_evaluations(file)
    assert [(each.stage, each.iteration) for each in lines] == places[:4]
    assert lines[0].means == {"eval_new": 0.5}


def test_what_was_set_aside_is_not_drawn_beside_what_came_after():
    rows = [{"iteration": at, "kl": 0.1, "eval_judge": 0.5, "eval_judge_ci95": 0.1} for at in range(3)]
    since = [line("base", {}), GOES_ON]
    assert comparable(rows, since) == [{"iteration": 0, "kl": 0.1}, {"iteration": 1, "kl": 0.1}, rows[2]]
    assert comparable(rows, [GOES_ON]) == comparable(rows, []) == rows, "of an older program"


def test_scores_of_all_images_are_kept(tmp_path):
    whole = line("base", {"judge": BASE}, {"judge": [0.25, math.nan, 1.0]})
    record_evaluation(tmp_path / "evaluations.jsonl", whole)
    (read,) = load_evaluations(tmp_path / "evaluations.jsonl")
    assert read.scores_of_all["judge"][::2] == [0.25, 1.0]
    assert math.isnan(read.scores_of_all["judge"][1])

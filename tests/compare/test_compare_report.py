"""`python -m advgrpo.compare report`: figures by hand, who is left out, what a reader is told."""

import json
import random

import pytest

from advgrpo.compare.__main__ import main
from advgrpo.compare.reporting import find, notes, passes
from advgrpo.compare.settings import Report
from advgrpo.compare.votes import VOTES
from tests.comparisons import always_left, attentive, make, vote, votes_by

OPTIONS = Report(resamples=200)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make(tmp_path_factory.mktemp("comparison"), sides=3)


@pytest.fixture
def comparison(made):
    return made[1]


def preferring(winners: dict[int, str]):
    """A rater who passes the checks and prefers, of prompt p, the `a` (first side), the `b` or neither."""

    def chooses(comparison, pair, left, right):
        if pair.kind != "sides":
            return attentive(comparison, pair, left, right)
        wanted = winners.get(pair.prompt, "a")
        return "tie" if wanted == "tie" else "left" if left == getattr(pair, wanted) else "right"

    return chooses


def test_rates_counts_and_agreement_by_hand(comparison):
    """Ann: win, tie, loss of the first of every two sides on the three prompts; Bo: win, tie, win."""
    votes = votes_by(comparison, "Ann", preferring({1: "tie", 2: "b"})) + votes_by(
        comparison, "Bo", preferring({1: "tie"})
    )
    found = find(comparison, votes, OPTIONS)
    assert (found.votes, found.left_out, len(found.answers)) == (2 * 9, 0, 3)
    for answers in found.answers:
        assert [(m.side, m.against) for m in answers.meetings] == [("A", "B"), ("A", "C"), ("B", "C")]
        for meeting in answers.meetings:
            assert (meeting.wins, meeting.ties, meeting.losses) == (3, 2, 1)
            assert meeting.win_rate.value == pytest.approx(4 / 6)
            assert meeting.win_rate.low < 4 / 6 < meeting.win_rate.high
        assert answers.shared_pairs == 9
        # 9 units of 2: three agree on a win, three on a tie, three differ by 1. D_o = 3 · 2 / 18.
        values = [1] * 9 + [0.5] * 6 + [0] * 3
        mean = sum(values) / 18
        variance = sum((value - mean) ** 2 for value in values) / 18
        assert answers.agreement == pytest.approx(1 - (6 / 18) / (2 * 18 / 17 * variance))
        strengths = [answers.strengths[side].value for side in "ABC"]
        assert strengths == sorted(strengths, reverse=True)
        assert sum(strengths) == pytest.approx(0)


def test_who_fails_the_checks_is_left_out_and_named(comparison):
    votes = votes_by(comparison, "Ann", attentive) + votes_by(comparison, "Lefty", always_left)
    found = find(comparison, votes, OPTIONS)
    ann, lefty = found.raters
    assert (ann.passed, ann.checks, ann.counts) == (4, 4, True)
    assert (lefty.checks, lefty.counts, lefty.left_share, lefty.tie_share) == (4, False, 1.0, 0.0)
    assert (found.votes, found.left_out) == (9, 1)
    assert all(m.losses == 0 for answers in found.answers for m in answers.meetings)
    told = notes(found)
    assert f"left out: Lefty passed {lefty.passed} of 4 attention checks" in told
    assert "1 of 2 raters are left out; --pass-share 0 counts all" in told
    assert find(comparison, votes, Report(resamples=200, pass_share=0)).votes == 18
    nobody = find(comparison, votes[len(comparison.pairs) :], OPTIONS)
    assert (nobody.votes, nobody.answers) == (0, [])
    assert "no vote on a pair is left, so there is nothing to report" in notes(nobody)


def test_one_slip_in_four_checks_is_forgiven_and_two_are_not(comparison):
    checks = [name for name, pair in comparison.pairs.items() if pair.kind == "same"]
    for slips, counts in ((1, True), (2, False)):
        votes = votes_by(comparison, "Ann", attentive)
        changed = [vote(comparison, name, at=2**50, id=f"{n:032d}") for n, name in enumerate(checks[:slips])]
        kept = [each for each in votes if each.pair not in checks[:slips]]
        (rater,) = find(comparison, kept + changed, OPTIONS).raters
        assert (rater.passed, rater.counts) == (4 - slips, counts)


@pytest.mark.parametrize(("kind", "wanted"), [("same", "tie"), ("noise", "a")])
def test_a_check_is_passed_in_every_question_or_not(comparison, kind, wanted):
    name, pair = next((name, pair) for name, pair in comparison.pairs.items() if pair.kind == kind)
    right = "tie" if wanted == "tie" else "left"
    passed = vote(comparison, name, answers=dict.fromkeys(comparison.questions, right))
    assert passes(passed, comparison)
    for question in comparison.questions:
        for other in {"left", "tie", "right"} - {right}:
            assert not passes(vote(comparison, name, answers={**passed.answers, question: other}), comparison)
    turned = vote(comparison, name, left=pair.b, right=pair.a, answers=passed.answers)
    assert passes(turned, comparison) == (kind == "same")


def test_who_has_seen_no_check_counts_and_is_named(comparison):
    votes = [each for each in votes_by(comparison, "Ann", attentive) if comparison.pairs[each.pair].kind == "sides"]
    found = find(comparison, votes, OPTIONS)
    assert found.raters[0].counts
    assert "no attention check was answered by Ann" in notes(found)
    assert "1 raters: the intervals say little about what other people would prefer" in notes(found)
    assert found.answers[0].agreement is None


def test_raters_of_known_taste_are_told_apart(tmp_path):
    """Ten raters prefer A with 80 %, by coin in one question: the interval holds the truth there and 50 % here."""
    prompts = [f"prompt {number}" for number in range(15)]
    _, comparison = make(tmp_path, prompts=prompts)
    votes = []
    for rater in range(10):
        generator = random.Random(rater)
        for each in votes_by(comparison, f"rater {rater}", attentive):
            pair = comparison.pairs[each.pair]
            if pair.kind == "sides":
                share = {"quality": 0.8, "aesthetics": 0.5, "alignment": 0.2}
                wins = {question: generator.random() < p for question, p in share.items()}
                side = {
                    True: "left" if each.left == pair.a else "right",
                    False: "right" if each.left == pair.a else "left",
                }
                each = vote(comparison, each.pair, each.rater, id=each.id, left=each.left, right=each.right,
                            answers={question: side[won] for question, won in wins.items()})  # fmt: skip
            votes.append(each)
    found = find(comparison, votes, Report(resamples=1000))
    rates = {answers.question: answers.meetings[0].win_rate for answers in found.answers}
    assert rates["quality"].low > 0.6
    assert rates["aesthetics"].low < 0.5 < rates["aesthetics"].high
    assert rates["alignment"].high < 0.4


def test_the_command_writes_what_it_says_and_merges_files(tmp_path, capsys):
    folder, comparison = make(tmp_path)
    assert main(["report", str(folder)]) == 2
    assert "there are no votes in" in capsys.readouterr().err
    own, sent = votes_by(comparison, "Ann", attentive), votes_by(comparison, "Bo", attentive)
    (folder / VOTES).write_bytes(b"".join(each.line() for each in own) + sent[0].line()[:30])
    (tmp_path / "bo.jsonl").write_bytes(b"".join(each.line() for each in sent))
    assert main(["report", str(folder), str(tmp_path / "bo.jsonl"), "--resamples", "200"]) == 0
    said = capsys.readouterr().out
    assert "6 votes by 2 raters on 3 prompts" in said
    assert "1 lines broke off in the middle" in said
    found = json.loads((folder / "report.json").read_text())
    assert (found["votes"], found["torn"], found["comparison"]) == (6, 1, comparison.id)
    page = (folder / "report.html").read_text()
    assert "http" not in page.replace("http-equiv", "")
    first = (folder / "report.json").read_bytes()
    assert main(["report", str(folder), str(tmp_path / "bo.jsonl"), "--resamples", "200"]) == 0
    assert (folder / "report.json").read_bytes() == first

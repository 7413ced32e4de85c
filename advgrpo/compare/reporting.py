"""`python -m advgrpo.compare report`: who wins how often, how sure that is, and whose votes it stands on."""

from __future__ import annotations

import itertools
import json
import statistics as plain
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from rich.console import Console
from rich.table import Table

from advgrpo.compare.page import REPORT_PAGE, render
from advgrpo.compare.plan import Comparison
from advgrpo.compare.settings import Report
from advgrpo.compare.statistics import Estimate, interval, krippendorff_alpha, strengths, weighted_mean
from advgrpo.compare.votes import VOTES, Vote, read_all, winner
from advgrpo.errors import UserError
from advgrpo.runtime.atomic import write_atomically

FILE = "report.json"
FEW_RATERS = 5  # below, resampling them says little of other people


@dataclass(frozen=True)
class Rater:
    """One person's votes.

    Attributes:
        pairs: answered, attention checks not counted.
        checks, passed: attention checks answered, and those answered as they must be.
        left_share: of the answers that are no tie, those for the left picture; None without any.
        tie_share: of all answers on pairs that are no check.
        seconds: median time on a pair.
        counts: whether the report stands on their votes.
    """

    name: str
    pairs: int
    checks: int
    passed: int
    left_share: float | None
    tie_share: float | None
    seconds: float
    counts: bool


@dataclass(frozen=True)
class Meeting:
    """Two sides in one question.

    Attributes:
        wins, ties, losses: votes as `side` sees them.
        win_rate: share of votes for `side`, a tie counting half.
    """

    side: str
    against: str
    wins: int
    ties: int
    losses: int
    win_rate: Estimate


@dataclass(frozen=True)
class Answers:
    """What one question gave.

    Attributes:
        strengths: Bradley-Terry, by side; 0 is the mean of all.
        agreement: Krippendorff's alpha; None where no pair has two raters, or all answers are equal.
        shared_pairs: pairs that two raters or more have answered.
    """

    question: str
    meetings: list[Meeting]
    strengths: dict[str, Estimate]
    agreement: float | None
    shared_pairs: int


@dataclass(frozen=True)
class Found:
    """The report, as report.json holds it."""

    comparison: str
    title: str
    sides: list[str]
    prompts: int
    confidence: float
    votes: int  # on pairs that are no check, of raters who count
    raters: list[Rater]
    left_out: int  # raters
    torn: int  # lines that broke off
    answers: list[Answers]


def find(comparison: Comparison, votes: Sequence[Vote], options: Report, torn: int = 0) -> Found:
    """The report of votes, of which every rater has at most one on a pair."""
    by_rater: dict[str, list[Vote]] = {}
    for vote in votes:
        by_rater.setdefault(vote.rater, []).append(vote)
    raters = [_rater(name, by_rater[name], comparison, options.pass_share) for name in sorted(by_rater)]
    kept = {rater.name for rater in raters if rater.counts}
    counted = [v for v in votes if v.rater in kept and comparison.pairs[v.pair].kind == "sides"]
    answers = [_answers(comparison, question, counted, options) for question in comparison.questions] if counted else []
    return Found(
        comparison.id,
        comparison.title,
        comparison.sides,
        len(comparison.prompts),
        options.confidence,
        len(counted),
        raters,
        len(raters) - len(kept),
        torn,
        answers,
    )


def passes(vote: Vote, comparison: Comparison) -> bool:
    """Whether an attention check is answered as it must be, in every question."""
    pair = comparison.pairs[vote.pair]
    wanted = 0.5 if pair.kind == "same" else 1.0
    return all(winner(vote, question, pair.a) == wanted for question in vote.answers)


def _rater(name: str, votes: Sequence[Vote], comparison: Comparison, pass_share: float) -> Rater:
    checks = [vote for vote in votes if comparison.pairs[vote.pair].kind != "sides"]
    own = [vote for vote in votes if comparison.pairs[vote.pair].kind == "sides"]
    passed = sum(passes(vote, comparison) for vote in checks)
    choices = [choice for vote in own for choice in vote.answers.values()]
    decided = [choice for choice in choices if choice != "tie"]
    return Rater(
        name,
        pairs=len(own),
        checks=len(checks),
        passed=passed,
        left_share=decided.count("left") / len(decided) if decided else None,
        tie_share=choices.count("tie") / len(choices) if choices else None,
        seconds=plain.median(vote.milliseconds for vote in votes) / 1000,
        counts=passed >= pass_share * len(checks),
    )


def _answers(comparison: Comparison, question: str, votes: Sequence[Vote], options: Report) -> Answers:
    pairs = [comparison.pairs[vote.pair] for vote in votes]
    first = np.array([comparison.pictures[pair.a].side for pair in pairs])
    second = np.array([comparison.pictures[pair.b].side for pair in pairs])
    outcome = np.array([winner(vote, question, pair.a) for vote, pair in zip(votes, pairs)])
    raters = np.array([vote.rater for vote in votes])
    prompts = np.array([pair.prompt for pair in pairs])
    how = {"confidence": options.confidence, "resamples": options.resamples, "seed": options.seed}
    meetings = []
    for one, other in itertools.combinations(range(len(comparison.sides)), 2):
        here = (first == one) & (second == other)  # a pair's sides stand in the order of the sides
        if here.any():
            seen = outcome[here]
            (rate,) = interval(weighted_mean(seen), raters[here], prompts[here], **how)
            counts = [int((seen == value).sum()) for value in (1, 0.5, 0)]
            meetings.append(Meeting(comparison.sides[one], comparison.sides[other], *counts, rate))
    fitted = interval(strengths(first, second, outcome, len(comparison.sides)), raters, prompts, **how)
    ratings = _ratings(votes, outcome)
    shared = int(((~np.isnan(ratings)).sum(1) >= 2).sum())
    by_side = dict(zip(comparison.sides, fitted))
    return Answers(question, meetings, by_side, krippendorff_alpha(ratings), shared)


def _ratings(votes: Sequence[Vote], outcome: np.ndarray) -> np.ndarray:
    """[pairs, raters], NaN where a rater has not voted."""
    units, unit = np.unique([vote.pair for vote in votes], return_inverse=True)
    people, person = np.unique([vote.rater for vote in votes], return_inverse=True)
    table = np.full((len(units), len(people)), np.nan)
    table[unit, person] = outcome
    return table


def write_report(options: Report, console: Console) -> Found:
    """Print the report; write report.json and report.html into the comparison's folder.

    Raises:
        UserError: no folder, no comparison in it, no votes, or a line that is none.
    """
    if not options.paths:
        raise UserError("paths: none given; want the comparison's folder, then files of votes")
    folder, *files = options.paths
    comparison = Comparison.read(folder)
    votes, torn = read_all(folder, files, comparison)
    if not votes:
        raise UserError(
            f"paths: there are no votes in {folder / VOTES}{' or the files' if files else ''}; vote on "
            "index.html first, and name the files that were downloaded"
        )
    found = find(comparison, votes, options, torn)
    content = asdict(found)
    shown = {**content, "questions": comparison.questions, "notes": notes(found)}
    write_atomically(folder / FILE, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    write_atomically(folder / REPORT_PAGE, render(REPORT_PAGE, f"The votes: {comparison.title}", shown))
    tell(found, console)
    console.print(f"wrote {folder / FILE} and {REPORT_PAGE}", soft_wrap=True)
    return found


def tell(found: Found, console: Console) -> None:
    """The report as text."""
    kept = len(found.raters) - found.left_out
    console.print(f"{found.votes} votes by {kept} raters on {found.prompts} prompts, {found.confidence:.0%} intervals")
    if found.answers:
        console.print(_rate_table(found))
        alphas = (f"{e.question} {'–' if e.agreement is None else format(e.agreement, 'z.2f')}" for e in found.answers)
        console.print(f"agreement of raters (Krippendorff's alpha): {', '.join(alphas)}", soft_wrap=True)
    if len(found.sides) > 2 and found.answers:
        console.print(_strength_table(found))
    for line in notes(found):
        console.print(line, soft_wrap=True)


def _rate_table(found: Found) -> Table:
    table = Table()
    for heading in ("question", "side", "against", "win, tie, lose", "win rate"):
        narrow = heading not in ("side", "against")
        table.add_column(heading, overflow="fold", no_wrap=narrow)
    for each in found.answers:
        for number, meeting in enumerate(each.meetings):
            table.add_row(
                "" if number else each.question,
                meeting.side,
                meeting.against,
                f"{meeting.wins}, {meeting.ties}, {meeting.losses}",
                _shown(meeting.win_rate, "{:.0%}"),
            )
    return table


def _strength_table(found: Found) -> Table:
    table = Table(title="Bradley-Terry strengths, 0 is the mean", title_justify="left")
    for heading in ("side", *(each.question for each in found.answers)):
        table.add_column(heading, overflow="fold")
    for side in found.sides:
        table.add_row(side, *(_shown(each.strengths[side], "{:+z.2f}") for each in found.answers))
    return table


def notes(found: Found) -> list[str]:
    """What a reader must know before believing the figures."""
    lines = []
    for rater in found.raters:
        if not rater.counts:
            lines.append(f"left out: {rater.name} passed {rater.passed} of {rater.checks} attention checks")
    kept = [rater for rater in found.raters if rater.counts]
    if found.left_out:
        lines.append(f"{found.left_out} of {len(found.raters)} raters are left out; --pass-share 0 counts all")
    unchecked = [rater.name for rater in kept if not rater.checks]
    if unchecked:
        lines.append(f"no attention check was answered by {', '.join(unchecked)}")
    if not found.answers:
        lines.append("no vote on a pair is left, so there is nothing to report")
    elif len(kept) < FEW_RATERS:
        lines.append(f"{len(kept)} raters: the intervals say little about what other people would prefer")
    if found.torn:
        lines.append(f"{found.torn} lines broke off in the middle and are not counted (a server was killed)")
    return lines


def _shown(estimate: Estimate, form: str) -> str:
    if estimate.low is None or estimate.high is None:
        return form.format(estimate.value)
    return f"{form.format(estimate.value)} [{form.format(estimate.low)}, {form.format(estimate.high)}]"

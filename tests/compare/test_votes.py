"""Votes: what is refused, what survives threads, kills and files from several places."""

import json
import os
import threading
from dataclasses import asdict

import pytest

from advgrpo.compare import votes as module
from advgrpo.compare.plan import Comparison
from advgrpo.compare.votes import (
    VOTES,
    BadVoteError,
    RepeatedVoteError,
    Vote,
    VoteFile,
    latest,
    read_all,
    read_votes,
    winner,
)
from advgrpo.errors import UserError
from tests.comparisons import make, vote


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make(tmp_path_factory.mktemp("comparison"))


@pytest.fixture
def folder(made, tmp_path):
    """The comparison without votes."""
    (tmp_path / "comparison.json").write_bytes((made[0] / "comparison.json").read_bytes())
    return tmp_path


@pytest.fixture
def comparison(folder) -> Comparison:
    return Comparison.read(folder)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"id": "short"}, "id: want 8 to 64"),
        ({"id": "../../../etc/passwd"}, "id: want 8 to 64"),
        ({"id": 7}, "id: want text"),
        ({"comparison": "0" * 16}, "comparison: '0000000000000000' is another comparison"),
        ({"rater": ""}, "rater: want a name"),
        ({"rater": "x" * 81}, "rater: want a name"),
        ({"rater": " Ann"}, "rater: want a name"),
        ({"rater": "A\nnn"}, "rater: want a name"),
        ({"rater": "A\u202enn"}, "rater: want a name"),
        ({"rater": ["Ann"]}, "rater: want text"),
        ({"pair": "none"}, "pair: there is no 'none'"),
        ({"left": "0123"}, "left, right: not the pictures"),
        ({"answers": {"quality": "left"}}, "answers: want one to each of quality, aesthetics, alignment"),
        ({"answers": ["left"] * 3}, "answers: want one to each"),
        ({"answers": {"quality": "left", "aesthetics": "best", "alignment": "tie"}}, "aesthetics wants one of"),
        ({"answers": {"quality": ["left"], "aesthetics": "tie", "alignment": "tie"}}, "quality wants one of"),
        ({"milliseconds": -1}, "milliseconds: want a whole number"),
        ({"milliseconds": 1.5}, "milliseconds: want a whole number"),
        ({"milliseconds": True}, "milliseconds: want a whole number"),
        ({"at": 2**60}, "at: want a whole number"),
        ({"side": "A"}, "'side' is no field of a vote"),
    ],
)
def test_what_is_no_vote(comparison, changed, expected):
    with pytest.raises(BadVoteError) as error:
        Vote.read({**asdict(vote(comparison)), **changed}, comparison)
    assert expected in str(error.value)


def test_fields_may_not_be_missing(comparison):
    content = asdict(vote(comparison))
    assert Vote.read(content, comparison) == vote(comparison)
    for name in content:
        with pytest.raises(BadVoteError, match=f"'{name}' is missing"):
            Vote.read({key: value for key, value in content.items() if key != name}, comparison)
    with pytest.raises(BadVoteError, match="not a list"):
        Vote.read([content], comparison)


def test_threads_append_whole_lines_once(folder, comparison):
    given = [vote(comparison, pair, f"rater {n}") for n in range(12) for pair in comparison.pairs]
    file, stored = VoteFile(folder, comparison), []

    def work(own):
        for each in own:
            stored.append(file.append(each))
            stored.append(file.append(each))  # sent again

    threads = [threading.Thread(target=work, args=(given[start::4],)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    file.close()
    found, torn = read_votes(folder / VOTES, comparison)
    assert sorted(found, key=lambda v: v.id) == sorted(given, key=lambda v: v.id)
    assert (stored.count(True), stored.count(False), torn) == (len(given), len(given), 0)


def test_a_vote_is_on_the_disk_when_append_returns(folder, comparison, monkeypatch):
    forced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: forced.append((folder / VOTES).read_bytes()))
    file = VoteFile(folder, comparison)
    forced.clear()
    file.append(vote(comparison))
    file.close()
    assert forced == [vote(comparison).line()]


def test_what_is_there_is_known_to_the_next_server(folder, comparison):
    first = VoteFile(folder, comparison)
    first.append(vote(comparison))
    with pytest.raises(UserError, match="is in use by process"):
        VoteFile(folder, comparison)
    first.close()
    second = VoteFile(folder, comparison)
    assert not second.append(vote(comparison))
    with pytest.raises(RepeatedVoteError, match="another vote's"):
        second.append(vote(comparison, milliseconds=1))
    second.close()
    assert (folder / VOTES).read_bytes() == vote(comparison).line()


@pytest.mark.parametrize("kept", [1, 40, *range(88, 104), -1])
def test_a_server_that_was_killed_within_a_line(folder, comparison, kept):
    """What is left of the line stays, and the next vote begins on its own. At -1 only the line's end is lost.

    Around 96 it ends within the bytes or the escapes of a name that is not ASCII.
    """
    one, two, three = (vote(comparison, rater=name) for name in ("Ann", "Ö自😀", "Chi"))
    assert two.rater not in two.line()[:88].decode()
    (folder / VOTES).write_bytes(one.line() + two.line()[:kept])
    file = VoteFile(folder, comparison)
    assert file.torn == (kept != -1)
    assert file.append(two) == (kept != -1)
    file.append(three)
    file.close()
    assert read_votes(folder / VOTES, comparison) == ([one, two, three], int(kept != -1))


def test_a_disk_that_is_full_within_a_line(folder, comparison, monkeypatch):
    write, full = os.write, [True]

    def short(descriptor, content):
        if not full:
            return write(descriptor, content)
        if len(full) == 1:
            full.append(True)
            return write(descriptor, content[:20])
        full.clear()
        raise OSError(28, "No space left on device")

    file = VoteFile(folder, comparison)
    monkeypatch.setattr(module.os, "write", short)
    with pytest.raises(OSError, match="No space"):
        file.append(vote(comparison))
    assert file.append(vote(comparison))  # the page sends it again
    file.close()
    assert read_votes(folder / VOTES, comparison) == ([vote(comparison)], 1)


def test_a_file_does_not_grow_without_end(folder, comparison, monkeypatch):
    monkeypatch.setattr(module, "MOST_BYTES", 3 * len(vote(comparison).line()))
    file = VoteFile(folder, comparison)
    for name in ("Ann", "Bob", "Chi"):
        assert file.append(vote(comparison, rater=name))
    with pytest.raises(OSError, match="has reached"):
        file.append(vote(comparison, rater="Dan"))
    file.close()
    assert len(read_votes(folder / VOTES, comparison)[0]) == 3


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"id": "x"}', "line 2: 'comparison' is missing"),
        ("[1]", "line 2: a vote is a JSON object, not a list"),
        ("hello", "line 2: not JSON"),
        ('{"id": "a", "id": "b"}', "line 2: id; remove"),
        ('{"id": "x"]}', "line 2: not JSON"),
    ],
)
def test_lines_that_no_crash_leaves_are_refused(folder, comparison, line, expected):
    (folder / "others.jsonl").write_bytes(vote(comparison).line() + line.encode() + b"\n")
    with pytest.raises(UserError) as error:
        read_votes(folder / "others.jsonl", comparison)
    assert expected in str(error.value)


def test_the_last_vote_of_a_rater_on_a_pair_counts_whichever_file_it_is_in(folder, comparison):
    first = vote(comparison, at=1000)
    changed = vote(comparison, id="f" * 32, at=2000, answers=dict.fromkeys(comparison.questions, "right"))
    other = vote(comparison, rater="Bo")
    (folder / VOTES).write_bytes(changed.line() + other.line())
    (folder / "download.jsonl").write_bytes(first.line() + changed.line())
    found, torn = read_all(folder, [folder / "download.jsonl"], comparison)
    assert sorted(found, key=lambda each: each.rater) == [changed, other]
    assert torn == 0
    with pytest.raises(UserError, match="two different votes have the id"):
        latest([first, vote(comparison, at=1001)])


def test_who_wins_is_told_by_the_picture_not_by_the_place(comparison):
    name, pair = next((name, pair) for name, pair in comparison.pairs.items() if pair.kind == "sides")
    assert winner(vote(comparison, name), "quality", pair.a) == 1
    turned = vote(comparison, name, left=pair.b, right=pair.a)
    assert winner(turned, "quality", pair.a) == 0
    tied = vote(comparison, name, answers={**turned.answers, "quality": "tie"})
    assert winner(tied, "quality", pair.a) == 0.5


def test_lines_are_plain_json_of_one_line(comparison):
    line = vote(comparison, rater="Ängström 自").line()
    assert line.count(b"\n") == 1
    assert line.isascii()  # a line that breaks off is text nevertheless
    assert json.loads(line)["rater"] == "Ängström 自"

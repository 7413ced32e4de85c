"""tests/mutants: every planted bug still fits the code and names tests that exist, and the program that plants them
tells red from everything that only looks like it.

`make mutants` plants all of them, which takes too long for every commit; here one is, beside a few in a tree of toys.
"""

import re
import subprocess
from pathlib import Path

import pytest

from tests.mutants import run

ROOT = Path(__file__).parents[2]
MUTANTS = run.read_all(ROOT)
ROOMS = {"adversary", "config", "data", "evaluation", "kernels", "monitor", "policy", "references", "rewards"}
ROOMS |= {"runtime", "sampling", "training"}
QUICK = "rng-indices-run-together"  # its test imports little

CODE = "def limit(x):\n    return x > 3\n"
TEST = "from house import limit\n\n\ndef test_limit():\n    assert limit(4)\n    assert not limit(3)\n"


@pytest.fixture
def house(tmp_path):
    """A repository of one function with its test; `house(name, old, new)` plants a bug into it."""
    files = {"house.py": CODE, "tests/test_house.py": TEST, "pyproject.toml": "[tool.pytest.ini_options]\n"}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    (tmp_path / run.FOLDER).mkdir()
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "-A"], check=True)

    def plant(name, old, new, above="Bug: it is wrong.\nHarm: it hurts.\nTests: tests/test_house.py\n"):
        (tmp_path / "house.py").write_text(CODE.replace(old, new))
        diff = subprocess.run([*git, "diff"], check=True, capture_output=True, text=True).stdout
        (tmp_path / "house.py").write_text(CODE)
        (tmp_path / run.FOLDER / f"{name}.patch").write_text(f"{above}\n{diff}")
        return tmp_path

    return plant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_bug_fits_the_code_and_names_tests_that_exist(mutant):
    run.git_apply(ROOT, mutant, "--check")
    assert all(name.startswith(("advgrpo/", "kernels/advgrpo_kernels/")) for name in mutant.touched)
    for test in mutant.tests:
        file, *names = re.sub(r"\[.*", "", test).split("::")
        assert (ROOT / file).exists(), test
        for name in names:
            assert re.search(rf"^\s*(def|class) {name}\b", (ROOT / file).read_text(), re.MULTILINE), test


def test_bugs_are_spread_over_the_house():
    assert len(MUTANTS) >= 60
    assert {mutant.room for mutant in MUTANTS} >= ROOMS
    assert len({mutant.bug for mutant in MUTANTS}) == len(MUTANTS)


def test_the_page_and_the_score_are_those_of_the_results():
    """`make mutants` writes the page; a patch without a verdict was never planted."""
    session = run.Session(ROOT)
    session.read_results()
    counted = [mutant for mutant in MUTANTS if not mutant.equivalent]
    assert {mutant.name for mutant in counted} == set(session.results)
    assert (ROOT / run.PAGE).read_text() == run.page(MUTANTS, session.results)
    caught = [verdict for verdict in session.results.values() if verdict.outcome == run.CAUGHT]
    assert len(caught) >= run.GOAL * len(counted)


@pytest.mark.weekly
def test_a_bug_of_the_repository_goes_red():
    (mutant,) = [mutant for mutant in MUTANTS if mutant.name == QUICK]
    session = run.Session(ROOT, trusts=True)
    session.write_results = lambda: None
    session.run([mutant])
    verdict = session.results[QUICK]
    assert (verdict.outcome, verdict.by.split("::")[0]) == (run.CAUGHT, "tests/runtime/test_rng.py")


@pytest.mark.weekly
def test_red_is_told_from_what_only_looks_like_it(house, capsys):
    house("seen", "x > 3", "x > 2")
    house("no-bug", "x > 3", "x > 3.0")
    house("no-python", "x > 3", "x >")
    house("no-import", "def limit", "def limits")
    root = house("no-end", "return x > 3", "while True: pass")
    assert run.main(["--timeout", "20"], root) == 1
    session = run.Session(root)
    session.read_results()
    assert {name: verdict.outcome for name, verdict in session.results.items()} == {
        "seen": run.CAUGHT,
        "no-bug": run.SURVIVED,
        "no-python": run.BROKEN,
        "no-import": run.BROKEN,
        "no-end": run.LATE,
    }
    assert "1 of 5 mutants are caught (20.0%)" in capsys.readouterr().out
    assert (root / "house.py").read_text() == CODE, "planted in copies only"
    assert "**1 of 5 are caught" in (root / run.PAGE).read_text()


def test_tests_that_are_red_without_the_bug_catch_nothing(house, capsys):
    root = house("seen", "x > 3", "x > 2")
    (root / "tests/test_house.py").write_text(f"{TEST}    assert limit(1)\n")
    assert run.main([], root) == 1
    assert "tests/test_house.py: red without the bug" in capsys.readouterr().out


def test_only_what_has_changed_is_planted_again(house, capsys):
    root = house("seen", "x > 3", "x > 2")
    assert run.main([], root) == 0
    assert "[1/1] caught" in capsys.readouterr().out
    assert run.main([], root) == 0
    assert "[1/1]" not in capsys.readouterr().out
    (root / "tests/test_house.py").write_text(f"{TEST}\n# another test\n")
    assert run.main([], root) == 0
    assert "[1/1] caught" in capsys.readouterr().out


def test_what_no_test_can_see_is_left_out_of_the_score(house, capsys):
    house("seen", "x > 3", "x > 2")
    above = "Bug: 3.0 for 3.\nHarm: none.\nTests: tests/test_house.py\nEquivalent: they are equal.\n"
    root = house("equal", "x > 3", "x > 3.0", above)
    assert run.main([], root) == 0
    assert "1 of 1 mutants are caught" in capsys.readouterr().out
    assert "| equal: 3.0 for 3. | they are equal. |" in (root / run.PAGE).read_text()


def test_a_patch_that_no_longer_fits_is_renewed_from_the_tree(house, capsys):
    root = house("seen", "x > 3", "x > 2")
    renamed = CODE.replace("x", "number")
    (root / "house.py").write_text(renamed)
    assert run.main([], root) == 2
    assert "python -m tests.mutants.run --renew seen" in capsys.readouterr().err
    subprocess.run(["git", "-C", str(root), "add", "house.py"], check=True)
    (root / "house.py").write_text(renamed.replace("> 3", "> 2"))
    assert run.main(["--renew", "seen"], root) == 0
    assert (root / "house.py").read_text() == renamed, "the bug is in the patch now"
    assert run.main([], root) == 0


@pytest.mark.parametrize(
    ("above", "said"),
    [
        ("Bug: a.\nTests: tests/test_house.py\n", "seen.patch has no Harm"),
        ("Bug: a.\nHarm: b.\nTests:\n", "seen.patch has no Tests"),
    ],
)
def test_a_patch_that_says_too_little_is_named(house, above, said, capsys):
    root = house("seen", "x > 3", "x > 2", above)
    assert run.main([], root) == 2
    assert said in capsys.readouterr().err
    assert run.main(["unseen"], house("seen", "x > 3", "x > 2")) == 2
    assert "no patch of that name in tests/mutants: unseen" in capsys.readouterr().err

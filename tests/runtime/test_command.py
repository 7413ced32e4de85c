"""What every command does around its work: one line for what can go wrong, exit codes, --version, --traceback.

Bugs planted, each seen red: OSError not expected; a bug swallowed; control characters printed; --version run as work;
--traceback handed on to the command; another rank's words printed as they came.
"""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import advgrpo
from advgrpo.errors import UserError
from advgrpo.policy.fused.decoder import ImageQualityError
from advgrpo.runtime import command, watch
from advgrpo.runtime.distributed import CollectiveError, RankFailure
from advgrpo.training.update import LogProbMismatchError
from tests.commands import COMMANDS, main_of

ROOT = Path(__file__).parents[2]


def failing(error):
    def body(arguments):
        raise error

    return body


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("seed = -1: want 0 or more"), 2, "seed = -1: want 0 or more"),
        (FloatingPointError("reward rule: nan"), 1, "reward rule: nan"),
        (OSError(errno.ENOSPC, "No space left on device", "runs/a"), 1, "'runs/a': No space left on device"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "x/y"), 1, "'x/y': Not a directory"),
        (LogProbMismatchError("mismatch 1e-3"), 1, "mismatch 1e-3"),
        (ImageQualityError("31 dB"), 1, "31 dB"),
        (CollectiveError("all_gather timed out"), 1, "all_gather timed out"),
        (MemoryError(), 1, "this machine's memory is full"),
        (RecursionError("maximum recursion depth exceeded"), 1, "nested too deeply"),
        (UserError("a\n  b\x1b[31mc"), 2, r"a b\x1b[31mc"),
        (UserError("a lone \ud800 surrogate"), 2, r"a lone \ud800 surrogate"),
        (
            RankFailure("rank 1 failed with this error:\nTraceback (most recent call last):\n  File x\nKeyError: 'y'"),
            1,
            "rank 1 failed with this error: KeyError: 'y'",
        ),
    ],
)
def test_what_can_go_wrong_is_one_line(error, code, line, capfd):
    assert command.run_command(failing(error), []) == code
    said = capfd.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert line in said


def test_a_bug_keeps_its_traceback():
    with pytest.raises(KeyError):
        command.run_command(failing(KeyError("x")), [])


@pytest.mark.parametrize("how", ["flag", "environment"])
def test_the_whole_stack_on_request(how, capsys, monkeypatch):
    if how == "environment":
        monkeypatch.setenv("ADVGRPO_TRACEBACK", "1")
    given = []

    def body(arguments):
        given.extend(arguments)
        raise UserError("no such thing")

    assert command.run_command(body, ["--seed", "1", *(["--traceback"] if how == "flag" else [])]) == 2
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert said.endswith("error: no such thing\n")
    assert given == ["--seed", "1"]


def test_what_another_rank_says_keeps_its_lines_and_moves_no_cursor(capsys):
    watch.tell(1, "first\n\tsecond \x1b[31mred\r")
    assert capsys.readouterr().err == "[rank 1] first\n\tsecond \\x1b[31mred\\r\n"


def test_brackets_in_a_path_are_printed_as_they_stand(capsys):
    command.plain_console().print("wrote runs/[v2]/x[/bold]")
    assert capsys.readouterr().out == "wrote runs/[v2]/x[/bold]\n"


def test_interruption_has_its_own_code(capsys):
    assert command.run_command(failing(KeyboardInterrupt()), [], interrupted="stopped") == 130
    assert capsys.readouterr().err == "stopped\n"


def test_a_reader_that_leaves_early_is_no_error():
    """`python -m advgrpo.train --help | head -1`"""
    program = "import sys; from advgrpo.train import main; sys.exit(main(['--help-all']))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    shell = f'{sys.executable} -c "{program}" | head -1'
    done = subprocess.run(shell, shell=True, capture_output=True, text=True, env=environment, timeout=120)
    assert done.stdout.startswith("usage:")
    assert done.stderr == ""


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_version_help_and_names_unknown_flags(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    main = main_of(name)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"advgrpo {advgrpo.__version__}\n"
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) < 230
    assert max(map(len, shown)) <= 80
    assert not re.search(r"METHOD|PERFORMANCE|http.*pydantic", " ".join(shown))
    assert main(["--no-such-flag", "1"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("error: ")


def test_one_version():
    assert f'\nversion = "{advgrpo.__version__}"\n' in (ROOT / "pyproject.toml").read_text()

"""Every command that the documents name is one that the program takes.

Commands are the lines of ``` blocks without a language (what is no command is a ```text block) and inline code that
begins with a program's name. Each is read by the command's own parser, up to where work would begin; some that are
cheap on the tiny world are run to their end.

Planted bugs that turn it red: `--image-per-prompt` for a flag of generate; a preset renamed in a job's page;
`--rollout.group-size 1`; a target `trian` of make; the extra `[orc]`; a ``` block of C++; a setting `update.kl_wait` in
a page.
"""

import argparse
import contextlib
import importlib.util
import io
import re
import runpy
import shlex
import sys
import tomllib
import warnings
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from PIL import Image, ImageOps

import advgrpo.config as configuration
from advgrpo.errors import UserError
from advgrpo.experiments.plan import EXPERIMENTS
from advgrpo_kernels.integrations import _launcher

ROOT = Path(__file__).parents[2]
BESIDE_DOCS = ("README.md", "CONTRIBUTING.md", "kernels/README.md", "bench/results/README.md")
PAGES = [*(ROOT / name for name in BESIDE_DOCS), *sorted((ROOT / "docs").rglob("*.md"))]
PROGRAMS = ("python", "torchrun", "accelerate", "make", "pip", "pytest", "hf", "git", "cp")
PLACEHOLDERS = {"N": "1", "NAME": "tiny", "FLAG": "reward_hacking", "PEER": "flow_grpo", "DIR": "runs/a"}
NOT_CHECKED = {
    "hf auth login": "the hub's own program, not installed with ours",
    "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-build-isolation 'apex @ git+https://github.com/NVIDIA/apex'": (
        "NVIDIA's own line; tests/repository/test_gpu_extra.py holds the one that errors name to it"
    ),
    "pip install --no-build-isolation "
    "'flash_attn_3 @ git+https://github.com/Dao-AILab/flash-attention#subdirectory=hopper'": "hours of a compiler",
    "pip install --pre flash-attn-4": "a package of others, which needs a GPU",
    "vllm serve Qwen/Qwen2.5-VL-7B-Instruct --port 8000": "another server, on another machine",
    "hpsv3/bin/python examples/rewards/serve_elsewhere.py examples/rewards/hpsv3.py:HPSv3 --port 8001": (
        "in an environment of its own; tests/rewards/test_reward_recipes.py runs the file"
    ),
    "pip install git+https://github.com/tgxs002/HPSv2": "a judge of the user's choice",
    "pip install hpsv3": "a judge of the user's choice",
    "pip install image-reward git+https://github.com/openai/CLIP": "a judge of the user's choice",
    "pip install vllm": "a judge of the user's choice",
}


class Command(NamedTuple):
    page: str
    text: str
    inline: bool = False

    def __str__(self) -> str:
        return f"{self.page}: {self.text}"


def commands_of(page: Path) -> list[Command]:
    text, name = page.read_text(), page.relative_to(ROOT).as_posix()
    fences = re.compile(r"^[ ]*```(\w*)[^\n]*\n(.*?)^[ ]*```[ ]*$", re.M | re.S)
    found = []
    for language, body in fences.findall(text):
        if language in ("", "bash", "sh"):
            lines = body.replace("\\\n", " ").splitlines()
            found += [Command(name, " ".join(line.split())) for line in lines if line.strip()]
    for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", fences.sub("", text)):
        words = [word for word in code.split() if not is_assignment(word)]
        if len(words) > 1 and words[0] in PROGRAMS:
            found.append(Command(name, " ".join(code.split()), inline=True))
    return found


def is_assignment(word: str) -> bool:
    return re.match(r"[A-Z_]+=", word) is not None


EVERY = list(dict.fromkeys(command for page in PAGES for command in commands_of(page)))


class Parsed(BaseException):
    """Raised where a command has read its flags and would begin to work; no command catches it."""

    def __init__(self, options: object):
        self.options = options


@pytest.fixture
def parse_only(monkeypatch, tmp_path):
    """The commands' own parsers, after which nothing happens; in a folder with the examples and a run to resume."""

    def stops_after(function):
        def called(*arguments, **keywords):
            raise Parsed(function(*arguments, **keywords))

        return called

    for name in ("parse_options", "parse_command", "build"):
        monkeypatch.setattr(configuration, name, stops_after(getattr(configuration, name)))
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stops_after(argparse.ArgumentParser.parse_args))
    monkeypatch.setattr(_launcher, "Session", stops_after(lambda *arguments: arguments))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    run = tmp_path / "runs" / "tiny"
    run.mkdir(parents=True)
    settings, _ = configuration.read("tiny", None)
    (run / "config.yaml").write_text(yaml.safe_dump(settings))


def run_module(module: str, arguments: list[str], monkeypatch) -> tuple[int, str, object]:
    """(exit code, what it printed, options where it stopped at its parser) of `python -m MODULE ARGUMENTS`."""
    assert importlib.util.find_spec(module) is not None, f"there is no module {module}"
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # runpy, of modules that a test has imported
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else int(end.code is not None), printed.getvalue(), None
        except Parsed as stop:
            return 0, printed.getvalue(), stop.options
    return 0, printed.getvalue(), None


def check_module(module: str, arguments: list[str], monkeypatch) -> None:
    if module.startswith("tests."):  # without a parser of ours: they would begin to work
        assert importlib.util.find_spec(module) is not None, f"there is no module {module}"
        return
    code, printed, options = run_module(module, arguments, monkeypatch)
    assert code == 0, printed
    if isinstance(options, configuration.Config):
        configuration.check(options, with_data=False)
    if module == "advgrpo.experiments" and arguments[:1] in (["run"], ["report"]):
        assert set(options.names) <= {*EXPERIMENTS, "all"}


@cache
def make_targets() -> frozenset[str]:
    return frozenset(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))


@cache
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def check_make(words: list[str], monkeypatch) -> None:
    targets = [word for word in words if not is_assignment(word)]
    assert set(targets) <= make_targets(), f"the Makefile has no {set(targets) - make_targets()}"
    arguments = [shlex.split(word.removeprefix("ARGS=")) for word in words if word.startswith("ARGS=")]
    for given in arguments:
        if targets == ["train"]:
            check_module("advgrpo.train", ["--fast", *map(filled, given)], monkeypatch)
        else:
            check_pytest(given)


def check_pip(words: list[str]) -> None:
    assert words[0] == "install"
    for word in words[1:]:
        if word == "--no-build-isolation":
            continue
        path, extras = re.fullmatch(r"(-e|[\w./-]+)(?:\[([\w,]+)\])?", word).groups()
        assert path == "-e" or (ROOT / path / "pyproject.toml").exists(), f"{path} is no package"
        known = project()["project"]["optional-dependencies"]
        assert set((extras or "").split(",")) - {""} <= set(known), f"no such extra: {extras}"


def check_pytest(words: list[str]) -> None:
    marks = {mark.split(":")[0] for mark in project()["tool"]["pytest"]["ini_options"]["markers"]}
    for before, word in zip(["", *words], words):
        assert word == "-m" or (word in marks if before == "-m" else (ROOT / word).exists()), f"pytest has no {word}"


def uncommented(text: str) -> str:
    return text.partition(" # ")[0]


def filled(word: str) -> str:
    return PLACEHOLDERS.get(word, word)


def split(text: str) -> list[str]:
    """The words of a command, without comment, assignments in front, redirection and placeholders."""
    words = shlex.split(text, comments=True)
    words = words[: words.index(">")] if ">" in words else words
    while words and is_assignment(words[0]):
        name = words.pop(0).partition("=")[0]
        assert name in ENVIRONMENT, f"no program reads {name}"
    return words


ENVIRONMENT = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "ADVGRPO_BUILD_CUDA")


def understand(text: str, monkeypatch) -> None:
    """AssertionError or UserError for what is no command of ours, or not one that it takes."""
    words = split(text)
    if not words:  # a comment, or assignments alone
        return
    program, rest = words[0], words[1:]
    if program in ("torchrun", "accelerate"):
        program, rest = "python", rest[rest.index("-m") :]
    if program == "python" and rest[0] == "-m":
        check_module(rest[1], [filled(word) for word in rest[2:]], monkeypatch)
    elif program == "python":
        assert (ROOT / rest[0]).exists(), f"there is no {rest[0]}"
    elif program == "make":
        check_make(rest, monkeypatch)
    elif program == "pip":
        check_pip(rest)
    elif program == "pytest":
        check_pytest(rest)
    else:
        pytest.fail(f"{program} is no program known here; a block that holds no commands begins with ```text")


@pytest.mark.parametrize("command", EVERY, ids=str)
def test_commands_are_taken(command, parse_only, monkeypatch):
    if command.inline and (module := re.fullmatch(r"python -m ([\w.]+)", command.text)):  # a command's name
        assert importlib.util.find_spec(module[1]) is not None, f"there is no module {module[1]}"
    elif uncommented(command.text) not in NOT_CHECKED:
        understand(command.text, monkeypatch)


def test_the_documents_name_commands():
    assert len(EVERY) > 80
    assert {text for text in NOT_CHECKED if not any(uncommented(command.text) == text for command in EVERY)} == set()


# Commands of the documents that are run to their end, in this order in one folder, and what makes them small.
RUN = {
    "python -m advgrpo.train --fast": "--iterations 1 --adversary.warmup-iterations 0 "
    "--rollout.prompts-per-iteration 4 --rollout.group-size 4 --rollout.micro-batch 8 "
    "--evaluation.images-per-prompt 1 --evaluation.num-steps 1 --evaluation.metrics dino_similarity rule_accuracy",
    "python -m advgrpo.train --resume runs/tiny --iterations 200": "--iterations 2",
    "python -m advgrpo.generate --lora runs/tiny/lora --base --seed 0 --output grid.png "
    '--prompt "a small fox on blue, left" --prompt "a large violin on pink"': "--images-per-prompt 1 --num-steps 2",
    "python -m advgrpo.evaluate --lora runs/tiny/lora --against base --metrics rule,dino_similarity "
    "--prompts tiny:report --output scores": "--images-per-prompt 1 --num-steps 1",
    "python -m advgrpo.export runs/tiny/lora --format comfyui --out lora.safetensors": "",
    "python -m advgrpo.references import photos/ --out refs/": "--size 64",
    "python -m advgrpo.references check refs/ --prompts p.txt --sheet sheet.png": "",
}
LEFT = (
    "runs/tiny/curves.png",
    "runs/tiny/lora/pytorch_lora_weights.safetensors",
    "runs/tiny/checkpoints/iteration-000002",
    "grid.png",
    "scores/evaluation.json",
    "lora.safetensors",
    "refs/references.json",
    "sheet.png",
)


@pytest.mark.weekly
@pytest.mark.slow
def test_cheap_commands_run_to_their_end(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photos = tmp_path / "photos"
    photos.mkdir()
    for name, colour in (("one", "red"), ("two", "blue")):
        shades = ImageOps.colorize(Image.linear_gradient("L"), "black", colour)  # one colour alone is refused
        shades.resize((96, 64)).save(photos / f"{name}.png")
        (photos / f"{name}.txt").write_text(f"a {colour} square\n")
    (tmp_path / "p.txt").write_text("a red square\na blue square\n")
    named = {uncommented(command.text).strip() for command in EVERY}
    for text, smaller in RUN.items():
        assert text in named, f"no document names {text}"
        module, *arguments = shlex.split(f"{text} {smaller}")[2:]
        code, printed, _ = run_module(module, arguments, monkeypatch)
        assert code == 0, f"{text} {smaller}\n{printed}"
    assert [name for name in LEFT if not (tmp_path / name).exists()] == []


SECTIONS = tuple(sorted({name.split(".")[0] for name in configuration.section_names(configuration.Config)}))
NO_SETTING = re.compile(r"rewards\.serve|.*\.(py|json)")  # a command, files


def test_settings_that_the_documents_name_exist():
    known = {*configuration.leaves(configuration.Config), *configuration.section_names(configuration.Config)}
    for page in PAGES:
        for name in re.findall(rf"`((?:{'|'.join(SECTIONS)})\.[a-z_.]+)`", page.read_text()):
            assert name in known or NO_SETTING.fullmatch(name), f"{page.relative_to(ROOT)} names a setting {name}"


@pytest.mark.parametrize(
    "wrong",
    [
        "python -m advgrpo.train --preset tiny --rollout.groupsize 8",
        "python -m advgrpo.train --preset sd35m-dino-papers",
        "python -m advgrpo.train --rollout.group-size 1",
        "torchrun --nproc-per-node=7 -m advgrpo.train --preset sd35m-dino-paper --rollout.micro-batch 5",
        "python -m advgrpo.generate --prompt star --image-per-prompt 4",
        "python -m advgrpo.experiments run hackings",
        "python -m advgrpo.nothing",
        "python -m bench.step --size huge",
        "python -m advgrpo_kernels.patch flow_grppo -- train.py",
        "make trian",
        'pip install -e ".[orc]"',
        "pytest tests/nothing",
        "int main() {",
    ],
)
def test_what_is_wrong_is_found(wrong, parse_only, monkeypatch):
    with pytest.raises((AssertionError, UserError, pytest.fail.Exception)):
        understand(wrong, monkeypatch)

"""`python -m advgrpo_kernels.patch`: what a script sees, when functions of it and of its imports are replaced, what is
said.

Planted bugs that turned this file red: the call after the main block, before the last definition, or in front of the
first main block; sys.path[0] left as the launcher's; the exit code lost; a refusal that `except Exception` swallows;
the loader left wrapped; a module patched before it was executed; silence when nothing was replaced; --strict ignored;
children left alone; another sitecustomize hidden.
"""

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from advgrpo_kernels.integrations import _launcher, _main_script, _patching, dance_grpo
from advgrpo_kernels.integrations._import_hook import AfterImport
from advgrpo_kernels.integrations.diffusers_transformers import FLUX, QWEN, SD3
from tests.kernels import stand_ins

ROOT = Path(__file__).parents[2]


def run(command, cwd, **environment):
    """A new process; torch takes seconds to import there, so most tests run the launcher in this one."""
    paths = os.pathsep.join([str(ROOT / "kernels"), *filter(None, [environment.pop("PYTHONPATH", "")])])
    known = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    environment = known | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(
        [sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.fixture
def launch(tmp_path, monkeypatch, capfd):
    """launch(PEER, *command, options=[...]) -> exit code, stdout and stderr of the launcher, run in `tmp_path`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    monkeypatch.setattr(sys, "argv", ["launcher"])

    def run_launcher(peer, *command, options=()):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "path", [str(tmp_path), *sys.path])
            patch.setattr(sys, "meta_path", list(sys.meta_path))
            before = set(sys.modules)
            importlib.invalidate_caches()
            try:
                code = _launcher.main([*options, peer, "--", *command])
            except SystemExit as stop:  # a refusal
                code = stop.code
            finally:
                for module in [sys.modules[name] for name in before if name.startswith("diffusers.models.")]:
                    if _patching._RECORD in vars(module):  # what other tests have imported and go on using
                        _patching.restore(module)
                for name in set(sys.modules) - before:
                    del sys.modules[name]
        out, err = capfd.readouterr()
        return SimpleNamespace(returncode=code, stdout=out, stderr=err)

    return run_launcher


def written(folder: Path, **sources: str) -> Path:
    """Files of a package tree: `a__b="..."` is a/b.py, and every folder a package."""
    for name, source in sources.items():
        path = folder.joinpath(*name.split("__")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
        for parent in path.relative_to(folder).parents[:-1]:
            (folder / parent / "__init__.py").touch()
    return folder


TRAINER = (
    stand_ins.dance()
    + """
import sys

def sample(x):
    return flux_step(x, x, 0.3, torch.tensor([1.0, 0.5, 0.0]), 0, None, True, True)

if __name__ == "__main__":
    import argparse
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int)
    steps = parser.parse_args().steps
    taken = sample(torch.zeros(2, 3, 4, 4))
    print(flux_step.__code__.co_filename, flux_step is sys.modules["__main__"].flux_step, len(taken), steps)
    raise SystemExit(steps)
"""
)


@pytest.mark.weekly
def test_a_function_of_the_script_itself_is_replaced_before_its_main_block(tmp_path, launch):
    """DanceGRPO's trainers are started as scripts that define `flux_step` and use it under their main block."""
    written(tmp_path, fastvideo__train_grpo_flux=TRAINER)
    command = ["-m", "advgrpo_kernels.patch", "dance_grpo", "--", "fastvideo/train_grpo_flux.py", "--steps", "7"]
    done = run(command, tmp_path)
    assert done.returncode == 7, done.stderr
    assert done.stdout.split() == [dance_grpo.__file__, "True", "3", "7"]
    assert "advgrpo_kernels.patch: flux_step of __main__ replaced" in done.stderr
    refused = launch("dance_grpo", "fastvideo/train_grpo_flux.py", "--stops", "7")
    assert refused.returncode == 2
    assert "unrecognized arguments: --stops 7" in refused.stderr
    as_module = launch("dance_grpo", "-m", "fastvideo.train_grpo_flux", "--steps", "4")
    assert as_module.returncode == 4
    assert as_module.stdout.split()[0] == dance_grpo.__file__


FACTS = """
import inspect, json, pickle, sys
from pathlib import Path

class Thing:
    pass

def facts():
    main = sys.modules["__main__"]
    names = sorted(name for name in vars(main) if name.startswith("__"))
    values = [repr(globals()[name]) for name in ("__name__", "__file__", "__package__", "__doc__", "__annotations__")]
    spec = __spec__ and (__spec__.name, __spec__.origin)
    first = [str(Path(entry or ".").resolve()) for entry in sys.path[:1]]
    kinds = [type(pickle.loads(pickle.dumps(Thing()))).__module__, type(__builtins__).__name__]
    lines = [len(inspect.getsource(facts)), inspect.stack()[1].lineno]
    return [sys.argv, first, names, values, spec, vars(main) is globals(), kinds, lines]

if __name__ == "__main__":
    print(json.dumps(facts()))
    sys.exit("a message" if sys.argv[-1] == "message" else 5)
"""
LIGHT = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("main_script", sys.argv[1])
main_script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(main_script)
command, settings = sys.argv[2:], ((), lambda module: None)
if command[0] == "-m":
    main_script.run_module(command[1], command[2:], *settings)
else:
    main_script.run_script(command[0], command[1:], *settings)
"""  # the launcher without torch


@pytest.mark.parametrize(
    "command",
    ["folder/facts.py --a -m message", "link.py", "-m folder.facts -- b", "-m tool"],
)
def test_the_program_finds_itself_as_under_plain_python(command, tmp_path):
    written(tmp_path, folder__facts=FACTS, tool__main=FACTS)
    (tmp_path / "tool/main.py").rename(tmp_path / "tool/__main__.py")
    (tmp_path / "link.py").symlink_to(tmp_path / "folder/facts.py")
    plain = run(command.split(), tmp_path)
    launched = run(["-c", LIGHT, _main_script.__file__, *command.split()], tmp_path)
    assert json.loads(launched.stdout) == json.loads(plain.stdout), launched.stderr
    assert launched.returncode == plain.returncode in (1, 5)
    assert launched.stderr == plain.stderr


@pytest.mark.parametrize(
    ("command", "message", "code"),
    [
        (["absent.py"], "can't open file '{}/absent.py': [Errno 2] No such file or directory", 2),
        (["-m", "absent.module"], "No module named absent", 1),
    ],
)
def test_programs_that_do_not_exist_end_as_under_python(command, message, code, launch, tmp_path):
    done = launch("mix_grpo", *command)
    assert run(command, tmp_path).returncode == done.returncode == code
    assert message.format(tmp_path) in done.stderr


PIPELINE = (
    "from adv_grpo.diffusers_patch.sd3_sde_with_logprob import sde_step_with_logprob_new as sde_step_with_logprob\n"
    "def filename(): return sde_step_with_logprob.__code__.co_filename\n"
)
ADV_SCRIPT = """
import sys, inspect, importlib
from adv_grpo import pipeline
from adv_grpo.diffusers_patch import sd3_sde_with_logprob as home
from adv_grpo.stat_tracking import PerPromptStatTracker
print(pipeline.filename())
print(pipeline.sde_step_with_logprob is home.sde_step_with_logprob_new)
print(PerPromptStatTracker.update.__code__.co_filename)
print(type(home.__loader__).__name__, type(home.__spec__.loader).__name__, "def rows" in inspect.getsource(home))
"""
ADV_PACKAGE = {
    "adv_grpo__diffusers_patch__sd3_sde_with_logprob": stand_ins.ADV_GRPO,
    "adv_grpo__stat_tracking": stand_ins.EARLY_TRACKER,
    "adv_grpo__pipeline": PIPELINE,
    "scripts__train": ADV_SCRIPT,
}


def test_what_the_program_imports_is_replaced_as_it_is_imported(tmp_path, launch, monkeypatch):
    written(tmp_path, **ADV_PACKAGE)
    monkeypatch.syspath_prepend(tmp_path)
    done = launch("adv_grpo", "scripts/train.py", options=["--strict"])
    assert done.returncode == 0, done.stderr
    ours, same, tracker, loaders = done.stdout.splitlines()
    assert Path(ours).parts[-2:] == ("integrations", "adv_grpo.py")
    assert Path(tracker).name == "_statistics.py"
    assert (same, loaders) == ("True", "SourceFileLoader SourceFileLoader True")
    said = "sde_step_with_logprob, sde_step_with_logprob_new of adv_grpo.diffusers_patch.sd3_sde_with_logprob replaced"
    assert said in done.stderr
    assert "PerPromptStatTracker.update of adv_grpo.stat_tracking replaced" in done.stderr
    monkeypatch.setenv("RANK", "3")
    assert launch("adv_grpo", "scripts/train.py").stderr == ""  # one process of many speaks


def test_blocks_of_the_peer_s_transformers_are_replaced_unless_told_otherwise(tmp_path, launch, monkeypatch):
    pytest.importorskip("diffusers")
    flux = importlib.import_module("diffusers.models.transformers.transformer_flux")
    attention = importlib.import_module("diffusers.models.attention")  # SD3's, which DanceGRPO does not train
    script = "import diffusers.models.transformers.transformer_flux as m, diffusers.models.attention as a\n"
    script += "for c in (m.FluxTransformerBlock, m.FluxSingleTransformerBlock, a.JointTransformerBlock):\n"
    script += "    print(c.forward.__code__.co_filename.rpartition('/')[2])\n"
    written(tmp_path, train=script)
    done = launch("dance_grpo", "train.py", options=["--strict"])
    assert done.stdout.split() == ["_flux_blocks.py", "_flux_blocks.py", "attention.py"], done.stderr
    assert (
        "FluxTransformerBlock.forward of diffusers.models.transformers.transformer_flux replaced: agrees" in done.stderr
    )
    assert done.returncode == 3  # blocks are diffusers': nothing of the codebase was replaced
    done = launch("dance_grpo", "train.py", options=["--no-blocks"])
    assert done.stdout.split() == ["transformer_flux.py", "transformer_flux.py", "attention.py"]
    own = flux.FluxTransformerBlock.forward
    monkeypatch.setattr(flux.FluxTransformerBlock, "forward", lambda self, tokens: tokens)
    other = flux.FluxTransformerBlock.forward
    other.__qualname__, other.__module__ = own.__qualname__, own.__module__
    done = launch("dance_grpo", "train.py")
    assert (done.returncode, done.stdout) == (1, "")
    assert "another version of that codebase" in done.stderr
    assert "--no-blocks runs the program with diffusers' own" in done.stderr
    assert attention.JointTransformerBlock.forward.__code__.co_filename == attention.__file__


def test_a_refusal_ends_the_program_whatever_catches_exceptions(tmp_path, launch):
    other = stand_ins.ADV_GRPO.replace("(1 - after) * clean", "(1 - now) * clean")
    script = "try:\n    import adv_grpo.pipeline\nexcept Exception:\n    pass\nprint('went on')\n"
    written(tmp_path, **ADV_PACKAGE | {"adv_grpo__diffusers_patch__sd3_sde_with_logprob": other, "train": script})
    done = launch("adv_grpo", "train.py")
    assert (done.returncode, done.stdout) == (1, "")
    assert "sde_step_with_logprob_new and its replacement do not give the same: prev_sample" in done.stderr
    assert "NOTHING WAS REPLACED" not in done.stderr


def test_nothing_replaced_is_said_loudly_and_fails_with_strict(tmp_path, launch):
    (tmp_path / "train.py").write_text("import sys; sys.exit(int(sys.argv[1]))")
    for options, code, expected in (([], 0, 0), (["--strict"], 0, 3), (["--strict"], 6, 6)):
        done = launch("flow_grpo", "train.py", str(code), options=options)
        assert done.returncode == expected
        assert "NOTHING WAS REPLACED. The program ran on its own code" in done.stderr
        assert "sde_step_with_logprob, PerPromptStatTracker.update as flow_grpo does (modules flow_grpo." in done.stderr


def test_an_error_of_the_program_is_its_own(tmp_path, launch, capfd):
    (tmp_path / "train.py").write_text("raise RuntimeError('of the program')")
    with pytest.raises(RuntimeError, match="of the program"):
        launch("flow_grpo", "train.py")
    assert "NOTHING WAS REPLACED" in capfd.readouterr().err


def test_a_copy_in_another_module_is_named_on_the_command_line(tmp_path, launch):
    script = "import mine.steps as s; print(s.sde_step_with_logprob.__code__.co_filename)"
    written(tmp_path, mine__steps=stand_ins.FLOW_GRPO, train=script)
    done = launch("flow_grpo", "train.py", options=["--module", "mine.steps", "--strict"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("integrations/flow_grpo.py")


@pytest.mark.weekly
def test_children_are_patched_on_request_and_keep_their_sitecustomize(tmp_path):
    """Ray's workers, for one: the program itself never imports what they run."""
    child = "import builtins; from adv_grpo import pipeline; print(pipeline.filename(), builtins.THEIRS)"
    script = f"import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', {child!r}]).returncode)"
    theirs = tmp_path / "theirs"
    written(theirs, sitecustomize="import builtins; builtins.THEIRS = 'kept'")
    written(tmp_path, **ADV_PACKAGE | {"train": script})
    paths = os.pathsep.join([str(theirs), str(tmp_path)])
    command = ["-m", "advgrpo_kernels.patch", "--strict"]
    done = run([*command, "--children", "adv_grpo", "--", "train.py"], tmp_path, PYTHONPATH=paths)
    assert done.returncode == 0, done.stderr
    file, kept = done.stdout.split()
    assert (Path(file).name, kept) == ("adv_grpo.py", "kept")
    assert "NOTHING" not in done.stderr
    without = run([*command, "adv_grpo", "--", "train.py"], tmp_path, PYTHONPATH=paths)
    assert without.returncode == 3
    assert Path(without.stdout.split()[0]).name == "sd3_sde_with_logprob.py"


@pytest.mark.slow
@pytest.mark.weekly
@pytest.mark.parametrize("launcher", ["torch.distributed.run", "accelerate.commands.launch"])
def test_under_the_launchers_that_start_these_trainers(launcher, tmp_path):
    pytest.importorskip(launcher.partition(".")[0])
    written(tmp_path, fastvideo__train_grpo_flux=TRAINER)
    settings = ["--nproc_per_node", "2", "--standalone"] if "torch" in launcher else ["--cpu", "--num_processes", "1"]
    command = ["-m", "advgrpo_kernels.patch", "dance_grpo", "--", "fastvideo/train_grpo_flux.py", "--steps", "0"]
    done = run(["-m", launcher, *settings, *command], tmp_path, HF_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    processes = 2 if "torch" in launcher else 1
    assert done.stdout.count(dance_grpo.__file__) == processes
    assert done.stderr.count("flux_step of __main__ replaced") == 1


def position(source):
    code = _main_script.compile_with_call(source, "file.py", {"flux_step", "Tracker"})
    calls = []
    space = {"__name__": "__main__", "calls": calls}
    space["__advgrpo_kernels_patch__"] = lambda: calls.append("patch")
    exec(code, space)
    return calls


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def flux_step(): pass\nif __name__ == '__main__':\n    calls.append('main')", ["patch", "main"]),
        ("def flux_step(): pass\nif '__main__' == __name__: calls.append('main')", ["patch", "main"]),
        ("def flux_step(): pass\nif __name__ == '__main__' and True: calls.append('main')", ["patch", "main"]),
        (
            "if __name__ == '__main__': calls.append('early')\ndef flux_step(): pass\ncalls.append('main')",
            ["early", "patch", "main"],
        ),
        ("def flux_step(): pass\ndef main(): calls.append('main')\nmain()", ["patch", "main"]),
        ("try:\n    class Tracker: pass\nfinally: pass\ncalls.append('main')", ["patch", "main"]),
        ("import os\nfrom sys import argv\ncalls.append('main')", ["patch", "main"]),
        ("import os\nif __name__ == '__main__': calls.append('main')", ["patch", "main"]),
        ("if __name__ == 'elsewhere': pass\ncalls.append('main')", ["patch", "main"]),
        ("'doc'\nfrom __future__ import annotations\nx: int = 1", ["patch"]),
        ("", ["patch"]),
    ],
)
def test_where_the_call_is_inserted(source, expected):
    assert position(source) == expected


def test_lines_of_tracebacks_are_the_file_s():
    source = "def flux_step(): pass\n\n\nif __name__ == '__main__':\n    x = 1\n"
    code = _main_script.compile_with_call(source, "file.py", {"flux_step"})
    lines = {line for _, _, line in code.co_lines() if line}
    assert lines <= {node.lineno for node in ast.walk(ast.parse(source)) if hasattr(node, "lineno")} | {0}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "no PEER given"),
        (["flow_rl", "--", "x.py"], "unknown PEER 'flow_rl': it must be one of adv_grpo, dance_grpo, flow_factory"),
        (["flow_grpo"], "no program given"),
        (["flow_grpo", "--"], "no program given"),
        (["flow_grpo", "--", "-m"], "no program given"),
        (["flow_grpo", "--strict", "--", "x.py"], "unknown option '--strict' behind PEER"),
        (["--strickt", "flow_grpo", "--", "x.py"], "unknown option '--strickt'"),
        (["--module"], "--module needs a name"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_2(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        _launcher.main(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_every_integration_is_a_peer_of_the_launcher():
    folder = Path(_launcher.__file__).parent
    modules = {path.stem for path in folder.glob("*.py") if not path.stem.startswith("_")} - {
        "diffusers_sd3",
        "diffusers_transformers",
    }
    assert set(_launcher.PEERS) == modules
    for peer in _launcher.PEERS:
        assert all(isinstance(target, _patching.Target) for target in _launcher.Session(peer).targets)


def test_a_module_that_fails_is_not_patched_and_its_error_is_its_own(tmp_path, monkeypatch):
    (tmp_path / "fails_while_loading.py").write_text("half = 1\nraise KeyError('its own')")
    (tmp_path / "is_fine.py").write_text("half = 1")
    monkeypatch.syspath_prepend(tmp_path)
    seen = []
    hook = AfterImport(lambda name: name in ("fails_while_loading", "is_fine", "absent"), seen.append)
    monkeypatch.setattr(sys, "meta_path", [hook, *sys.meta_path])
    with pytest.raises(KeyError, match="its own"):
        importlib.import_module("fails_while_loading")
    with pytest.raises(ModuleNotFoundError, match="absent"):
        importlib.import_module("absent")
    assert seen == []
    module = importlib.import_module("is_fine")
    assert seen == [module]
    importlib.reload(module)
    assert seen == [module, module]
    del sys.modules["is_fine"]


def test_the_readme_has_every_codebase_and_the_blocks_that_are_replaced_for_it():
    """Planted, each seen red: Qwen-Image's block left out of dance_grpo's, FLUX.1's of one stream out of mix_grpo's."""
    readme = (ROOT / "kernels" / "README.md").read_text(encoding="utf-8")
    of_peer, of_blocks = (
        [line.strip("| ").split(" | ") for line in text.split("\n\n")[0].splitlines()[2:]]
        for text in readme.split("\n| PEER | ")[1:]
    )
    assert {peer.strip("`") for peer, *_ in of_peer} == set(_launcher.PEERS)
    families = {"SD3": SD3, "FLUX.1": FLUX, "Qwen-Image": QWEN}
    said = {peer: set() for peer in _launcher.PEERS}
    for peers, names, _ in of_blocks:
        for peer in peers.replace("`", "").split(", "):
            said[peer] = {block for name in names.split(";")[0].split(", ") for block in families[name]}
    modules = {peer: importlib.import_module(f"advgrpo_kernels.integrations.{peer}") for peer in _launcher.PEERS}
    assert {peer: set(getattr(module, "BLOCKS", ())) for peer, module in modules.items()} == said

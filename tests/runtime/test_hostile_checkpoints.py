"""Checkpoints whose hashes are right and whose content is not: one clear error each, and the trainer is as before.

Every case changes the newest of three good checkpoints and writes its manifest anew. The first test is the control.

Bugs planted in a copy, each seen red: no look at the tensors' shapes, at their dtypes; no check for what is not finite,
for tensors too many, for where the optimizer's tensors belong, for the sign of its second moments, for its settings,
for the cursor of the replay buffer, for repeated keys; the policy copied before the rest is checked.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from advgrpo.errors import UserError
from advgrpo.runtime.checkpoint import MANIFEST, STATE, TENSORS
from advgrpo.runtime.distributed import Distributed
from advgrpo.training.resuming import Resume, Resuming
from advgrpo.training.run import Run
from tests.conftest import make_unit_config


@pytest.fixture(scope="module")
def run(unit_pipeline, unit_backbone, tmp_path_factory):
    """After three iterations, with their three checkpoints."""
    settings = make_unit_config(unit_pipeline, unit_backbone, tmp_path_factory.mktemp("hostile"))
    settings.iterations, settings.output.checkpoint_every, settings.output.keep_checkpoints = 3, 1, 3
    settings.adversary.warmup_iterations = 0
    made = Run(settings, Distributed.start("cpu"), console=Console(quiet=True))
    made.train()
    settings.iterations = 9
    return made


def rehash(folder: Path, **changes) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    for name in (TENSORS, STATE):
        content = (folder / name).read_bytes()
        manifest["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / MANIFEST).write_text(json.dumps({**manifest, **changes}))


def resume(run: Run, root: Path) -> None:
    """What a run does with the newest checkpoint in `root`; UserError where it is refused."""
    resuming = Resuming(run.config, root.parent, run.distributed, Resume("folder"), run.console)
    saved = resuming.choose()
    if reason := run._misfit(saved):
        resuming.next(saved, reason)


Spoil = Callable[[dict, dict], object]


def tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Spoil:
    """Replace the first tensor whose name begins so."""

    def spoil(tensors, state):
        full = next(each for each in tensors if each.startswith(name))
        tensors[full] = change(tensors[full]).clone()

    return spoil


def removed(name: str) -> Spoil:
    return lambda tensors, state: tensors.pop(next(each for each in tensors if each.startswith(name)))


def renamed(name: str, to: str) -> Spoil:
    def spoil(tensors, state):
        full = next(each for each in tensors if each.startswith(name))
        tensors[to] = tensors.pop(full)

    return spoil


def entry(path: str, value) -> Spoil:
    """Set "trainer.iteration" and so on; None removes it."""

    def spoil(tensors, state):
        *outer, last = path.split(".")
        here = state
        for part in outer:
            here = here[int(part) if isinstance(here, list) else part]
        if value is None:
            del here[last]
        else:
            here[int(last) if isinstance(here, list) else last] = value

    return spoil


def not_finite(t: torch.Tensor, value: float) -> torch.Tensor:
    t = t.clone()
    t.view(-1)[-1] = value
    return t


def shared(tensors, state):
    """Both moments in one tensor: steps would change it twice."""
    text = json.dumps(state["trainer"]["head_optimizer"])
    state["trainer"]["head_optimizer"] = json.loads(text.replace('.0.exp_avg"', '.0.exp_avg_sq"'))


def of_another_model(tensors, state):
    state["config"]["model"]["lora"]["rank"] = 8


WRONG_CONTENT: dict[str, tuple[Spoil, str]] = {
    "policy missing": (removed("policy."), "tensor policy.lora is missing"),
    "policy renamed": (renamed("policy.", "policy.other"), "tensor policy.lora is missing"),
    "policy of one number": (tensor("policy.", lambda t: t[:1]), "tensor policy.lora is float32 [1], this run's is"),
    "policy in half precision": (tensor("policy.", lambda t: t.half()), "tensor policy.lora is float16"),
    "policy not finite": (tensor("policy.", lambda t: not_finite(t, float("nan"))), "policy.lora is not finite"),
    "average missing": (removed("ema."), "tensor ema.lora is missing"),
    "average not finite": (tensor("ema.", lambda t: not_finite(t, float("-inf"))), "ema.lora is not finite"),
    "average transposed": (tensor("ema.", lambda t: t.view(2, -1)), "tensor ema.lora is float32 [2, "),
    "one tensor too many": (lambda t, s: t.update(other=torch.ones(2)), "tensor other is none of this run's"),
    "a policy tensor too many": (lambda t, s: t.update({"policy.a": torch.ones(2)}), "tensor policy.a is none"),
    "head missing": (removed("head.b1"), "tensor head.b1 is missing"),
    "head wider": (tensor("head.w2", lambda t: torch.cat([t, t])), "tensor head.w2 is float32 [2, 16], this run's is"),
    "head in double": (tensor("head.w1", torch.Tensor.double), "tensor head.w1 is float64"),
    "replay missing": (removed("replay.cls"), "tensor replay.cls is missing"),
    "replay of other features": (
        tensor("replay.patches", lambda t: t[:, :4]),
        "tensor replay.patches is float32 [16, 4, 64], this run's is float32 [16, 8, 64]",
    ),
    "replay shorter": (tensor("replay.cls", lambda t: t[:3]), "tensor replay.cls is float32 [3, 64]"),
    "replay not finite": (tensor("replay.cls", lambda t: not_finite(t, float("inf"))), "replay.cls is not finite"),
    "replay fuller than it can be": (entry("trainer.replay.size", 17), "size in state.json is 17"),
    "replay cursor below zero": (entry("trainer.replay.cursor", -1), "cursor in state.json is -1"),
    "replay cursor astray": (entry("trainer.replay.cursor", 1), "slots are filled, but the next is 1"),
    "replay counters text": (entry("trainer.replay.size", "6"), "size in state.json is '6', want a whole number"),
    "no replay counters": (entry("trainer.replay", None), "replay is missing in state.json"),
    "moments of another shape": (
        tensor("optimizer.state.0.exp_avg", lambda t: t[:5]),
        "optimizer state exp_avg of parameter 0 is torch.float32 [5]",
    ),
    "moments one number": (tensor("head_optimizer.state.0.exp_avg", torch.Tensor.sum), "exp_avg of parameter 0 is"),
    "moments missing": (removed("head_optimizer.state.1.exp_avg_sq"), "no tensor 'head_optimizer.state.1.exp_avg_sq'"),
    "moments not finite": (tensor("optimizer.state.0.exp_avg", lambda t: not_finite(t, float("nan"))), "is not finite"),
    "mean square below zero": (tensor("optimizer.state.0.exp_avg_sq", lambda t: t - 1), "is negative, which no mean"),
    "one mean square below zero": (
        tensor("optimizer.state.0.exp_avg_sq", lambda t: torch.cat([t[:-1], -1 - t[-1:]])),
        "is negative, which no mean",
    ),
    "steps below zero": (tensor("head_optimizer.state.0.step", lambda t: t - 99), "want a number of steps"),
    "half a step": (tensor("head_optimizer.state.0.step", lambda t: t + 0.5), "want a number of steps"),
    "steps per element": (tensor("optimizer.state.0.step", lambda t: t.expand(3)), "want a number of steps"),
    "another learning rate": (
        entry("trainer.head_optimizer.param_groups.0.lr", 1e9),
        "head_optimizer has lr = 1000000000.0, this run",
    ),
    "a learning rate that is text": (entry("trainer.head_optimizer.param_groups.0.lr", "1"), "has lr = '1', this run"),
    "both moments in one tensor": (shared, "its tensors are not where state.json says"),
    "an optimizer that is a list": (entry("trainer.optimizer", []), "optimizer in state.json is a list"),
    "an optimizer without groups": (entry("trainer.optimizer", {"state": {}}), "no optimizer's state (KeyError"),
    "groups that are numbers": (entry("trainer.optimizer.param_groups", [1]), "no optimizer's state (TypeError"),
    "optimizer nested in itself": (
        entry("trainer.optimizer.state", {"__items__": [[{"__items__": []}, 1]]}),
        "no optimizer's state (TypeError",
    ),
    "no head optimizer": (entry("trainer.head_optimizer", None), "head_optimizer is missing in state.json"),
    "no trainer": (entry("trainer", None), "trainer is missing in state.json"),
    "trainer a list": (entry("trainer", [1]), "trainer in state.json is a list, want an object"),
    "another iteration": (entry("trainer.iteration", 2), "state.json says iteration 2, unlike the folder"),
    "iteration below zero": (entry("trainer.iteration", -3), "iteration in state.json is -3"),
    "iteration text": (entry("trainer.iteration", "3"), "iteration in state.json is '3'"),
    "iteration true": (entry("trainer.iteration", True), "iteration in state.json is True"),
    "iteration a fraction": (entry("trainer.iteration", 3.0), "iteration in state.json is 3.0"),
    "steps gone": (entry("trainer.global_step", None), "global_step is missing"),
    "steps negative": (entry("trainer.global_step", -1), "global_step in state.json is -1"),
    "monitor gone": (entry("trainer.monitor", None), "monitor is missing"),
    "monitor series text": (
        entry("trainer.monitor.reward_collapse.series", {"reward": ["much"]}),
        "monitor.reward_collapse.series.reward.0 in state.json is damaged",
    ),
    "monitor without an entry": (entry("trainer.monitor.mode_collapse.active", None), "monitor.mode_collapse.active"),
    "monitor active for no reason": (
        lambda t, s: s["trainer"]["monitor"]["dead_groups"].update(active=True, last=None),
        "monitor.dead_groups in state.json is damaged",
    ),
    "base text": (entry("base", {"eval_rule_accuracy": "good"}), "base.eval_rule_accuracy in state.json is 'good'"),
    "base a list": (entry("base", [0.5]), "base in state.json is a list"),
    "base not finite": (entry("base", {"eval_rule_accuracy": float("nan")}), "base.eval_rule_accuracy in state.json"),
    "start a number": (entry("start", 1), "start in state.json is 1, want an object"),
    "hashes numbers": (entry("made_from", {"base": 7}), "made_from.base in state.json is 7, want a hash"),
    "settings of another model": (of_another_model, "other settings: model.lora.rank: 8 -> 4"),
    "settings gone": (entry("config", None), "config is missing"),
    "settings a list": (entry("config", []), "config in state.json is a list"),
    "settings of the wrong kind": (entry("config.seed", "x"), "config in state.json: seed = 'x': want a whole number"),
    "settings of the future": (entry("config.telepathy", 1), "unknown key 'telepathy'"),
}


@pytest.fixture
def root(run, tmp_path) -> Path:
    """A copy of the run's checkpoints."""
    shutil.copytree(run.folder / "checkpoints", tmp_path / "run" / "checkpoints")
    return tmp_path / "run" / "checkpoints"


def refused(run: Run, root: Path) -> str:
    """The error; the trainer is as it was."""
    before = {name: t.clone() for name, t in run.trainer.state()[0].items()}
    counters = json.dumps(run.trainer.state()[1])
    with pytest.raises(UserError) as error:
        resume(run, root)
    after, rest = run.trainer.state()
    assert after.keys() == before.keys()
    assert all(torch.equal(before[name], t) for name, t in after.items())
    assert json.dumps(rest) == counters
    return str(error.value)


def test_the_untouched_checkpoint_is_taken(run, root):
    folder = root / "iteration-000003"
    save_file(load_file(folder / TENSORS), folder / TENSORS)
    rehash(folder)
    resume(run, root)
    assert run.trainer.iteration == 3


@pytest.mark.parametrize("name", WRONG_CONTENT)
def test_wrong_content_is_named(name, run, root):
    spoil, expected = WRONG_CONTENT[name]
    folder = root / "iteration-000003"
    tensors, state = load_file(folder / TENSORS), json.loads((folder / STATE).read_text())
    spoil(tensors, state)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / TENSORS)
    (folder / STATE).write_text(json.dumps(state))
    rehash(folder)
    said = refused(run, root)
    assert expected in said, said
    assert str(folder) in said
    assert f"--resume-from {root / 'iteration-000002'}" in said or "other settings" in said


def header(entries: dict, data: bytes = b"") -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
WRONG_FILES: dict[str, tuple[str, bytes, str]] = {
    "tensors text": (TENSORS, b"no tensors", "is no safetensors file"),
    "tensors empty": (TENSORS, b"", "is no safetensors file"),
    "a header longer than the file": (TENSORS, struct.pack("<Q", 2**60) + b"{}", "is no safetensors file"),
    "a header that is not JSON": (TENSORS, struct.pack("<Q", 3) + b"{{{", "is no safetensors file"),
    "offsets beyond the file": (TENSORS, header({"a": {**F32, "data_offsets": [0, 400]}}), "is no safetensors file"),
    "offsets that overlap": (TENSORS, header({"a": F32, "b": F32}, bytes(4)), "is no safetensors file"),
    "a shape that is not the bytes'": (TENSORS, header({"a": {**F32, "shape": [9]}}, bytes(4)), "is no safetensors"),
    "a dtype of nowhere": (TENSORS, header({"a": {**F32, "dtype": "F7"}}, bytes(4)), "is no safetensors file"),
    "a header nested deeply": (TENSORS, struct.pack("<Q", 90_000) + b"[" * 90_000, "is no safetensors file"),
    "state not JSON": (STATE, b"{", "state.json: not JSON"),
    "state a list": (STATE, b"[]", "state.json holds a list"),
    "state nested deeply": (STATE, b'{"trainer": ' + b"[" * 100_000, "nested too deeply"),
    "state of many digits": (STATE, b'{"trainer": ' + b"9" * 5000 + b"}", "thousands of digits"),
    "state not UTF-8": (STATE, b'{"\xff": 1}', "is not UTF-8"),
    "a key that stands twice": (STATE, b'{"trainer": 1, "trainer": {}}', "the key 'trainer' stands twice"),
    "half a character": (STATE, b'{"trainer": "\\ud800"}', "half a character"),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_files_that_are_something_else_are_named(name, run, root):
    file, content, expected = WRONG_FILES[name]
    folder = root / "iteration-000003"
    (folder / file).write_bytes(content)
    rehash(folder)
    said = refused(run, root)
    assert expected in said, said
    assert str(folder / file) in said
    assert f"--resume-from {root / 'iteration-000002'}" in said


MANIFESTS = {
    "version of the future": ({"version": 2}, "version 2, this program reads 1"),
    "version of the past": ({"version": 0}, "version 0, this program reads 1"),
    "version text": ({"version": "1"}, "version '1', this program reads 1"),
    "another iteration": ({"iteration": 4}, "says iteration 4, unlike its folder"),
    "another format": ({"format": "pickle"}, "does not say format"),
    "no files": ({"files": []}, "does not list"),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_that_say_something_else_are_named(name, run, root):
    changes, expected = MANIFESTS[name]
    rehash(root / "iteration-000003", **changes)
    said = refused(run, root)
    assert expected in said, said
    assert f"--resume-from {root / 'iteration-000002'}" in said

"""Output folders, remote judges, the cache, and runs to continue."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file

from advgrpo.runtime.checkpoint import MANIFEST, STATE, TENSORS
from tests.bad_input.case import Bench, Case, flagged

_OUT, _REMOTE, _RESUME = "output dir", "remote reward", "resume"


def _into(name: str, *expect: str, make: Callable[[Bench], str]) -> Case:
    return Case(_OUT, name, expect, lambda bench: bench.train("--output-dir", make(bench)))


def _finished(bench: Bench) -> str:
    return str(bench.copy(bench.world.run, "done"))


OUTPUT = [
    _into("empty", "output_dir = ''", "want text that is not empty", make=lambda b: ""),
    _into("a file", "output_dir = ", "is not writable", make=lambda b: b.write("file", "")),
    _into("below a file", "output_dir = ", "is not writable", make=lambda b: b.write("file", "") + "/run"),
    _into("below /proc", "output_dir = '/proc/run' is not writable", make=lambda b: "/proc/run"),
    _into(
        "too long", "output_dir = ", "is not writable: File name too long", make=lambda b: str(b.folder / ("x" * 300))
    ),
    _into("holds a run", "output_dir = ", "--resume", make=_finished),
    _into("brackets below a file", "[/bold]", "is not writable", make=lambda b: b.write("f", "") + "/x[/bold]"),
]

CACHE = [
    Case(
        "cache",
        "a file",
        ("data.cache_dir = ", "is not writable"),
        lambda b: b.train("--data.cache_dir", b.write("c", "")),
    ),
    flagged("cache", "--data.cache_dir /proc/cache", "data.cache_dir = '/proc/cache' is not writable"),
    flagged("cache", "--data.cache_dir=", "data.cache_dir = ''", "want text that is not empty"),
]


def _answers(behaviour: str, *expect: str) -> Case:
    def make(bench: Bench) -> list[str]:
        quick = ("--rewards.remote.timeout", "1", "--rewards.remote.retries", "0", "--rewards.remote.wait", "0")
        return bench.train(
            "--rewards.remote.weight", "1", "--rewards.remote.url", bench.world.servers[behaviour], *quick
        )

    return Case(_REMOTE, behaviour, ("rewards.remote", *expect), make)


def _url(url: str, *expect: str) -> Case:
    once = ("--rewards.remote.retries", "0", "--rewards.remote.wait", "0")
    return flagged(_REMOTE, ["--rewards.remote.weight", "1", "--rewards.remote.url", url, *once], *expect)


def _token(name: str, content: bytes, *expect: str) -> Case:
    def make(bench: Bench) -> list[str]:
        token = ("--rewards.remote.token_file", bench.write("token", content))
        return bench.train("--rewards.remote.weight", "1", "--rewards.remote.url", bench.world.servers["good"], *token)

    return Case(_REMOTE, name, ("rewards.remote.token_file = ", *expect), make)


REMOTE = [
    _answers("not-found", "404"),
    _answers("refuses", "400"),
    _answers("fails", "500"),
    _answers("down", "503", "gave up after 1 attempts in 0 s (retries = 0, wait = 0 s)"),
    _answers("wants-a-token", "401", "set token_file to a file with the server's token"),
    _answers("rude", "status 400 Bad Request: \\x1b[2J"),
    _answers("redirects", "302"),
    _answers("html"),
    _answers("not-json"),
    _answers("list"),
    _answers("no-scores"),
    _answers("too-many"),
    _answers("text"),
    _answers("nan"),
    _answers("overflow"),
    _answers("boolean"),
    _answers("endless"),
    _answers("hangs"),
    _url("http://127.0.0.1:1/", "rewards.remote at"),
    _url("ftp://127.0.0.1/score", "rewards.remote.url = 'ftp://127.0.0.1/score'"),
    _url("127.0.0.1:8000", "rewards.remote.url = '127.0.0.1:8000'"),
    _url("http://[::1/score", "rewards.remote.url = 'http://[::1/score'"),
    _url("http://host:99999/", "rewards.remote.url = 'http://host:99999/'"),
    _url("http://host:0/", "rewards.remote.url = 'http://host:0/'"),
    _url("http://ho st:1/", "rewards.remote.url = 'http://ho st:1/' is not an address (it holds a space"),
    _url("http://a..b/", "rewards.remote.url = 'http://a..b/' is not an address"),
    flagged(_REMOTE, "--rewards.remote.backoff 0", "rewards.remote.backoff = 0: want a number from 0.001 to 30"),
    flagged(_REMOTE, "--rewards.remote.wait -1", "rewards.remote.wait = -1: want a number from 0 to 604800"),
    flagged(_REMOTE, "--rewards.remote.wait inf", "rewards.remote.wait = inf: not finite"),
    flagged(
        _REMOTE,
        "--rewards.remote.weight 1 --rewards.remote.url http://127.0.0.1:1 --rewards.remote.token_file nowhere",
        "rewards.remote.token_file = nowhere does not exist; write the token into it",
    ),
    _token("token of two lines", b"a\nb", "want the token alone"),
    _token("token binary", b"\xff\x00", "is not UTF-8 text"),
    _token("no token", b"\n", "want the token alone"),
]  # fmt: skip


def _checkpoint(run: Path) -> Path:
    return sorted((run / "checkpoints").glob("iteration-*"))[-1]


def _damaged(
    name: str, damage: Callable[[Path], object], *expect: str, flags: tuple[str, ...] = (), loading: bool = False
) -> Case:
    """A run whose folder, given to `damage`, was changed; it is continued for one more iteration."""

    def make(bench: Bench) -> list[str]:
        run = bench.copy(bench.world.run, "run")
        damage(run)
        return ["--resume", str(run), "--iterations", "2", *flags]

    return Case(_RESUME, name, expect, make, loading=loading)


def _in_checkpoint(change: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda run: change(_checkpoint(run))


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def _unreadable(folder: Path) -> None:
    """A file that is there, and whose first byte Linux refuses with EIO."""
    (folder / STATE).unlink()
    (folder / STATE).symlink_to("/proc/self/mem")
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][STATE]["size"] = 0
    (folder / MANIFEST).write_text(json.dumps(manifest))


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-50])


def _every(pattern: str, change: Callable[[Path], object]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        found = [file for file in sorted(_checkpoint(folder).glob(pattern)) if file.is_file()]
        assert found, pattern
        for file in found:
            change(file)

    return damage


def _rewritten(change: Callable[[dict, dict], object]) -> Callable[[Path], object]:
    """Tensors and state changed, and the manifest made to fit."""

    def damage(run: Path) -> None:
        folder = _checkpoint(run)
        tensors, state = load_file(folder / TENSORS), json.loads((folder / STATE).read_text())
        change(tensors, state)
        save_file(tensors, folder / TENSORS)
        (folder / STATE).write_text(json.dumps(state))
        manifest = json.loads((folder / MANIFEST).read_text())
        for name in (TENSORS, STATE):
            content = (folder / name).read_bytes()
            manifest["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        (folder / MANIFEST).write_text(json.dumps(manifest))

    return damage


def _without_checkpoints(content: bytes) -> Callable[[Path], object]:
    """Its settings are in config.yaml alone."""
    return lambda run: (shutil.rmtree(run / "checkpoints"), (run / "config.yaml").write_bytes(content))


def _from(name: str, make: Callable[[Bench], str], *expect: str) -> Case:
    return Case(_RESUME, name, expect, lambda bench: ["--resume-from", make(bench)])


def _changed(flags: str, *expect: str, loading: bool = False) -> Case:
    """A setting that may not change."""
    return _damaged(flags, lambda _: None, *expect, flags=tuple(flags.split()), loading=loading)


RESUME = [
    Case(_RESUME, "nowhere", ("nowhere", "config.yaml is missing"), lambda b: ["--resume", "nowhere"]),
    Case(_RESUME, "empty folder", ("config.yaml is missing",), lambda b: ["--resume", str(b.folder)]),
    Case(_RESUME, "a file", ("--resume",), lambda b: ["--resume", b.write("x", "")]),
    Case(_RESUME, "no value", ("--resume: the value is missing",), lambda b: ["--resume"]),
    Case(_RESUME, "empty value", ("--resume",), lambda b: ["--resume="]),
    _damaged("config cut", _without_checkpoints(b"model: {"), "config.yaml"),
    _damaged("config empty", _without_checkpoints(b""), "config.yaml"),
    _damaged("config binary", _without_checkpoints(b"\xff\xfe\x00"), "config.yaml"),
    _damaged("config of another version", _without_checkpoints(b"old_setting: 1\n"), "old_setting"),
    _damaged("no checkpoints", lambda run: shutil.rmtree(run / "checkpoints"), "no checkpoint in", "--resume auto"),
    _damaged("checkpoints is a file", lambda run: (shutil.rmtree(run / "checkpoints"), (run / "checkpoints").write_text("")), "checkpoint"),
    _damaged("a read error", _in_checkpoint(_unreadable), "--resume", "iteration-000001 cannot be read", "Input/output error", "--resume-from"),
    _damaged("empty checkpoint", _in_checkpoint(lambda c: [f.unlink() for f in c.iterdir()]), "iteration-"),
    _damaged("manifest not JSON", _every("*manifest*", lambda f: f.write_text("{")), "iteration-"),
    _damaged("manifest a list", _every("*manifest*", lambda f: f.write_text("[]")), "iteration-"),
    _damaged("manifest gone", _every("*manifest*", Path.unlink), "iteration-"),
    _damaged("tensors cut", _every("*.safetensors", _cut), "iteration-"),
    _damaged("tensors flipped", _every("*.safetensors", _flip), "iteration-"),
    _damaged("tensors gone", _every("*.safetensors", Path.unlink), "iteration-"),
    _damaged("tensors text", _every("*.safetensors", lambda f: f.write_text("x")), "iteration-"),
    _damaged("state flipped", _every("state*.json", _flip), "iteration-"),
    _damaged("state not JSON", _every("state*.json", lambda f: f.write_text("{")), "iteration-"),
    _changed("--seed 7", "seed: 42 -> 7"),
    _changed("--model.lora.rank 8", "model.lora.rank: 4 -> 8"),
    _changed("--update.learning_rate 1e-5", "update.learning_rate: "),
    _changed("--adversary.kind siglip", "adversary.kind: 'dino' -> 'siglip'"),
    _changed("--rollout.group_size 8", "rollout.group_size: 4 -> 8"),
    _changed("--iterations 1", "is done already", "raise --iterations to go on"),
    _changed("--output-dir another", "goes on in that folder: leave out --output-dir another, or copy the folder there"),
    _changed("--update.eps nan", "update.eps = nan: not finite"),
    _changed("--preset tiny", "leave out --preset"),
    _changed("--resume-from x", "--resume and --resume-from exclude each other"),
    _damaged("not finite", _rewritten(lambda t, s: t["head.w1"].fill_(float("nan"))), "iteration-", "head.w1 is not finite"),
    _damaged("another iteration", _rewritten(lambda t, s: s["trainer"].update(iteration=7)), "says iteration 7, unlike"),
    _damaged("no trainer", _rewritten(lambda t, s: s.pop("trainer")), "iteration-", "trainer is missing in state.json"),
    _damaged("base a text", _rewritten(lambda t, s: s.update(base="good")), "iteration-", "base in state.json is 'good'"),
    _damaged("settings a list", _rewritten(lambda t, s: s.update(config=[])), "iteration-", "config in state.json"),
    _damaged(
        "other prompts", _rewritten(lambda t, s: s["made_from"].update(prompts="0")), "the content of prompts", "--accept-changed prompts"
    ),
    _damaged("another head", _rewritten(lambda t, s: t.pop("head.b1")), "iteration-", "tensor head.b1 is missing", loading=True),
    _from("a run", lambda b: str(b.world.run), "--resume-from", "is the folder of a run; want a checkpoint in it, such as"),
    _from("no checkpoint", lambda b: str(b.folder), "manifest.json does not exist"),
    _from("no folder", lambda b: "nowhere", "checkpoint nowhere does not exist"),
    Case(_RESUME, "a checkpoint", ("use --resume-from",), lambda b: ["--resume", str(_checkpoint(b.world.run))]),
    Case(_RESUME, "accepted without a resume", ("--accept-changed says", "give --resume"), lambda b: b.train("--accept-changed", "base")),
    Case(_RESUME, "nothing to accept", ("--accept-changed ['all']", "prompts"), lambda b: b.train("--resume", "auto", "--accept-changed", "all")),
    Case(
        _RESUME, "auto with other settings", ("other settings: seed: 42 -> 7",),
        lambda b: b.train("--resume", "auto", "--seed", "7", "--output-dir", str(b.copy(b.world.run, "run"))),
    ),
]  # fmt: skip

CASES = [*OUTPUT, *CACHE, *REMOTE, *RESUME]

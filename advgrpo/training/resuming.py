"""From which checkpoint a run goes on: found, verified and compared with what the run is made from, before models load.

    --resume DIR             the newest checkpoint of the run in DIR, or an error
    --output-dir DIR --resume auto
                             the newest that is whole, finite and this run's; the others are named; without one, a start
    --resume-from CHECKPOINT exactly that one

One process decides, the others follow it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from rich.console import Console

from advgrpo import config as configuration
from advgrpo.config import Config
from advgrpo.config.command_line import Source
from advgrpo.data.sources import Sources
from advgrpo.errors import UserError, one_line
from advgrpo.policy.lora_file import lora_digest
from advgrpo.policy.pipelines import pipeline_folder, pipeline_index
from advgrpo.reporting.evaluations import EVALUATIONS_FILE
from advgrpo.reporting.tracking import METRICS_FILE
from advgrpo.rewards.custom import source_digest
from advgrpo.runtime import checkpoint as checkpoints
from advgrpo.runtime.atomic import move_aside
from advgrpo.runtime.distributed import SLOW_SECONDS, Distributed
from advgrpo.runtime.fingerprint import FileStamps, folder_fingerprint
from advgrpo.runtime.reading import UnreadableError
from advgrpo.training import best
from advgrpo.training.restoring import count, entry, measured
from advgrpo.training.state_in_parts import cut_of

SUMMARY_FILE = "summary.json"
JUDGED_ON = {"held_out_prompts", "references", "base", "rewards"}  # what the base model's metrics depend on

# Settings a resumed run may change; any other difference would make it another run.
FREE_TO_CHANGE = (
    "iterations",
    "global_steps",
    "output_dir",
    "device",
    "collective_timeout",
    "model.sequence_parallel",
    "data.cache_dir",
    "data.decode_workers",
    "update.graphs",
    "model.offload",
    "rollout.decode_stream",
    *(
        f"rollout.engine.{name}"
        for name in (
            *("kind", "urls", "weights_dir", "requests_at_once", "probe_tolerance"),
            *("timeout", "retries", "backoff", "wait", "token_file"),
        )
    ),
    "output",
    "evaluation.every",
    "evaluation.keep_best",
    "evaluation.stop_after",
    "monitor",
    *(
        f"rewards.{judge}.{name}"
        for judge, where in (("remote", "url"), ("remotes[]", "url"), ("vlm_judge", "base_url"))
        for name in (where, "timeout", "retries", "backoff", "wait", "token_file")
    ),
    "rewards.vlm_judge.concurrency",
    "rewards.pools",
)


@dataclass(frozen=True)
class Resume:
    """What --resume, --resume-from and --accept-changed ask for."""

    mode: Literal["never", "auto", "folder", "checkpoint"] = "never"
    checkpoint: Path | None = None  # of mode "checkpoint"
    accepted: tuple[Source, ...] = ()

    @classmethod
    def of(cls, wanted: Resume | Literal["auto"] | bool) -> Resume:
        """True is mode "folder", False "never", "auto" the mode of that name."""
        if isinstance(wanted, Resume):
            return wanted
        if wanted not in (True, False, "auto"):
            raise UserError(f'resume = {wanted!r}: want True, False or "auto"')
        return cls("auto" if wanted == "auto" else "folder" if wanted else "never")


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is whole, finite, and of a run with these settings; of tensors in parts this process's rows."""

    path: Path
    tensors: dict[str, torch.Tensor]
    state: dict[str, Any]

    @property
    def iteration(self) -> int:
        return self.state["trainer"]["iteration"]

    def ended_early(self, config: Config) -> str:
        """Why the run is at its end there although it has not its length; "" where it is not."""
        return best.ended_early(self.state.get(best.STATE, {}), config.evaluation)

    def finished(self, config: Config) -> bool:
        """Whether the run has its length there, as `Trainer.finished`."""
        return self.iteration >= config.iterations or 0 < config.global_steps <= self.state["trainer"]["global_step"]


class Resuming:
    """The choice of a checkpoint. `choose`, and `next` after it, are called by all processes.

    Args:
        folder: the run's output folder.
    """

    def __init__(self, config: Config, folder: Path, distributed: Distributed, resume: Resume, console: Console):
        self.config, self.folder, self.distributed = config, folder, distributed
        self.resume, self.console = resume, console
        self.root = folder / "checkpoints"
        self._left: list[Path] | None = None  # those that have not been looked at, newest last
        self._skipped: list[str] = []
        self._cut = cut_of(config, distributed)

    @property
    def flag(self) -> str:
        """What was given on the command line, for errors."""
        if self.resume.mode == "checkpoint":
            return f"--resume-from {self.resume.checkpoint}"
        return "--resume auto" if self.resume.mode == "auto" else f"--resume {self.folder}"

    def choose(self) -> Saved | None:
        """The checkpoint to go on from; None where the run starts anew.

        Raises:
            UserError: there is none although one was asked for, it is damaged, it cannot be read, or it is another
                run's. With --resume auto only the last two: what is damaged is skipped.
        """
        if self.resume.mode == "never":
            self._refuse_a_run()
            return None
        if self.distributed.is_main and self._left is None:
            self._left = self._candidates()
        while True:
            with self.distributed.monitored("look for a checkpoint", at_most_seconds=SLOW_SECONDS):
                found = self._search() if self.distributed.is_main else None
            path = self.distributed.gather_json(None if found is None else str(found.path))[0]
            if path is None or self._cut is None:
                return found if path is None or found is not None else self._open(Path(path))
            found, reason = self._open_together(Path(path), found)
            if not reason:
                return found
            if self.resume.mode != "auto":
                raise UserError(f"{self.flag}: {reason}")
            self._skipped.append(reason)

    def _open_together(self, path: Path, found: Saved | None) -> tuple[Saved | None, str]:
        """A checkpoint that every process has opened, of which each has verified a share; or the first one's error.

        Raises:
            UserError: a process cannot read it and none finds it damaged; on all of them.
        """
        reason = unreadable = ""
        with self.distributed.monitored("open a checkpoint", at_most_seconds=SLOW_SECONDS):
            try:
                found = found or self._open(path)
            except checkpoints.CheckpointError as error:
                reason = error.reason if self.resume.mode == "auto" else str(error)
            except UnreadableError as error:
                unreadable = str(error)
        reasons, unread = zip(*self.distributed.gather_json([reason, unreadable]))
        if any(unread) and not any(reasons):
            raise UserError(f"{self.flag}: {next(filter(None, unread))}")
        return found, next(filter(None, reasons), "")

    def next(self, saved: Saved, reason: str) -> Saved | None:
        """The one before `saved`, which turned out not to fit; UserError where exactly that one was asked for."""
        error = checkpoints.CheckpointError(saved.path, f"checkpoint {saved.path}: {reason}")
        if self.resume.mode != "auto":
            raise UserError(f"{self.flag}: {error}")
        self._skipped.append(error.reason)
        return self.choose()

    def tell(self, saved: Saved | None) -> None:
        """Print, in a line, what was skipped; and what is moved out of the way of a run that starts anew."""
        if self._skipped:
            self.console.print(f"{self.flag}: skipped {one_line('; '.join(self._skipped))}", soft_wrap=True)
        if saved is None and self.resume.mode == "auto" and self.distributed.is_main:
            names = (METRICS_FILE, SUMMARY_FILE, self.root.name, EVALUATIONS_FILE)
            old = [self.folder / name for name in names if (self.folder / name).exists()]
            moved = [f"{path.name} is now {move_aside(path).name}" for path in old]
            why = "no checkpoint that can be continued" if self._skipped else "no checkpoint yet"
            self.console.print(
                f"{self.flag}: {why} in {self.root}; starting at iteration 0. {', '.join(moved)}".rstrip(". "),
                soft_wrap=True,
            )

    def done(self, saved: Saved | None, sources: Sources) -> str:
        """Why nothing is left to do; empty while something is.

        A run that ended early has something to do where its evaluations are to be of other content from now on.

        Raises:
            UserError: the run is done, and it was asked for by --resume DIR or --resume-from.
        """
        if saved is None:
            return ""
        early = "" if saved.finished(self.config) else saved.ended_early(self.config)
        if early and self._judged_anew(saved, sources):
            early = ""
        if not (early or saved.finished(self.config)):
            return ""
        done, wanted = saved.iteration, self.config.iterations
        evaluated = (self.folder / SUMMARY_FILE).exists()  # if not, the run was cut short in its last evaluation
        if not (evaluated or done > wanted):
            return ""
        flag = "--iterations" if done >= wanted else "--global-steps"
        text = f"{self.flag}: iteration {done} of {wanted} is done already, and with it the run; raise {flag} to go on"
        if early:
            text = f"{self.flag}: the run has ended after iteration {done}: {early}; raise it, or set it to 0, to go on"
        if self.resume.mode != "auto":
            raise UserError(text)
        return text

    def _judged_anew(self, saved: Saved, sources: Sources) -> bool:
        """Whether what evaluations depend on has changed since the checkpoint was written, by consent."""
        accepted = JUDGED_ON.intersection(self.resume.accepted)
        before, now = saved.state.get("made_from", {}), made_from(self.config, sources) if accepted else {}
        return any(before.get(name, now[name]) != now[name] for name in accepted)

    def refuse_changes(self, saved: Saved, made_from: Mapping[str, str]) -> tuple[Source, ...]:
        """What has changed since the checkpoint was written, and was accepted by --accept-changed.

        Raises:
            UserError: naming what else has changed.
        """
        before = saved.state.get("made_from", {})
        unknown = [name for name in made_from if made_from[name] and name not in before]
        if unknown:
            self.console.print(
                f"note: {saved.path} has no hashes of {', '.join(unknown)}, so they are not compared",
                soft_wrap=True,
            )
        changed = [name for name in made_from if before.get(name, made_from[name]) != made_from[name]]
        refused = [name for name in changed if name not in self.resume.accepted]
        if refused:
            given = {**{name: getattr(self.config.data, name, "") for name in refused}, "base": self.config.model.path}
            given["references"] = given.get("references") or self.config.data.style
            given["rewards"] = ", ".join(getattr(each, "import") for each in self.config.rewards.custom)
            given |= {"teacher": self.config.update.teacher, "start": self.config.model.lora.start_from}
            named = ", ".join(f"{name} ({_SETTINGS[name]} = {given[name]!r})" for name in refused)
            raise UserError(
                f"{self.flag}: since {saved.path} was written, the content of {named} has changed. Put back what was "
                f"there, or go on with what is there now by --accept-changed {' '.join(changed)}"
            )
        if changed:
            self.console.print(f"going on with other content of {', '.join(changed)}", soft_wrap=True)
        return tuple(changed)

    def _refuse_a_run(self) -> None:
        if not self.distributed.is_main:
            return
        if (self.folder / METRICS_FILE).exists() or checkpoints.checkpoints(self.root):
            raise UserError(
                f"output_dir = {str(self.folder)!r} already holds a run; continue it with --resume {self.folder}, or "
                "with the same flags and --resume auto, or choose another --output-dir"
            )

    def _candidates(self) -> list[Path]:
        if self.resume.mode == "checkpoint":
            if self.resume.checkpoint.resolve().parent != self.root.resolve():
                self._refuse_a_run()  # a fork of that run, in a folder of its own
            return [self.resume.checkpoint]
        found = checkpoints.checkpoints(self.root)
        if self.resume.mode == "folder":
            if not found:
                raise UserError(
                    f"{self.flag}: there is no checkpoint in {self.root} yet; start it again with --config "
                    f"{self.folder / 'config.yaml'} --output-dir {self.folder} --resume auto"
                )
            return found[-1:]
        return found

    def _search(self) -> Saved | None:
        while self._left:
            path = self._left.pop()
            try:
                saved = self._open(path)
            except checkpoints.CheckpointError as error:
                if self.resume.mode != "auto":
                    raise UserError(f"{self.flag}: {error}") from error
                self._skipped.append(error.reason)
                continue
            except UnreadableError as error:  # whoever takes an older one then loses what the newest has
                raise UserError(f"{self.flag}: {error}") from error
            self._refuse_other_settings(saved)
            return saved
        return None

    def _open(self, path: Path) -> Saved:
        """A checkpoint whose files are what was written, and whose numbers are finite."""
        tensors, state = checkpoints.load_checkpoint(path, self._cut)
        try:
            own = entry(state, "trainer", dict)
            iteration = count(own, "iteration")
            count(own, "global_step")
            measured(state, "base")
            measured(state, "start")
            for name, value in (entry(state, "made_from", dict) if "made_from" in state else {}).items():
                if type(value) is not str:
                    raise UserError(f"made_from.{name} in state.json is {value!r:.60}, want a hash")
            unlogged = state.get("unlogged")
            if unlogged is not None and (not isinstance(unlogged, dict) or unlogged.get("iteration") != iteration - 1):
                raise UserError(f"unlogged in state.json is {unlogged!r:.60}, want iteration {iteration - 1}'s metrics")
            if checkpoints.iteration_of(path) not in (None, iteration):
                raise UserError(f"state.json says iteration {iteration}, unlike the folder")
            configuration.build(entry(state, "config", dict), "config in state.json")
            wrong = checkpoints.not_finite(tensors, state)
            if wrong is not None:
                raise UserError(f"{wrong} is not finite")
        except UserError as error:
            raise checkpoints.CheckpointError(path, f"checkpoint {path}: {error}") from None
        return Saved(path, tensors, state)

    def _refuse_other_settings(self, saved: Saved) -> None:
        there = configuration.build(saved.state["config"], str(saved.path))  # settings that are newer get defaults
        different = differences(there.model_dump(mode="json"), self.config.model_dump(mode="json"))
        if there.model.gathers_stock_blocks != self.config.model.gathers_stock_blocks and not different:
            before, now = (each.model.sequence_parallel for each in (there, self.config))
            raise UserError(
                f"{self.flag}: {saved.path} was made with other settings: model.sequence_parallel: {before} -> {now}, "
                "which changes the forward that model.shard_base = blocks gathers blocks for, and with it how adapters "
                f"are kept (1 is diffusers', more ours). Set model.sequence_parallel = {before}, or start a new run"
            )
        if different:
            free = ", ".join(name for name in FREE_TO_CHANGE if name != "output_dir")  # only that the folder was moved
            raise UserError(
                f"{self.flag}: {saved.path} was made with other settings: {'; '.join(different)}. Leave them as they "
                f"were, or start a new run (only {free} may change)"
            )


_SETTINGS = {
    "prompts": "data.prompts",
    "held_out_prompts": "data.held_out_prompts",
    "references": "data.references",
    "base": "model.path",
    "rewards": "rewards.custom",
    "teacher": "update.teacher",
    "start": "model.lora.start_from",
}


def made_from(config: Config, sources: Sources) -> dict[Source, str]:
    """Hashes of what a run is made from, beside its settings.

    Prompts, references, the files of the base model, of the LoRA that it starts from, of the teacher that it learns
    from and of its own rewards.
    """
    hashes = {
        "prompts": _digest([sources.prompts, sources.metadata]),
        "held_out_prompts": _digest(sources.held_out),
        "references": "" if sources.references is None else sources.references.fingerprint(),
        "base": base_fingerprint(config),
        "rewards": _rewards_digest(config),
        "teacher": _lora_digest(config.update.teacher),
        "start": _lora_digest(config.model.lora.start_from),
    }
    assert tuple(hashes) == get_args(Source)
    return hashes


def base_fingerprint(config: Config) -> str:
    """Hash of every file of the pipeline's parts; those that did not change since an earlier run are not read again."""
    folder, index = pipeline_folder(config.model.path), pipeline_index(config.model.path)
    parts = tuple(sorted(name for name, value in index.items() if isinstance(value, list) and (folder / name).is_dir()))
    return folder_fingerprint(folder, parts, FileStamps(Path(config.data.cache_dir).expanduser() / "stamps", folder))


def _rewards_digest(config: Config) -> str:
    """Of the files of rewards.custom that are used; "" without any."""
    custom = [entry for entry in config.rewards.entries().values() if entry.kind == "custom"]
    files = {entry.section.name: source_digest(getattr(entry.section, "import"), entry.owner) for entry in custom}
    return _digest(files) if files else ""


def _lora_digest(path: str) -> str:
    """Of the file of its weights; "" without one, which is refused where it is read."""
    return lora_digest(Path(path)) if path else ""


def _digest(value: Any) -> str:
    return sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def differences(
    saved: Mapping[str, Any], current: Mapping[str, Any], prefix: str = "", *, free: tuple[str, ...] = FREE_TO_CHANGE
) -> list[str]:
    """Settings that differ, but for the `free` ones, as "name: old -> new"."""
    found = []
    for key in sorted(saved.keys() | current.keys()):
        name = f"{prefix}{key}"
        old, new = saved.get(key), current.get(key)
        if re.sub(r"\[\d+\]", "[]", name) in free or old == new:
            continue
        if _are_entries(old, new):
            for number, (before, after) in enumerate(zip(old, new)):
                found += differences(before, after, f"{name}[{number}].", free=free)
        elif isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{name}.", free=free)
        else:
            found.append(f"{name}: {old!r} -> {new!r}")
    return found


def _are_entries(old: Any, new: Any) -> bool:
    """Whether both are lists of as many mappings, such as rewards.remotes."""
    lists = isinstance(old, list) and isinstance(new, list) and len(old) == len(new)
    return lists and all(isinstance(each, dict) for each in (*old, *new))

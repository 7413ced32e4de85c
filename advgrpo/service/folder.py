"""What a served discriminator leaves on the disk, and goes on from: checkpoints, and a record per iteration.

FOLDER/iteration-000123/   as checkpoint.py writes them: head, optimizer, replay buffer, and the images that the
                           iteration has collected so far
       metrics.jsonl       a record per iteration
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from advgrpo import config as configuration
from advgrpo.errors import UserError
from advgrpo.reporting.tracking import METRICS_FILE, metrics_line, open_metrics, plain
from advgrpo.runtime.checkpoint import (
    CheckpointError,
    latest_checkpoint,
    load_checkpoint,
    load_state,
    not_finite,
    save_checkpoint,
)
from advgrpo.runtime.folders import FolderLock, writable
from advgrpo.service.collecting import AdversaryService, Collected, Record, restored_answers
from advgrpo.training.restoring import check_head, count, entry, refuse_others
from advgrpo.training.resuming import differences
from advgrpo.types import Features

_FLAG = "--checkpoint"


class ServiceFolder:
    """The folder of one service; no second process may use it meanwhile.

    Args:
        every: iterations between checkpoints.
        keep: how many of the newest stay.
        print_line: prints one.

    Raises:
        UserError: the folder cannot be written, or is in use.
    """

    def __init__(self, root: Path, *, every: int, keep: int, print_line: Callable[[str], None]):
        writable(root, _FLAG)
        self.root, self.every, self.keep, self.print_line = root, every, keep, print_line
        self._lock = FolderLock(root, _FLAG)
        self._metrics: Any = None
        self._references = ""

    def check(self, settings: Mapping[str, Any], references: str) -> None:
        """What can be known without a model: whether the newest checkpoint, if there is one, is of these settings.

        Args:
            settings: `AdversaryService.settings`.
            references: `ReferenceSet.fingerprint`.

        Raises:
            UserError: it is not, or damaged.
        """
        self._references = references
        path = latest_checkpoint(self.root)
        if path is not None:
            with self._named(path):
                self._compare(load_state(path), settings)

    def resume(self, service: AdversaryService) -> Path | None:
        """Put the service where the newest checkpoint is, and keep what it learns from then on; None without one.

        Call `check` before.

        Raises:
            UserError: the checkpoint is damaged, not finite, or of other settings or references.
        """
        path = latest_checkpoint(self.root)
        if path is not None:
            with self._named(path):
                self._load(service, path)
        self._metrics = open_metrics(self.root / METRICS_FILE, service.iteration, self.print_line)
        service.learned = lambda record: self._learned(service, record)
        return path

    def save(self, service: AdversaryService) -> Path:
        """A checkpoint of the service as it stands.

        Raises:
            FloatingPointError: something in it is not finite; nothing was written.
            UserError: it cannot be written.
        """
        tensors, own = service.discriminator_trainer.state()
        tensors |= {f"collected.{number}": each.images for number, each in enumerate(service.collected)}
        own |= {
            "iteration": service.iteration,
            "newest": service.newest and plain(service.newest),
            "monitor": service.monitor.state(),
            "before": [answer.model_dump() for answer in service.before.values()],
            "collected": [{"answer": each.answer.model_dump(), "prompts": each.prompts} for each in service.collected],
        }
        state = {"service": own, "settings": service.settings, "references": self._references}
        wrong = not_finite(tensors, state)
        if wrong is not None:
            raise FloatingPointError(f"iteration {service.iteration}: {wrong} is not finite; it was not saved")
        return save_checkpoint(self.root, service.iteration, tensors, state, self.keep)

    def close(self) -> None:
        """May be called twice."""
        if self._metrics is not None:
            self._metrics.close()
        self._lock.release()

    def _learned(self, service: AdversaryService, record: Record) -> None:
        flags = service.monitor.active()
        self._metrics.write(metrics_line({**plain(record), "flags": [flag.name for flag in flags]}))
        self._metrics.flush()
        self.print_line(
            f"iteration {record['iteration']}: {record['images']} images, reward {record['reward_generated']:.3f} "
            f"(references {record['reward_reference']:.3f}), {record['discriminator_updates']} updates, "
            f"accuracy {record['discriminator_accuracy']:.2f}"
        )
        for flag in flags:
            self.print_line(str(flag))
        if service.iteration % self.every == 0:
            self.save(service)

    def _load(self, service: AdversaryService, path: Path) -> None:
        tensors, state = load_checkpoint(path)
        wrong = not_finite(tensors, state)
        if wrong is not None:
            raise UserError(f"{wrong} is not finite")
        self._compare(state, service.settings)
        own = entry(state, "service", dict)
        head, monitor = check_head(service.discriminator_trainer, tensors, own), entry(own, "monitor", dict)
        checked, iteration = service.monitor.checked(monitor), count(own, "iteration")
        before = restored_answers(entry(own, "before", list), "before")
        collected = _collected(entry(own, "collected", list), tensors)
        refuse_others(tensors, [*head.prefixes, "collected."])
        head.apply(service.discriminator_trainer)
        service.monitor.load(checked)
        service.iteration, service.newest = iteration, own.get("newest")
        service.before = {answer.key: answer for answer in before}
        service.restore(collected)

    def _compare(self, state: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        saved = entry(state, "settings", dict)
        if isinstance(saved.get("adversary"), dict):  # settings that are newer get defaults
            there = configuration.build({"adversary": saved["adversary"]}, "settings in state.json")
            saved = {**saved, "adversary": there.adversary.model_dump(mode="json")}
        other = differences(saved, settings, free=())
        if other:
            raise UserError(f"it was made with other settings ({'; '.join(other)})")
        if state.get("references") != self._references:
            raise UserError("the references are others than it was made with")

    @contextmanager
    def _named(self, path: Path) -> Iterator[None]:
        """Errors name the flag and a remedy of this command; a checkpoint's own remedies are flags of a run."""
        remedy = f"correct that, start in another folder, or remove {path} to go on from what was before it"
        try:
            yield
        except CheckpointError as error:
            raise UserError(f"{_FLAG} {self.root}: {error.reason}; {remedy}") from None
        except UserError as error:
            raise UserError(f"{_FLAG} {self.root}: {path.name}: {error}; {remedy}") from None


def _collected(entries: list[Any], tensors: Mapping[str, torch.Tensor]) -> list[Collected]:
    """Images of a checkpoint, without features; UserError for what is none."""
    found = []
    for number, each in enumerate(entries):
        name = f"collected.{number}"
        prompts = each.get("prompts") if isinstance(each, dict) else None
        images = tensors.get(name)
        fits = isinstance(prompts, list) and all(isinstance(prompt, str) for prompt in prompts)
        if not fits or images is None or images.dtype != torch.uint8 or images.shape[:2] != (len(prompts), 3):
            raise UserError(f"{name} is no list of images with their prompts")
        (answer,) = restored_answers([each.get("answer")], name)
        if len(answer.ids) != len(prompts):
            raise UserError(f"{name} has {len(prompts)} prompts, but {len(answer.ids)} ids")
        found.append(Collected(answer, prompts, images, Features({})))
    return found

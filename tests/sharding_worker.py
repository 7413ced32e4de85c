"""A process of the jobs that tests/training/test_sharding.py and test_full_in_parts.py start in forks (zygote.py).

FOLDER/job.json names networks, of each of which every process leaves FOLDER/NAME.RANK.safetensors (`seen`) and
FOLDER/NAME.RANK.json (`counted`, `counted_export`), and runs, each with the checkpoint that it goes on from or null,
which leave FOLDER/NAME. Settings are in FOLDER/NAME.yaml. The last process asks those that it calls "stopped" to stop,
in their first iteration.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from advgrpo import config as configuration
from advgrpo.config import Config
from advgrpo.policy.adapters import block_names
from advgrpo.policy.diffusers_policy import DiffusersPolicy
from advgrpo.policy.loading import load_policy
from advgrpo.policy.parts import Parts
from advgrpo.policy.sharding import BlockSharding, _Gather
from advgrpo.runtime.checkpoint_parts import Cut
from advgrpo.runtime.distributed import Distributed
from advgrpo.training.objective import Iteration
from advgrpo.training.resuming import Resume
from advgrpo.training.run import Run
from advgrpo.training.trainer import Trainer
from tests.families import PROMPTS
from tests.parts import train_adapters


def loaded(settings: Config, sharding: BlockSharding | None = None) -> DiffusersPolicy:
    """By diffusers' forward, with adapters that say something, or other weights than the base's."""
    place, cache = torch.device("cpu"), Path(settings.data.cache_dir)
    how = {"precision": settings.rollout.precision, "sharding": sharding}
    policy = load_policy(settings.model, device=place, cache_dir=cache, seed=0, **how)
    if policy.parts is None:
        train_adapters(policy)
    else:
        train_parts(policy)
    return policy


def train_parts(policy: DiffusersPolicy) -> None:
    """This process's rows of what `train_adapters` does."""
    generator, job = torch.Generator().manual_seed(5), policy.parts.distributed
    cut = Cut(job.rank, job.world_size, lambda name: True)
    with torch.no_grad():
        for name, parameter in policy.trainable_parameters():
            shape = policy.parts.shapes[name]
            own = cut.of(shape[0])
            parameter.add_(0.1 * torch.randn(shape, generator=generator)[own.start : own.stop])


def seen(policy: DiffusersPolicy) -> dict[str, torch.Tensor]:
    """What the network gives at a step, adapted and frozen; its gradient; bytes of the frozen weights held between."""
    generator = torch.Generator().manual_seed(7)
    latents = torch.randn(len(PROMPTS), *policy.latent_shape(), generator=generator)
    prepared = policy.prepare(policy.encode(PROMPTS), torch.tensor([900.0, 500.0]), guidance=1.5)
    found, step = {}, torch.tensor([1])
    with torch.no_grad():
        found["adapted"] = policy.predict(latents, step, prepared)[0]
        with policy.disable_adapter():
            found["base"] = policy.predict(latents, step, prepared)[0]
        if policy.has_merged:
            policy.merge()
            found["merged"], error = policy.predict_merged(latents, step, prepared)[0], policy.merge_error()
            found["merge error"] = error
    found["held"] = torch.tensor(frozen_bytes(policy))
    velocity, unconditional = policy.predict(latents, step, prepared)
    with torch.no_grad(), policy.disable_adapter():  # as the KL of the update does it
        found["base, before the backward"] = policy.predict(latents, step, prepared)[0]
    found["trained"] = velocity.detach()
    outputs = [each for each in (velocity, unconditional) if each is not None]
    gradients = [torch.randn(each.shape, generator=generator).to(each.dtype) for each in outputs]
    torch.autograd.backward(outputs, gradients)
    found["held after the backward"] = torch.tensor(frozen_bytes(policy))
    named = policy.trainable_parameters()
    gradients = {name: parameter.grad for name, parameter in named if parameter.grad is not None}
    if policy.parts is not None:  # each process has computed it
        job = policy.parts.distributed
        gradients = {name: policy.parts.gathered(name, g) / job.world_size for name, g in gradients.items()}
    gradients = {name: g for name, g in gradients.items() if bool(g.any())}  # nothing reads the last block's text
    return found | gradients


def counted(policy: DiffusersPolicy) -> dict[str, Any]:
    """Gathers that have begun when each block runs, in a forward; of a policy with merged weights also the gathers of
    their step, and the most bytes of the frozen weights that are here while they are merged."""
    gathers, before, gather = [], [], _Gather.__call__

    def listed(self: _Gather, *given: Any, **named: Any) -> Any:
        gathers.append(self)
        return gather(self, *given, **named)

    blocks = [policy.transformer.get_submodule(name) for name in block_names(policy.transformer)]
    hooks = [block.register_forward_pre_hook(lambda *given: before.append(len(gathers))) for block in blocks]
    prepared = policy.prepare(policy.encode(PROMPTS), torch.tensor([900.0, 500.0]), guidance=1.5)
    inputs = torch.zeros(len(PROMPTS), *policy.latent_shape()), torch.tensor([1]), prepared
    with torch.no_grad(), mock.patch.object(_Gather, "__call__", listed):
        policy.predict(*inputs)
        found: dict[str, Any] = {"before": before}
        if policy.has_merged:
            gathers.clear()
            policy.predict_merged(*inputs)
            found |= {"merged": len(gathers), "held": most_held_while_merging(policy)}
    for hook in hooks:
        hook.remove()
    return found


class Collectives(TorchDispatchMode):
    """Notes every collective inside, by whatever function it is asked for: [c10d's operator, bytes of its tensors]."""

    def __init__(self) -> None:
        super().__init__()
        self.issued: list[tuple[str, list[int]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, given: Any = (), named: Any = None) -> Any:
        if function.namespace == "c10d":
            self.issued.append((str(function), [each.nbytes for each in given if isinstance(each, torch.Tensor)]))
        return function(*given, **(named or {}))


@contextmanager
def counted_export() -> Iterator[dict[str, Any]]:
    """Inside, what an export issues, as "issued", and the most bytes of gathered parameters that are here at a time, as
    "held", are noted."""
    found, alive, gathered = {"issued": [], "held": 0}, [], Parts.gathered

    def weighed(parts: Parts, name: str, part: torch.Tensor) -> torch.Tensor:
        whole = gathered(parts, name, part)
        alive.append(weakref.ref(whole))
        found["held"] = max(found["held"], sum(each.nbytes for ref in alive if (each := ref()) is not None))
        return whole

    with mock.patch.object(Parts, "gathered", weighed), Collectives() as collectives:
        yield found
    found["issued"] = collectives.issued


def most_held_while_merging(policy: DiffusersPolicy) -> int:
    held, gathered = [], policy.network.copy._gathered
    with torch.no_grad():
        next(iter(policy.trainable_parameters()))[1].add_(0)  # or there is nothing to merge

    @contextmanager
    def weighed(unit: torch.nn.Module) -> Iterator[None]:
        with gathered(unit):
            held.append(frozen_bytes(policy))
            yield

    with mock.patch.object(policy.network.copy, "_gathered", weighed):
        policy.merge()
    return max(held)


def frozen_bytes(policy: DiffusersPolicy) -> int:
    """Held by this process of the frozen weights; of all, where all are trained."""
    held = list(policy.transformer.parameters())
    frozen = [parameter for parameter in held if not parameter.requires_grad] or held
    return sum((p.to_local() if isinstance(p, DTensor) else p).nbytes for p in frozen)


def train(settings: Config, job: Distributed, checkpoint: str | None = None) -> Run:
    """A whole run. What each of its exports issues is left in OUT.RANK.exports.json."""
    resume = Resume("checkpoint", Path(checkpoint)) if checkpoint else False
    made = Run(settings, job, resume=resume, console=Console(quiet=True))
    exports, export = [], made.export

    def counted_one() -> None:
        with counted_export() as found:
            export()
        exports.append(found)

    with mock.patch.object(made, "export", counted_one):
        made.train()
    Path(f"{settings.output_dir}.{job.rank}.exports.json").write_text(json.dumps(exports))
    return made


@contextmanager
def stopping(job: Distributed) -> Iterator[None]:
    """Inside, this process asks for the end when an iteration begins."""
    begin = Trainer.begin

    def ask(trainer: Trainer, number: int) -> Iteration:
        job.ask_to_stop("SIGTERM")
        return begin(trainer, number)

    with mock.patch.object(Trainer, "begin", ask):
        yield


def main(arguments: list[str]) -> int:
    """[folder]"""
    folder = Path(arguments[0])
    job = Distributed.start("cpu")
    with job.guard():
        asked, sharding = json.loads((folder / "job.json").read_text()), BlockSharding(job)
        for name in asked["networks"]:
            policy = loaded(configuration.load(file=folder / f"{name}.yaml"), sharding)
            save_file(seen(policy), folder / f"{name}.{job.rank}.safetensors")
            found = counted(policy)
            with counted_export() as found["export"]:
                policy.export(folder / f"{name}.{job.rank}.export")
            (folder / f"{name}.{job.rank}.json").write_text(json.dumps(found))
        for name, checkpoint in asked["runs"].items():
            asks = name.endswith("-stopped") and checkpoint is None and job.rank == job.world_size - 1
            with stopping(job) if asks else nullcontext():
                train(configuration.load(file=folder / f"{name}.yaml"), job, checkpoint)
    job.close()
    return 0

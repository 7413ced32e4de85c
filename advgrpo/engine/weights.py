"""The LoRA that an engine is to draw with: a file, the checksum of each of its tensors, and a loud one for the probe.

A LoRA begins at zero and changes by little in an iteration, less than the rounding of a network in bfloat16: whether it
is bound cannot be seen in a picture. So before a run begins the engine gets another one that nobody could miss, random
and strong in every module, and the probe is drawn with that (`loud`).
"""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import safetensors.torch
import torch

from advgrpo.errors import UserError
from advgrpo.policy.base import LoraReader, Policy
from advgrpo.policy.fused.lora import Pair
from advgrpo.policy.lora_file import read_lora, write_lora
from advgrpo.runtime import rng
from advgrpo.runtime.atomic import write_atomically

_KEPT = 2  # files of an engine: the one it draws with, and the one before
# Of a module's input, how large the loud adapter's output is: as large as what the module itself may give.
_LOUDNESS = 0.5


def checksum(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes, as SGLang-Diffusion's checker computes it."""
    tensor = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)!r}".encode())
    digest.update(tensor.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Adapter:
    """A LoRA by the engine's names, "transformer_blocks.0.attn.to_q.lora_A": alpha is the rank, strength 1.

    Attributes:
        path: of its file, which no other content ever has: the engine loads nothing from a path it has loaded.
        checksums: of every tensor, by name.
    """

    path: Path
    tensors: dict[str, torch.Tensor]
    checksums: dict[str, str]

    @classmethod
    def of(cls, policy: Policy, folder: Path, version: str) -> Adapter:
        """The policy's weights as they are now; nothing is written. The same on every process."""
        tensors = {}
        for name, (a, b) in exported(policy).items():
            tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"] = a.contiguous(), b.contiguous()
        checksums = {name: checksum(tensor) for name, tensor in tensors.items()}
        digest = hashlib.sha256(repr(sorted(checksums.items())).encode()).hexdigest()
        return cls(folder.absolute() / f"lora-{version}-{digest[:16]}.safetensors", tensors, checksums)

    @property
    def modules(self) -> int:
        return len(self.tensors) // 2

    def write(self) -> None:
        """Its file, unless it is there; all but the newest before it go.

        Raises:
            UserError: the folder cannot be written to.
        """
        try:
            if not self.path.exists():
                content = {f"{name}.weight": tensor for name, tensor in self.tensors.items()}
                write_atomically(self.path, partial(safetensors.torch.save_file, content))
            files = sorted(self.path.parent.glob("lora-*.safetensors"), key=lambda file: file.stat().st_mtime_ns)
            for old in [file for file in files if file != self.path][: 1 - _KEPT or None]:
                old.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(
                f"rollout.engine.weights_dir: {self.path.parent} cannot be written ({error}); free space, or name "
                "another"
            ) from error


def exported(policy: Policy) -> Mapping[str, Pair]:
    """Module -> (A, B) float32 on the host, whose update is B @ A, through the policy's own export."""
    with tempfile.TemporaryDirectory(prefix="advgrpo-engine-") as folder:
        policy.export(Path(folder) / "lora")
        return read_lora(Path(folder) / "lora", "the exported LoRA").modules


@contextlib.contextmanager
def loud(policy: Policy, seed: int) -> Iterator[None]:
    """Inside, the policy's adapters are random ones, each of which changes its module's output by half its input's
    size; after, its own, bit for bit. Merged weights are not touched.

    Raises:
        UserError: a policy that reads no LoRA.
    """
    if not isinstance(policy, LoraReader):
        raise UserError(f"rollout.engine: a {type(policy).__name__} reads no LoRA; set rollout.engine.kind = none")
    pairs = {name: (a, _loud_b(a, b, name, seed)) for name, (a, b) in exported(policy).items()}
    with tempfile.TemporaryDirectory(prefix="advgrpo-engine-") as folder:
        write_lora(Path(folder), pairs, policy.component, "diffusers")
        values = policy.parameters_of_lora(Path(folder), "the probe's LoRA")
    own = {name: parameter.detach().clone() for name, parameter in policy.trainable_parameters()}
    try:
        _fill(policy, values)
        yield
    finally:
        _fill(policy, own)


def _loud_b(a: torch.Tensor, b: torch.Tensor, name: str, seed: int) -> torch.Tensor:
    """For white inputs of size 1, |A x| is A's Frobenius norm: B's elements over it make B A x of size `_LOUDNESS`."""
    drawn = torch.randn(b.shape, generator=rng.generator(seed, f"engine_probe:{name}"))
    return drawn * (_LOUDNESS / a.norm().clamp(min=1e-8))


@torch.no_grad()
def _fill(policy: Policy, values: Mapping[str, torch.Tensor]) -> None:
    for name, parameter in policy.trainable_parameters():
        parameter.copy_(values[name])

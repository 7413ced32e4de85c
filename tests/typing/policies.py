"""Which contract of `policy/base.py` each policy keeps, read by a type checker and never run.

A line that is refused says that a policy has lost a member, or that a member's arguments or result differ from the
contract's. What a policy must not claim is here too: an ignore that is not needed is an error itself.
"""

from __future__ import annotations

import torch

from advgrpo.policy.base import Capturable, Generator, LoraReader, P, Policy, Prediction, SupervisedTarget, Trainable
from advgrpo.policy.diffusers_policy import DiffusersPolicy
from advgrpo.policy.flux import FluxPolicy
from advgrpo.policy.flux2 import Flux2Policy
from advgrpo.policy.fused.transformer import FusedTransformer, Prepared
from advgrpo.policy.guidance import Guided, N, Network
from advgrpo.policy.networks import FusedNetwork, StockNetwork, StockPrepared
from advgrpo.policy.qwen import QwenPolicy
from advgrpo.policy.sd3 import SD3Policy
from advgrpo.policy.sdxl import UNetPolicy
from advgrpo.sampling.dynamics import step_table
from advgrpo.sampling.sampler import Sampler
from advgrpo.types import Conditioning
from bench.random_policy import RandomPolicy


def draws(policy: Generator[P], prompts: type[P]) -> None: ...
def learns(policy: Trainable[P], prompts: type[P]) -> None: ...
def draws_and_learns(policy: Policy[P], prompts: type[P]) -> None: ...
def is_supervised(policy: SupervisedTarget[P], prompts: type[P]) -> None: ...
def is_captured(policy: Capturable[P], prompts: type[P]) -> None: ...
def reads_loras(policy: LoraReader) -> None: ...
def runs(network: Network[N], prompts: type[N]) -> None: ...
def samples(sampler: Sampler[P], prompts: type[P]) -> None: ...


def sd3(policy: SD3Policy) -> None:
    draws(policy, Guided)
    learns(policy, Guided)
    draws_and_learns(policy, Guided)
    is_captured(policy, Guided)
    is_supervised(policy, Guided)


def flux(policy: FluxPolicy) -> None:
    draws(policy, Guided)
    learns(policy, Guided)
    draws_and_learns(policy, Guided)
    is_captured(policy, Guided)
    is_supervised(policy, Guided)


def flux2(policy: Flux2Policy) -> None:
    draws(policy, Guided)
    learns(policy, Guided)
    draws_and_learns(policy, Guided)
    is_captured(policy, Guided)
    is_supervised(policy, Guided)


def qwen(policy: QwenPolicy) -> None:
    draws(policy, Guided)
    learns(policy, Guided)
    draws_and_learns(policy, Guided)
    is_captured(policy, Guided)
    is_supervised(policy, Guided)


def unet(policy: UNetPolicy) -> None:
    draws(policy, Guided)
    learns(policy, Guided)
    draws_and_learns(policy, Guided)
    is_captured(policy, Guided)
    is_supervised(policy, Guided)  # ty: ignore[invalid-argument-type]


def of_any_pipeline(policy: DiffusersPolicy) -> None:
    draws_and_learns(policy, Guided)
    is_captured(policy, Guided)
    reads_loras(policy)


def of_the_benchmark(policy: RandomPolicy) -> None:
    reads_loras(policy)  # ty: ignore[invalid-argument-type]
    draws_and_learns(policy, Guided)
    is_captured(policy, Guided)
    is_supervised(policy, Guided)  # ty: ignore[invalid-argument-type]


def networks(stock: StockNetwork, fused: FusedNetwork, transformer: FusedTransformer) -> None:
    runs(stock, StockPrepared)
    runs(fused, Prepared)
    runs(transformer, Prepared)
    runs(transformer, StockPrepared)  # ty: ignore[invalid-argument-type]


class Prompts:
    """What a new family prepares: nothing of graphs."""

    def rows(self, index: torch.Tensor) -> Prompts:
        return self


class NewFamily:
    """The least that can be sampled."""

    def __init__(self, device: torch.device):
        self.device, self.prediction_type = device, "flow_prediction"

    def schedule(self, num_steps: int) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError

    def latent_shape(self) -> tuple[int, int, int]:
        raise NotImplementedError

    def encode(self, prompts: list[str]) -> Conditioning:
        raise NotImplementedError

    def prepare(self, conditioning: Conditioning, timesteps: torch.Tensor, *, guidance: float) -> Prompts:
        raise NotImplementedError

    def predict(self, latents: torch.Tensor, step: torch.Tensor, prepared: Prompts) -> Prediction:
        raise NotImplementedError

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


def callers(new: NewFamily, trained: SD3Policy) -> None:
    draws(new, Prompts)
    learns(new, Prompts)  # ty: ignore[invalid-argument-type]
    is_captured(new, Prompts)  # ty: ignore[invalid-argument-type]
    step_table(new, 4)
    samples(Sampler(new, 4.5, "gaussian", share_prefix=True, merged=False), Prompts)
    samples(Sampler(new, 4.5, "gaussian", share_prefix=True, merged=False), Guided)  # ty: ignore[invalid-argument-type]
    samples(Sampler(trained, 4.5, "gaussian", share_prefix=True, merged=True), Guided)

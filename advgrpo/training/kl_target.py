"""Whom the KL of the update pulls towards: the frozen base, the policy's average (`ema_kl_beta` of
X-GenGroup/Flow-Factory at a0b2bc5), or a teacher's LoRA (DistillKLLoss and DistillFlowMatchingMSELoss of
verl-project/verl-omni at a1139ba).

Each is a context within which `policy.predict` is that model's. The latter two lend their weights to the parameters: a
parameter's storage is exchanged, not written, so that a forward pass whose backward is still to come keeps its own;
parameters in parts are written, as their backward gathers them anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path

import torch

from advgrpo.config import UpdateSection
from advgrpo.errors import UserError
from advgrpo.policy.base import LoraReader, Policy
from advgrpo.policy.parts import parts_of
from advgrpo.training.ema import Ema

KlTarget = Callable[[], AbstractContextManager[None]]


def kl_target(policy: Policy, update: UpdateSection, ema: Ema) -> KlTarget:
    """By `update.kl_to`; a teacher is read here, once.

    Raises:
        UserError: a teacher that is no LoRA of this run's rank, targets and blocks, or a policy that reads none.
    """
    if update.kl_to == "base":
        return policy.disable_adapter
    parameters, parts = dict(policy.trainable_parameters()), parts_of(policy)
    if update.kl_to == "ema":
        averages = ema.averages_for_update()
        return partial(_lent, parameters, averages) if parts is None else partial(parts.lent, averages)
    if not isinstance(policy, LoraReader):
        raise UserError(f"update.teacher = {update.teacher!r}: a {type(policy).__name__} reads no LoRA")
    return partial(_lent, parameters, policy.parameters_of_lora(Path(update.teacher), "update.teacher"))


@contextmanager
def _lent(parameters: Mapping[str, torch.nn.Parameter], values: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Within it the parameters are `values`, of the same names and shapes."""
    own = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = values[name]
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = own[name]

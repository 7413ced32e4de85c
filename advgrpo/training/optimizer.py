"""AdamW with gradient clipping and the moving average of the weights, as one step.

A gradient whose norm is not finite changes neither weights nor moments, and the average never sees it: the refusal that
`DeviceAbort` (device_abort.py) counts on. The norm comes back as a tensor, so that the fast path waits for the device
only when the iteration is logged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from advgrpo.config import UpdateSection
from advgrpo.errors import UserError
from advgrpo.training.ema import Ema
from advgrpo_kernels import multi_tensor_adamw

# The package `apex` on PyPI is something else.
APEX = "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-build-isolation 'apex @ git+https://github.com/NVIDIA/apex'"


Norm = Callable[[list[torch.Tensor]], torch.Tensor]


class ClippedOptimizer(Protocol):
    """What `Updater` steps; `optimizer` holds the state that a checkpoint keeps."""

    optimizer: torch.optim.Optimizer

    def step(self) -> torch.Tensor:
        """Clip, step, average; returns the norm before clipping, a scalar on the device."""
        ...


class TorchAdamW:
    """torch's AdamW (or Apex's FusedAdam) and the average one after the other; reads the norm on the host.

    Args:
        norm: of gradients, a scalar on the device; torch's own unless these are in parts on several processes.
    """

    def __init__(
        self,
        parameters: list[torch.nn.Parameter],
        section: UpdateSection,
        ema: Ema,
        norm: Norm = torch.nn.utils.get_total_norm,
    ):
        self.parameters, self.max_norm, self.ema, self.norm = parameters, section.max_grad_norm, ema, norm
        settings = {"lr": section.learning_rate, "betas": section.betas, "eps": section.eps}
        kind = _apex_adam() if section.optimizer == "apex" else torch.optim.AdamW
        self.optimizer = kind(parameters, weight_decay=section.weight_decay, **settings)
        if section.optimizer == "apex":  # whose kernels write to them without telling autograd
            self.optimizer.register_step_post_hook(lambda *_: torch.autograd.graph.increment_version(parameters))

    def step(self) -> torch.Tensor:
        norm = self.norm([p.grad for p in self.parameters])
        torch.nn.utils.clip_grads_with_norm_(self.parameters, self.max_norm, norm)
        if torch.isfinite(norm):
            self.ema.before_step()
            self.optimizer.step()
            self.ema.step()
        return norm


class FusedAdamW:
    """`multi_tensor_adamw`: norm, clipping, AdamW and average in three launches, without a host sync on a GPU."""

    def __init__(self, parameters: list[torch.nn.Parameter], section: UpdateSection, ema: Ema):
        self.parameters, self.section, self.ema = parameters, section, ema
        self.optimizer = _MomentsOnly(parameters)

    def step(self) -> torch.Tensor:
        section, moments = self.section, self.optimizer
        averages = list(self.ema.averages_for_update().values())
        self.ema.before_step()
        kept = self.ema.count_step()
        return multi_tensor_adamw(
            self.parameters,
            [p.grad for p in self.parameters],
            moments.column("exp_avg"),
            moments.column("exp_avg_sq"),
            moments.state[self.parameters[0]]["step"],
            lr=section.learning_rate,
            betas=section.betas,
            eps=section.eps,
            weight_decay=section.weight_decay,
            max_grad_norm=section.max_grad_norm,
            emas=averages if kept < 1 else (),
            ema_decay=kept if kept < 1 else 0.0,
        )


class _MomentsOnly(torch.optim.Optimizer):
    """Keeps what AdamW remembers in torch's own format, so that checkpoints need no second one."""

    filled_from_start = True  # torch's own remember nothing before their first step

    def __init__(self, parameters: list[torch.nn.Parameter]):
        super().__init__(parameters, {})
        for number, p in enumerate(parameters):
            self.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            if number == 0:  # one counter for all
                self.state[p]["step"] = torch.zeros((), dtype=torch.int64, device=p.device)

    def column(self, name: str) -> list[torch.Tensor]:
        return [self.state[p][name] for p in self.param_groups[0]["params"]]

    def step(self, closure=None):
        raise NotImplementedError("FusedAdamW.step does the step")

    def load_state_dict(self, state_dict: dict) -> None:
        """In place: a captured graph holds these tensors."""
        for index, p in enumerate(self.param_groups[0]["params"]):
            for name, value in state_dict["state"][index].items():
                self.state[p][name].copy_(value)


def _apex_adam() -> type:
    """NVIDIA Apex's FusedAdam."""
    try:
        from apex.optimizers import FusedAdam
    except ImportError as error:
        raise UserError(
            f"update.optimizer = 'apex': NVIDIA Apex is not installed ({error}); build it with {APEX}, or use auto"
        ) from error
    return FusedAdam


def build_optimizer(
    parameters: list[torch.nn.Parameter], section: UpdateSection, ema: Ema, *, fused: bool, norm: Norm | None = None
) -> ClippedOptimizer:
    """Ours on the fast path, torch's on the plain one, unless `update.optimizer` asks for one by name.

    Args:
        norm: as of `TorchAdamW`, which is then the one; None: of the gradients as they are.
    """
    if norm is not None:
        return TorchAdamW(parameters, section, ema, norm)
    ours = section.optimizer == "fused" or (section.optimizer == "auto" and fused)
    return (FusedAdamW if ours else TorchAdamW)(parameters, section, ema)

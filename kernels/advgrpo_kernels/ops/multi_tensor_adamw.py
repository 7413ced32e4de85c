"""AdamW over a list of tensors with gradient-norm clipping and a moving average, by `csrc/multi_tensor_adamw.cu`.

    norm = |all gradients|;  g ← g·min(1, max_norm/(norm + 1e-6))        torch.nn.utils.clip_grad_norm_
    p ← p·(1 - lr·wd);  m ← lerp(m, g, 1 - β1);  v ← β2·v + (1 - β2)·g²
    p ← p - lr/(1 - β1^t)·m/(sqrt(v)/sqrt(1 - β2^t) + eps)               torch.optim.AdamW
    ema ← lerp(ema, p, 1 - ema_decay)

No host sync on a GPU: norm and step count stay on the device, so a captured graph replays it; three launches with the
library, PyTorch's operators without. A norm that is not finite changes nothing at all, and is returned for the caller
to look at when it next synchronises.

Shapes:   any, float32; `step` is an int64 scalar, the number of steps taken so far. Gradients are left unclipped.
Numerics: float32 per element in torch's order of operations; the norm is summed in float64 in a fixed order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import List

import torch

from .._ops import add_op_namespace_prefix
from .._runtime import check_tensors, device_guard
from ._csrc import (
    Table,
    TableCache,
    aligned,
    check_launch,
    current_stream,
    is_capturing,
    loaded_library,
    pick_cuda_backend,
    pointer,
    stream_of,
)

__all__ = ["multi_tensor_adamw", "multi_tensor_adamw_ref"]

FIRST_BLOCK = 6  # of the words of AdamTensor in csrc/multi_tensor_adamw.cu
_TABLES = TableCache()


@torch.library.custom_op(
    add_op_namespace_prefix("multi_tensor_adamw"),
    mutates_args=("parameters", "exp_avgs", "exp_avg_sqs", "emas", "step"),
)
def _multi_tensor_adamw_op(
    parameters: List[torch.Tensor],
    grads: List[torch.Tensor],
    exp_avgs: List[torch.Tensor],
    exp_avg_sqs: List[torch.Tensor],
    emas: List[torch.Tensor],
    step: torch.Tensor,
    settings: List[float],
    compiled: bool,
) -> torch.Tensor:
    """The norm. settings: lr, β1, β2, eps, weight decay, largest norm, EMA decay. compiled: run the library."""
    run = _launch if compiled else _step_ref
    return run(parameters, grads, exp_avgs, exp_avg_sqs, emas, step, settings)


@_multi_tensor_adamw_op.register_fake
def _(parameters, *_):
    return parameters[0].new_empty(())


def _launch(parameters, grads, exp_avgs, exp_avg_sqs, emas, step, settings) -> torch.Tensor:
    tensors = list(zip(parameters, grads, exp_avgs, exp_avg_sqs, emas or [None] * len(parameters)))
    key = tuple((*(pointer(t) for t in row), row[0].numel()) for row in tensors)
    table = _TABLES.get(key, lambda: _table(tensors), capturing=is_capturing(step), stream=stream_of(step))
    square_sums = step.new_empty(table.blocks, dtype=torch.float64)
    state = parameters[0].new_empty(4)
    with device_guard(step):
        error = loaded_library().advgrpo_multi_tensor_adamw(
            *(table.rows.data_ptr(), table.of_block.data_ptr(), table.blocks),
            *(square_sums.data_ptr(), state.data_ptr(), step.data_ptr(), *settings, current_stream(step)),
        )
    check_launch("multi_tensor_adamw", error)
    return state[0]


def _table(tensors) -> Table:
    per_block = loaded_library().advgrpo_multi_tensor_adamw_elements_per_block()
    counts = [row[0].numel() for row in tensors]
    rows = [[*(pointer(t) for t in row), count, 0, aligned(*row)] for row, count in zip(tensors, counts)]
    return Table(rows, [-(-count // per_block) for count in counts], FIRST_BLOCK, tensors[0][0].device)


def multi_tensor_adamw(
    parameters: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    step: torch.Tensor,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    max_grad_norm: float = math.inf,
    emas: Sequence[torch.Tensor] = (),
    ema_decay: float = 0.0,
    backend: str = "auto",
) -> torch.Tensor:
    """Take one step in place; returns the norm of the gradients before clipping, a float32 scalar on the device.

    Args:
        parameters, grads, exp_avgs, exp_avg_sqs, emas: float32, contiguous, of one length and pairwise one shape; emas
            may be left out.
        step: int64 scalar on the parameters' device, counted up here.
        max_grad_norm: inf clips nothing.
        backend: "auto", "cuda" or "torch".

    Raises:
        ValueError: names the argument that does not fit.
    """
    lists = {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, **({"emas": emas} if emas else {})}
    if not parameters or any(len(tensors) != len(parameters) for tensors in lists.values()):
        lengths = {name: len(tensors) for name, tensors in {"parameters": parameters, **lists}.items()}
        raise ValueError(f"want lists of one length, got {lengths}")
    check_tensors(step=step)
    for name, tensors in {"parameters": parameters, **lists}.items():
        check_tensors(**{f"{name}[{i}]": tensor for i, tensor in enumerate(tensors)})
    device = parameters[0].device
    for name, tensors in {"parameters": parameters, **lists}.items():
        for i, (tensor, parameter) in enumerate(zip(tensors, parameters)):
            fits = tensor.shape == parameter.shape and tensor.dtype == torch.float32 and tensor.is_contiguous()
            if not fits or tensor.device != device:
                got = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}, strides {tensor.stride()}"
                raise ValueError(
                    f"{name}[{i}] must be contiguous float32 {list(parameter.shape)} on {device}, got {got}"
                )
    if step.dtype != torch.int64 or step.dim() != 0 or step.device != device:
        raise ValueError(f"step must be an int64 scalar on {device}, got {step.dtype} {list(step.shape)}")
    if not (lr >= 0 and eps >= 0 and weight_decay >= 0 and max_grad_norm > 0 and all(0 <= b < 1 for b in betas)):
        raise ValueError(f"out of range: {lr=}, {betas=}, {eps=}, {weight_decay=}, {max_grad_norm=}")
    if not 0 <= ema_decay < 1:
        raise ValueError(f"ema_decay must be in [0, 1), got {ema_decay}")
    settings = [float(x) for x in (lr, *betas, eps, weight_decay, max_grad_norm, ema_decay)]
    compiled = pick_cuda_backend(backend, *parameters) == "cuda"
    groups = [list(tensors) for tensors in (parameters, grads, exp_avgs, exp_avg_sqs, emas)]
    with torch.no_grad():
        return _multi_tensor_adamw_op(*groups, step, settings, compiled)


def multi_tensor_adamw_ref(
    parameters: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    step: torch.Tensor,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    max_grad_norm: float = math.inf,
    emas: Sequence[torch.Tensor] = (),
    ema_decay: float = 0.0,
) -> torch.Tensor:
    """Plain PyTorch in the tensors' own dtype, bit for bit clip_grad_norm_, torch.optim.AdamW and the lerp."""
    settings = [lr, *betas, eps, weight_decay, max_grad_norm, ema_decay]
    groups = [list(tensors) for tensors in (parameters, grads, exp_avgs, exp_avg_sqs, emas)]
    return _step_ref(*groups, step, settings)


@torch.no_grad()
def _step_ref(parameters, grads, exp_avgs, exp_avg_sqs, emas, step, settings) -> torch.Tensor:
    """By what a captured graph can hold: nothing is read on the host, so the step is taken either way.

    With a norm that is not finite it is one that changes nothing: gradients become 0, factors 1 and weights 0.
    """
    lr, beta1, beta2, eps, weight_decay, max_grad_norm, ema_decay = settings
    norm = torch.nn.utils.get_total_norm(grads)
    taken = torch.isfinite(norm)
    step += taken
    count = step.clamp(min=1).double()
    corrected1, corrected2 = 1 - torch.pow(beta1, count), 1 - torch.pow(beta2, count)

    def if_taken(value: float | torch.Tensor, otherwise: float) -> torch.Tensor:
        exact = value if isinstance(value, torch.Tensor) else torch.full_like(count, value)
        return torch.where(taken, exact, otherwise).to(parameters[0].dtype)

    grads = torch._foreach_mul(grads, torch.clamp(max_grad_norm / (norm + 1e-6), max=1.0))
    for grad in grads:
        grad.masked_fill_(~taken, 0.0)
    torch._foreach_mul_(parameters, if_taken(1 - lr * weight_decay, 1.0))
    weight1 = if_taken(1 - beta1, 0.0)
    for exp_avg, grad in zip(exp_avgs, grads):
        exp_avg.lerp_(grad, weight1)
    torch._foreach_mul_(exp_avg_sqs, if_taken(beta2, 1.0))
    torch._foreach_addcmul_(exp_avg_sqs, torch._foreach_mul(grads, if_taken(1 - beta2, 0.0)), grads)
    denominators = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_div_(denominators, corrected2.sqrt().to(parameters[0].dtype))
    torch._foreach_add_(denominators, eps)
    for denominator in denominators:
        denominator.masked_fill_(~taken, 1.0)
    torch._foreach_addcdiv_(parameters, torch._foreach_mul(exp_avgs, if_taken(-lr / corrected1, 0.0)), denominators)
    averaged = if_taken(1 - ema_decay, 0.0)
    for ema, parameter in zip(emas, parameters):
        ema.lerp_(parameter, averaged)
    return norm

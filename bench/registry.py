"""Every public op of `advgrpo_kernels` with its benchmark cases and the tests that must pass before it is timed."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass

from . import cases_layers, cases_lists, cases_policy
from .workload import Bench, Workload

TESTS = "tests/kernels"


@dataclass(frozen=True)
class Op:
    """One op: its test file and its cases by name."""

    name: str
    test: str
    cases: dict[str, Callable[[Bench], Workload]]


def _op(name: str, module, *, test: str | None = None, **more: Callable[[Bench], Workload]) -> Op:
    return Op(name, f"{TESTS}/test_{test or name}.py", {name: getattr(module, name), **more})


REGISTRY: dict[str, Op] = {
    op.name: op
    for op in (
        _op("gaussian_step", cases_policy, gaussian_step_ode=cases_policy.gaussian_step_ode),
        _op("gaussian_log_prob", cases_policy),
        _op("clipped_policy_loss", cases_policy),
        _op("group_advantages", cases_policy),
        _op("sample_patches", cases_policy, test="patches"),
        _op("score_features", cases_policy),
        _op("hinge_head_loss", cases_policy),
        _op(
            "qk_rms_norm",
            cases_layers,
            qk_rms_norm_rotary=cases_layers.qk_rms_norm_rotary,
            qk_rms_norm_rotary_half=cases_layers.qk_rms_norm_rotary_half,
        ),
        _op("ada_layer_norm", cases_layers, ada_layer_norm_backward=cases_layers.ada_layer_norm_backward),
        _op("gated_residual", cases_layers),
        _op("gelu", cases_layers),
        _op("swiglu", cases_layers),
        _op("group_norm", cases_layers),
        _op("fp8_quantize", cases_layers, test="fp8"),
        _op("fp8_linear", cases_layers, test="fp8"),
        _op("merge_lora", cases_lists),
        _op("multi_tensor_adamw", cases_lists),
    )
}

# Public functions that launch nothing of ours, so there is nothing to time.
UNTIMED = {
    "transition_coefficients": "float64 on the host, once per schedule",
    "ddim_coefficients": "float64 on the host, once per schedule",
    "step_coefficients": "a handful of scalars, for integrations whose callers hold no schedule",
    "step_std": "a handful of scalars, for integrations whose callers hold no schedule",
    "linear": "a kernel for CPUs alone; on a GPU it is PyTorch's linear",
    "matrix_product": "a kernel for CPUs alone; on a GPU it is PyTorch's product",
    "small_attention": "a kernel for CPUs alone; on a GPU it is PyTorch's attention",
    "philox_integers": "the PyTorch twin of what the kernels draw inside",
    "philox_normal": "the PyTorch twin of what the kernels draw inside",
    "philox_permutation": "the PyTorch twin of what the kernels draw inside",
    "philox_words": "the PyTorch twin of what the kernels draw inside",
}


def lookup(name: str) -> Op:
    """The op called `name`.

    Raises:
        ValueError: there is none; names the nearest.
    """
    if name not in REGISTRY:
        near = difflib.get_close_matches(name, REGISTRY, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(REGISTRY)}"
        raise ValueError(f"no op {name!r}{hint}")
    return REGISTRY[name]

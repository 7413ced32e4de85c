"""diffusers: the fused layer ops in the transformers of SD3 and SD3.5, FLUX.1, Qwen-Image and FLUX.2.

    from advgrpo_kernels.integrations import diffusers_transformers
    diffusers_transformers.accelerate(pipe.transformer)               # or filter=lambda name, module: ...
    diffusers_transformers.restore(pipe.transformer)

`accelerate` replaces only `forward` of the chosen modules, on the instance: parameters, their names and the state dict
stay, LoRA layers of PEFT are called as they are, checkpoints are interchangeable, and copies and pickles of the model
keep the replacement. `patch` replaces the forward of a class of blocks for all models, those loaded later included, in
the module of diffusers that defines it:

    import diffusers.models.transformers.transformer_flux as module
    diffusers_transformers.patch(module)
    diffusers_transformers.unpatch(module)

`python -m advgrpo_kernels.patch PEER` does that in a peer's program. Either way the class's own forward is run beside
the fused one first, on small random blocks with gradients, and nothing is replaced unless they agree. float32 results
agree with the original to 1e-5, half-precision ones round less often than it does.

Fused are frozen norms and modulations: LoRA of anything else, and inference of a model that had
`requires_grad_(False)`. A block whose norms or modulation train, as in full fine-tuning, runs its own forward and says
so once, and so does one in which a norm, attention, feed-forward or GELU has a hook (`register_forward_hook`, an
offloading or casting hook of diffusers or accelerate, a global one), so that the hook fires. `_flux_blocks` and
`_qwen_blocks` say what else of theirs is not fused; of FLUX.2 it is SwiGLU and the last norm that are, in blocks that
run as they are (`_flux2_blocks`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import CodeType, FunctionType, ModuleType
from typing import Any

from torch import nn

from . import _blocks, _flux2_blocks, _flux_blocks, _patching, _qwen_blocks, _sd3_blocks
from ._blocks import logger

MODELS = {
    "SD3Transformer2DModel": "SD3, SD3.5",
    "FluxTransformer2DModel": "FLUX.1",
    "QwenImageTransformer2DModel": "Qwen-Image",
    "Flux2Transformer2DModel": "FLUX.2",
}
BLOCKS = (_sd3_blocks.BLOCK, _flux_blocks.BLOCK, _flux_blocks.SINGLE, _qwen_blocks.BLOCK)
FUSED = (*BLOCKS, _flux2_blocks.SWIGLU, _sd3_blocks.NORM)
SD3, FLUX, QWEN, FLUX2 = (
    (_sd3_blocks.BLOCK.target,),
    (_flux_blocks.BLOCK.target, _flux_blocks.SINGLE.target),
    (_qwen_blocks.BLOCK.target,),
    (_flux2_blocks.SWIGLU.target,),
)
TARGETS = (*SD3, *FLUX, *QWEN, *FLUX2)
_MARK = "_advgrpo_kernels_forward"  # on each replaced module: what `forward` was set to


def accelerate(model: nn.Module, filter: Callable[[str, nn.Module], bool] | None = None) -> list[str]:
    """Replace the forward of `model`'s transformer blocks, FLUX.2's SwiGLUs, and of its last norm; returns their names.

    Args:
        model: one of `MODELS`, also wrapped by PEFT.
        filter: called with (name, module) of each candidate; only those for which it is true are replaced. Default all.

    Raises:
        ValueError: another model, no candidate that the filter lets through, a chosen module that is built in a way
            the fused forward does not cover, or a release of diffusers whose blocks compute something else.
        RuntimeError: the forward of a chosen module is replaced already, by this or by a hook. Nothing is replaced.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a module such as pipe.transformer, got {type(model).__name__}")
    if not any(_is_a(module, name) for module in model.modules() for name in MODELS):
        known = ", ".join(f"{name} ({families})" for name, families in MODELS.items())
        raise ValueError(f"accelerate() knows {known} alone, got {type(model).__name__}")
    candidates = [(name, module, fused) for name, module in model.named_modules() if (fused := _fused_of(module))]
    # The last block's context norm of SD3 is a part of that block, which replaces it.
    inside = tuple(f"{name}." for name, _, fused in candidates if fused is not _sd3_blocks.NORM)
    candidates = [candidate for candidate in candidates if not candidate[0].startswith(inside)]
    chosen = [(name, module, fused) for name, module, fused in candidates if filter is None or filter(name, module)]
    if not chosen:
        kinds = ", ".join(dict.fromkeys(fused.name for _, _, fused in candidates))
        raise ValueError(
            f"no module of {type(model).__name__} was replaced: {len(candidates)} candidates ({kinds}), none chosen by "
            "the filter"
        )
    forwards = [_forward_for(name, module, fused) for name, module, fused in chosen]
    for (name, module, fused), forward in zip(chosen, forwards):
        module.forward = functools.partial(forward, module)  # unlike a bound method it can be pickled
        vars(module)[_MARK] = module.forward
        logger.info("%s (%s): %s", name, type(module).__name__, fused.about(module))
    return [name for name, _, _ in chosen]


def restore(model: nn.Module) -> list[str]:
    """Give every module that `accelerate` replaced its own forward back; returns their names.

    Raises:
        RuntimeError: no module of `model` is replaced, or a hook was put over a replaced forward. Nothing is restored.
    """
    replaced = [(name, module) for name, module in model.named_modules() if _MARK in vars(module)]
    if not replaced:
        raise RuntimeError(f"no module of {type(model).__name__} is replaced")
    for name, module in replaced:
        if not _is_replaced(module):
            raise RuntimeError(f"{name}: a hook was put over its fused forward: remove that hook, then restore(model)")
    for name, module in replaced:
        del module.forward, vars(module)[_MARK]
        logger.info("%s (%s): original forward restored", name, type(module).__name__)
    return [name for name, _ in replaced]


def patch(module: ModuleType, everywhere: bool = True) -> list[str]:
    """Replace the forward of the classes in `module` that `TARGETS` names; `_patching.replace` says what it raises."""
    return _patching.replace(module, TARGETS, everywhere)


def unpatch(module: ModuleType) -> None:
    """Put the classes' own forwards back."""
    _patching.restore(module)


def _is_replaced(module: nn.Module) -> bool:
    return _MARK in vars(module) and vars(module).get("forward") is vars(module)[_MARK]


def _is_a(module: nn.Module, name: str) -> bool:
    return name in {cls.__name__ for cls in type(module).__mro__}


def _fused_of(module: nn.Module) -> _blocks.Fused | None:
    return next((fused for fused in FUSED if _is_a(module, fused.name)), None)


def _forward_for(name: str, module: nn.Module, fused: _blocks.Fused) -> FunctionType:
    """The fused forward that can take the place of this module's; raises as `accelerate` says."""
    if _is_replaced(module):
        raise RuntimeError(f"{name}: its forward is replaced already; restore(model) first")
    if "forward" in vars(module):
        raise RuntimeError(
            f"{name}: its forward was replaced by a hook (LayerSkip, offloading, ...) or another patch, which this "
            "would undo: call accelerate(model) before such hooks are added"
        )
    cls: Any = next(cls for cls in type(module).__mro__ if cls.__name__ == fused.name)
    if type(module).forward is not cls.forward:
        raise ValueError(f"{name}: {type(module).__name__} has a forward of its own, which would be lost")
    misfit = fused.misfit(module)
    if misfit:
        raise ValueError(f"{name}: {misfit}")
    return _agreeing(fused, cls, _patching.original_of(cls.forward) or cls.forward)


_agreed: dict[tuple[type, CodeType], FunctionType] = {}  # by code: what holds a function is warned of in `patch`


def _agreeing(fused: _blocks.Fused, cls: type, original: FunctionType) -> FunctionType:
    """The variant that gives what diffusers' own forward gives; ValueError where none does."""
    key = cls, original.__code__
    if key not in _agreed:
        _agreed[key], _ = _patching._variant_of(_patching._Found(fused.target, original, cls))
    return _agreed[key]

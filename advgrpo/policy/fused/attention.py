"""Attention backends behind one call, chosen explicitly or by `auto`.

    name       needs                                  backward repeats its bits
    flash3     flash_attn_interface, Hopper, half     yes (deterministic=True)
    flash2     flash_attn, Ampere or newer, half      yes (deterministic=True)
    flash4     flash_attn.cute, Hopper, half          no
    cudnn      PyTorch's cuDNN attention, half        no
    flash      PyTorch's flash attention, half        no
    efficient  PyTorch's memory-efficient attention   no
    cpu        our kernel for a CPU in float32 and    yes
               without a mask, over few keys; else
               PyTorch's fused attention
    math       nothing                                yes

An explicit name is honoured or raises; `auto` takes the first that this device and dtype support and that runs a small
product; of a package that is there and does not (built for another torch, or FlashAttention-4's, which has no
`flash_attn_func`) it says so once. It never takes flash4, which stands in PyTorch's own flash attention's place: a
prototype there, and a switch of the whole process, so it is asked for by name. Likelihood ratios of exactly 1 need a
forward that gives the same bits for the same input and shape, with a gradient (update) and without (sampler). cuDNN and
the memory-efficient kernel are compiled differently where the logarithms of the softmax's sums are not wanted, which
PyTorch decides by whether there is a gradient; here they are always computed, so that both are the same kernel.
Training that must repeat bit for bit on a GPU needs one whose backward does too.

A mask of keys, as Qwen-Image's text has, is taken by cudnn, efficient, cpu and math. It is added to the logarithms, 0
or -∞, so that masked keys weigh exactly 0, whatever they and their values hold (finite). `key_bias` makes what is
added, once for all attentions of a forward.

Shapes: q [B, H, Sq, D], k and v [B, H, S, D], bias [B, 1, 1, S] -> [B, Sq, H·D]. Any strides with dense heads. The
result lies in memory in q's order of images and tokens; not with flash3 and efficient, which put image after image, so
that to_out copies its input or is two operators.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
import torch.nn.attention
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel

from advgrpo.errors import UserError
from advgrpo_kernels import small_attention

_logger = logging.getLogger(__name__)
Attention = Callable[..., torch.Tensor]  # q, k, v and, where keys are masked, their bias


class Recomputed(saved_tensors_hooks):
    """What autograd saves inside, without `tensors` and views of them: they are computed again when backward asks.

    Args:
        tensors: e.g. normalised q and k, whose raw form is kept anyway.
        compute: gives the same ones, bit for bit; called once per backward pass if each is saved once.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], compute: Callable[[], Sequence[torch.Tensor]]):
        numbers = {t.untyped_storage()._cdata: i for i, t in enumerate(tensors)}
        made: dict[int, torch.Tensor] = {}  # the ones that backward has not asked for yet

        def pack(tensor: torch.Tensor):
            number = numbers.get(tensor.untyped_storage()._cdata)
            return tensor if number is None else (number, tensor.shape, tensor.stride(), tensor.storage_offset())

        def unpack(packed):
            if isinstance(packed, torch.Tensor):
                return packed
            number, *view = packed
            if number not in made:
                with torch.no_grad():
                    made.update(enumerate(compute()))
            return made.pop(number).as_strided(*view)

        super().__init__(pack, unpack)


class _Unusable(RuntimeError):
    """A backend that should run here does not; the message says why."""


def _flash_package(module: str) -> Attention:
    try:
        kernel = importlib.import_module(module).flash_attn_func
    except Exception as error:  # a build for another torch fails at import with whatever its loader raises
        raise _Unusable(f"the package {module} is there but cannot be used ({_said(error)})") from error

    def attend(q, k, v):
        out = kernel(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), deterministic=True)
        return (out[0] if isinstance(out, tuple) else out).flatten(2)

    return attend


def key_bias(mask: torch.Tensor, before: int, dtype: torch.dtype) -> torch.Tensor:
    """[B, 1, 1, before + S] of 0 and -∞ in q's `dtype`, for `before` keys that all attend to and S masked ones.

    Rows are aligned to 16 elements, as the kernels want them. B rows of keys are all the memory it takes: heads and
    queries see it through strides of 0.

    Args:
        mask: [B, S] bool, the keys that are attended to.
    """
    rows, keys = len(mask), before + mask.shape[1]
    bias = torch.zeros(rows, 1, 1, -(-keys // 16) * 16, dtype=dtype, device=mask.device)[..., :keys]
    bias[..., before:].masked_fill_(~mask[:, None, None], -torch.inf)
    return bias


def _for_all(q: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
    """[B, H, Sq, S] view of a bias [B, 1, 1, S]."""
    return None if bias is None else bias.expand(-1, q.shape[1], q.shape[2], -1)


def _cudnn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    attend = torch.ops.aten._scaled_dot_product_cudnn_attention
    return attend(q, k, v, _for_all(q, bias), compute_log_sumexp=True)[0].transpose(1, 2).flatten(2)


def _efficient(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    attend = torch.ops.aten._scaled_dot_product_efficient_attention
    return attend(q, k, v, _for_all(q, bias), compute_log_sumexp=True)[0].transpose(1, 2).flatten(2)


def _torch_backend(backend: SDPBackend) -> Attention:
    def attend(q, k, v, bias=None):
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=_for_all(q, bias))
        return out.transpose(1, 2).flatten(2)

    return attend


def _cpu(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    if bias is None:
        return small_attention(q, k, v).transpose(1, 2).flatten(2)
    return _torch_backend(SDPBackend.FLASH_ATTENTION)(q, k, v, bias)


class _TorchFlash:
    """PyTorch's flash attention, whose kernel the process can exchange (`activate_flash_attention_impl`, torch 2.11).

    Models of one process may want different ones: who runs exchanges it first, where it is not the one wanted. Without
    a wish it is PyTorch's own again after an exchange of ours, and whatever somebody else has activated otherwise.

    Args:
        implementation: PyTorch's name for it, "FA4"; None: no wish.

    Raises:
        _Unusable: this PyTorch does not know it, or its package cannot be used.
    """

    _ours: ClassVar[str | None] = None  # what an object of this class has activated

    def __init__(self, implementation: str | None = None):
        self.implementation, self._attend = implementation, _torch_backend(SDPBackend.FLASH_ATTENTION)
        known = getattr(torch.nn.attention, "list_flash_attention_impls", list)()
        if implementation is not None and implementation not in known:
            raise _Unusable(f"PyTorch {torch.__version__} has no flash attention by the name of {implementation}")
        try:
            self._activate()
        except Exception as error:  # whatever the package raises at import
            raise _Unusable(f"{implementation}'s package is there but cannot be used ({_said(error)})") from error

    def _activate(self) -> None:
        if self.implementation == _TorchFlash._ours:
            return
        if self.implementation is None:
            torch.nn.attention.restore_flash_attention_impl()
        else:
            torch.nn.attention.activate_flash_attention_impl(self.implementation)
        _TorchFlash._ours = self.implementation

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        self._activate()
        return self._attend(q, k, v)


_HALF = (torch.float16, torch.bfloat16)
_MAKERS: dict[str, Callable[[], Attention]] = {
    "flash3": lambda: _flash_package("flash_attn_interface"),
    "flash2": lambda: _flash_package("flash_attn"),
    "cudnn": lambda: _cudnn,
    "flash": _TorchFlash,
    "efficient": lambda: _efficient,
    "cpu": lambda: _cpu,
    "math": lambda: _torch_backend(SDPBackend.MATH),
    "flash4": lambda: _TorchFlash("FA4"),
}
_AUTO = tuple(name for name in _MAKERS if name != "flash4")
_MASKED = ("cudnn", "efficient", "cpu", "math")
_PACKAGES = {
    "flash3": ("flash_attn_interface", (9, 0)),
    "flash2": ("flash_attn", (8, 0)),
    "flash4": ("flash_attn.cute", (9, 0)),
}


def _unsupported(name: str, device: torch.device, dtype: torch.dtype, masked: bool = False) -> str | None:
    """Why `name` cannot run there, or None."""
    if masked and name not in _MASKED:
        return "it takes no mask, which this model's text has"
    if name == "math":
        return None
    if name == "cpu":
        return None if device.type == "cpu" else f"it runs on a CPU, not on {device.type}"
    if device.type != "cuda":
        return f"it needs a CUDA device, got {device.type}"
    if name == "efficient":
        return None
    if dtype not in _HALF:
        return f"it needs bfloat16, got {str(dtype).removeprefix('torch.')}"
    package, capability = _PACKAGES.get(name, (None, (8, 0)))
    if package and not _is_installed(package):
        return f"the package {package} is not installed"
    if torch.cuda.get_device_capability(device) < capability:
        return f"it needs compute capability {capability[0]}.{capability[1]}"
    return None


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except Exception:  # of a submodule: its parent is imported, and is no package or broken
        return False


def choose_attention(
    requested: str, device: torch.device, dtype: torch.dtype, *, masked: bool = False
) -> tuple[str, Attention]:
    """(name, function) for `model.attention`.

    Args:
        masked: some keys are not attended to; the function then takes their `key_bias` after q, k and v.

    Raises:
        UserError: an unknown name, or an explicit one that this device, dtype or installation does not support.
    """
    if requested != "auto" and requested not in _MAKERS:
        raise UserError(f"model.attention = {requested!r}: want auto or one of {', '.join(_MAKERS)}")
    for name in _AUTO if requested == "auto" else (requested,):
        try:
            return name, _made(name, device, dtype, masked)
        except _Unusable as error:
            if requested != "auto":
                raise UserError(f"model.attention = {name!r}: {error}; use auto or another backend") from error
            if error.__cause__ is not None:  # it is there and broken, which is worth a word
                _say_once(f"model.attention = 'auto' passes over {name}: {error}")
    raise AssertionError("math runs everywhere")


def _made(name: str, device: torch.device, dtype: torch.dtype, masked: bool) -> Attention:
    """Raises _Unusable, with a cause where what should run does not."""
    reason = _unsupported(name, device, dtype, masked)
    if reason:
        raise _Unusable(reason)
    attend = _MAKERS[name]()
    if device.type == "cuda":
        _try(name, attend, device, dtype, masked)
    return attend


def _try(name: str, attend: Attention, device: torch.device, dtype: torch.dtype, masked: bool) -> None:
    """One small product: what lacks code for this GPU, or does not fit this PyTorch, fails here and not later."""
    q, mask = torch.ones(1, 1, 64, 64, device=device, dtype=dtype), torch.ones(1, 64, dtype=torch.bool, device=device)
    try:
        with torch.no_grad():
            attend(q, q, q, *([key_bias(mask, 0, dtype)] if masked else []))
    except Exception as error:
        raise _Unusable(f"a product of 64 tokens fails ({_said(error)})") from error


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"


@functools.cache
def _say_once(message: str) -> None:
    _logger.warning(message)

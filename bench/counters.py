"""Instruments that count what a piece of code asks a GPU to do, without a GPU: on meta tensors, or on a CPU's.

A **launch** is an ATen operator that computes or copies, or one Triton kernel of ours; views (among them
`_unsafe_view`) and allocations launch nothing. Operators of `advgrpo_kernels` are opened: their bodies run with every
kernel launch replaced by its name, so copies of strided inputs inside them are counted too, and what they would write
stays uninitialised. The two ops of csrc/ are the exception, `COMPILED_LAUNCHES`.

`on_gpu()` makes meta tensors take the paths of CUDA tensors. Inside it, `SD35_MEDIUM`'s forward is 2348 launches for 16
rows under no_grad with int64 timesteps and weights as loaded (a frozen base needs 47 fewer: PyTorch folds a strided
linear into one matrix product only where the weight requires a gradient), 3112 with LoRA in the weights' dtype, and
the backward of `velocity.square().sum()` 4090, of which four are the loss's.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Generator, Iterable
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from advgrpo_kernels._ops import NAMESPACE
from advgrpo_kernels._runtime import HAS_TRITON

ALLOCATIONS = {"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"}
FREE = {*ALLOCATIONS, "_unsafe_view", "detach", "lift_fresh", "alias", "device"}  # prim.device: fake tensors ask for it
COMPILED_LAUNCHES = {"merge_lora": 1, "multi_tensor_adamw": 3}  # launched by csrc/, which nothing here can open
MATRIX_PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "addbmm", "mv", "dot", "_scaled_mm", "linear"}
MATRIX_PRODUCTS |= {"_addmm_activation"}  # GELU in the epilogue
CONVOLUTIONS = {"convolution", "convolution_backward"}
ATTENTION = {
    f"_scaled_dot_product_{kind}_attention{suffix}"
    for kind in ("flash", "efficient", "cudnn", "fused")
    for suffix in ("", "_backward", "_for_cpu", "_for_cpu_backward")
}
NOT_ELEMENTWISE = MATRIX_PRODUCTS | CONVOLUTIONS | ATTENTION
GATHERS = {"index_select", "gather", "index", "embedding"}  # read as much as they write
SHAPED_LIKE = {f"{made}_like" for made in ("zeros", "ones", "full", "rand", "randn")}  # which read nothing of it
SHAPED_LIKE |= {"new_zeros", "new_ones", "new_full"}
OVERWRITES = {"copy_", "fill_", "zero_", "normal_", "uniform_", "_foreach_copy_", "_foreach_zero_"}
SYNCS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2", "unique_dim"}
COPIES = {"_to_copy", "copy_", "_copy_from"}
HOST_READS = {Tensor.tolist: "tolist", Tensor.numpy: "numpy", Tensor.__array__: "__array__"}  # no operator on a CPU
_IS_CUDA = getattr(Tensor, "is_cuda").__get__  # noqa: B009  the property itself, which stubs call a bool

_META_PRODUCT = "aten::_scaled_mm.out"  # with a result that is given; torch knows it without on meta tensors alone
if not torch._C._dispatch_has_kernel_for_dispatch_key(_META_PRODUCT, "Meta"):
    torch.library.impl(_META_PRODUCT, "Meta", lambda *_given, out, **_options: out)


class HostSyncError(AssertionError):
    """Code that must not wait for the device read one of its tensors on the host."""


class _OnGpu(TorchFunctionMode):
    def __torch_function__(self, func, types, args: tuple = (), kwargs=None):
        kwargs = kwargs or {}
        if func == _IS_CUDA and args[0].is_meta:
            return True
        if func is F.scaled_dot_product_attention and (args[0] if args else kwargs["query"]).is_meta:
            return _flash_attention(*args, **kwargs)
        if func is Tensor.backward:
            func = _backward
        if func in (_backward, torch.autograd.backward, torch.autograd.grad):
            # A mode is off while it handles a call, but checkpointed blocks run their forward in here.
            with self, mock.patch.object(torch.autograd, "has_torch_function", return_value=False):
                return func(*args, **kwargs)
        return func(*args, **kwargs)


def _backward(tensor, gradient=None, retain_graph=None, create_graph=False, inputs=None):
    torch.autograd.backward(tensor, gradient, retain_graph, create_graph, inputs=inputs)


def _flash_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """The one operator that PyTorch picks on a GPU; on meta tensors it would decompose into matrix products."""
    if attn_mask is not None or enable_gqa:
        raise NotImplementedError("counted without masks and grouped queries only")
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    return flash(query, key, value, dropout_p, is_causal, scale=scale)[0]


def on_gpu() -> contextlib.AbstractContextManager:
    """Inside, a meta tensor says `is_cuda`, so kernels choose Triton, and fused attention is one operator."""
    return _OnGpu()


class Recorder(TorchDispatchMode):
    """Calls `see(name, func, args, kwargs, result)` after every operator, once composites are taken apart.

    For our own operators `see` is called with the operator itself, then with what its body does; `func` is None for a
    kernel launch. Meant for meta and CPU tensors: a real CUDA tensor's kernels would not run.
    """

    def see(self, name: str, func, args, kwargs, result) -> None:
        raise NotImplementedError

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with self:
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        if func.namespace == NAMESPACE:
            return self._open(func, args, kwargs)
        result = func(*args, **kwargs)
        self.see(func.overloadpacket.__name__, func, args, kwargs, result)
        return result

    def _open(self, func, args, kwargs):
        name = func.overloadpacket.__name__
        if name in COMPILED_LAUNCHES:
            result = func(*args, **kwargs)
            self.see(name, func, args, kwargs, result)
            for _ in range(COMPILED_LAUNCHES[name]):
                self.see(name, None, (), {}, None)
            return result
        with self, torch._C.DisableTorchFunction(), _kernels_replaced(self._launched):
            result = OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        self.see(name, func, args, kwargs, result)
        return result

    def _launched(self, kernel: str) -> None:
        self.see(kernel, None, (), {}, None)


@contextlib.contextmanager
def _kernels_replaced(launched: Callable[[str], None]) -> Generator[None, None, None]:
    """Inside, launching a Triton kernel only reports its name, compiled or interpreted."""
    if not HAS_TRITON:
        yield
        return
    from triton.runtime.interpreter import GridExecutor
    from triton.runtime.jit import JITFunction

    def run(self, *args, **kwargs):
        launched(self.fn.__name__)

    with mock.patch.object(GridExecutor, "__call__", run), mock.patch.object(JITFunction, "run", run):
        yield


def is_launch(name: str, func) -> bool:
    """Whether what a Recorder saw is a launch: a kernel of ours, or an ATen operator that is no view or allocation."""
    return func is None or (func.namespace != NAMESPACE and name not in FREE and not func.is_view)


class Launches(Recorder):
    """Names of the launches, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def see(self, name, func, args, kwargs, result) -> None:
        if is_launch(name, func):
            self.names.append(name)

    @property
    def count(self) -> int:
        return len(self.names)

    def by_name(self) -> Counter[str]:
        return Counter(self.names)


class ElementwiseBytes(Recorder):
    """Bytes read and written by everything but matrix products, convolutions and attention.

    Inputs once, outputs once, each distinct element once: a broadcast dimension costs nothing, a cache saves nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_name: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return sum(self.by_name.values())

    def see(self, name, func, args, kwargs, result) -> None:
        if func is None or name in FREE or func.is_view or name in NOT_ELEMENTWISE:
            return
        read, written = _traffic(name, func, args, kwargs, result)
        self.by_name[name] += read + written


def _traffic(name: str, func, args, kwargs, result) -> tuple[int, int]:
    """Bytes read and written by one operator, from its schema."""
    read, written = 0, 0
    parameters = func._schema.arguments
    values = [*args, *(kwargs.get(p.name) for p in parameters[len(args) :])]
    for parameter, value in zip(parameters, values):
        size = _size(value)
        changed = parameter.alias_info is not None and parameter.alias_info.is_write
        written += size if changed else 0
        overwritten = changed and (name in OVERWRITES or parameter.is_out)
        read += 0 if overwritten else size
    fresh = sum(_size(value) for value, place in _returns(func, result) if place.alias_info is None)
    written += fresh
    if name in SHAPED_LIKE:
        read = 0
    if name in GATHERS:
        read = fresh + _size(values[1:])
    return read, written


def _returns(func, result):
    places = func._schema.returns
    return zip([result] if len(places) == 1 else result, places) if places else ()


def _size(value) -> int:
    return sum(_distinct(t) * t.element_size() for t in tree_leaves(value) if isinstance(t, Tensor))


def _distinct(tensor: Tensor) -> int:
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride()):
        count *= size if stride != 0 or size == 0 else 1
    return count


class HostSyncs(Recorder):
    """Reads of device tensors on the host: `.item()`, `nonzero`, comparisons, copies to the CPU.

    Args:
        device: type of the device whose tensors must not be waited for. Counted on "meta", host tensors on the CPU are
            free, as on a GPU; on "cpu" every tensor counts, and copies cannot be seen.
        forbidden: raise HostSyncError at the first one.
    """

    def __init__(self, device: str = "meta", *, forbidden: bool = True) -> None:
        super().__init__()
        self.device, self.forbidden = device, forbidden
        self.names: list[str] = []
        self._python = _HostReads(self)

    def __enter__(self):
        self._python.enter_once()
        return super().__enter__()

    def __exit__(self, exc_type, exc_val, exc_tb):
        super().__exit__(exc_type, exc_val, exc_tb)
        self._python.leave_once()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, tensors = func.overloadpacket.__name__, tree_leaves((args, kwargs))
        ours = any(isinstance(t, Tensor) and t.device.type == self.device for t in tensors)
        if ours and (name in SYNCS or self._leaves(name, args, kwargs or {}) or _boolean_index(name, args)):
            self.synced(name)
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _leaves(self, name: str, args, kwargs) -> bool:
        if name not in COPIES or self.device == "cpu":
            return False
        target = kwargs.get("device") if name == "_to_copy" else args[0].device
        source = args[0] if name != "copy_" else args[1]
        return target is not None and torch.device(target).type == "cpu" and source.device.type == self.device

    def synced(self, name: str) -> None:
        self.names.append(name)
        if self.forbidden:
            raise HostSyncError(f"{name} waits for the device")

    def see(self, name, func, args, kwargs, result) -> None:
        """Everything was looked at before it ran: a meta tensor's value cannot be read."""


def _boolean_index(name: str, args) -> bool:
    return name == "index" and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])


class _HostReads(TorchFunctionMode):
    """Methods that read a CPU tensor's memory without an operator."""

    def __init__(self, syncs: HostSyncs) -> None:
        super().__init__()
        self.syncs, self.depth = syncs, 0

    def enter_once(self) -> None:
        """The dispatch mode re-enters itself inside every operator."""
        self.depth += 1
        if self.depth == 1:
            self.__enter__()

    def leave_once(self) -> None:
        self.depth -= 1
        if self.depth == 0:
            self.__exit__(None, None, None)

    def __torch_function__(self, func, types, args: tuple = (), kwargs=None):
        if func in HOST_READS and args[0].device.type == self.syncs.device:
            self.syncs.synced(HOST_READS[func])
        return func(*args, **(kwargs or {}))


class Trace(Recorder):
    """The launches with everything that a captured graph would freeze: shapes, strides, dtypes and scalar arguments.

    Two steps of a sampler whose traces are equal can be one graph replayed, as far as the tensors they read are the
    same ones; where a tensor lies is not compared.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def see(self, name, func, args, kwargs, result) -> None:
        if func is not None and (is_launch(name, func) or func.namespace == NAMESPACE):
            described = ", ".join(_describe(value) for value in tree_leaves((args, kwargs)))
            self.lines.append(f"{name}({described})")


def _describe(value) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}/{list(value.stride())}"


class SavedTensors(saved_tensors_hooks):
    """Bytes that autograd keeps for the backward pass of what runs inside, each storage once.

    Args:
        held_anyway: tensors that are in memory with or without a graph, such as parameters.
    """

    def __init__(self, held_anyway: Iterable[Tensor] = ()) -> None:
        self._held = {_storage(t) for t in held_anyway}
        self._kept: dict[int, torch.UntypedStorage] = {}  # kept alive: an address may be used again
        super().__init__(self._pack, lambda tensor: tensor)

    def __enter__(self) -> SavedTensors:  # ty: ignore[incompatible-method-override]  PyTorch's gives None
        super().__enter__()
        return self

    def _pack(self, tensor: Tensor) -> Tensor:
        if _storage(tensor) not in self._held:
            self._kept[_storage(tensor)] = tensor.untyped_storage()
        return tensor

    @property
    def total(self) -> int:
        return sum(storage.nbytes() for storage in self._kept.values())


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _addmm_flops(bias, a, b, **_) -> int:
    """Of the shapes of `addmm`: PyTorch has no formula for the operator that applies an activation to it."""
    return 2 * a[0] * a[1] * b[1]


def flops(run: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products and attention in one call, by PyTorch's own formulas."""
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten._addmm_activation: _addmm_flops}) as counter:
        run()
    return counter.get_total_flops()

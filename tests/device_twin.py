"""A GPU's memory on a CPU: tensors that say they are on another device, hold values, and tell when the host waits.

Inside `DeviceTwin()` the device "meta" is a device with values: what is made there, or copied there, is a `TwinTensor`
around a CPU tensor, and every operator on it runs on the CPU. As a GPU does, it

- refuses operators that mix its tensors with the host's (`MixedDevices`): a scalar of the host is fine beside a tensor
  of the device, but not in a `cat` or `stack`;
- waits where a value is read on the host, or copied from ordinary host memory. `waits` lists both, with the line of
  this repository that is to blame; copies from pinned memory with `non_blocking=True` are free.

Not emulated: streams, Triton (the PyTorch references run), and what only CUDA's own code paths do.
"""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

ROOT = Path(__file__).parents[1]
DEVICE = torch.device("meta")
STACKS = {"cat", "stack", "_foreach_add", "_foreach_copy_"}  # refuse even scalars of the host
INDEXING = {"index", "index_put", "index_put_", "_unsafe_index"}  # take the host's indices, and copy them
READS = {"_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "_unique2", "unique_dim"}
READS |= {"unique_consecutive", "bincount"}
COMPREHENSIONS = {"<listcomp>", "<dictcomp>", "<setcomp>"}  # functions of their own before Python 3.12

# What the host reads of an iteration. All of it lies between the phases or at their end: sampler, update and head
# updates themselves read nothing.
ITERATION_READS = {
    "advgrpo/training/scoring.py:_check_finite": 1,  # a reward that is not finite stops the iteration at once
    "advgrpo/training/scoring.py:score": 1,  # the mean similarity
    "advgrpo/training/scoring.py:metrics": 1,
    "advgrpo/adversary/trainer.py:evaluate": 1,  # the head's loss and accuracy
    "advgrpo/adversary/trainer.py:check": 1,  # whether every discriminator update was finite
    "advgrpo/adversary/trainer.py:learn": 1,  # for the schedule: means and pairs
    "advgrpo/training/policy_gradient.py:update": 1,  # the share of groups without spread
    "advgrpo/training/policy_gradient.py:_update_metrics": 1,  # the one place where the update waits
    "advgrpo/monitor/image_statistics.py:measure": 2,  # the monitor's
    "advgrpo/training/trainer.py:judge": 1,  # what merging loses, the monitor's
}
FIRST_VISITS = {  # copies that a prompt's first visit makes
    "advgrpo/runtime/cache.py:_remember",  # features of its references
    "advgrpo/training/scoring.py:_mean_scores",  # references for the fixed rewards
}
FIRST_FEATURES = {  # reads where the cache has no features of a prompt's references yet
    "advgrpo/adversary/reference_features.py:_packed",
    "advgrpo/adversary/reference_features.py:_store",
    "advgrpo/runtime/cache.py:store",
}


class MixedDevices(RuntimeError):
    """An operator got tensors of the host and of the device: a GPU would refuse it."""


@dataclass(frozen=True)
class Wait:
    """The host waits for the device."""

    what: str  # "read" or "copy"
    operator: str
    place: str  # FILE:FUNCTION of this repository, the innermost one that is not in kernels/

    def __str__(self) -> str:
        return f"{self.what} by {self.operator} in {self.place}"


class TwinTensor(torch.Tensor):
    """A tensor of the twin device around the CPU tensor `held`."""

    @staticmethod
    def __new__(cls, real: torch.Tensor):
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            real.size(),
            strides=real.stride(),
            storage_offset=real.storage_offset(),
            dtype=real.dtype,
            device=DEVICE,
        )
        made.held = real
        return made

    def __tensor_flatten__(self):
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner, context, size, stride):
        return TwinTensor(inner["held"])

    def __repr__(self, **_) -> str:
        return f"TwinTensor({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} on a twin tensor outside DeviceTwin")


class DeviceTwin(TorchDispatchMode):
    """The mode; see the module docstring."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[Wait] = []
        self._pinned: dict[int, torch.Tensor] = {}  # by storage; kept alive, so that no address comes back
        self._functions = _NoOperators(self)

    def __enter__(self):
        self._functions.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._functions.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        twins = [t for t in tree_leaves((args, kwargs)) if isinstance(t, TwinTensor)]
        wanted = kwargs.get("device")
        to_twin = wanted is not None and torch.device(wanted).type == DEVICE.type
        if name == "_to_copy":
            return self._moved(func, args, kwargs, to_twin)
        if name == "copy_":
            return self._copied(func, args, kwargs)
        if not twins and not to_twin:
            return func(*args, **kwargs)
        self._check(name, args, kwargs, twins)
        if name in READS:
            self._wait("read", name)
        if to_twin:
            kwargs = kwargs | {"device": "cpu"}
        result = func(*tree_map(_real, args), **tree_map(_real, kwargs))
        wrapped = tree_map(lambda x: TwinTensor(x) if isinstance(x, torch.Tensor) else x, result)
        return return_and_correct_aliasing(func, args, kwargs, wrapped) if twins else wrapped

    def _moved(self, func, args, kwargs, to_twin: bool):
        """`tensor.to(...)`: another device, another dtype, or both."""
        source, wanted = args[0], kwargs.get("device")
        stays = wanted is None or torch.device(wanted).type == source.device.type
        ends_there = isinstance(source, TwinTensor) if stays else to_twin
        if not stays:
            self._transfer(source, "_to_copy", kwargs.get("non_blocking", False))
        own = {**kwargs, "device": None, "non_blocking": False, "pin_memory": None}
        result = func(_real(source), **own)
        return TwinTensor(result) if ends_there else result

    def _copied(self, func, args, kwargs):
        target, source = args[:2]
        if isinstance(target, TwinTensor) != isinstance(source, TwinTensor):
            self._transfer(source, "copy_", args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        func(_real(target), _real(source))
        return target

    def _transfer(self, source: torch.Tensor, name: str, non_blocking: bool) -> None:
        if isinstance(source, TwinTensor):
            self._wait("read", name)
        elif not (non_blocking and source.untyped_storage()._cdata in self._pinned):
            self._wait("copy", name)

    def _check(self, name: str, args, kwargs, twins) -> None:
        host = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and not isinstance(t, TwinTensor)]
        if not twins or not host:
            return
        if name in INDEXING:
            for _ in host:
                self._wait("copy", name)
        elif name in STACKS or any(t.dim() > 0 for t in host):
            raise MixedDevices(f"{name}: {[list(t.shape) for t in host]} of the host beside the device's, in {place()}")

    def _wait(self, what: str, name: str) -> None:
        self.waits.append(Wait(what, name, place()))


class _NoOperators(TorchFunctionMode):
    """What Python does to tensors without an operator, or with one that needs a GPU."""

    def __init__(self, twin: DeviceTwin) -> None:
        super().__init__()
        self.twin = twin

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.pin_memory:
            copy = args[0].clone()
            self.twin._pinned[copy.untyped_storage()._cdata] = copy
            return copy
        if func in (torch.tensor, torch.as_tensor) and torch.device((kwargs or {}).get("device") or "cpu") == DEVICE:
            return func(*args, **{**kwargs, "device": "cpu"}).to(DEVICE)  # from ordinary memory, as on a GPU
        if func == torch.Tensor.is_meta.__get__ and isinstance(args[0], TwinTensor):
            return False
        if func == torch.Tensor.data.__set__ and isinstance(args[0], TwinTensor):
            args[0].held = args[1].held
            return None
        if func is torch.Tensor.new_tensor and isinstance(args[0], TwinTensor):
            return torch.tensor(args[1], dtype=(kwargs or {}).get("dtype", args[0].dtype)).to(DEVICE)
        if func in (torch.Tensor.tolist, torch.Tensor.numpy) and isinstance(args[0], TwinTensor):
            self.twin._wait("read", func.__name__)
            args = (args[0].held, *args[1:])
        return func(*args, **(kwargs or {}))


def _real(value):
    return value.held if isinstance(value, TwinTensor) else value


def place() -> str:
    """FILE:FUNCTION of this repository that is running: the innermost one that is not in kernels/."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if frame.name in COMPREHENSIONS:
            continue
        if ROOT in path.parents and path.relative_to(ROOT).parts[0] in ("advgrpo", "bench"):
            return f"{path.relative_to(ROOT)}:{frame.name}"
    return "elsewhere"

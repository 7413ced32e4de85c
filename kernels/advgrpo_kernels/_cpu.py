"""The CPU's kernels: `cpu/*.cpp`, compiled by this machine's C++ compiler when one of them is first called.

A wheel cannot hold them: half of what they gain is the registers of the CPU at hand. Compiled they lie in the user's
cache folder, under a name made of sources, flags, compiler and CPU, and come into being whole, so that processes that
compile at the same time do not disturb each other. They are loaded by ctypes and see pointers alone: they know nothing
of torch and serve every version of it.

    ADVGRPO_KERNELS_CPU     auto (default): the PyTorch references where they cannot be compiled, which is said once
                            required: an error where they cannot
                            off: the references
    ADVGRPO_KERNELS_CACHE   the folder, $XDG_CACHE_HOME/advgrpo_kernels or ~/.cache/advgrpo_kernels unless given
    CXX                     the compiler; c++, g++ or clang++ unless given

Every row of a result is computed by one thread in one order: no bit of it depends on how many rows a call has, or on
the number of threads.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch.autograd import forward_ad

from ._runtime import _warn_once, logger

SOURCES = Path(__file__).with_name("cpu")
FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fPIC",
    "-shared",
    "-Wno-psabi",
)
THREADED = ("-fopenmp",)  # torch's own OpenMP serves it: one pool of threads in the process
MODES = ("auto", "required", "off")
MODE = os.environ.get("ADVGRPO_KERNELS_CPU", "auto")
ZEN_5 = 26  # the family; Zen 4 and older are 25 and below
LONGEST = 300  # seconds that the compiler gets; it takes about five

_PLAIN = (torch.Tensor, torch.nn.Parameter)  # a subclass may be sharded, or fake

_pointer, _count, _number, _threads = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
SIGNATURES = {
    "gelu": [*[_pointer] * 3, _count, _count, _threads],
    "gelu_backward": [*[_pointer] * 4, _count, _count, _threads],
    "group_norm": [*[_pointer] * 5, _number, _threads],
    "philox_words": [*[_pointer] * 3, _threads],
    "product": [*[_pointer] * 5, _threads],
    "residual_norm": [*[_pointer] * 13, _number, _threads],
    "residual_norm_backward": [*[_pointer] * 12, _number, _threads],
    "qk_rms_norm": [*[_pointer] * 7, _number, _threads],
    "qk_rms_norm_backward": [*[_pointer] * 9, _number, _threads],
    "small_attention": [*[_pointer] * 6, _number, _threads],
    "small_attention_backward": [*[_pointer] * 9, _number, _threads],
}


class CpuKernelsUnavailable(RuntimeError):
    """The CPU's kernels cannot be compiled or loaded here; the message says why and what to do."""


def takes(*tensors: torch.Tensor, dtype: torch.dtype = torch.float32) -> bool:
    """Whether `auto` runs the CPU's kernels on these tensors: of the dtype, on a CPU, outside of traced graphs.

    Raises:
        CpuKernelsUnavailable: they are required and not there.
    """
    return MODE != "off" and _fits(tensors, dtype) and usable()


def check(*tensors: torch.Tensor) -> None:
    """Raise for a call with backend="cpu" that they cannot serve."""
    if not _fits(tensors, torch.float32):
        found = ", ".join(f"{t.dtype} on {t.device}" for t in tensors)
        raise RuntimeError(f"backend='cpu' needs float32 tensors on a CPU, outside of a traced graph, got {found}")
    library()


def _fits(tensors: tuple[torch.Tensor, ...], dtype: torch.dtype) -> bool:
    """In a few microseconds: some of the calls take no more."""
    # What traces, counts or transforms sees operators of PyTorch, and would not see ours.
    if (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack()
        or torch._is_functional_tensor(tensors[0])
        or forward_ad._current_level >= 0
    ):
        return False
    for tensor in tensors:
        plain = tensor.is_cpu and tensor.dtype == dtype and type(tensor) in _PLAIN
        if not plain or tensor.is_neg():  # a view of negated values, which memory does not show
            return False
    return True


@functools.cache
def usable() -> bool:
    """Whether `auto` runs them on this machine; compiles them at the first call, and says once where it cannot.

    A build without their sources, as the hub's, is one without them.

    Raises:
        CpuKernelsUnavailable: they are required and cannot be compiled.
        ValueError: ADVGRPO_KERNELS_CPU is none of `MODES`.
    """
    if MODE not in MODES:
        raise ValueError(f"ADVGRPO_KERNELS_CPU = {MODE!r}: want one of {', '.join(MODES)}")
    if MODE == "off" or (MODE == "auto" and not SOURCES.is_dir()):
        return False
    try:
        library()
    except CpuKernelsUnavailable as error:
        if MODE == "required":
            raise
        _warn_once(f"{error}. The PyTorch references run in place of the CPU's kernels, which is slower")
        return False
    return True


def why_not() -> str:
    """Why `auto` does not run them here, or ""."""
    if MODE == "off":
        return "ADVGRPO_KERNELS_CPU = off"
    if not SOURCES.is_dir():
        return "this build came without their sources"
    return "" if usable() else "they could not be compiled"


@functools.cache
def gains_by_products() -> bool:
    """Whether PyTorch's float32 products are MKL's kernels of AVX2 on a CPU that PyTorch uses AVX-512 of: a Zen 5.

    By facts, which are the same in every process of a machine, never by the clock: bits follow.
    """
    return not _why_products_are_mkls()


def why_no_products() -> str:
    """Why `auto` leaves matrix products to PyTorch here, or ""."""
    return why_not() or _why_products_are_mkls()


def _why_products_are_mkls() -> str:
    if not torch.backends.mkl.is_available():
        return "PyTorch's products are not MKL's here, and ours were measured against no other"
    capability, (vendor, family) = torch.backends.cpu.get_cpu_capability(), _maker()
    if capability != "AVX512":
        return f"PyTorch uses no AVX-512 of this CPU ({capability})"
    if vendor == "GenuineIntel":
        return "MKL has kernels of AVX-512 for Intel's CPUs"
    if vendor != "AuthenticAMD":
        return f"ours were measured on AMD's CPUs alone, and this one's maker is {vendor or 'not told by the system'}"
    return "" if family >= ZEN_5 else f"AMD's family {family} computes AVX-512 in halves, ours gain on {ZEN_5}"


def _maker() -> tuple[str, int]:
    """The CPU's vendor and family as it names them; ("", 0) where the system does not tell."""
    with contextlib.suppress(OSError):
        lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
        told = {name.strip(): value.strip() for name, _, value in reversed(lines)}
        return told.get("vendor_id", ""), int(told.get("cpu family", 0))
    return "", 0


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled kernels, from the cache or compiled now.

    Raises:
        CpuKernelsUnavailable: no compiler, or one that fails.
    """
    if not SOURCES.is_dir():
        raise CpuKernelsUnavailable(
            f"this build came without {SOURCES.name}/*.cpp: install the package from its sources"
        )
    compiler = _compiler()
    sources = sorted(SOURCES.glob("*.cpp"))
    path = _cache_folder() / f"cpu_{_key(compiler)}.so"
    try:
        return _loaded(path)
    except OSError:  # not there yet, or of another system
        _compile(compiler, sources, path)
    try:
        return _loaded(path)
    except OSError as error:
        raise CpuKernelsUnavailable(f"{path} was compiled by {compiler} and does not load ({error})") from error


def _compiler() -> str:
    named = os.environ.get("CXX")
    for name in [named] if named else ["c++", "g++", "clang++"]:
        if found := shutil.which(name):
            return found
    wanted = f"CXX = {named!r} is no program" if named else "there is no C++ compiler (c++, g++ or clang++)"
    raise CpuKernelsUnavailable(f"{wanted}: install one, or set ADVGRPO_KERNELS_CPU=off")


def _key(compiler: str) -> str:
    """Of all that decides the machine code."""
    digest = hashlib.sha256()
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + source.read_bytes())
    stat = os.stat(compiler)
    for word in (*FLAGS, *THREADED, compiler, stat.st_size, stat.st_mtime_ns, platform.machine(), _cpu_features()):
        digest.update(f"{word}\n".encode())
    return digest.hexdigest()[:24]


def _cpu_features() -> str:
    """What -march=native depends on, as the system tells it."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        known = ("flags", "Features", "model name", "CPU part")
        return "\n".join(sorted({line for line in lines if line.startswith(known)}))
    return platform.processor()


def _cache_folder() -> Path:
    """Where compiled kernels stay, or for this process alone where that cannot be written."""
    named = os.environ.get("ADVGRPO_KERNELS_CACHE")
    try:
        of_user = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(named or Path(of_user) / "advgrpo_kernels")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, RuntimeError) as error:  # the latter of a user without a home
        if named:
            raise CpuKernelsUnavailable(f"ADVGRPO_KERNELS_CACHE = {named!r} cannot be written ({error})") from error
        logger.info("no cache folder (%s): the CPU's kernels are compiled for this process alone", error)
        return Path(tempfile.mkdtemp(prefix="advgrpo_kernels_"))


def _compile(compiler: str, sources: list[Path], path: Path) -> None:
    """Write the library to `path`, with threads where the compiler has OpenMP."""
    logger.info("compiling the CPU's kernels with %s", compiler)
    said = ""
    for flags in (THREADED, ()):
        handle, made = tempfile.mkstemp(dir=path.parent, suffix=".so.part")
        os.close(handle)
        try:
            command = [compiler, *FLAGS, *flags, *map(str, sources), "-o", made]
            done = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST, check=False)
            if done.returncode == 0:
                os.chmod(made, 0o755)  # of a temporary file nobody else may read; the folder may be shared
                os.replace(made, path)
                return
            said = said or done.stderr.strip()
        except (OSError, subprocess.TimeoutExpired) as error:
            said = said or str(error)
        finally:
            Path(made).unlink(missing_ok=True)
    first = next(
        (line for line in said.splitlines() if "error" in line), said.splitlines()[0] if said else "no message"
    )
    raise CpuKernelsUnavailable(
        f"{compiler} does not compile the CPU's kernels ({first}): name another compiler by CXX, or set "
        "ADVGRPO_KERNELS_CPU=off"
    )


def _loaded(path: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(path))
    for name, arguments in SIGNATURES.items():
        function = getattr(loaded, f"advgrpo_{name}")
        function.argtypes, function.restype = arguments, None
    return loaded

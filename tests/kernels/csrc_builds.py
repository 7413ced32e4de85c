"""Builds of csrc/ for tests: by nvcc for sm_90, and by the C++ compiler for the CPU (`cuda_on_cpu/cuda_on_cpu.h`)."""

import functools
import importlib.util
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
SHIM = Path(__file__).parent / "cuda_on_cpu" / "cuda_on_cpu.h"
LAUNCH = re.compile(r"(\w+(?:<\w+>)?)<<<([^,]+), (\w+), 0, \w+>>>\((.*?)\);", re.S)


@functools.cache
def _folder() -> Path:
    folder = tempfile.TemporaryDirectory(prefix="advgrpo_csrc_")
    _folder.keep = folder  # removed when the process ends
    return Path(folder.name)


def build_module():
    """csrc/build.py, the script that setup.py runs."""
    spec = importlib.util.spec_from_file_location("csrc_build", CSRC / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def nvcc_build() -> tuple[Path, str]:
    """(library, report of registers and spills) for sm_90; skips the test without nvcc."""
    builder = build_module()
    try:
        builder.find_nvcc()
    except RuntimeError as error:
        pytest.skip(str(error))
    target = _folder() / "sm_90.so"
    return target, builder.build(target, "90")


@functools.cache
def cpu_build() -> Path:
    """The same sources compiled for this CPU; skips the test without g++."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to compile csrc/ for the CPU")
    folder, sources = _folder(), []
    for source in sorted(CSRC.glob("*.cu*")):
        text = re.sub(r"#include <cuda_\w+\.h>\n", "", source.read_text())
        text = LAUNCH.sub(r"on_cpu::launch(dim3(\2), \3, [=] { \1(\4); });", text)
        target = folder / (source.name if source.suffix == ".cuh" else f"{source.stem}.cpp")
        target.write_text(text)
        sources += [str(target)] if target.suffix == ".cpp" else []
    flags = ["-std=c++20", "-O1", "-w", "-fPIC", "-shared", "-ffp-contract=off", "-include", str(SHIM)]
    library = folder / "cpu.so"
    subprocess.run([compiler, *flags, *sources, "-o", str(library)], check=True)
    return library

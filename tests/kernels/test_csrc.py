"""The CUDA library of csrc/: its build, its machine code and its interface, without a GPU.

What the kernels compute is tested in test_merge_lora.py and test_multi_tensor_adamw.py.

Planted bugs that turned this file red: generic loads; registers squeezed into spills; packs aligned to 4 bytes; a
failed build passes; build not made though asked for; launcher not exported; wrong first block in the table.
"""

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from advgrpo_kernels.ops import _csrc
from tests.kernels.csrc_builds import CSRC, build_module, nvcc_build

# Registers per thread, and the least number of 128-bit loads and stores: one per streaming tensor.
BUDGETS = {
    "merge_lora_kernelI13__nv_bfloat16": (128, 8, 4),  # W for 4 rows, A; out for 4 rows
    "merge_lora_kernelI6__half": (128, 8, 4),
    "merge_lora_kernelIf": (128, 8, 8),
    "square_sums_kernel": (32, 8, 0),
    "adam_state_kernel": (40, 0, 0),
    "adam_update_kernel": (64, 5, 4),
}


def kernel_named(name, found):
    (key,) = [key for key in found if name in key]
    return found[key]


@pytest.mark.parametrize("kernel", BUDGETS)
@pytest.mark.weekly
def test_no_spills_and_registers_within_budget(kernel):
    _, report = nvcc_build()
    pattern = r"entry function '(\S+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
    found = {name: tuple(map(int, numbers)) for name, *numbers in re.findall(pattern, report, re.S)}
    assert len(found) == len(BUDGETS)
    stores, loads, registers = kernel_named(kernel, found)
    assert (stores, loads) == (0, 0)
    assert registers <= BUDGETS[kernel][0]


@pytest.fixture(scope="module")
def machine_code():
    """SASS by kernel."""
    library, _ = nvcc_build()
    triton = importlib.util.find_spec("triton")
    folders = [Path(triton.origin).parent / "backends/nvidia/bin"] if triton else []
    path = os.pathsep.join([*map(str, folders), os.environ["PATH"]])
    tool = shutil.which("cuobjdump", path=path)
    if tool is None:
        pytest.skip("no cuobjdump")
    text = subprocess.run([tool, "-sass", str(library)], capture_output=True, text=True, check=True).stdout
    parts = re.split(r"Function : (\S+)", text)
    return dict(zip(parts[1::2], parts[2::2]))


@pytest.mark.weekly
@pytest.mark.parametrize("kernel", BUDGETS)
def test_streaming_tensors_are_read_and_written_128_bits_at_a_time(kernel, machine_code):
    sass = kernel_named(kernel, machine_code)
    _, loads, stores = BUDGETS[kernel]
    assert len(re.findall(r"\bLDG\.E\.128\b", sass)) >= loads
    assert len(re.findall(r"\bSTG\.E\.128\b", sass)) >= stores
    assert re.findall(r"\b(?:LD|ST)\.E\S*|\b(?:LDL|STL)\S*", sass) == [], "generic or local memory"


def test_launch_without_a_driver_returns_its_error(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is a driver")
    path, _ = nvcc_build()
    monkeypatch.setenv("ADVGRPO_KERNELS_LIBRARY", str(path))
    _csrc.library.cache_clear()
    try:
        loaded = _csrc.library()
        assert loaded.advgrpo_merge_lora_rows_per_block() == 32
        assert loaded.advgrpo_multi_tensor_adamw_elements_per_block() == 8192
        assert loaded.advgrpo_merge_lora(None, None, 1, 2, None) == 35
        assert loaded.advgrpo_merge_lora(None, None, 1, 7, None) == 1  # unknown dtype, nothing launched
        assert loaded.advgrpo_multi_tensor_adamw(*[None] * 2, 1, *[None] * 3, *[0.5] * 7, None) == 35
        with pytest.raises(ctypes.ArgumentError):
            loaded.advgrpo_merge_lora(None, None, 1, "half", None)
        with pytest.raises(RuntimeError, match="cudaError 35"):
            _csrc.check_launch("merge_lora", 35)
    finally:
        _csrc.library.cache_clear()


def test_only_the_launchers_are_exported():
    path, _ = nvcc_build()
    if shutil.which("nm") is None:
        pytest.skip("no nm")
    text = subprocess.run(["nm", "-D", "--defined-only", str(path)], capture_output=True, text=True, check=True).stdout
    ours = {line.split()[-1] for line in text.splitlines() if "advgrpo" in line}
    assert ours == {
        "advgrpo_merge_lora",
        "advgrpo_merge_lora_rows_per_block",
        "advgrpo_multi_tensor_adamw",
        "advgrpo_multi_tensor_adamw_elements_per_block",
    }


def setup_arguments(**variables):
    """Runs setup.py's decision in a process of its own."""
    code = (
        "import setuptools, runpy; setuptools.setup = lambda **arguments: print(sorted(arguments))\n"
        f"runpy.run_path({str(CSRC.parent / 'setup.py')!r})"
    )
    environment = {**os.environ, **variables}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_setup_builds_only_when_asked():
    assert setup_arguments(ADVGRPO_BUILD_CUDA="0") == "[]"
    assert setup_arguments(ADVGRPO_BUILD_CUDA="1") == "['cmdclass', 'ext_modules']"


def test_a_build_that_was_asked_for_raises_where_it_cannot_be_made(monkeypatch, tmp_path):
    builder = build_module()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(RuntimeError, match="no nvcc in"):
        builder.build(tmp_path / "x.so")
    broken = tmp_path / "bin" / "nvcc"
    broken.parent.mkdir()
    broken.write_text("#!/bin/sh\necho broken toolkit; exit 3\n")
    broken.chmod(0o755)
    with pytest.raises(RuntimeError, match="broken toolkit"):
        builder.build(tmp_path / "x.so")


def test_choice_of_backend(monkeypatch, tmp_path):
    _csrc.library.cache_clear()
    try:
        monkeypatch.setattr(_csrc, "PACKAGE", tmp_path)
        monkeypatch.delenv("ADVGRPO_KERNELS_LIBRARY", raising=False)
        assert _csrc.library() is None
        assert _csrc.pick_cuda_backend("auto", torch.zeros(1)) == "torch"
        with pytest.raises(RuntimeError, match="needs CUDA tensors and a build"):
            _csrc.pick_cuda_backend("cuda", torch.zeros(1))
        with pytest.raises(ValueError, match="backend must be one of"):
            _csrc.pick_cuda_backend("triton", torch.zeros(1))
        _csrc.library.cache_clear()
        monkeypatch.setenv("ADVGRPO_KERNELS_LIBRARY", str(tmp_path / "missing.so"))
        with pytest.raises(OSError, match=r"missing\.so"):
            _csrc.library()
    finally:
        _csrc.library.cache_clear()


class Stream:
    """Remembers what it is told to wait for."""

    def __init__(self):
        self.waited = []

    def wait_event(self, event):
        self.waited.append(event)


def test_a_table_is_used_on_another_stream_after_its_upload_and_outlives_that_use():
    table = _csrc.Table([[11, 0]], [1], 1, torch.device("cpu"))
    home, other, recorded = Stream(), Stream(), []
    tensor = SimpleNamespace(record_stream=recorded.append)
    table._stream, table._uploaded, table.rows, table.of_block = home, "uploaded", tensor, tensor
    cache = _csrc.TableCache()
    for stream in (None, home):
        assert cache.get("key", lambda: table, stream=stream) is table
    assert home.waited == recorded == []
    cache.get("key", None, stream=other)
    assert other.waited == ["uploaded"]
    assert recorded == [other, other]


def test_tables():
    table = _csrc.Table([[11, 0, 12], [21, 0, 22], [31, 0, 32]], [2, 1, 3], 1, torch.device("cpu"))
    assert table.rows.view(3, 3).tolist() == [[11, 0, 12], [21, 2, 22], [31, 3, 32]]
    assert table.of_block.tolist() == [0, 0, 1, 2, 2, 2]
    cache, built = _csrc.TableCache(), []
    for key in [*range(_csrc.TABLES_KEPT), 0, "new", 0, 1]:
        cache.get(key, lambda key=key: built.append(key) or f"table {key}")
    assert built == [*range(_csrc.TABLES_KEPT), "new", 1]  # 0 was used again, so 1 was the oldest
    assert cache.get(1, None, capturing=True) == "table 1"
    with pytest.raises(RuntimeError, match="once with the same tensors before capturing"):
        cache.get("other", None, capturing=True)
    for key in range(100, 200):
        cache.get(key, object)
    assert cache._captured == ["table 1"]

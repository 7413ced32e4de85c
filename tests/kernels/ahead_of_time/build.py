"""Compile every spec for sm_90 without a GPU and print what the compiler made of it, as JSON.

Run as a script in a process of its own: Triton's interpreter, which the other tests use, cannot share one.

    python build.py                   the measurements as JSON
    python build.py --budget NAME..   set the budgets of the named specs from what was just measured (read the diff!)
"""

import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
BUDGETS = HERE / "budgets.json"
sys.path[:0] = [str(HERE), str(HERE.parents[2] / "kernels")]

import triton  # noqa: E402
from spec import Spec  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia.compiler import get_ptxas  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

VECTOR = r"\.v4\.[bf]32|\.v2\.[bfu]64|\.v8\.[bf]16"


def load_specs() -> list[Spec]:
    modules = sorted(path.stem for path in HERE.glob("*_specs.py"))
    return [spec for module in modules for spec in importlib.import_module(module).SPECS]


def compile_spec(spec: Spec) -> triton.compiler.CompiledKernel:
    module, attribute = spec.kernel.split(":")
    kernel = getattr(importlib.import_module(module), attribute)
    unknown = (spec.types.keys() | spec.constants.keys()) ^ set(kernel.arg_names)
    if unknown:
        raise ValueError(f"{spec.name}: types and constants must list the kernel's arguments; differs in {unknown}")
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        kind = spec.types.get(name, "constexpr")
        signature[name] = kind.removesuffix(":16")
        if kind == "constexpr":
            constants[(i,)] = spec.constants[name]
        elif kind.startswith("*") or kind.endswith(":16"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    options = {"num_warps": spec.warps, "enable_fp_fusion": True}
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def measure(spec: Spec) -> dict[str, int]:
    compiled = compile_spec(spec)
    ptx = compiled.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [get_ptxas(90).path, "-v", "-arch=sm_90a", str(source), "-o", str(source.with_suffix(".cubin"))]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    loads = re.findall(r"ld\.global\S*", ptx)
    stores = re.findall(r"st\.global\S*", ptx)
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global [^;]*, (?:0x)?([0-9a-f]+)", ptx)
    wide_copies = sum(size in ("16", "10") for size in copies)
    wide_loads, wide_stores = (sum(bool(re.search(VECTOR, name)) for name in names) for names in (loads, stores))
    return {
        "registers": int(re.search(r"Used (\d+) registers", report)[1]),
        "spill_bytes": sum(map(int, re.findall(r"(\d+) bytes spill", report))),
        "entries": ptx.count(".entry "),
        "vector_loads": wide_loads + wide_copies,
        "vector_stores": wide_stores,
        "narrow_accesses": len(loads) - wide_loads + len(copies) - wide_copies + len(stores) - wide_stores,
        "tensor_core_instructions": compiled.asm["sass"].count("HGMMA") if spec.has_dot else 0,
    }


def measure_or_error(spec: Spec) -> dict[str, int | str]:
    try:
        return measure(spec)
    except Exception as error:  # one broken kernel must not hide the others; the test fails on the text
        return {"error": f"{type(error).__name__}: {error}"}


def write_budgets(names: list[str]) -> None:
    """Registers are allocated in eights; one step of eight is left for other compiler versions."""
    specs = {spec.name: spec for spec in load_specs()}
    budgets = json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}
    for name in names:
        measured = measure(specs[name])
        registers = min(255, 8 * (measured["registers"] // 8 + 2))
        budgets[name] = {"registers": registers, "narrow_accesses": measured["narrow_accesses"] + 2}
    BUDGETS.write_text(json.dumps(dict(sorted(budgets.items())), indent=2) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--budget"]:
        write_budgets(sys.argv[2:])
    else:
        print(json.dumps({spec.name: measure_or_error(spec) for spec in load_specs()}, indent=2))

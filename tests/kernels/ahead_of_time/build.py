"""Compile every spec for sm_90 without a GPU and print what the compiler made of it, as JSON.

Run as a script in a process of its own: Triton's interpreter, which the other tests use, cannot share one.

    python build.py NAME..            the measurements of the named specs as JSON
    python build.py --budget NAME..   set the budgets of the named specs from what was just measured (read the diff!)
"""

import importlib
import inspect
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
from triton.backends import compiler as triton_backends  # noqa: E402
from triton.backends.nvidia import compiler as nvidia  # noqa: E402
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
    signature, constants, aligned = {}, {}, []
    for i, name in enumerate(kernel.arg_names):
        kind = spec.types.get(name, "constexpr")
        signature[name] = kind.removesuffix(":16")
        if kind == "constexpr":
            constants[i] = spec.constants[name]
        elif kind.startswith("*") or kind.endswith(":16"):
            aligned.append(i)
    options = {"num_warps": spec.warps, "enable_fp_fusion": True}
    target = triton_backends.GPUTarget("cuda", 90, 32)
    return triton.compile(_source(kernel, signature, constants, aligned), target=target, options=options)


def _source(kernel, signature: dict[str, str], constants: dict[int, object], aligned: list[int]) -> ASTSource:
    """What to compile, in the form this version of Triton takes: by position since 3.3, by name before."""
    if not hasattr(triton_backends, "AttrsDescriptor"):
        attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
        return ASTSource(kernel, signature, {(i,): value for i, value in constants.items()}, attributes)
    attributes = triton_backends.AttrsDescriptor.from_hints(dict.fromkeys(aligned, 16))
    named = {kernel.arg_names[i]: value for i, value in constants.items()}
    # A pointer that is None is an argument like any other there, a constant of the type *i8.
    types = {parameter.name: signature[parameter.name] for parameter in kernel.params if not parameter.is_constexpr}
    return ASTSource(kernel, {k: "*i8" if v == "constexpr" else v for k, v in types.items()}, named, attributes)


def _ptxas() -> str:
    """The assembler inside the Triton wheel, which knows the PTX that this Triton writes."""
    find = getattr(nvidia, "get_ptxas", None)
    if find and "arch" in inspect.signature(find).parameters:  # a wheel may have two; 3.3 gives (path, version)
        tool = find(90)
        return tool[0] if isinstance(tool, tuple) else tool.path
    return str(Path(nvidia.__file__).parent / "bin" / "ptxas")


def measure(spec: Spec) -> dict[str, int]:
    compiled = compile_spec(spec)
    ptx = compiled.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [_ptxas(), "-v", "-arch=sm_90a", str(source), "-o", str(source.with_suffix(".cubin"))]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    loads = re.findall(r"ld\.global\S*", ptx)
    stores = re.findall(r"st\.global\S*", ptx)
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global [^;]*, (?:0x)?([0-9a-f]+)", ptx)
    wide_copies = sum(size in ("16", "10") for size in copies)
    wide_loads, wide_stores = (sum(bool(re.search(VECTOR, name)) for name in names) for names in (loads, stores))
    sass = compiled.asm["sass"] if spec.has_dot or spec.elements else ""
    counted = {"instructions": round(instructions(sass) / spec.elements, 2)} if spec.elements else {}
    return counted | {
        "registers": int(re.search(r"Used (\d+) registers", report)[1]),
        "spill_bytes": sum(map(int, re.findall(r"(\d+) bytes spill", report))),
        "entries": ptx.count(".entry "),
        "vector_loads": wide_loads + wide_copies,
        "vector_stores": wide_stores,
        "narrow_accesses": len(loads) - wide_loads + len(copies) - wide_copies + len(stores) - wide_stores,
        "tensor_core_instructions": sass.count("HGMMA"),
    }


def instructions(sass: str) -> int:
    """Of one thread, in a turn of its longest loop where it has one: what is behind its end and its branches left
    out."""
    names, labels, turns = [], {}, []
    for line in sass.splitlines():
        if label := re.match(r"(\w+):$", line):
            labels[label[1]] = len(names)
        elif found := re.match(r"[-0-9A-Z:]+\t(?:@!?U?P\w+ )?([A-Z][A-Z0-9_]+)(?: (\w+))?", line):
            if found[1] == "BRA" and found[2] in labels:
                turns.append(names[labels[found[2]] :])
            elif found[1] not in ("NOP", "BRA", "EXIT"):
                names.append(found[1])
    return len(max(turns, key=len, default=[])) or len(names)


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
        if "instructions" in measured:
            budgets[name]["instructions"] = measured["instructions"]
    BUDGETS.write_text(json.dumps(dict(sorted(budgets.items())), indent=2) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--budget"]:
        write_budgets(sys.argv[2:])
    else:
        specs = [spec for spec in load_specs() if spec.name in sys.argv[1:]]
        print(json.dumps({spec.name: measure_or_error(spec) for spec in specs}, indent=2))

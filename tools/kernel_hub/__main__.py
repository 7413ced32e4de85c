"""Write the repository of the Hugging Face kernel hub that `kernels/advgrpo_kernels` is there.

    python -m tools.kernel_hub FOLDER [--repo-id ORGANISATION/NAME]

What `kernel-builder` builds from (build.toml, flake.nix, CARD.md, torch-ext, tests, benchmarks), and in build/ the
variants that the package `kernels` loads. The sources are copied as they are: they import each other relatively and
register their ops through `_ops.add_op_namespace_prefix`, so a build only brings an `_ops.py` of its own. Its name is a
hash of the sources: the same sources give the same build, others another name.
"""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import json
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "kernels/advgrpo_kernels"
FILES = Path(__file__).parent / "files"
NAME = "advgrpo-kernels"
MODULE = NAME.replace("-", "_")
VERSION = 1  # of the public functions, as the hub counts: a new one when a call that worked no longer does
BACKENDS = ("cpu", "cuda")
UNPUBLISHED = f"local/{NAME}"
# They replace functions of other codebases by the import name of this package, which a kernel of the hub has not; and
# the builder brings an _ops.py of its own.
LEFT_OUT = ("integrations", "patch.py", "_ops.py")

OPS = '''"""The name under which the ops of this build are registered."""

import torch

_OPS_NAME = "{identifier}"
ops = getattr(torch.ops, _OPS_NAME)


def add_op_namespace_prefix(op_name: str) -> str:
    """`op_name` in the namespace of this build."""
    return f"{{_OPS_NAME}}::{{op_name}}"
'''


def sources(package: Path) -> dict[str, bytes]:
    """Every Python file of the package that belongs in a kernel, by its path in the package.

    Raises:
        ValueError: a file imports itself or another by an absolute name, which a kernel of the hub does not have.
    """
    paths = [path for path in sorted(package.rglob("*.py")) if path.relative_to(package).parts[0] not in LEFT_OUT]
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            else:
                continue
            if any(name.split(".")[0] == package.name for name in names):
                raise ValueError(f"{path}:{node.lineno} imports {package.name} by name: write it relatively")
    return {path.relative_to(package).as_posix(): path.read_bytes() for path in paths}


def identity(files: dict[str, bytes]) -> str:
    """Eight hexadecimal digits of all names and contents."""
    digest = hashlib.sha256()
    for name, content in sorted(files.items()):
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:8]


def metadata(identifier: str, backend: str, files: dict[str, bytes]) -> str:
    """metadata.json of a variant, as `kernels` reads it."""
    digests = {name: base64.b64encode(hashlib.sha256(content).digest()).decode() for name, content in files.items()}
    content = {
        "name": NAME,
        "id": identifier,
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": dict(sorted(digests.items()))},
    }
    return json.dumps(content, indent=2) + "\n"


def first_paragraph(node: ast.FunctionDef | ast.ClassDef) -> str:
    """Of a docstring, for a table."""
    text = (ast.get_docstring(node) or "").split("\n\n")[0].replace("\n", " ")
    return text.replace("|", "\\|")


def tables(files: dict[str, bytes]) -> dict[str, str]:
    """The card's lists of functions and layers, from the sources."""
    nodes = {}
    for name, content in files.items():
        for node in ast.parse(content).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):  # the last of a name: stubs of overloads go before it
                nodes["layers" if name == "layers.py" else "", node.name] = node
    init = ast.parse(files["__init__.py"])
    public = next(ast.literal_eval(n.value) for n in init.body if isinstance(n, ast.Assign))  # __all__
    functions = [n for n in public if n.islower() and not n.endswith("_ref") and n != "layers"]
    rows = {
        "functions": ("function", [(n, nodes["", n]) for n in functions]),
        "layers": ("layer", [(n, node) for (where, n), node in nodes.items() if where and not n.startswith("_")]),
    }
    return {
        key: "\n".join([f"| {title} | |", "|---|---|", *(f"| `{n}` | {first_paragraph(node)} |" for n, node in found)])
        for key, (title, found) in rows.items()
    }


def loading(repo_id: str) -> str:
    """How a reader of the card gets at the kernel."""
    if repo_id == UNPUBLISHED:
        call = 'get_local_kernel(Path("PATH/OF/THIS/FOLDER"))  # not on the hub: generated without --repo-id'
        return f"from pathlib import Path\n\nimport torch\nfrom kernels import get_local_kernel\n\n{MODULE} = {call}"
    call = f'get_kernel("{repo_id}", version={VERSION}, trust_remote_code=["{repo_id}"])'
    return f"import torch\nfrom kernels import get_kernel\n\n{MODULE} = {call}"


def requirements() -> str:
    """What the distribution asks for, as its pyproject.toml has it."""
    text = (PACKAGE.parent / "pyproject.toml").read_text()
    bounds = re.findall(r"""^(?:requires-)?\W*(python|torch|triton)(?: = ")?([<>=][^"';]+)""", text, re.MULTILINE)
    return ", ".join(f"{name} {bound}" for name, bound in bounds)


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def generate(folder: Path, *, repo_id: str = UNPUBLISHED, package: Path = PACKAGE) -> dict[str, str]:
    """Write the repository into `folder`, which must be empty or absent; the id of the build of each backend.

    Raises:
        FileExistsError: there is something in `folder`.
        ValueError: the package has something in it that a kernel may not have.
    """
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty: give another folder, or remove it")
    kernel = sources(package)
    unique = identity(kernel)
    filled = {
        "repo_id": repo_id,
        "version": str(VERSION),
        "load": loading(repo_id),
        "requirements": requirements(),
        **tables(kernel),
    }
    for path in sorted(p for p in FILES.rglob("*") if p.is_file() and "__pycache__" not in p.parts):
        text = path.read_text()
        for key, value in filled.items():
            text = text.replace(f"@{key}@", value)
        write(folder, {path.relative_to(FILES).as_posix(): text.encode()})
    shutil.copyfile(folder / "CARD.md", folder / "README.md")  # what the builder makes of the card: it has no blanks
    shutil.copyfile(ROOT / "LICENSE", folder / "LICENSE")
    write(folder / "torch-ext" / MODULE, kernel)
    identifiers = {}
    for backend in BACKENDS:
        identifiers[backend] = f"_{MODULE}_{backend}_{unique}"
        built = {**kernel, "_ops.py": OPS.format(identifier=identifiers[backend]).encode()}
        described = metadata(identifiers[backend], backend, built).encode()
        write(folder / "build" / f"torch-{backend}", {**built, "metadata.json": described})
    return identifiers


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.kernel_hub", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="to write into; empty or absent")
    parser.add_argument("--repo-id", default=UNPUBLISHED, help="ORGANISATION/NAME that it will have on the hub")
    arguments = parser.parse_args()
    try:
        identifiers = generate(arguments.folder, repo_id=arguments.repo_id)
    except (FileExistsError, ValueError) as error:
        parser.error(str(error))
    print(f"{arguments.folder}: {', '.join(identifiers.values())}")


if __name__ == "__main__":
    main()

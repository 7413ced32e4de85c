"""Pages of the site that are not files of docs/: documents from elsewhere in the repository, and the API reference.

The reference is made by walking the packages, so a module that is added, moved or renamed needs no edit here. Left out
are modules whose name begins with an underscore.
"""

from collections.abc import Iterator
from pathlib import Path

import mkdocs_gen_files

ROOT = Path(__file__).parents[2]
PACKAGES = (ROOT / "kernels" / "advgrpo_kernels", ROOT / "advgrpo")


def modules(package: Path) -> Iterator[Path]:
    """Files of the public modules, a package's own first, then its contents by name."""
    for path in sorted(package.rglob("*.py"), key=lambda path: (path.parent / path.stem.replace("__init__", "")).parts):
        names = path.relative_to(package).with_suffix("").parts
        hidden = any(name.startswith("_") and name != "__init__" for name in names)
        if not hidden and path.read_text().strip():
            yield path


def write_reference() -> None:
    nav = mkdocs_gen_files.Nav()
    for package in PACKAGES:
        for path in modules(package):
            names = path.relative_to(package.parent).with_suffix("").parts
            own = names[-1] == "__init__"
            names = names[:-1] if own else names
            page = "/".join(names) + ("/index.md" if own else ".md")
            nav[names] = page
            with mkdocs_gen_files.open(f"reference/{page}", "w") as file:
                file.write(f"::: {'.'.join(names)}\n")
    with mkdocs_gen_files.open("reference/SUMMARY.md", "w") as file:
        file.writelines(nav.build_literate_nav())


def copy_documents() -> None:
    """Links in them are mended by links.py, which knows where they come from."""
    for page, document in mkdocs_gen_files.config.extra["documents"].items():
        with mkdocs_gen_files.open(page, "w") as file:
            file.write((ROOT / document).read_text())


write_reference()
copy_documents()

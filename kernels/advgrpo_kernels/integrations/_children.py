"""The same for the Python programs that a launched one starts: Ray's workers, spawned processes, scripts of a shell.

A folder in front of PYTHONPATH holds a `sitecustomize`, which every Python program imports as it starts. It waits for a
module of the peer; only then this package, and torch with it, is imported and the hook is installed.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

_FOLDER = "ADVGRPO_KERNELS_CHILDREN"  # environment variable: where the children leave word
_SITE = '''"""Written by `python -m advgrpo_kernels.patch --children`: patches {peer} in the programs that it starts."""
import importlib.util, os, sys

class WaitForPeer:
    def find_spec(self, name, path=None, target=None):
        if any(("." + name).endswith("." + known) for known in {known!r}):
            sys.meta_path.remove(self)
            from advgrpo_kernels.integrations._launcher import Session
            return Session({peer!r}, {modules!r}, {blocks!r}).install().find_spec(name, path, target)

sys.meta_path.insert(0, WaitForPeer())
here = os.path.dirname(os.path.abspath(__file__))
for folder in [entry for entry in sys.path if os.path.abspath(entry or ".") != here]:  # the one that this one hides
    other = os.path.join(folder, "sitecustomize.py")
    if os.path.isfile(other):
        spec = importlib.util.spec_from_file_location("sitecustomize", other)
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
        break
'''


def prepare(peer: str, targets: Sequence, modules: Sequence[str], blocks: bool) -> None:
    """Have the programs started from now on patch `peer` for as long as this one runs."""
    folder = tempfile.mkdtemp(prefix="advgrpo-kernels-")
    process = os.getpid()
    atexit.register(lambda: os.getpid() == process and shutil.rmtree(folder, ignore_errors=True))
    known = tuple(name for target in targets for name in target.modules) + tuple(modules)
    text = _SITE.format(peer=peer, known=known, modules=tuple(modules), blocks=blocks)
    Path(folder, "sitecustomize.py").write_text(text)
    rest = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = folder if not rest else f"{folder}{os.pathsep}{rest}"
    os.environ[_FOLDER] = folder


def note_replaced() -> None:
    """Leave word for the program that started this one."""
    folder = os.environ.get(_FOLDER)
    if folder and os.path.isdir(folder):
        Path(folder, f"replaced-{os.getpid()}").touch()


def any_replaced() -> bool:
    """Whether this program or one that it started has replaced something."""
    folder = os.environ.get(_FOLDER)
    return bool(folder) and any(Path(folder).glob("replaced-*"))

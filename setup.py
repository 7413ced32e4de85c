"""The project is described in pyproject.toml; this adds the optional CUDA library.

Without ADVGRPO_BUILD_CUDA=1 the wheel is pure Python. With it, csrc/ is compiled by nvcc alone, so isolated builds need
no torch, and a build that cannot compile raises.
"""

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = Path(__file__).resolve().parent / "csrc"


class BuildCuda(build_ext):
    def build_extension(self, extension: Extension) -> None:
        sys.path.insert(0, str(CSRC))
        from build import build

        print(build(Path(self.get_ext_fullpath(extension.name))))


def extension_arguments() -> dict:
    if os.environ.get("ADVGRPO_BUILD_CUDA", "0") != "1":
        return {}
    sources = sorted(str(path.relative_to(CSRC.parent)) for path in CSRC.glob("*.cu"))
    return {"ext_modules": [Extension("advgrpo_kernels._cuda", sources)], "cmdclass": {"build_ext": BuildCuda}}


setup(**extension_arguments())

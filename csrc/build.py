"""Compile csrc/*.cu to one shared library by nvcc alone; torch is not needed.

    python csrc/build.py TARGET.so [ARCHITECTURES]      then ADVGRPO_KERNELS_LIBRARY=TARGET.so

ARCHITECTURES, or ADVGRPO_CUDA_ARCHITECTURES: compute capabilities such as "80;90" (the default). Machine code for each,
and PTX of the last for newer GPUs.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
SOURCES = sorted(FOLDER.glob("*.cu"))


def find_nvcc() -> str:
    """CUDA_HOME's nvcc, else the one on the path.

    Raises:
        RuntimeError: there is none.
    """
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = shutil.which("nvcc", path=str(Path(home) / "bin")) if home else shutil.which("nvcc")
    if found is None:
        raise RuntimeError(
            f"no nvcc in {Path(home) / 'bin'}" if home else "no nvcc on the path: set CUDA_HOME to a CUDA toolkit"
        )
    return found


def build(target: Path, architectures: str | None = None) -> str:
    """Compile into `target`; returns the compiler's report on registers and spills.

    Raises:
        RuntimeError: no nvcc, or it failed; its messages are in the error.
    """
    wanted = architectures or os.environ.get("ADVGRPO_CUDA_ARCHITECTURES") or "80;90"
    numbers = [number for number in wanted.replace(",", ";").split(";") if number]
    code = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in numbers]
    code.append(f"-gencode=arch=compute_{numbers[-1]},code=compute_{numbers[-1]}")
    flags = ["-O3", "-std=c++17", "-Xptxas=-v", "-Xcompiler=-fPIC,-fvisibility=hidden", "-shared", "-cudart=static"]
    target.parent.mkdir(parents=True, exist_ok=True)
    command = [find_nvcc(), *flags, *code, *map(str, SOURCES), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    report = done.stdout + done.stderr
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{report}")
    return report


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    print(build(Path(sys.argv[1]), *sys.argv[2:]))

#!/usr/bin/env bash
# tests/kernels in environments of their own: `matrix.sh PYTHON:TORCH:TRITON:DIFFUSERS...` (see `make kernels-matrix`),
# where DIFFUSERS are packages for the tests of the integrations, separated by commas.
#
# Each lane is installed once under .matrix/ and kept. A lane whose Python is not found is reported and left out; the
# script fails if the tests of a lane fail, or if no lane ran.
set -uo pipefail
cd "$(dirname "$0")/../.." || exit 1

ran=0 failed=0
for lane in "$@"; do
  IFS=: read -r python torch triton diffusers <<<"$lane"
  IFS=, read -ra packages <<<"$diffusers"
  if ! command -v "$python" >/dev/null; then
    echo "torch $torch, triton $triton: left out, there is no $python"
    continue
  fi
  home=.matrix/${python##*/}-torch-$torch
  if [ ! -e "$home/installed" ]; then
    echo "torch $torch, triton $triton: installing into $home"
    "$python" -m venv "$home" &&
      "$home/bin/python" -m pip install --quiet "torch==$torch" "triton==$triton" "numpy<3" packaging pytest \
        "setuptools>=77,<83" "${packages[@]}" && touch "$home/installed" || exit 1
  fi
  "$home/bin/python" -c 'import platform, torch, triton
print(f"python {platform.python_version()}, torch {torch.__version__}, triton {triton.__version__}:")'
  OMP_NUM_THREADS=1 "$home/bin/python" -m pytest tests/kernels -q -p no:cacheprovider || failed=1
  ran=$((ran + 1))
done
[ "$ran" -gt 0 ] && [ "$failed" -eq 0 ]

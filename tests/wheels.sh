#!/usr/bin/env bash
# Build both wheels into dist/, from the tracked files alone, and use each in an environment of its own, far from here.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

mkdir "$work/source"
git ls-files -z | xargs -0 cp --parents -t "$work/source"
"$python" -m venv "$work/train"
"$python" -m venv "$work/kernels"
rm -rf dist
"$work/train/bin/python" -m pip wheel --quiet --no-deps --wheel-dir dist "$work/source" "$work/source/kernels"
ls -l dist
dist=$PWD/dist
cd "$work"

echo "advgrpo: install, import, --help, one iteration of the embedded model"
train/bin/python -m pip install --quiet "$(echo "$dist"/advgrpo-*.whl)[train]"
train/bin/python -c 'import advgrpo, advgrpo_kernels
print(advgrpo.__file__)
assert "site-packages" in advgrpo.__file__ and "site-packages" in advgrpo_kernels.__file__'
train/bin/python -m advgrpo.train --help >/dev/null
OMP_NUM_THREADS=1 train/bin/python -m advgrpo.train --iterations 1 --data.held-out-prompts= --output-dir run >train.log 2>&1 || { cat train.log; exit 1; }
test -f run/lora/pytorch_lora_weights.safetensors

echo "advgrpo-kernels: install, import"
kernels/bin/python -m pip install --quiet "$dist"/advgrpo_kernels-*.whl
kernels/bin/python -c 'import advgrpo_kernels, advgrpo_kernels.patch, importlib.util
print(advgrpo_kernels.__file__)
assert "site-packages" in advgrpo_kernels.__file__
assert importlib.util.find_spec("advgrpo") is None'
echo "both wheels work"

#!/usr/bin/env bash
# Everything worth doing with a GPU for half an hour, each step with its own log and none stopping the others:
#   OUT=/path/for/results bench/gpu_session.sh [test|sanitize|bench|step|profile]...      default: all, in this order
# The machine needs torch, triton, pytest, transformers, pydantic, matplotlib and rich (no diffusers, no network). Copy
# $OUT/<gpu>.json and $OUT/<gpu>-step.json to bench/results/ and commit them.
set -u
cd "$(dirname "$0")/.."
: "${OUT:?set OUT to a folder for logs and results}"
mkdir -p "$OUT"
export PYTHONPATH=.:kernels HF_HUB_OFFLINE=1
unset TRITON_INTERPRET
python=${PYTHON:-python}
status=0

step() {  # step NAME COMMAND...: run it, keep its log, report its exit status
    local name=$1 begin=$SECONDS code
    shift
    "$@" >"$OUT/$name.log" 2>&1
    code=$?
    echo "$name: exit $code after $((SECONDS - begin)) s; $(tail -n 1 "$OUT/$name.log")"
    [ "$code" -eq 0 ] || status=1
}

nvidia-smi -q -d CLOCK,POWER,PERFORMANCE >"$OUT/nvidia-smi.txt" 2>&1
"$python" -c 'import torch, triton; print(torch.__version__, triton.__version__, torch.cuda.get_device_name())' ||
    { echo "torch sees no GPU"; exit 1; }
gpu=$("$python" -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-"))')

if command -v nvcc >/dev/null || [ -n "${CUDA_HOME:-}" ]; then  # csrc/ is optional: without it its two ops are refused
    step build-csrc "$python" csrc/build.py "$OUT/advgrpo_cuda.so"
    [ -f "$OUT/advgrpo_cuda.so" ] && export ADVGRPO_KERNELS_LIBRARY="$OUT/advgrpo_cuda.so"
fi

[ $# -gt 0 ] || set -- test sanitize bench step profile
for part in "$@"; do
    case $part in
    test)
        step pytest-gpu "$python" -m pytest tests/kernels -q -m gpu -p no:cacheprovider
        ;;
    sanitize)  # every case once at tiny shapes; PyTorch's caching allocator would hide an access out of bounds
        if command -v compute-sanitizer >/dev/null; then
            for tool in memcheck racecheck initcheck; do
                step "sanitizer-$tool" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" \
                    --error-exitcode 9 "$python" -m bench.smoke --device cuda
            done
        else
            echo "sanitize: no compute-sanitizer on this machine, left out"
        fi
        ;;
    bench)
        step bench-kernels "$python" -m bench.kernels --device cuda --json "$OUT/$gpu.json"
        cat "$OUT/bench-kernels.log"
        for old in bench/results/"$gpu".json; do
            [ -f "$old" ] && step gate "$python" -m bench.gate "$old" "$OUT/$gpu.json"
        done
        ;;
    step)  # whole steps at full size against B0, random weights: the goals P1-P7, P12, P13 and the waterfall
        step bench-step "$python" -m bench.step --size full --device cuda --json "$OUT/$gpu-step.json" \
            --png "$OUT/$gpu-step.png"
        cat "$OUT/bench-step.log"
        ;;
    profile)  # P8 and P11, and a trace
        step bench-profile "$python" -m bench.profile --size full --device cuda --trace "$OUT/$gpu-trace.json"
        cat "$OUT/bench-profile.log"
        ;;
    *)
        echo "unknown part $part: test, sanitize, bench, step or profile"
        exit 2
        ;;
    esac
done
exit $status

#!/usr/bin/env bash
# Fifteen minutes with a lent GPU, in commands of ten at most; starting the machine takes one or two of them:
#
#   make gpu-carry                                       at home, once: wheels such a machine may lack, into .whl/ (not in git)
#   OUT=DIR bench/gpu_session.sh                         there: smoke and step, 9.5 minutes
#   OUT=DIR LIMIT=150 bench/gpu_session.sh profile       at once after it, while the machine is held
#
# and with another fifteen minutes, what is worth less:
#
#   OUT=DIR bench/gpu_session.sh smoke kernels
#   OUT=DIR LIMIT=150 bench/gpu_session.sh test          or: sanitize
#
# Parts run in the order they are named in, each within what is left of LIMIT, whatever became of those before it:
#
#   smoke     at most 3 min  does it run at all: csrc/ built, every op against float64 at real shapes, and tests/gpu:
#                            capture and replay of each kind of step, drift per attention backend, FP8, no wait of the host
#   step      the rest, 6 min  whole steps at full size over B0: P1-P7, P12, P13, then where the sampler's time goes
#   kernels   the rest, 5 min  every op over eager PyTorch, then over torch.compile: P9
#   profile   2 min  phases, kernels and idle time of an iteration, with a trace: P8, P11
#   test      the rest, 5 min  the whole tests/kernels and tests/runtime/test_graphs.py on the GPU; compiles hundreds of kernels
#   sanitize  the rest, 5 min  compute-sanitizer over every op at tiny shapes
#
# What the machine has to have: a CUDA GPU, python3 with torch, triton, pytest, numpy, transformers, matplotlib and rich;
# nvcc for csrc/. No network and no diffusers. The rest is carried: copy .whl/ along (3 MB of the tree), and it is
# unpacked here; or put it on PYTHONPATH, which is kept.
#
# What comes back in $OUT is at most eight files: session.log (everything, as it happens), logs.tar.gz (the same by step),
# check.json, <gpu>-step.json and .png, <gpu>-kernels.json, <gpu>-profile.json and <gpu>-trace.json.gz. Figures are written
# as they are found, so a command that is cut off loses only what it was measuring. Copy the JSON files to bench/results/.
#
# LIMIT   seconds this command may take (570)
# SMOKE   seconds of smoke, building and unpacking included where it comes first (180)
# DEVICE  cpu rehearses everything at small size, without a GPU
# ATTENTION  model.attention for step and profile
set -u
cd "$(dirname "$0")/.."
: "${OUT:?set OUT to a folder for logs and results}"
LIMIT=${LIMIT:-570} SMOKE=${SMOKE:-180} DEVICE=${DEVICE:-cuda} python=${PYTHON:-python3}
mkdir -p "$OUT"
work=$(mktemp -d)
mkdir "$work/logs"
exec > >(tee -a "$OUT/session.log") 2>&1
export PYTHONPATH=.:kernels${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=PASSIVE
[ "$DEVICE" = cuda ] && unset TRITON_INTERPRET
status=0

left() { echo $((LIMIT - SECONDS)); }

pack() { tar -czf "$work/logs.tar.gz" -C "$work" logs && mv "$work/logs.tar.gz" "$OUT/logs.tar.gz"; }
trap pack EXIT

step() {  # step NAME MOST COMMAND...: run it within MOST seconds and what is left of the limit, keep its log, report its status
    local name=$1 most=$2 begin=$SECONDS code seconds
    shift 2
    seconds=$(($(left) - 10))
    [ "$most" -lt "$seconds" ] && seconds=$most
    if [ "$seconds" -lt 5 ]; then
        echo "== $name: left out, it would have $seconds s ($(left) of $LIMIT are left)"
        status=1
        return
    fi
    echo "== $name, at most $seconds s"
    # As Ctrl-C: pytest then still prints the failures it has found.
    timeout --foreground --signal=INT --kill-after=5 "$seconds" "$@" 2>&1 | tee "$work/logs/$name.log"
    code=${PIPESTATUS[0]}
    echo "== $name: exit $code after $((SECONDS - begin)) s"
    [ "$code" -eq 0 ] || status=1
    pack
}

carried() {  # unpack .whl/ where the machine lacks what it holds
    "$python" -c 'import pydantic' 2>/dev/null && return
    ls .whl/*.whl >/dev/null 2>&1 || { echo "no pydantic here and no .whl/: run make gpu-carry and carry .whl/ along"; exit 1; }
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$work/site" .whl/*.whl ||
        exit 1
    export PYTHONPATH=$PYTHONPATH:$work/site
}

if [ "$DEVICE" = cuda ]; then
    size=full
    nvidia-smi -q -d CLOCK,POWER,PERFORMANCE >"$work/logs/nvidia-smi.txt" 2>&1
    "$python" -c 'import torch, triton; print(torch.__version__, triton.__version__, torch.cuda.get_device_name())' ||
        { echo "torch sees no GPU"; exit 1; }
    gpu=$("$python" -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-"))')
else
    size=small gpu=rehearsal
fi
carried

csrc() {  # csrc/ is optional: without it its two ops are refused
    local target=build/gpu/advgrpo_cuda.so
    [ "$DEVICE" = cuda ] || return
    if command -v nvcc >/dev/null || [ -n "${CUDA_HOME:-}" ]; then
        [ -f "$target" ] && [ -z "$(find csrc -newer "$target" -name '*.cu*')" ] || step build-csrc 60 "$python" csrc/build.py "$target"
        [ -f "$target" ] && export ADVGRPO_KERNELS_LIBRARY=$PWD/$target
    else
        echo "no nvcc: merge_lora and multi_tensor_adamw of csrc/ are refused"
    fi
}
csrc

[ $# -gt 0 ] || set -- smoke step
begun=0  # when this part began: the first one with the command
for part in "$@"; do
    case $part in
    smoke)  # the second half of its time, at least, is for tests/gpu; then it makes way for the figures
        ends=$((begun + SMOKE))
        step check-ops $(((ends - SECONDS) / 2)) "$python" -m bench.kernels --device "$DEVICE" --check --json "$OUT/check.json"
        marks="gpu"
        [ "$DEVICE" = cuda ] || marks="not gpu and not slow"
        step check-parts $((ends - SECONDS)) "$python" -m pytest tests/gpu -v -m "$marks" --durations=5 -p no:cacheprovider
        ;;
    step)
        step step "$LIMIT" "$python" -m bench.step --size $size --device "$DEVICE" --seconds $(($(left) - 40)) \
            ${ATTENTION:+--attention "$ATTENTION"} --json "$OUT/$gpu-step.json" --png "$OUT/$gpu-step.png"
        ;;
    kernels)
        step kernels "$LIMIT" "$python" -m bench.kernels --device "$DEVICE" --seconds $(($(left) - 40)) \
            --json "$OUT/$gpu-kernels.json"
        for old in bench/results/"$gpu"-kernels.json; do
            [ -f "$old" ] && step gate 20 "$python" -m bench.gate "$old" "$OUT/$gpu-kernels.json"
        done
        ;;
    profile)
        step profile "$LIMIT" "$python" -m bench.profile --size $size --device "$DEVICE" ${ATTENTION:+--attention "$ATTENTION"} \
            --json "$OUT/$gpu-profile.json" --trace "$OUT/$gpu-trace.json.gz"
        ;;
    test)
        how=(-m "not slow")
        [ "$DEVICE" = cuda ] || how=(-m gpu --collect-only)  # a rehearsal: can all of them be imported?
        step test "$LIMIT" "$python" -m pytest tests/kernels tests/runtime/test_graphs.py -q "${how[@]}" -p no:cacheprovider
        ;;
    sanitize)  # PyTorch's caching allocator would hide an access out of bounds
        if ! command -v compute-sanitizer >/dev/null; then
            echo "sanitize: no compute-sanitizer on this machine, left out"
        elif ! compute-sanitizer "$python" -c 'import torch; torch.zeros(1, device="cuda")' >"$work/logs/sanitizer-probe.log" 2>&1; then
            echo "sanitize: compute-sanitizer cannot use this device (virtualised?), left out: $(tail -n 1 "$work/logs/sanitizer-probe.log")"
        else
            for tool in memcheck racecheck initcheck; do
                step "sanitizer-$tool" "$LIMIT" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" \
                    --error-exitcode 9 "$python" -m bench.smoke --device "$DEVICE"
            done
        fi
        ;;
    *)
        echo "unknown part $part: smoke, step, kernels, profile, test or sanitize"
        exit 2
        ;;
    esac
    begun=$SECONDS
done
exit $status

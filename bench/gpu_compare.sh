#!/usr/bin/env bash
# Two checkouts on one GPU, for a pull request: `OUT=DIR bench/gpu_compare.sh BASE HEAD`.
#
# Runs BASE's bench/gpu_session.py (kernels), then HEAD's (smoke and kernels), and compares their figures by HEAD's
# bench.gate: ratios over baselines of the same run, so no figures from another day or machine are needed. $OUT/verdict.md
# is what to post; $OUT/base and $OUT/head are what the sessions left. Exit status 1 if HEAD's session failed, if the gate
# says WORSE or MISSING, or if there is nothing to compare.
#
# DEVICE=cpu rehearses; PYTHON is the program that runs it (python3).
set -u
: "${OUT:?set OUT to a folder for the verdict, logs and results}"
[ $# -eq 2 ] || { echo "usage: OUT=DIR $0 BASE HEAD"; exit 2; }
base=$(cd "$1" && pwd) head=$(cd "$2" && pwd) python=${PYTHON:-python3}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)

session() {  # session CHECKOUT FOLDER PART...
    local where=$1 out=$2
    shift 2
    (cd "$where" && "$python" -m bench.gpu_session "$@" --out "$out" --device "${DEVICE:-cuda}" --python "$python")
}
session "$base" "$OUT/base" kernels || echo "base: its session failed, which is not HEAD's fault"
session "$head" "$OUT/head" smoke kernels
session=$?

commit() { git -C "$1" rev-parse --short HEAD 2>/dev/null || echo unknown; }
figures() { ls "$OUT/$1/kernels.json" 2>/dev/null; }
if [ -n "$(figures base)" ] && [ -n "$(figures head)" ]; then
    said=$(cd "$head" && PYTHONPATH=.:kernels "$python" -m bench.gate "$(figures base)" "$(figures head)" 2>&1)
    gate=$?
else
    said="nothing to compare: no kernels.json from $([ -n "$(figures base)" ] && echo head || echo base)" gate=1
fi
{
    echo "**bench.gate**: $(commit "$head") over $(commit "$base"): $([ $gate -eq 0 ] && echo holds || echo fails);" \
        "smoke and kernels of the session: $([ $session -eq 0 ] && echo pass || echo fail)"
    # shellcheck disable=SC2016  # Markdown's fence
    printf '\n```\n%s\n```\n' "$said"
} | tee "$OUT/verdict.md"
[ $gate -eq 0 ] && [ $session -eq 0 ]

#!/bin/bash
# A run on machines that this one reaches by ssh, without any scheduler. FOLDER is the same shared folder on all of them,
# a clone of this repository with its .venv. Ctrl-C ends all processes in order; the same command goes on. See
# docs/clusters.md.
#
#   HOSTS="gpu1 gpu2" FOLDER=/shared/advgrpo recipes/ssh.sh
set -euo pipefail

read -ra hosts <<<"${HOSTS:?name the machines: HOSTS=\"gpu1 gpu2\"; the first one must be reached by all at port 29500}"
folder=${FOLDER:-$PWD}

run=(
  "$folder/.venv/bin/torchrun" --nnodes "${#hosts[@]}" --nproc-per-node 8 --max-restarts 3
  --rdzv-backend c10d --rdzv-endpoint "${hosts[0]}:29500" --rdzv-id "advgrpo-$(date +%s)"
  -m advgrpo.train --preset sd35m-dino-paper
  --data.prompts "$folder/prompts.txt" --data.held-out-prompts "$folder/held_out.txt"
  --data.references "$folder/references" --data.cache-dir "$folder/cache"
  --output-dir "$folder/runs/paper" --resume auto --output.checkpoint-every 5
)

sessions=()
for host in "${hosts[@]}"; do # with a terminal, whose end is a SIGHUP for what runs in it
  ssh -tt -o ServerAliveInterval=15 "$host" "cd $(printf %q "$folder") && exec $(printf '%q ' "${run[@]}")" </dev/null &
  sessions+=($!)
done
trap 'kill "${sessions[@]}" 2>/dev/null' INT TERM

code=0
for session in "${sessions[@]}"; do
  wait "$session" || code=$?
done
exit "$code"

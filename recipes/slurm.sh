#!/bin/bash
# A run on several machines under SLURM. It stands in line again, and goes on, after its time limit, a preemption or a
# lost machine. Change the lines of #SBATCH and the paths; every machine must see them. See docs/clusters.md.
#
#   sbatch recipes/slurm.sh
#SBATCH --job-name=advgrpo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@180
#SBATCH --output=advgrpo-%j.log
set -euo pipefail

folder=${FOLDER:-$PWD}
read -r first <<<"$(scontrol show hostnames "$SLURM_JOB_NODELIST")"

# Since 22.05 srun does not take it from the batch script by itself.
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
srun --kill-on-bad-exit=1 torchrun \
  --nnodes "$SLURM_NNODES" --nproc-per-node 8 --max-restarts 3 \
  --rdzv-backend c10d --rdzv-endpoint "$first:$((29500 + SLURM_JOB_ID % 1000))" \
  --rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
  -m advgrpo.train --preset sd35m-dino-paper \
  --data.prompts "$folder/prompts.txt" --data.held-out-prompts "$folder/held_out.txt" \
  --data.references "$folder/references" --data.cache-dir "$folder/cache" \
  --output-dir "$folder/runs/paper" --resume auto --output.checkpoint-every 5 &
step=$!

requeue() { # three minutes before the limit: the run saves, which takes it seconds, and ends
  trap '' USR1
  scancel --signal=TERM "$SLURM_JOB_ID"
  wait "$step" || true
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
}
trap requeue USR1
wait "$step"

#!/usr/bin/env bash
# A run on GPUs under SLURM: one process for each GPU, which find each other by themselves.
#   sbatch experiments/launchers/slurm.sh
#SBATCH --job-name=effjax
#SBATCH --nodes=4
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --time=24:00:00
#SBATCH --requeue
# Two minutes before the end, or before a job that comes first: time enough to save.
#SBATCH --signal=TERM@120
set -uo pipefail

CONFIG=configs/language/lm.py:8b
WORKDIR=/shared/runs/8b # on a disk that all nodes share

srun --kill-on-bad-exit=1 python -m experiments.train --config="$CONFIG" --workdir="$WORKDIR" --config.mesh.fsdp=32
code=$?
# 75: stopped, saved, and to be gone on with.
if [ "$code" -eq 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"

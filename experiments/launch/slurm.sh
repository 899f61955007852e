#!/usr/bin/env bash
# A run on GPU nodes by SLURM, with one process for each GPU, as jax expects it there.
# Filled in by `moejax launch --target slurm`. Start: sbatch FILE. Partition, account and time limit
# are sbatch's own flags: sbatch --partition=P --time=24:00:00 FILE.
#SBATCH --job-name=@{name}
#SBATCH --nodes=@{hosts}
#SBATCH --ntasks-per-node=@{chips_per_host}
#SBATCH --gpus-per-node=@{chips_per_host}
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
# To this script, three minutes before the time limit.
#SBATCH --signal=B:USR1@180
set -uo pipefail

# The environment that moejax is installed in, where it is not that of the shell that submits:
# source /shared/venv/bin/activate

# SIGTERM makes every process save a checkpoint and end.
time_is_up=no
trap 'time_is_up=yes; scancel --signal=TERM "$SLURM_JOB_ID.0"' USR1

# A process that ends by itself gives the others two minutes to do the same.
srun --wait=120 \
  @{command} &
wait "$!"
status=$?
if [ "$time_is_up" = yes ]; then
  # The trap ended the first wait.
  wait "$!"
  status=$?
fi

# 0: finished. 2: a mistake in the input, which no restart mends. 130: stopped by a signal, which
# without the time limit is scancel, or a preemption, after which SLURM itself starts the job again.
# Else the job goes back into the queue, and the same command goes on from the last checkpoint.
case "$status,$time_is_up" in
  0,* | 2,* | 130,no) ;;
  *)
    if [ "${SLURM_RESTART_COUNT:-0}" -lt @{max_restarts} ]; then
      scontrol requeue "$SLURM_JOB_ID"
    fi
    ;;
esac
exit "$status"

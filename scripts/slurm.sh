#!/usr/bin/env bash
# sbatch --nodes=2 --gpus-per-node=8 scripts/slurm.sh --model detr --enact --coco_path COCO --output_dir DIR
#
# Five minutes before the time is up, or when another job needs the machines, the run saves a checkpoint and ends, and
# the job goes back into the queue; it goes on from that checkpoint.
#SBATCH --job-name=enact
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --time=72:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
set -euo pipefail

export NODES=$SLURM_NNODES JOB=$SLURM_JOB_ID
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):29500
export HEAD
# SIGUSR1 comes to this shell alone; torchrun hands SIGTERM on to every process, which ends after its step.
requeue=
trap 'requeue=yes; kill -TERM "$run"' USR1 TERM
srun "$SLURM_SUBMIT_DIR/scripts/launch.sh" "$@" &
run=$!
status=0
wait "$run" || status=$?
if [ -n "$requeue" ]; then
    wait "$run" || status=$? # the trap ended the first wait, not the run
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"

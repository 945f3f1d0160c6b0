#!/usr/bin/env bash
# sbatch --nodes=2 --gpus-per-node=8 scripts/slurm.sh --model detr --enact --coco_path COCO --output_dir DIR
#SBATCH --job-name=enact
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --time=72:00:00
set -euo pipefail

export NODES=$SLURM_NNODES JOB=$SLURM_JOB_ID
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):29500
export HEAD
srun "$SLURM_SUBMIT_DIR/scripts/launch.sh" "$@"

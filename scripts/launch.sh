#!/usr/bin/env bash
# Start main.py on the GPUs of this machine, or of several; it goes on from its last checkpoint when it is started again.
#
#   scripts/launch.sh --model detr --enact --coco_path COCO --output_dir runs/detr_enact
#   NODES=2 HEAD=node0:29500 scripts/launch.sh ...        the same on each of two machines that share the output folder
#
# GPUS      processes on this machine; all of its GPUs, or 1 without any
# NODES     machines; 1
# HEAD      HOST:PORT of one of the machines, which the others can reach; needed with several
# RESTARTS  how often a failed run starts again by itself; 3
# JOB       a name that the machines of one run share; enact
set -euo pipefail
cd "$(dirname "$0")/.."

nodes=${NODES:-1}
gpus=${GPUS:-$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')}
if [ "$nodes" = 1 ]; then
    rendezvous=(--standalone)
else
    rendezvous=(--rdzv-backend=c10d "--rdzv-endpoint=${HEAD:?with NODES give HEAD=HOST:PORT}" "--rdzv-id=${JOB:-enact}")
fi
# A machine that comes back joins a later round, whose store only this makes known to it (seen with torch 2.14).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec torchrun "${rendezvous[@]}" --nnodes="$nodes" --nproc_per_node="$gpus" --max-restarts="${RESTARTS:-3}" \
    main.py --resume auto "$@"

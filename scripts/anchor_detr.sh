#!/usr/bin/env bash
# scripts/anchor_detr.sh [--enact] --coco_path COCO --output_dir DIR    (GPUS, NODES, HEAD as in launch.sh)
exec "$(dirname "$0")/launch.sh" --model anchor_detr "$@"

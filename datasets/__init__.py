"""Detection data: COCO folders, the built-in drawn scenes, batches, and COCO's metrics."""

from datasets.bad_images import BadImages
from datasets.coco import Batch, CocoDetection, build_coco, collate
from datasets.evaluator import METRIC_NAMES, CocoEvaluator, CocoSummary
from datasets.loading import BatchLoader, EpochBatches, EvalBatches, build_loader
from datasets.shapes import prepare_shapes
from datasets.transforms import eval_transform, normalize, train_transform

__all__ = [
    "METRIC_NAMES",
    "BadImages",
    "Batch",
    "BatchLoader",
    "CocoDetection",
    "CocoEvaluator",
    "CocoSummary",
    "EpochBatches",
    "EvalBatches",
    "build_coco",
    "build_loader",
    "collate",
    "eval_transform",
    "normalize",
    "prepare_shapes",
    "train_transform",
]

"""Write report.html of a run: curves, COCO's table, classes, confusion, worst images, configuration, in one file.

    python tools/report.py outputs/detr_enact
    python tools/report.py outputs/detr_enact --coco_path COCO --device cpu

The run's detections.json is taken, where there is one (COCO's results format), else its checkpoint.pth is evaluated on
the validation set of the data that it was trained on.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import engine
from configs.schema import FIELD_NAMES, Config
from datasets import CocoDetection, CocoEvaluator, EvalBatches, build_loader
from datasets.json_files import read_json
from models import build_criterion_from, build_postprocessor
from preparation import build_data
from tools.commands import add_device_flag, one_line_errors
from tools.detector_files import inference_device, load_detector
from tools.report_page import EXAMPLES, write_report
from util import checkpoint
from util.errors import InputError
from util.logs import set_up_console
from util.yaml_files import read_yaml

logger = logging.getLogger("report")

DETECTIONS_NAME = "detections.json"


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0 if the page was written, 2 if it could not be."""
    set_up_console()
    options = build_parser().parse_args(argv)
    logger.info("%s", report(options))
    return 0


def build_parser() -> argparse.ArgumentParser:
    """A parser of the command's flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="RUN_FOLDER", help="what main.py wrote into (--output_dir)")
    parser.add_argument("--coco_path", help="the data set, if it is not where it was in training")
    add_device_flag(parser)
    parser.add_argument(
        "--pictures", type=int, default=EXAMPLES, metavar="N",
        help=f"most pictures of the worst images, and of the first (default {EXAMPLES})",
    )  # fmt: skip
    return parser


def report(options: argparse.Namespace) -> Path:
    """Write the page; see `main`."""
    folder: Path = options.folder
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; give the --output_dir of a run")
    detections, weights = folder / DETECTIONS_NAME, folder / checkpoint.LATEST
    if detections.is_file():
        dataset = validation_set(read_config(folder), options.coco_path)
        results, origin = read_results(detections), f"detections of {DETECTIONS_NAME}"
    elif weights.is_file():
        dataset, results = detect_all(weights, options)
        origin = f"{checkpoint.LATEST} evaluated"
    else:
        raise InputError(f"{folder} holds neither {checkpoint.LATEST} nor {DETECTIONS_NAME}; give the folder of a run")
    origin += f" on the {len(dataset)} validation images"
    return write_report(
        folder, dataset.coco, dataset.image_dir, results, origin=origin, examples=max(0, options.pictures)
    )  # fmt: skip


def validation_set(config: Config, coco_path: str | None) -> CocoDetection:
    """The images that a run is evaluated on, from `coco_path` if it is given."""
    if coco_path is not None:
        config = dataclasses.replace(config, coco_path=coco_path)
    return build_data(config)[1]


def read_config(folder: Path) -> Config:
    """The configuration of a run."""
    path = folder / "config.yaml"
    try:
        values = read_yaml(path)
        return Config(**{name: value for name, value in values.items() if name in FIELD_NAMES})
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; a run's folder is needed") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is no configuration of a run: {' '.join(str(error).split())}") from None


def read_results(path: Path) -> list[dict[str, Any]]:
    """Detections in COCO's results format."""
    results = read_json(path)
    if not isinstance(results, list):
        raise InputError(f"{path} is not a list of detections, as COCO's results format has it")
    return results


def detect_all(path: Path, options: argparse.Namespace) -> tuple[CocoDetection, list[dict[str, Any]]]:
    """The validation set of a checkpoint, and what it detects there."""
    device = inference_device(options.device)
    model, config, _ = load_detector(path, device)
    dataset = validation_set(config, options.coco_path)
    batches = EvalBatches(len(dataset), config.batch_size, rank=0, world_size=1)
    loader = build_loader(dataset, batches, config.num_workers, device.type == "cuda")
    evaluator = CocoEvaluator(dataset.coco)
    criterion, postprocess = build_criterion_from(config), build_postprocessor(config.model)
    engine.evaluate(model, criterion, postprocess, loader, evaluator, device, config.amp)
    return dataset, evaluator.results


if __name__ == "__main__":
    sys.exit(main())

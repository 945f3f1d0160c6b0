"""Export a trained detector, and check on photographs that it is still the same one.

    python tools/export.py --checkpoint outputs/detr_enact/checkpoint.pth --output detr.onnx
    python tools/export.py --checkpoint FILE --output detr.pt2 --format torch_export --images photographs/

The file takes resized pixels and gives boxes: images uint8 (B, 3, H, W), RGB; pad_mask bool (B, H, W), true where
padded; sizes int64 (B, 2), height and width of the pictures -> scores (B, D), labels (B, D), boxes (B, D, 4) in pixels
of the pictures. B, H and W may be anything. Normalisation, scores and selection are inside; resizing is not, since
ONNX has no bilinear filter that gives Pillow's pixels. Class names, sizes and the way to prepare an image are in the
file. `python tools/predict.py photo.jpg --checkpoint detr.onnx` runs it.

The file is written only once its detections agree with PyTorch's on every image alone and, but for ENACT `official`, on
all in one padded batch. The command says how far they differ, and how long one image takes by both; OUTPUT.json keeps
that, with device and versions.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.commands import one_line_errors
from tools.detection_graph import (
    INPUT_NAMES,
    METADATA_NAME,
    OUTPUT_NAMES,
    Detect,
    DetectionGraph,
    ExportedGraph,
    Metadata,
    OnnxGraph,
    import_optional,
)
from tools.detector_files import add_detector_flags, fields_from, load_detector, validation_images
from tools.export_check import Difference, Inputs, compare, prepare, time_both
from tools.pictures import find_inputs, is_video
from util import environment
from util.errors import InputError
from util.logs import set_up_console

logger = logging.getLogger("export")

CPU = torch.device("cpu")
VALIDATION_IMAGES = 4
SUFFIXES = {"onnx": ".onnx", "torch_export": ".pt2"}
CHATTY = ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")
# Any sizes will do; these differ from each other, and need no more than a few clusters.
EXAMPLE = (3, 197, 230)


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0 if the file is written, 1 if it is not the same detector, 2 if it could not start."""
    set_up_console()
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    options = build_parser().parse_args(argv)
    return export(options)


def build_parser() -> argparse.ArgumentParser:
    """A parser of the command's flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_detector_flags(parser)
    parser.add_argument("--output", type=Path, required=True, help="the file to write, .onnx or .pt2")
    parser.add_argument("--format", choices=tuple(SUFFIXES), default="onnx", help="default: onnx")
    parser.add_argument(
        "--max_clusters", type=int,
        help="of ENACT: the most clusters of an image and layer, whatever its size; neighbours are merged beyond. "
        "Default: as the checkpoint says, usually one for 4 tokens",
    )  # fmt: skip
    parser.add_argument(
        "--images", nargs="+", default=[], metavar="PATH",
        help=f"what to check it on: images, folders, patterns in quotes; default: the first {VALIDATION_IMAGES} "
        "validation images of the data set that the checkpoint was trained on",
    )  # fmt: skip
    parser.add_argument(
        "--tolerance", type=float, default=0.01, help="how far boxes may differ, pixels of the picture (default 0.01)"
    )
    return parser


def export(options: argparse.Namespace) -> int:
    """Export, check, time and write; see `main`."""
    suffix = SUFFIXES[options.format]
    if options.output.suffix != suffix:
        raise InputError(f"--output {options.output}: the name of a {options.format} file must end in {suffix}")
    if options.format == "onnx":
        import_optional("onnx", "onnxscript", "onnxruntime")
    fields = fields_from(options)
    if options.max_clusters is not None:
        fields["max_clusters"] = options.max_clusters
    model, config, class_names = load_detector(options.checkpoint, CPU, fields)
    metadata = Metadata.of(config, class_names)
    graph = DetectionGraph(model, config.model).eval()
    files = find_inputs(options.images) if options.images else validation_images(config, VALIDATION_IMAGES)
    inputs = prepare([file for file in files if not is_video(file)], metadata)
    unchecked = options.output.with_name(f".{options.output.name}.unchecked{suffix}")
    try:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        written = write(graph, metadata, unchecked)
        return check(graph, written, inputs, options, unchecked)
    except OSError as error:
        raise InputError(f"cannot write {options.output}: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            unchecked.unlink()


def check(graph: DetectionGraph, written: Detect, inputs: list[Inputs], options: argparse.Namespace, file: Path) -> int:
    """Compare with PyTorch; give the file its name if it agrees."""
    difference = Difference()
    for one in tqdm(inputs, desc="check", unit="batch", leave=False):
        difference = difference.worst(compare(graph, written, one))
    if difference.boxes > options.tolerance:
        logger.error(
            "not written: on %s a detection is %.2g px from the nearest that PyTorch gives of its label and score (or "
            "the other way round); --tolerance is %g px (docs/predict-and-export.md: What is checked)",
            difference.where, difference.boxes, options.tolerance,
        )  # fmt: skip
        return 1
    times = time_both(graph, written, inputs[0])
    file.replace(options.output)
    report = {
        "images": [one.name for one in inputs], "boxes_px": difference.boxes, "scores": difference.scores,
        "detections": difference.count, **times, **environment.describe(CPU),
    }  # fmt: skip
    options.output.with_name(f"{options.output.name}.json").write_text(json.dumps(report, indent=1) + "\n")
    logger.info(
        "%s: %d detections on %s agree with PyTorch's within %.1g px and %.1g of score",
        options.output, difference.count, describe_images(inputs), difference.boxes, difference.scores,
    )  # fmt: skip
    logger.info("%s", describe_times(times, inputs[0]))
    return 0


def write(graph: DetectionGraph, metadata: Metadata, path: Path) -> Detect:
    """Export to `path`, and read it back."""
    batch, height, width = EXAMPLE
    pad_mask = torch.zeros(batch, height, width, dtype=torch.bool)
    pad_mask[1:, height - 30 :], pad_mask[1:, :, width - 40 :] = True, True
    example = torch.zeros(batch, 3, height, width, dtype=torch.uint8), pad_mask, torch.full((batch, 2), 100)
    any_size = torch.export.Dim.DYNAMIC
    axes = ({0: any_size, 2: any_size, 3: any_size}, {0: any_size, 1: any_size, 2: any_size}, {0: any_size})
    shapes = dict(zip(INPUT_NAMES, axes, strict=True))
    with torch.no_grad():
        program = torch.export.export(_Plain(graph), example, dynamic_shapes=shapes)
    if path.suffix == ".onnx":
        _write_onnx(program, metadata, path)
        return OnnxGraph(path, CPU)
    torch.export.save(program, path, extra_files={METADATA_NAME: json.dumps(metadata.to_text())})
    return ExportedGraph(path)


class _Plain(nn.Module):
    """The graph with a plain tuple as its result, since torch.export saves no named one."""

    def __init__(self, graph: DetectionGraph) -> None:
        super().__init__()
        self.detector = graph

    def forward(self, images: Tensor, pad_mask: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        detections = self.detector(images, pad_mask, sizes)
        return detections.scores, detections.labels, detections.boxes


def _write_onnx(program: torch.export.ExportedProgram, metadata: Metadata, path: Path) -> None:
    names: dict[str, Any] = {"input_names": list(INPUT_NAMES), "output_names": list(OUTPUT_NAMES)}
    exported = torch.onnx.export(program, dynamo=True, verbose=False, **names)
    assert exported is not None
    exported.model.metadata_props.update(metadata.to_text())
    exported.save(path)


def describe_images(inputs: list[Inputs]) -> str:
    """How many there are, and how they were given to the detector."""
    alone = sum(len(one.images) == 1 for one in inputs)
    return f"{alone} images, alone{' and in one batch,' if len(inputs) > alone else ','}"


def describe_times(times: dict[str, Any], inputs: Inputs) -> str:
    """One line."""
    height, width = inputs.pad_mask.shape[1:]
    parts = [f"{name} {1e3 * times[name][1]:.0f} ms ({1e3 * times[name][0]:.0f} to {1e3 * times[name][2]:.0f})"
             for name in ("pytorch", "exported")]  # fmt: skip
    return f"one image of {height} x {width}, {torch.get_num_threads()} threads, median of 10: {', '.join(parts)}"


if __name__ == "__main__":
    sys.exit(main())

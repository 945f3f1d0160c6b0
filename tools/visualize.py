"""Draw what ENACT does in each encoder layer of a trained detector.

    python tools/visualize.py --checkpoint outputs/detr_enact/checkpoint.pth
    python tools/visualize.py --checkpoint FILE --images a.jpg photographs/ --queries 120,80 300,200 --output clusters

For each image and layer it writes NAME_layer0.png: the detections, the clusters, the smoothed information, the learned
probability, and the attention of a few tokens; for each image NAME_contact.png, with a row for each layer; and
clusters.json with the counts. A dense checkpoint has no clusters, only attention.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs.schema import Config
from datasets import eval_transform
from models import build_postprocessor
from tools.clusters_plot import draw_contact_sheet, draw_layer, save
from tools.clusters_view import Explanation, LayerView, Point, explain
from tools.commands import add_device_flag, one_line_errors
from tools.detector_files import (
    LoadedDetector,
    add_detector_flags,
    fields_from,
    inference_device,
    load_detector,
    validation_images,
)
from tools.pictures import image_files, read_picture, unique_stems, writing
from tools.results import choices_of, encoder_of
from util.errors import InputError
from util.logs import set_up_console

logger = logging.getLogger("visualize")

VALIDATION_IMAGES = 4


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0 if an image was drawn, 1 if none was, 2 if it could not start."""
    set_up_console()
    options = build_parser().parse_args(argv)
    return visualize(options)


def build_parser() -> argparse.ArgumentParser:
    """A parser of the command's flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_detector_flags(parser)
    parser.add_argument(
        "--images", nargs="+", type=Path, default=[], metavar="PATH",
        help=f"image files and folders of them; default: the first {VALIDATION_IMAGES} validation images of the data "
        "set that the checkpoint was trained on",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, help="a folder; default: clusters/ beside the checkpoint")
    parser.add_argument(
        "--queries", nargs="+", type=_point, default=[], metavar="X,Y",
        help="points, in pixels of the image, whose attention is drawn; default: the centres of the best detections, "
        "else the image's centre",
    )  # fmt: skip
    parser.add_argument("--score", type=float, default=0.5, help="least score of a detection that counts (default 0.5)")
    add_device_flag(parser)
    return parser


def visualize(options: argparse.Namespace) -> int:
    """Draw every image that can be read; see `main`."""
    detector = load_detector(options.checkpoint, inference_device(options.device), fields_from(options))
    model, config, _ = detector
    files = image_files(options.images) if options.images else validation_images(config, VALIDATION_IMAGES)
    folder = options.output or options.checkpoint.parent / "clusters"
    if config.enact is None:
        logger.info("%s is a dense model: it has no clusters, only attention is drawn", options.checkpoint)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        explain_one = partial(explain_file, model, config, options.queries, options.score)
        images = draw_all(files, folder, explain_one, detector)
        report = {"checkpoint": str(options.checkpoint), "encoder": describe_encoder(config), **images}
        (folder / "clusters.json").write_text(json.dumps(report, indent=1) + "\n")
    drawn = len(images["images"])
    logger.info("%d of %d images are drawn in %s", drawn, len(files), folder)
    return 0 if drawn else 1


def draw_all(
    files: Sequence[Path], folder: Path, explain_one: Callable[[Path], Explanation], detector: LoadedDetector
) -> dict[str, Any]:
    """Write the pictures of each image; what clusters.json says of those that were drawn, and of the others."""
    names, drawn, skipped = detector.class_names, [], []
    encoder = describe_encoder(detector.config)
    for path, stem in zip(tqdm(files, unit="image", disable=len(files) == 1), unique_stems(files), strict=True):
        try:
            explanation = explain_one(path)
        except InputError as error:
            logger.warning("skipped: %s", error)
            skipped.append({"image": str(path), "reason": str(error)})
            continue
        for number in range(len(explanation.layers)):
            title = f"{stem}, encoder layer {number} ({encoder})"
            save(draw_layer(explanation, number, title, names), folder / f"{stem}_layer{number}.png")
        save(draw_contact_sheet(explanation, f"{stem} ({encoder})", names), folder / f"{stem}_contact.png")
        drawn.append({"image": str(path), "name": stem, **counts(explanation)})
    return {"images": drawn, "skipped": skipped}


def describe_encoder(config: Config) -> str:
    """For titles."""
    encoder = encoder_of({"enact": config.enact, "choices": choices_of(vars(config))})
    return f"{config.model}, {encoder}"


def explain_file(
    model: nn.Module, config: Config, points: Sequence[Point], min_score: float, path: Path
) -> Explanation:
    """Run a detector on an image file; points and boxes are in pixels of that file, turned as its EXIF data says."""
    picture = read_picture(path)
    image = eval_transform(config.eval_short_side, config.max_long_side)(picture)
    options: dict[str, Any] = {"size": (picture.height, picture.width), "points": points, "min_score": min_score}
    try:
        return explain(model, image, build_postprocessor(config.model), **options)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def counts(explanation: Explanation) -> dict[str, Any]:
    """What clusters.json says of an image; sizes of clusters are in tokens, information in bits."""
    height, width = explanation.size
    layers = [{"layer": number, **layer_counts(layer)} for number, layer in enumerate(explanation.layers)]
    return {"height": height, "width": width, "detections": len(explanation.detections["scores"]), "layers": layers}


def layer_counts(layer: LayerView) -> dict[str, int | float]:
    """The numbers of one layer."""
    tokens = layer.attention[0].numel()
    if layer.clusters is None:
        return {"tokens": tokens}
    sizes, information = layer.clusters.sizes(), layer.clusters.information
    return {
        "tokens": tokens,
        "clusters": layer.clusters.num_clusters,
        "tokens_in_no_cluster": int(layer.clusters.unclustered().sum()),
        "mean_size": sizes.float().mean().item(),
        "min_size": int(sizes.min()),
        "max_size": int(sizes.max()),
        "min_information": information.min().item(),
        "max_information": information.max().item(),
    }


def _point(text: str) -> Point:
    try:
        x, y = map(float, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not X,Y in pixels, such as 120,80") from None
    return x, y


if __name__ == "__main__":
    sys.exit(main())

"""Detect objects in images and videos with a trained detector.

    python tools/predict.py photo.jpg photographs/ "more/**/*.png" clip.mp4 --checkpoint outputs/detr/checkpoint.pth

It writes an annotated copy of each image and video, detections.json (COCO's results format) and detections.csv. Boxes
are in pixels of the upright picture: a photograph is turned first as its EXIF data says. `image_id` is the number that
a file is called, as COCO's are, if all are called by different numbers, else the place of the file among those given.

Images are resized alike if they are of one size, and only such ones share a batch: none is padded, so that an image
gets the same detections in company as alone. As a function:

    from tools.predict import Detector
    detector = Detector.from_checkpoint("outputs/detr/checkpoint.pth")
    print(detector("photo.jpg"))
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypedDict, overload

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets import eval_transform
from datasets.transforms import resized_size
from tools.commands import add_device_flag, one_line_errors
from tools.detection_graph import Detect, DetectionGraph, ExportedGraph, Metadata, OnnxGraph
from tools.detector_files import add_detector_flags, fields_from, inference_device, load_detector
from tools.pictures import find_inputs, is_video, picture_size, read_picture
from tools.predict_results import Results
from tools.predict_video import annotate_video
from util.errors import InputError
from util.logs import set_up_console

logger = logging.getLogger("predict")

ImageLike = str | Path | Image.Image | Tensor


class Found(TypedDict):
    """The detections of an image, best first: scores (n,), labels (n,) int64, names, boxes (n, 4) xyxy in pixels."""

    scores: Tensor
    labels: Tensor
    names: list[str]
    boxes: Tensor


class Detector:
    """Finds objects in pictures of any size.

    Args:
        detect: the detector, from resized pixels to boxes.
        metadata: what it was trained with.
        device: where `detect` wants its images.
        score: least score of a detection that counts.
        batch_size: images that are looked at together, if they are of one size.
    """

    def __init__(
        self, detect: Detect, metadata: Metadata, device: torch.device, score: float = 0.5, batch_size: int = 8
    ) -> None:
        self.metadata = metadata
        self.device = device
        self.score = score
        self.batch_size = 1 if metadata.alone else batch_size
        self._detect = detect
        self._resize = eval_transform(metadata.short_side, metadata.max_long_side)

    @classmethod
    def from_checkpoint(
        cls, path: str | Path, *, device: str = "auto", score: float = 0.5, batch_size: int = 8, **fields: Any
    ) -> Detector:
        """A detector out of a file.

        Args:
            path: a checkpoint of ours or a published one, a Hugging Face folder or file, or a file that
                tools/export.py wrote (.onnx, .pt2).
            device: "auto", "cpu", "cuda" or "mps".
            score, batch_size: as in the constructor.
            fields: of the config, that hold over what the file says, such as `model`, `enact`, `eval_short_side`.

        Raises:
            InputError: the file holds no detector, or does not say enough of it.
        """
        path, place = Path(path), inference_device(device)
        if path.suffix in (".onnx", ".pt2"):
            graph = OnnxGraph(path, place) if path.suffix == ".onnx" else ExportedGraph(path)
            return cls(graph, graph.metadata, torch.device("cpu"), score, batch_size)
        model, config, class_names = load_detector(path, place, fields)
        detect = DetectionGraph(model, config.model).to(place).eval()
        return cls(detect, Metadata.of(config, class_names), place, score, batch_size)

    @overload
    def __call__(self, images: ImageLike) -> Found: ...  # type: ignore[overload-overlap]  # str is a sequence of str

    @overload
    def __call__(self, images: Sequence[ImageLike]) -> list[Found]: ...

    def __call__(self, images: ImageLike | Sequence[ImageLike]) -> Found | list[Found]:
        """Detect.

        Args:
            images: one, or a list of them: a path, a PIL image, or a tensor uint8 (3, H, W), RGB. Files are turned
                upright; PIL images and tensors are taken as they lie.

        Returns:
            The detections of the image, or a list of those of each. Boxes are in pixels of the upright picture.

        Raises:
            InputError: a file is no image.
        """
        single = isinstance(images, str | Path | Image.Image | Tensor)
        several = [images] if single else list(images)  # type: ignore[arg-type]
        pictures = [as_picture(image) for image in several]  # type: ignore[arg-type]
        found: list[Found | None] = [None] * len(pictures)
        for batch in self.batches([(picture.height, picture.width) for picture in pictures]):
            for index, result in zip(batch, self.detect([pictures[index] for index in batch]), strict=True):
                found[index] = result
        results = [result for result in found if result is not None]
        return results[0] if single else results

    def batches(self, sizes: Sequence[tuple[int, int]]) -> Iterator[list[int]]:
        """Indices of images that may share a batch, from their sizes (height, width): those resized to one size."""
        groups: dict[tuple[int, int], list[int]] = {}
        for index, (height, width) in enumerate(sizes):
            size = resized_size(height, width, self.metadata.short_side, self.metadata.max_long_side)
            groups.setdefault(size, []).append(index)
        for group in groups.values():
            for start in range(0, len(group), self.batch_size):
                yield group[start : start + self.batch_size]

    @torch.inference_mode()
    def detect(self, pictures: Sequence[Image.Image]) -> list[Found]:
        """The detections of RGB pictures that are resized to one size."""
        images = torch.stack([self._resize(picture) for picture in pictures]).to(self.device)
        pad_mask = torch.zeros(len(images), *images.shape[2:], dtype=torch.bool)
        sizes = torch.tensor([[picture.height, picture.width] for picture in pictures])
        detections = self._detect(images, pad_mask, sizes)
        return [self._above_score(*image) for image in zip(*(tensor.cpu() for tensor in detections), strict=True)]

    def name(self, label: int) -> str:
        """Of a label; its number where no name is known."""
        return self.metadata.class_names.get(label, str(label))

    def _above_score(self, scores: Tensor, labels: Tensor, boxes: Tensor) -> Found:
        order = scores.argsort(descending=True, stable=True)
        order = order[scores[order] >= self.score]
        names = [self.name(label) for label in labels[order].tolist()]
        return {"scores": scores[order], "labels": labels[order], "names": names, "boxes": boxes[order]}


def as_picture(image: ImageLike) -> Image.Image:
    """A picture as RGB; InputError where a file is none, ValueError for a tensor of another form."""
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if not isinstance(image, Tensor):
        return read_picture(Path(image))
    if image.dtype != torch.uint8 or image.dim() != 3 or image.shape[0] != 3:
        raise ValueError(f"an image as a tensor is uint8 (3, H, W), got {image.dtype} {tuple(image.shape)}")
    picture: Image.Image = to_pil_image(image)
    return picture


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0 if something could be read, 1 if nothing could, 2 if it could not start."""
    set_up_console()
    options = build_parser().parse_args(argv)
    return predict(options)


def build_parser() -> argparse.ArgumentParser:
    """A parser of the command's flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", help="images, folders, patterns in quotes, videos")
    add_detector_flags(parser, "; or a file that tools/export.py wrote")
    parser.add_argument("--output", type=Path, help="a folder; default: predictions/ beside the checkpoint")
    parser.add_argument("--score", type=float, default=0.5, help="least score of a detection that counts (default 0.5)")
    parser.add_argument("--batch_size", type=int, default=8, help="images looked at together (default 8)")
    add_device_flag(parser)
    parser.add_argument("--no_pictures", action="store_true", help="write detections.json and detections.csv only")
    return parser


def predict(options: argparse.Namespace) -> int:
    """Detect in everything that can be read; see `main`."""
    if options.batch_size < 1:
        raise InputError("--batch_size must be 1 or more")
    files = find_inputs(options.inputs)
    folder = options.output or options.checkpoint.parent / "predictions"
    detector = Detector.from_checkpoint(
        options.checkpoint, device=options.device, score=options.score, batch_size=options.batch_size,
        **fields_from(options),
    )  # fmt: skip
    if detector.batch_size != options.batch_size:
        logger.info("%s: batches of 1, since images of a batch would change each other", options.checkpoint)
    with Results(folder, files, pictures=not options.no_pictures) as results:
        detect_images(detector, [file for file in files if not is_video(file)], results)
        for file in filter(is_video, files):
            with results.reporting(file):
                annotate_video(detector, file, results)
    logger.info("%s; results are in %s", results.summary(), folder)
    if results.read and not results.found:
        logger.info("nothing has a score of %g or more; --score 0.1 also shows what is less certain", options.score)
    return 0 if results.read else 1


def detect_images(detector: Detector, files: Sequence[Path], results: Results) -> None:
    """Detect in image files; those that cannot be read are reported."""
    sizes: dict[Path, tuple[int, int]] = {}
    for file in files:
        with results.reporting(file):
            sizes[file] = picture_size(file)
    batches = detector.batches(list(sizes.values()))
    with ThreadPoolExecutor() as pool, tqdm(total=len(sizes), unit="image", disable=len(files) == 1) as bar:
        for batch in read_ahead(pool, batches, list(sizes)):
            pictures: dict[Path, Image.Image] = {}
            for file, reading in batch:
                with results.reporting(file):
                    pictures[file] = reading.result()
            found = detector.detect(list(pictures.values())) if pictures else []
            for (file, picture), result in zip(pictures.items(), found, strict=True):
                results.add_image(file, picture, result)
            bar.update(len(batch))


def read_ahead(
    pool: ThreadPoolExecutor, batches: Iterable[list[int]], files: Sequence[Path]
) -> Iterator[list[tuple[Path, Future[Image.Image]]]]:
    """The files of each batch and their pictures, those of the next batch being read meanwhile."""
    current: list[tuple[Path, Future[Image.Image]]] = []
    for batch in batches:
        upcoming = [(files[index], pool.submit(read_picture, files[index])) for index in batch]
        if current:
            yield current
        current = upcoming
    if current:
        yield current


if __name__ == "__main__":
    sys.exit(main())

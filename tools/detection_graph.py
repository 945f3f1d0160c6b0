"""From pixels to boxes in one call, by PyTorch or by an exported file.

Shapes: B images, H x W pixels, D detections of an image.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from configs.schema import Config
from datasets.transforms import IMAGENET_MEAN, IMAGENET_STD
from models import build_postprocessor
from models.postprocess import Detections
from util.errors import InputError

INPUT_NAMES = ("images", "pad_mask", "sizes")
OUTPUT_NAMES = ("scores", "labels", "boxes")
METADATA_NAME = "metadata.json"
# (images uint8 (B, 3, H, W) RGB, pad_mask bool (B, H, W) True where padded, sizes int64 (B, 2)) -> Detections
Detect = Callable[[Tensor, Tensor, Tensor], Detections]


@dataclass(frozen=True)
class Metadata:
    """What one must know of an exported file to use it.

    class_names: by label, as far as they are known.
    short_side, max_long_side: to which images are resized, pixels; see `datasets.transforms.resized_size`.
    alone: an image's detections depend on the others of its batch, so that it is to be alone in it.
    """

    model: str
    enact: str | None
    class_names: Mapping[int, str]
    short_side: int
    max_long_side: int
    alone: bool

    @staticmethod
    def of(config: Config, class_names: Mapping[int, str]) -> Metadata:
        """Of a detector."""
        own = "chunks" if config.enact == "official" and config.model != "anchor_detr" else None
        alone = (config.regions or own) == "chunks"  # one length for all images of a batch
        return Metadata(
            config.model, config.enact, class_names, config.eval_short_side, config.max_long_side, alone
        )

    def to_text(self) -> dict[str, str]:
        """JSON text of each field, and of how to use the file."""
        values = {
            **asdict(self),
            "preprocessing": "upright RGB as uint8; bilinear resize with antialiasing (as Pillow's) so that the short "
            "side is short_side, less where the long side would exceed max_long_side; zeros below and on the right to "
            "the size of the batch, where pad_mask is true; normalisation is in the graph",
            "sizes": "height and width, in pixels, of the pictures that the boxes are wanted in",
            "boxes": "left, top, right, bottom in pixels of those pictures",
        }
        return {name: json.dumps(value) for name, value in values.items()}

    @staticmethod
    def from_text(text: Mapping[str, str], path: Path) -> Metadata:
        """What `to_text` gave (InputError: it is of no file of ours)."""
        try:
            values: dict[str, Any] = {name: json.loads(text[name]) for name in Metadata.__dataclass_fields__}
            names = {int(key): name for key, name in values["class_names"].items()}
        except (AttributeError, KeyError, ValueError):
            raise InputError(f"{path} was not written by tools/export.py: it does not say how to use it") from None
        return Metadata(**{**values, "class_names": names})


class DetectionGraph(nn.Module):
    """A detector with normalisation before it and selection behind it.

    Args:
        model: from `build_model`.
        name: of the model.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.model = model
        self.select = build_postprocessor(name).select
        for buffer, values in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            self.register_buffer(buffer, torch.tensor(values).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor, pad_mask: Tensor, sizes: Tensor) -> Detections:
        """Detect.

        Args:
            images: uint8 (B, 3, H, W), RGB, resized; of any value where padded.
            pad_mask: bool (B, H, W), True where padded; in host memory even for a GPU.
            sizes: int64 (B, 2), height and width in pixels of the pictures that the boxes are wanted in.

        Returns:
            The best detections of each image, without a threshold.
        """
        normalized = (images.to(torch.float32) / 255 - self.mean) / self.std
        normalized = normalized.masked_fill(pad_mask.to(images.device).unsqueeze(1), 0)
        return self.select(self.model(normalized, pad_mask), sizes)


class OnnxGraph:
    """The same out of a file that tools/export.py wrote.

    Args:
        path: an ONNX file.
        device: "cuda" where onnxruntime can; anything else is the CPU.

    Raises:
        InputError: onnxruntime is not installed, or this is no such file.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        onnxruntime = import_optional("onnxruntime")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        wanted = ["CUDAExecutionProvider"] if device.type == "cuda" else []
        available = onnxruntime.get_available_providers()
        providers = [name for name in [*wanted, "CPUExecutionProvider"] if name in available]
        try:
            self.session = onnxruntime.InferenceSession(path, options, providers=providers)
        except Exception as error:  # the library has its own kinds, whatever the damage
            raise InputError(f"{path} is no ONNX file that can be run: {' '.join(str(error).split())}") from None
        self.metadata = Metadata.from_text(self.session.get_modelmeta().custom_metadata_map, path)

    def __call__(self, images: Tensor, pad_mask: Tensor, sizes: Tensor) -> Detections:
        """As `DetectionGraph.forward`, in host memory."""
        arrays = (tensor.cpu().numpy() for tensor in (images, pad_mask, sizes))
        found = self.session.run(list(OUTPUT_NAMES), dict(zip(INPUT_NAMES, arrays, strict=True)))
        return Detections(*map(torch.from_numpy, found))


class ExportedGraph:
    """The same out of a file of torch.export; it runs on a CPU.

    Args:
        path: a .pt2 file that tools/export.py wrote.

    Raises:
        InputError: this is no such file.
    """

    def __init__(self, path: Path) -> None:
        text = {METADATA_NAME: ""}
        try:
            program = torch.export.load(path, extra_files=text)
        except Exception as error:  # many kinds, whatever the damage
            raise InputError(f"{path} is no file of torch.export: {' '.join(str(error).split())}") from None
        self.metadata = Metadata.from_text(json.loads(text[METADATA_NAME] or "{}"), path)
        self._module = program.module()

    def __call__(self, images: Tensor, pad_mask: Tensor, sizes: Tensor) -> Detections:
        """As `DetectionGraph.forward`."""
        return Detections(*self._module(images, pad_mask, sizes))


def import_optional(*names: str) -> Any:
    """The first of some modules that are not always installed (InputError: how to install what is missing)."""
    try:
        modules = [importlib.import_module(name) for name in names]
    except ImportError as error:
        raise InputError(f"{error.name} is not installed; install it: pip install {' '.join(names)}") from None
    return modules[0]

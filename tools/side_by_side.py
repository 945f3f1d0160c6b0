"""Detectors beside each other on one picture: what each finds, how long it takes, what its encoder's layers do.

    arms = arms_of(load_detector("outputs/detr/checkpoint.pth", device))
    for look in look_at(picture, arms, smoothing_sigma=3.0):
        print(look.name, look.milliseconds, look.encoder_milliseconds)
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

import enact
import engine
from configs.schema import Config
from datasets import Batch, eval_transform
from enact.information import Information, gaussian_taps
from models import build_postprocessor
from tools.clusters_view import Explanation, Size, explain
from tools.detector_files import LoadedDetector
from tools.results import choices_of, encoder_of

REPEATS = 3  # of which the time is the median, after one more to warm up


@dataclass(frozen=True)
class Arm:
    """A detector, and what it is called."""

    name: str
    detector: LoadedDetector


@dataclass(frozen=True)
class Look:
    """What one detector makes of a picture.

    Args:
        name: of the arm.
        picture: RGB.
        milliseconds: of a forward pass from resized pixels to boxes, the median of `REPEATS`.
        encoder_milliseconds: of its encoder in these passes.
        detections: "scores", "labels" and "boxes" (xyxy in pixels of the picture), whatever their scores, best first.
        explanation: its encoder's layers, with the attention of the tokens under its best detections.
        class_names: by label, as far as they are known.
    """

    name: str
    picture: Image.Image
    milliseconds: float
    encoder_milliseconds: float
    detections: dict[str, Tensor]
    explanation: Explanation
    class_names: Mapping[int, str]

    def found(self, min_score: float) -> dict[str, Any]:
        """The detections of a score and more: scores, labels, names, and boxes (xyxy) in pixels of the picture."""
        kept = {key: values[self.detections["scores"] >= min_score] for key, values in self.detections.items()}
        return {**kept, "names": [self.class_names.get(label, str(label)) for label in kept["labels"].tolist()]}

    def with_score(self, min_score: float) -> Explanation:
        """The explanation with the detections of a score and more."""
        found = self.found(min_score)
        return replace(self.explanation, detections={key: found[key] for key in self.detections})

    def tokens_and_clusters(self) -> tuple[int, float | None]:
        """Tokens of a layer, and clusters, the mean over layers; None for a dense encoder."""
        layers = self.explanation.layers
        counts = [layer.clusters.num_clusters for layer in layers if layer.clusters is not None]
        return layers[0].attention[0].numel(), statistics.fmean(counts) if counts else None


def arms_of(first: LoadedDetector, second: LoadedDetector | None = None) -> list[Arm]:
    """The detectors to compare, a dense one before one with ENACT.

    Args:
        first, second: as loaded. Of a dense DETR or Conditional DETR alone, the second arm is a copy with
            `enact.apply`, untrained.
    """
    if second is not None:
        both = sorted((first, second), key=lambda detector: detector.config.enact is not None)
        return [Arm(_describe(detector.config), detector) for detector in both]
    arms = [Arm(_describe(first.config), first)]
    if first.config.enact is None and first.config.model != "anchor_detr":
        model = copy.deepcopy(first.model)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # of the new layers, so that the picture is the same tomorrow
            enact.apply(model)
        arms.append(Arm("the same with enact.apply, untrained", first._replace(model=model)))
    return arms


def _describe(config: Config) -> str:
    return f"{config.model}, {encoder_of({'enact': config.enact, 'choices': choices_of(vars(config))})}"


def set_smoothing_sigma(model: nn.Module, sigma: float) -> None:
    """Smooth the information of all of a model's ENACT layers with another filter.

    Args:
        sigma: its standard deviation in tokens, above 1/3.
    """
    for module in model.modules():
        if isinstance(module, Information):
            module.smoothing_sigma = sigma
            module.gaussian = gaussian_taps(sigma).to(module.gaussian)


def look_at(picture: Image.Image, arms: Sequence[Arm], smoothing_sigma: float) -> list[Look]:
    """Run each arm on a picture (RGB, upright); see `Look`."""
    images = [eval_transform(*_sizes(arm))(picture) for arm in arms]
    for arm in arms:
        set_smoothing_sigma(arm.detector.model, smoothing_sigma)
    size = picture.height, picture.width
    passes = [_forward(arm, image, size) for arm, image in zip(arms, images, strict=True)]
    times = measure(passes, arms)
    return [
        Look(
            arm.name,
            picture,
            *time,
            _best_first(run()),
            explain(arm.detector.model, image, build_postprocessor(arm.detector.config.model), size=size),
            arm.detector.class_names,
        )
        for arm, image, run, time in zip(arms, images, passes, times, strict=True)
    ]


def _sizes(arm: Arm) -> tuple[int, int]:
    return arm.detector.config.eval_short_side, arm.detector.config.max_long_side


def _best_first(found: dict[str, Tensor]) -> dict[str, Tensor]:
    order = found["scores"].argsort(descending=True, stable=True)
    return {key: values[order].cpu() for key, values in found.items()}


def _forward(arm: Arm, image: Tensor, size: Size) -> Callable[[], dict[str, Tensor]]:
    """A forward pass from resized pixels (3, H, W) to boxes in a picture of some size."""
    model, postprocess = arm.detector.model, build_postprocessor(arm.detector.config.model)
    pad_mask = torch.zeros(1, *image.shape[1:], dtype=torch.bool)
    batch = Batch(image.unsqueeze(0), pad_mask, []).to(next(model.parameters()).device)

    @torch.inference_mode()
    def run() -> dict[str, Tensor]:
        return postprocess(engine.forward(model, batch, amp=False), torch.tensor([size]))[0]

    return run


def measure(passes: Sequence[Callable[[], Any]], arms: Sequence[Arm]) -> list[tuple[float, float]]:
    """Milliseconds of each pass and of the encoder in it; the passes take turns, so that they share disturbances."""
    clocks = [_Stopwatch(arm.detector.model.eval()) for arm in arms]
    whole: list[list[float]] = [[] for _ in arms]
    for _ in range(1 + REPEATS):
        for run, clock, times in zip(passes, clocks, whole, strict=True):
            start = clock.now()
            with clock:
                run()
                times.append(clock.now() - start)
    return [
        (1000 * statistics.median(times[1:]), 1000 * statistics.median(clock.times[1:]))
        for clock, times in zip(clocks, whole, strict=True)
    ]


class _Stopwatch:
    """Measures the calls of a model's encoder while it is entered."""

    def __init__(self, model: nn.Module) -> None:
        self.times: list[float] = []
        self._encoder = model.get_submodule("encoder")
        self._on_gpu = next(model.parameters()).is_cuda

    def now(self) -> float:
        """Seconds, once the device has done what it was given."""
        if self._on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def __enter__(self) -> None:
        def start(*_: Any) -> None:
            self._started = self.now()

        def stop(*_: Any) -> None:
            self.times.append(self.now() - self._started)

        self._hooks = [self._encoder.register_forward_pre_hook(start), self._encoder.register_forward_hook(stop)]

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

"""Detection in videos, by PyAV (`pip install av`), which is not among the requirements."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from PIL import Image
from tqdm import tqdm

from tools.detection_graph import import_optional
from tools.pictures import writing
from tools.predict_results import Results, draw
from util.errors import InputError

ENCODERS = ("libx264", "mpeg4")  # the first that this PyAV has


class _Detector(Protocol):
    batch_size: int

    def detect(self, pictures: Sequence[Image.Image]) -> Sequence[Mapping[str, Any]]: ...


def annotate_video(detector: _Detector, file: Path, results: Results) -> None:
    """Detect in every frame; write NAME.mp4 with the boxes, without sound, and rows with the frame's number from 0.

    Raises:
        InputError: PyAV is not installed, or the file is no video.
    """
    av = import_optional("av")
    try:
        with av.open(str(file)) as container:
            if not container.streams.video:
                raise InputError(f"{file}: holds no video")
            stream = container.streams.video[0]
            rate = stream.average_rate or 25
            writer = _Writer(av, results, results.path(file, ".mp4"), rate) if results.pictures else None
            frames = (upright(frame) for frame in container.decode(stream))
            _detect_frames(detector, file, frames, stream.frames, results, writer)
    except (av.FFmpegError, OSError) as error:
        raise InputError(f"{file}: video cannot be read ({' '.join(str(error).split())})") from None
    results.read += 1


def upright(frame: Any) -> Image.Image:
    """A frame as RGB, turned as the video says that it is to be shown."""
    picture: Image.Image = frame.to_image()
    return picture.rotate(frame.rotation, expand=True) if frame.rotation else picture


def _detect_frames(
    detector: _Detector,
    file: Path,
    frames: Iterator[Image.Image],
    total: int,
    results: Results,
    writer: _Writer | None,
) -> None:
    number = 0
    with tqdm(total=total or None, unit="frame", desc=file.name) as bar:
        while batch := list(islice(frames, detector.batch_size)):
            for picture, found in zip(batch, detector.detect(batch), strict=True):
                results.add_rows(file, number, found)
                if writer is not None:
                    writer.add(draw(picture, found))
                number += 1
            bar.update(len(batch))
    if writer is not None:
        writer.close()
    if not number:
        raise InputError(f"{file}: the video has no frames")


class _Writer:
    """An MP4 file of pictures of one size."""

    def __init__(self, av: Any, results: Results, path: Path, rate: Any) -> None:
        self._av = av
        self._path = path
        with writing(results.folder):
            self._container = av.open(str(path), "w")
        encoder = next(name for name in ENCODERS if name in av.codecs_available)
        self._stream = self._container.add_stream(encoder, rate=rate)
        self._stream.pix_fmt = "yuv420p"
        self._size: tuple[int, int] | None = None

    def add(self, picture: Image.Image) -> None:
        """The next frame."""
        if self._size is None:
            self._size = picture.width // 2 * 2, picture.height // 2 * 2  # chroma planes have half of each side
            self._stream.width, self._stream.height = self._size
        frame = self._av.VideoFrame.from_image(picture.crop((0, 0, *self._size)))
        self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        """Write what the encoder still holds."""
        self._container.mux(self._stream.encode())
        self._container.close()

"""What a command that detects leaves behind: annotated pictures, detections.json, detections.csv."""

from __future__ import annotations

import contextlib
import csv
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import matplotlib as mpl
from PIL import Image, ImageDraw, ImageFont

from tools.pictures import unique_stems, writing
from util.errors import InputError

logger = logging.getLogger("predict")

COLUMNS = ("file", "image_id", "frame", "label", "name", "score", "left", "top", "right", "bottom")
FONT = Path(mpl.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"  # Pillow's own is of one size
# Of boxes, for a label always the same; dark enough for white text.
COLOURS = ("#c1121f", "#1d4ed8", "#15803d", "#7e22ce", "#b45309", "#0e7490", "#be185d", "#4d7c0f")
Row = tuple[str, int, int | str, int, str, float, float, float, float, float]


class Results:
    """Writes pictures as they come, and the tables at the end, in the order of the files.

    Args:
        folder: is made if it is missing.
        files: everything that is looked at.
        pictures: draw annotated copies.

    Raises:
        InputError: the folder cannot be written, or a copy would replace what was given.
    """

    def __init__(self, folder: Path, files: Sequence[Path], pictures: bool = True) -> None:
        self.folder = folder
        self.pictures = pictures
        self.read = 0
        self._files = list(files)
        self._image_ids = image_ids(files)
        self._stems = dict(zip(files, unique_stems(files), strict=True))
        self._rows: dict[Path, list[Row]] = {}
        self._skipped: dict[Path, None] = {}
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        if pictures and any(file.parent.resolve() == folder.resolve() for file in files):
            raise InputError(f"{folder} holds what is to be looked at; choose another --output, or --no_pictures")

    def __enter__(self) -> Results:
        """Nothing is open yet."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Write the tables, of what is done so far if something failed."""
        self.write_tables()

    @contextlib.contextmanager
    def reporting(self, file: Path) -> Iterator[None]:
        """An InputError in here is reported, and the file left out."""
        try:
            yield
        except InputError as error:
            self._skipped[file] = None
            logger.warning("skipped: %s", error)

    def add_image(self, file: Path, picture: Image.Image, found: Mapping[str, Any]) -> None:
        """Draw an image, and keep its detections."""
        self.read += 1
        self.add_rows(file, "", found)
        if self.pictures:
            with writing(self.folder):
                draw(picture, found).save(self.path(file, ".jpg"), quality=95)

    def add_rows(self, file: Path, frame: int | str, found: Mapping[str, Any]) -> None:
        """Keep the detections of an image, or of a frame of a video."""
        head = str(file), self._image_ids[file], frame
        columns = (found["labels"].tolist(), found["names"], found["scores"].tolist(), found["boxes"].tolist())
        self._rows.setdefault(file, []).extend(
            (*head, label, name, score, *box) for label, name, score, box in zip(*columns, strict=True)
        )

    def path(self, file: Path, suffix: str) -> Path:
        """Where the annotated copy of a file belongs."""
        return self.folder / f"{self._stems[file]}{suffix}"

    def write_tables(self) -> None:
        """detections.json, of images, and detections.csv, of images and frames."""
        rows = [row for file in self._files for row in self._rows.get(file, [])]
        with writing(self.folder):
            coco = [coco_result(row) for row in rows if row[2] == ""]
            (self.folder / "detections.json").write_text(json.dumps(coco, indent=1) + "\n", encoding="utf-8")
            with (self.folder / "detections.csv").open("w", newline="", encoding="utf-8") as file:
                table = csv.writer(file)
                table.writerow(COLUMNS)
                table.writerows(rows)

    @property
    def found(self) -> int:
        """Detections so far."""
        return sum(map(len, self._rows.values()))

    def summary(self) -> str:
        """One line of what was read and found."""
        skipped = f", {len(self._skipped)} skipped" if self._skipped else ""
        return f"{self.found} detections in {self.read} of {len(self._files)} files{skipped}"


def image_ids(files: Sequence[Path]) -> dict[Path, int]:
    """The numbers that all files are called, if these differ; else their places from 1 on."""
    numbers = [int(file.stem) for file in files if file.stem.isdecimal()]
    if len(set(numbers)) < len(files):
        numbers = list(range(1, len(files) + 1))
    return dict(zip(files, numbers, strict=True))


def coco_result(row: Row) -> dict[str, Any]:
    """An entry of COCO's results format, and the file's name."""
    file, image_id, _, label, _, score, left, top, right, bottom = row
    return {
        "image_id": image_id,
        "category_id": label,
        "bbox": [left, top, right - left, bottom - top],
        "score": score,
        "file_name": file,
    }


def draw(picture: Image.Image, found: Mapping[str, Any]) -> Image.Image:
    """A copy of the picture with boxes, names and scores, sized to be read on it; the best detection on top."""
    drawn = picture.copy()
    canvas = ImageDraw.Draw(drawn)
    size = max(12, min(picture.size) // 32)
    font = ImageFont.truetype(FONT, size)
    columns = (found["boxes"].tolist(), found["labels"].tolist(), found["names"], found["scores"].tolist())
    for (left, top, right, bottom), label, name, score in reversed(list(zip(*columns, strict=True))):
        colour = COLOURS[label % len(COLOURS)]
        canvas.rectangle((left, top, max(left, right), max(top, bottom)), outline=colour, width=max(2, size // 8))
        corner = max(left, 0), max(top, 0)
        canvas.rectangle(canvas.textbbox(corner, f"{name} {score:.2f}", font), fill=colour)
        canvas.text(corner, f"{name} {score:.2f}", "white", font)
    return drawn

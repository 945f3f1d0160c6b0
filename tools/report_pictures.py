"""Pictures of a report: an image with its objects, and again with the detections, as inline SVG around one JPEG."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from markupsafe import Markup
from PIL import Image

from datasets.images import DECODING_ERRORS
from tools.analysis import ImageMatch

Element = ElementTree.Element

LONGEST = 640  # pixels of an embedded picture's longer side
JPEG_QUALITY = 85
SMALL = 240  # pixels; smaller images are shown two pairs a row, each pixel as a square
SHOWN = {True: 250, False: 520}  # pixels that a picture is about as wide as on a screen, small or not
LETTER = 0.56  # mean width of a letter, in parts of the letters' size


@dataclass(frozen=True)
class Pair:
    """What the page shows of an image.

    Args:
        name: its file.
        truth, detections: inline SVG; None where the file cannot be read, for a reason.
        small: whether it has few pixels.
    """

    name: str
    match: ImageMatch
    truth: Markup | None
    detections: Markup | None
    reason: str
    small: bool


def draw_pair(
    match: ImageMatch, entry: Mapping[str, Any], image_dir: Path, class_names: Mapping[int, str], key: str
) -> Pair:
    """An image with its objects and with its detections.

    Args:
        match: the two, and which of them belong together.
        entry: the image's in the annotation file.
        image_dir: where its file is.
        class_names: by category id.
        key: a name that no other pair of the page has.
    """
    small = max(entry["width"], entry["height"]) <= SMALL
    try:
        uri = jpeg_uri(image_dir / entry["file_name"])
    except DECODING_ERRORS as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        return Pair(entry["file_name"], match, None, None, f"the picture cannot be read ({reason})", small)
    truth = _Picture(entry, small, f"{entry['file_name']}: objects")
    truth.embed(uri, key)
    rows = zip(match.object_boxes.tolist(), match.object_labels.tolist(), match.found.tolist(), strict=True)
    for box, label, found in rows:
        truth.draw(box, class_names[label], "found" if found else "missed")
    detections = _Picture(entry, small, f"{entry['file_name']}: detections")
    detections.embed(f"#{key}", None)
    for row in reversed(range(len(match.labels))):  # the best on top
        caption = f"{class_names[int(match.labels[row])]} {match.scores[row]:.2f}"
        detections.draw(match.boxes[row].tolist(), caption, "found" if match.correct[row] else "wrong")
    return Pair(entry["file_name"], match, truth.markup(), detections.markup(), "", small)


def jpeg_uri(path: Path) -> str:
    """An image file, made smaller if it is large, as a data URI; raises `DECODING_ERRORS`."""
    with Image.open(path) as image:
        picture = image.convert("RGB")
    picture.thumbnail((LONGEST, LONGEST))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


class _Picture:
    """An SVG in the pixels of an image, with boxes over it."""

    def __init__(self, entry: Mapping[str, Any], small: bool, title: str) -> None:
        self.width, self.height = entry["width"], entry["height"]
        self.letters = 11 * max(self.width, self.height) / SHOWN[small]
        box = {"viewBox": f"0 0 {self.width} {self.height}", "role": "img", "aria-label": title}
        self.svg = Element("svg", {**box, "class": "pixels" if small else "photograph"})

    def embed(self, uri: str, key: str | None) -> None:
        """Put the image in, under a name for others to use; or use another's, "#name"."""
        if key is None:
            ElementTree.SubElement(self.svg, "use", {"href": uri})
            return
        size = {"width": str(self.width), "height": str(self.height), "preserveAspectRatio": "none"}
        ElementTree.SubElement(self.svg, "image", {"id": key, "href": uri, **size})

    def draw(self, box: list[float], caption: str, style: str) -> None:
        """A box x, y, w, h with its caption above it, or inside where there is no room."""
        x, y, width, height = box
        group = ElementTree.SubElement(self.svg, "g", {"class": style})
        ElementTree.SubElement(group, "title").text = caption
        places = {"x": x, "y": y, "width": width, "height": height}
        ElementTree.SubElement(group, "rect", {"class": "box", **_written(places)})
        across, down = LETTER * self.letters * len(caption) + 0.4 * self.letters, 1.25 * self.letters
        left = max(0.0, min(x, self.width - across))
        top = max(0.0, y - down) if y >= down else max(0.0, y)
        places = {"x": left, "y": top, "width": across, "height": down}
        ElementTree.SubElement(group, "rect", {"class": "plate", **_written(places)})
        places = {"x": left + 0.2 * self.letters, "y": top + 0.95 * self.letters}
        size = f"font-size: {self.letters:.2f}px"  # as a style, which holds over the page's
        ElementTree.SubElement(group, "text", {**_written(places), "style": size}).text = caption

    def markup(self) -> Markup:
        return Markup(ElementTree.tostring(self.svg, encoding="unicode"))  # which has escaped texts and attributes


def _written(numbers: Mapping[str, float]) -> dict[str, str]:
    return {name: f"{value:.2f}" for name, value in numbers.items()}

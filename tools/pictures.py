"""Image files that a command is given: finding, reading and naming them."""

from __future__ import annotations

import contextlib
import glob
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import ExifTags, Image, ImageOps

from datasets.images import DECODING_ERRORS, DEEP_MODES
from util.errors import InputError
from util.files import regular_size

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm"})
VIDEO_SUFFIXES = frozenset({".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg"})
URL = re.compile(r"^[a-z][a-z0-9+.-]*://", re.IGNORECASE)
SIDEWAYS = frozenset({5, 6, 7, 8})  # EXIF orientations that swap width and height


def image_files(paths: Sequence[Path]) -> list[Path]:
    """The files among `paths`, and the images in the folders among them."""
    files: list[Path] = []
    for path in paths:
        files += _inside(path, SUFFIXES, "images") if path.is_dir() else [path]
    return list(dict.fromkeys(files))


def find_inputs(words: Sequence[str]) -> list[Path]:
    """The images and videos that words of a command line name, in that order, each once.

    Args:
        words: files, folders (whose images and videos count, not those of folders inside), and patterns such as
            "photos/*.jpg" or "photos/**/*.jpg".

    Raises:
        InputError: a word is a URL, or stands for no file.
    """
    files: list[Path] = []
    for word in words:
        path = Path(word)
        if URL.match(word):
            raise InputError(f"{word} is a URL, and nothing is fetched here; download it first and give the file")
        if path.is_dir():
            files += _inside(path, SUFFIXES | VIDEO_SUFFIXES, "images or videos")
        elif path.exists() or not glob.has_magic(word):
            files.append(path)
        else:
            files += _matching(word)
    return list(dict.fromkeys(files))


def is_video(path: Path) -> bool:
    """As its name says."""
    return path.suffix.lower() in VIDEO_SUFFIXES


def read_picture(path: Path) -> Image.Image:
    """An image file as RGB, turned as its EXIF data says (InputError if it is none)."""
    try:
        regular_size(path)
        with Image.open(path) as image:
            mode = image.mode
            picture: Image.Image = ImageOps.exif_transpose(image).convert("RGB")
    except DECODING_ERRORS as error:
        raise _unreadable(path, error) from None
    if mode.startswith(DEEP_MODES):
        raise InputError(f"{path}: image has pixels of mode {mode}; convert it to 8 bits a channel")
    return picture


def picture_size(path: Path) -> tuple[int, int]:
    """(height, width) in pixels of what `read_picture` gives, from the file's header (InputError if it has none)."""
    try:
        regular_size(path)
        with Image.open(path) as image:
            width, height = image.size
            sideways = image.getexif().get(ExifTags.Base.Orientation) in SIDEWAYS
    except DECODING_ERRORS as error:
        raise _unreadable(path, error) from None
    return (width, height) if sideways else (height, width)


def unique_stems(files: Sequence[Path]) -> list[str]:
    """A name for what is written of each image: the file's, with a number if another has it."""
    stems: dict[str, None] = {}
    for file in files:
        candidates = (f"{file.stem}_{number}" if number > 1 else file.stem for number in itertools.count(1))
        stems[next(stem for stem in candidates if stem not in stems)] = None
    return list(stems)


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """What fails in here fails because the folder cannot be written (InputError)."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror or error}; choose another --output") from None


def _inside(folder: Path, suffixes: frozenset[str], kind: str) -> list[Path]:
    try:
        inside = sorted(file for file in folder.iterdir() if file.suffix.lower() in suffixes)
    except OSError as error:
        raise InputError(f"cannot read {folder}: {error.strerror}") from None
    if not inside:
        raise InputError(f"there are no {kind} in {folder}")
    return inside


def _matching(pattern: str) -> list[Path]:
    found = sorted(Path(name) for name in glob.glob(pattern, recursive=True) if Path(name).is_file())
    if not found:
        raise InputError(f"no file matches {pattern}")
    return found


def _unreadable(path: Path, error: Exception) -> InputError:
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())
    return InputError(f"{path}: image cannot be read ({reason})")

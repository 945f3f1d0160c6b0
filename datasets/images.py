"""Image files: regular ones inside the data folder, in the formats that are needed, of sizes that fit into memory."""

from __future__ import annotations

import contextlib
import errno
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import ExifTags, Image

from util.errors import InputError
from util.files import demand_inside, regular_size

FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "PPM")  # Pillow has dozens more, one of which runs a program
LARGEST_SIDE = 65_535  # pixels
LARGEST_AREA = 89_478_485  # pixels; from here on Pillow warns of a decompression bomb
LARGEST_FILE = 2**30  # bytes
DECODING_ERRORS = (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError)
DEEP_MODES = ("I", "F")  # 16 or 32 bits a pixel, which Pillow would cut off at 255
# What the system says of a name that is wrong; anything else that it says may be over in a minute.
WRONG_NAME = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL})


class UnreadableImageError(InputError):
    """The file itself is wrong, so that each process meets it at each attempt; any other `InputError` may pass."""


@contextlib.contextmanager
def open_image(path: Path, roots: Sequence[Path]) -> Iterator[Image.Image]:
    """An image that is not decoded yet; errors of decoding it inside the block become one line, too.

    Args:
        roots: folders, one of which the file must lie in when all links are followed.

    Raises:
        UnreadableImageError: there is no such image, or it is damaged, too large, or not a file of the data set.
        InputError: the system cannot read it now.
    """
    try:
        _demand_own_file(path, roots)
        with Image.open(path, formats=FORMATS) as image:
            _demand_fitting(image)
            yield image
    except InputError:
        raise
    except OSError as error:
        if error.errno in WRONG_NAME:
            raise UnreadableImageError(f"{path}: image not found ({error.strerror})") from None
        raise _unreadable(path, error) if error.errno is None else InputError(
            f"{path}: cannot be read ({error.strerror}); go on when the disk can be read again"
        ) from None
    except Exception as error:  # Pillow's readers raise many kinds, whatever the damage
        raise _unreadable(path, error) from None


def read_image(path: Path, roots: Sequence[Path], size: tuple[int, int], source: Path) -> Image.Image:
    """A decoded image in RGB, as stored: EXIF orientation is ignored.

    Args:
        roots: see `open_image`.
        size: width and height that it must have.
        source: the file that says so.

    Raises:
        UnreadableImageError, InputError: see `open_image`; or the size or the pixels are not as they should be.
    """
    with open_image(path, roots) as image:
        if image.size != size:
            found, said = (f"{width} x {height}" for width, height in (image.size, size))
            raise UnreadableImageError(
                f"{path}: image is {found} pixels, but {source} says {said}; correct one of them"
            )
        if image.mode.startswith(DEEP_MODES):
            raise UnreadableImageError(
                f"{path}: image has pixels of mode {image.mode}; convert it to 8 bits a channel"
            )
        picture: Image.Image = image.convert("RGB")
        return picture
    raise AssertionError("open_image suppresses nothing")


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 is upright, and stands for any other value."""
    found = image.getexif().get(ExifTags.Base.Orientation, 1)
    return found if found in range(1, 9) else 1


def _demand_own_file(path: Path, roots: Sequence[Path]) -> None:
    try:
        demand_inside(path, roots)
        regular_size(path, LARGEST_FILE)
    except InputError as error:
        raise UnreadableImageError(str(error)) from None


def _demand_fitting(image: Image.Image) -> None:
    width, height = image.size
    if width * height > LARGEST_AREA or max(width, height) > LARGEST_SIDE:
        raise ValueError(f"{width} x {height} pixels are more than fit; cut it into tiles")


def _unreadable(path: Path, error: Exception) -> UnreadableImageError:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return UnreadableImageError(f"{path}: image cannot be read ({reason}); fetch it again or remove it")

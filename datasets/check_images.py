"""Every image of a data set decoded, in several processes: damage, size, EXIF orientation, a digest of the content."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

from datasets.annotations import Problem, is_integer, leads_out
from datasets.images import DEEP_MODES, open_image, orientation
from util.errors import InputError
from util.files import unprintable

CHUNK = 16  # images that a process takes at a time
SIDEWAYS = range(5, 9)


class Job(NamedTuple):
    """An image file, and the folders that it must lie in; width and height as annotated, None if that is no size."""

    path: Path
    roots: tuple[Path, ...]
    size: tuple[int, int] | None


class Seen(NamedTuple):
    """What an image file turned out to be; without a digest if it could not be read."""

    path: Path
    digest: str
    errors: tuple[Problem, ...] = ()
    warnings: tuple[Problem, ...] = ()


def jobs_of(images: Sequence[dict[str, Any]], image_dir: Path, root: Path) -> list[Job]:
    """Each file that the images name, once; names that `problems` refuses are left out."""
    jobs: dict[str, Job] = {}
    for image in images:
        name = image.get("file_name")
        size: tuple[Any, Any] = (image.get("width"), image.get("height"))
        if isinstance(name, str) and name and not unprintable(name) and not leads_out(name):
            said = size if all(is_integer(side) and side > 0 for side in size) else None
            jobs.setdefault(name, Job(image_dir / name, (image_dir, root), said))
    return list(jobs.values())


def examine_all(jobs: Sequence[Job], processes: int) -> Iterator[Seen]:
    """The images in order; 0 or 1 processes: in this one.

    Raises:
        InputError: a process died.
    """
    if processes < 2:
        yield from map(examine, jobs)
        return
    try:
        with ProcessPoolExecutor(processes) as pool:
            yield from pool.map(examine, jobs, chunksize=CHUNK)
    except BrokenProcessPool:
        raise InputError("a process that decoded images died, out of memory perhaps; give --workers 1") from None


def examine(job: Job) -> Seen:
    """Decode an image and compare it with what is said of it."""
    try:
        with open_image(job.path, job.roots) as image:
            size, mode, turned = image.size, image.mode, orientation(image)
            image.load()
        digest = _digest(job.path)
    except InputError as error:
        missing = not job.path.exists()
        kind = "images that are missing" if missing else "images that cannot be read"
        return Seen(job.path, "", (Problem(kind, str(error)),))
    warnings: tuple[Problem, ...] = ()
    if turned != 1:
        text = f"{job.path}: orientation {turned}; boxes must be those of the pixels as they are stored"
        warnings = (Problem("images that are stored turned (EXIF)", text),)
    return Seen(job.path, digest, tuple(_disagreements(job, size, mode, turned)), warnings)


def _disagreements(job: Job, size: tuple[int, int], mode: str, turned: int) -> Iterator[Problem]:
    if job.size is not None and size != job.size:
        text = f"{job.path}: {size[0]} x {size[1]} pixels, annotated as {job.size[0]} x {job.size[1]}"
        if turned in SIDEWAYS and size[::-1] == job.size:
            text += ", which is the picture turned upright (EXIF); store it upright, without the tag"
        yield Problem("image sizes that disagree with the file", text)
    if mode.startswith(DEEP_MODES):
        text = f"{job.path}: pixels of mode {mode}; convert it to 8 bits a channel"
        yield Problem("images of more than 8 bits a channel", text)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()  # hashlib.file_digest is new in Python 3.11
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()

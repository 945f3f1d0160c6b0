"""Training images that cannot be read: replaced by the data set, counted here, up to a limit."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator

from datasets.coco import Batch, CocoDetection
from util.errors import InputError

logger = logging.getLogger(__name__)


class BadImages:
    """Which images the batches of a process say were replaced; each counts, and is logged, once.

    Args:
        dataset: that the batches come from, here or in workers; it has the limit.
    """

    def __init__(self, dataset: CocoDetection) -> None:
        self.reasons: dict[int, str] = {}  # by image id
        self._dataset = dataset

    def watch(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches as they are.

        Raises:
            InputError: more images than the data set's `max_bad_images` were replaced; names the last of them.
        """
        for batch in batches:
            for target in batch.targets:
                for image_id in target["bad_images"].tolist() if "bad_images" in target else ():
                    self._count(image_id)
            yield batch

    def _count(self, image_id: int) -> None:
        if image_id in self.reasons:
            return
        reason = self.reasons[image_id] = self._reason(image_id)
        number, limit = len(self.reasons), self._dataset.max_bad_images
        if number > limit:
            raise InputError(f"{reason}; this is image {number} that cannot be read, and --max_bad_images is {limit}")
        logger.warning("%s; the next image takes its place (%d of at most %d)", reason, number, limit)

    def _reason(self, image_id: int) -> str:
        try:
            self._dataset.read_picture(self._dataset.image_ids.index(image_id))
        except InputError as error:
            return str(error)
        return f"image {image_id} could not be read before, and can be now"

"""A mapper that combines several training images, during a part of the training."""

from __future__ import annotations

from collections.abc import Sequence

from detectron2.data import transforms as T

from dino.data.mixing import MixUp, Mosaic, Picture
from dino.utils.files import UserError

from .data_loading import TrainMapper
from .training.sampler import Place


class CombiningMapper(TrainMapper):
    """As `TrainMapper`, with a mosaic and a mixture of images before the augmentations.

    Both are off at the start and at the end of the training: images are then those of `TrainMapper`, bit for bit. In
    between, so are the images that neither of the two changes. A mixture may have a mosaic in both of its parts, so it
    shows up to eight images. `file_name` of the result lists the files of all of them, for messages.

    Args:
        augmentations, input_range: as of `TrainMapper`.
        mosaic: joins four images, see `dino.data.mixing.Mosaic`.
        mixup: blends two, see `dino.data.mixing.MixUp`.
        begin, end: the part of the training, in shares of its iterations; from `begin` to before `end`.
        max_iter: length of the training in iterations; `"${train.max_iter}"` in a recipe, where None is filled in
            when the training starts.

    Raises:
        UserError: `begin` and `end` are not two rising numbers in [0, 1]; or, when called, `max_iter` is None.
    """

    def __init__(
        self,
        augmentations: Sequence[T.Augmentation],
        *,
        mosaic: Mosaic,
        mixup: MixUp,
        begin: float,
        end: float,
        max_iter: int | None,
        input_range: Sequence[float] | None = None,
    ):
        super().__init__(augmentations, input_range)
        if not 0 <= begin <= end <= 1:
            raise UserError(f"begin={begin} and end={end} of mosaic and mixup must rise within [0, 1]")
        self.mosaic = mosaic
        self.mixup = mixup
        self.begin = begin
        self.end = end
        self.max_iter = max_iter

    @property
    def first_iteration(self) -> int:
        """The first iteration that may show combined images."""
        return self._iteration(self.begin)

    def __call__(self, entry: dict, place: Place) -> dict:
        """Dict of a data set, and its place in the training -> dict for `DINODetector`."""
        if not self.first_iteration <= place.iteration < self._iteration(self.end):
            return super().__call__(entry)
        picture = self._scene(entry, place)
        if place.numbers.random() < self.mixup.probability:
            picture = self.mixup(picture, self._scene(*place.others(1), place), place.numbers)
        return self.augment(entry, picture)

    def _iteration(self, share: float) -> int:
        """The iteration at a share of the training."""
        if self.max_iter is None:
            raise UserError("mosaic and mixup need the length of the training: set train.max_iter")
        return round(share * self.max_iter)

    def _scene(self, entry: dict, place: Place) -> Picture:
        """The image of an entry, alone or in a mosaic."""
        if place.numbers.random() >= self.mosaic.probability:
            return self.read(entry)
        return self.mosaic(map(self.read, [entry, *place.others(3)]), place.numbers)

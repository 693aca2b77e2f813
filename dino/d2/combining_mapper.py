"""A mapper that combines several training images, during a part of the training."""

from __future__ import annotations

from collections.abc import Sequence

from detectron2.data import transforms as T

from dino.data.mixing import Combination, MixUp, Mosaic
from dino.training.image_order import Place

from .data_loading import TrainMapper


class CombiningMapper(TrainMapper):
    """As `TrainMapper`, with a mosaic and a mixture of images before the augmentations.

    Outside its part of the training, images are those of `TrainMapper`, bit for bit. Within it, so are the images that
    neither of the two changes. `file_name` of the result lists the files of all images, for messages.

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
        self.combination = Combination(mosaic=mosaic, mixup=mixup, begin=begin, end=end, max_iter=max_iter)

    @property
    def first_iteration(self) -> int:
        """The first iteration that may show combined images."""
        return self.combination.first_iteration

    def __call__(self, entry: dict, place: Place) -> dict:
        """Dict of a data set, and its place in the training -> dict for `DINODetector`."""
        return self.augment(entry, self.combination(entry, place, self.read))

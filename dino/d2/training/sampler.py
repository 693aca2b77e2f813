"""The training loader of Detectron2's road, see `dino.training.image_order`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from detectron2.data import DatasetFromList, build_detection_train_loader
from detectron2.utils import comm

from dino.layers.matcher import takes
from dino.training.image_order import (
    Place,
    SeededImages,
    Stream,
    endless_order,
    repeat_factors,
    seed_random,
    sort_by_shape,
)
from dino.utils.files import DataError

__all__ = ["Place", "TrainLoader", "seed_random"]


def _map_without_place(mapper: Callable[[Any], dict], entry: Any, place: Place) -> dict:
    """Call a mapper that combines no images."""
    return mapper(entry)


class TrainLoader:
    """Endless batches of this process, through Detectron2's loader.

    Args:
        dataset: dicts of a data set.
        mapper: dict -> dict for the detector, see `TrainMapper`; it gets a `Place` too if it has an argument `place`,
            see `CombiningMapper`.
        total_batch_size: images in one step of the optimizer, over all processes.
        num_workers: processes that read images.
        repeat_threshold: classes that are on less than this fraction of the images have theirs shown more often (repeat
            factors of LVIS, arXiv 1908.03195, appendix B.2); 0 shows every image once per epoch.
        sorted_batches: batches that share out their images by shape, which saves padding; with 1, any shapes meet in a
            batch. No more batches than an epoch has.

    """

    def __init__(
        self,
        dataset: list[dict],
        mapper: Callable[..., dict],
        *,
        total_batch_size: int,
        num_workers: int = 0,
        repeat_threshold: float = 0.0,
        sorted_batches: int = 1,
    ):
        self.images = DatasetFromList(dataset, copy=False)
        self.mapper = mapper
        self.total_batch_size = total_batch_size
        self.num_workers = num_workers
        self.sorted_batches = min(sorted_batches, max(1, len(dataset) // total_batch_size))
        self.ratios = [entry["width"] / entry["height"] for entry in dataset] if self.sorted_batches > 1 else []
        self.seed, self.start, self.parts = 0, 0, 1
        self.repeats = None
        if repeat_threshold > 0:
            labels = [{a["category_id"] for a in entry["annotations"]} for entry in dataset]
            self.repeats = repeat_factors(labels, repeat_threshold)

    def begin(self, *, seed: int, start: int, parts: int) -> None:
        """Prepare the first batch: the seed of the run, its first iteration, the number of batches of one step."""
        self.seed, self.start, self.parts = seed, start, parts

    def __iter__(self) -> Iterator[list[dict]]:
        """Yield the batches of this process from iteration `start` on."""
        pieces = self.parts * comm.get_world_size()
        if self.total_batch_size % pieces:
            raise DataError(
                f"dataloader.train.total_batch_size={self.total_batch_size} can't be divided among "
                f"{comm.get_world_size()} processes and train.grad_accum_steps={self.parts}"
            )
        mapper = self.mapper if takes(self.mapper, "place") else partial(_map_without_place, self.mapper)
        start = self.start * self.total_batch_size
        loader = build_detection_train_loader(
            SeededImages(self.images, mapper, self.seed, self.total_batch_size),
            mapper=None,
            sampler=Stream(self._indices, start, comm.get_rank(), comm.get_world_size()),
            total_batch_size=self.total_batch_size // self.parts,
            aspect_ratio_grouping=False,  # it delays images, which a resumed run could not repeat
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),  # of images; the few numbers in `Instances` stay where they are
        )
        return iter(loader)

    def _indices(self) -> Iterator[int]:
        """The indices of images for all processes."""
        indices = endless_order(len(self.images), self.seed, self.repeats)
        if self.sorted_batches <= 1:
            return indices
        return sort_by_shape(indices, self.ratios, self.total_batch_size, self.sorted_batches, self.seed)

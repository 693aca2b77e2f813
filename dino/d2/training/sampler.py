"""The training loader of Detectron2's road, see `dino.training.image_order`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from detectron2.data import DatasetFromList, build_detection_train_loader
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage, has_event_storage

from dino.layers.matcher import takes
from dino.training.engine_settings import only_dino_train
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

logger = logging.getLogger("detectron2.dino")


def _map_without_place(mapper: Callable[[Any], dict], entry: Any, place: Place) -> dict:
    """Call a mapper that combines no images."""
    return mapper(entry)


class TrainLoader:
    """Endless batches of this process, through Detectron2's loader.

    Seed and first iteration determine all batches. Trainers other than that of `dino train` need not state the
    iteration: the loader starts at that of Detectron2's `EventStorage`, which their training runs in. So a run that
    Detectron2's own programs resume continues with the images that an uninterrupted run would see.

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
        seed: of order and augmentation; negative for another one each time.
        start: iteration of the first batch; None for that of the `EventStorage`, or 0 where there is none.
        settings: the recipe's `train`. Where another trainer uses the loader, one line of the log lists those of its
            settings that only `dino train` follows.

    Raises:
        DataError: when iterated, the batch can't be divided among processes and parts.
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
        seed: int = 0,
        start: int | None = None,
        settings: Mapping | None = None,
    ):
        self.images = DatasetFromList(dataset, copy=False)
        self.mapper = mapper
        self.total_batch_size = total_batch_size
        self.num_workers = num_workers
        self.sorted_batches = min(sorted_batches, max(1, len(dataset) // total_batch_size))
        self.ratios = [entry["width"] / entry["height"] for entry in dataset] if self.sorted_batches > 1 else []
        self.seed, self.start, self.parts = seed, start, 1
        self.settings = settings  # None where `dino train` follows them
        self.repeats = None
        if repeat_threshold > 0:
            labels = [{a["category_id"] for a in entry["annotations"]} for entry in dataset]
            self.repeats = repeat_factors(labels, repeat_threshold)

    def begin(self, *, seed: int, start: int, parts: int) -> None:
        """Prepare the first batch: the seed of the run, its first iteration, the number of batches of one step."""
        self.seed, self.start, self.parts = seed, start, parts
        self.settings = None

    def _first_iteration(self) -> int:
        """That of the first batch; settles the seed, and says what trainers other than `dino train`'s ignore."""
        if self.seed < 0:
            self.seed = comm.shared_random_seed()
        ignored = only_dino_train(self.settings or {}) if has_event_storage() else []
        if ignored:
            self.settings = None  # once is enough
            logger.warning(
                f"the recipe also sets {', '.join(ignored)}: only `dino train` and tools/lazyconfig_train_net.py of "
                "this project follow these settings, the present trainer ignores them"
            )
        if self.start is None:
            return get_event_storage().iter if has_event_storage() else 0
        return self.start

    def __iter__(self) -> Iterator[list[dict]]:
        """Yield the batches of this process from iteration `start` on."""
        start = self._first_iteration() * self.total_batch_size
        pieces = self.parts * comm.get_world_size()
        if self.total_batch_size % pieces:
            raise DataError(
                f"dataloader.train.total_batch_size={self.total_batch_size} can't be divided among "
                f"{comm.get_world_size()} processes and train.grad_accum_steps={self.parts}"
            )
        mapper = self.mapper if takes(self.mapper, "place") else partial(_map_without_place, self.mapper)
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

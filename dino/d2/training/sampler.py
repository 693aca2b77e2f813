"""Order and augmentation of the training images, as functions of the seed and the position in an endless stream.

So nothing has to be saved: a run that resumes at iteration n reads the same images as an uninterrupted one.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from detectron2.data import DatasetFromList, build_detection_train_loader
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from detectron2.utils import comm
from torch.utils.data import Dataset, Sampler

from dino.layers.matcher import takes
from dino.utils.files import DataError


def seed_random(*numbers: int) -> None:
    """Seed Python, numpy and torch, on all devices, from several numbers, without a device sync."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class _Stream(Sampler):
    """This process's share of an endless stream, as pairs of a position in the whole stream and an index.

    Args:
        indices: () -> the whole stream.
        start: number of its positions to skip.
    """

    def __init__(self, indices: Callable[[], Iterator[int]], start: int):
        self.indices = indices
        self.start = start

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Yield (position, index) endlessly."""
        stream = enumerate(self.indices())
        return itertools.islice(stream, self.start + comm.get_rank(), None, comm.get_world_size())


def _sort_by_shape(
    sampler: Sampler, ratios: Sequence[float], batch_size: int, num_batches: int, seed: int
) -> Iterator[int]:
    """Gather images of like shapes in batches, which then need little padding.

    Each run of `num_batches` batches is sorted by shape and divided anew; its batches come in random order. So the
    stream stays a function of the seed.

    Args:
        sampler: one of Detectron2's endless samplers.
        ratios: width / height of each image of the data set.
        batch_size: images of a batch.
        num_batches: batches that are sorted together.
        seed: of their order.
    """
    indices, numbers = sampler._infinite_indices(), np.random.default_rng(seed)
    while True:
        run = sorted(itertools.islice(indices, batch_size * num_batches), key=ratios.__getitem__)
        for place in numbers.permutation(num_batches) * batch_size:
            yield from run[place : place + batch_size]


class Place(NamedTuple):
    """The place of an image in the training, for a mapper that combines images.

    It depends on the seed and the position in the stream only. So a resumed run combines the same images as an
    uninterrupted one, and so does any number of processes and workers.
    """

    images: Dataset  # dicts of the data set
    index: int  # of the image in it
    iteration: int  # in which the image is shown, from 0
    numbers: np.random.Generator  # of this place; drawing from it doesn't change what augmentations draw

    def others(self, count: int) -> list[dict]:
        """Draw dicts of other images, with replacement, each image with the same chance.

        A data set of one image gives that image.
        """
        total = len(self.images)
        steps = 1 + self.numbers.integers(max(1, total - 1), size=count)
        return [self.images[(self.index + step) % total] for step in steps.tolist()]


class _SeededDataset(Dataset):
    """Maps an image with random numbers from the seed and its position in the stream.

    Args:
        images: dicts of a data set, kept in compact form.
        mapper: see `TrainLoader`.
        seed: of the run.
        total_batch_size: number of positions in an iteration.
    """

    def __init__(self, images: Dataset, mapper: Callable[..., dict], seed: int, total_batch_size: int):
        self.images = images
        self.mapper = mapper
        self.seed = seed
        self.total_batch_size = total_batch_size
        self.place_wanted = takes(mapper, "place")

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        """(position, index) -> the mapped image."""
        position, index = key
        seed_random(self.seed, position)
        if not self.place_wanted:
            return self.mapper(self.images[index])
        own = np.random.SeedSequence((self.seed, position)).spawn(1)[0]
        place = Place(self.images, index, position // self.total_batch_size, np.random.default_rng(own))
        return self.mapper(self.images[index], place=place)


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
            factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency
            self.repeats = factors(dataset, repeat_threshold)

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
        if self.repeats is None:
            sampler = TrainingSampler(len(self.images), seed=self.seed)
        else:
            sampler = RepeatFactorTrainingSampler(self.repeats, seed=self.seed)
        indices = sampler._infinite_indices
        if self.sorted_batches > 1:
            indices = partial(
                _sort_by_shape, sampler, self.ratios, self.total_batch_size, self.sorted_batches, self.seed
            )
        loader = build_detection_train_loader(
            _SeededDataset(self.images, self.mapper, self.seed, self.total_batch_size),
            mapper=None,
            sampler=_Stream(indices, self.start * self.total_batch_size),
            total_batch_size=self.total_batch_size // self.parts,
            aspect_ratio_grouping=False,  # it delays images, which a resumed run could not repeat
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),  # of images; the few numbers in `Instances` stay where they are
        )
        return iter(loader)

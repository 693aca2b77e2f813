"""Order and random numbers of training images, as functions of the seed and the position in an endless stream.

So nothing has to be saved: a run that resumes at iteration n reads the same images as an uninterrupted one.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler


def _seed_of(numbers: Sequence[int]) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def seed_random(*numbers: int) -> None:
    """Seed Python, numpy and torch, on all devices, from several numbers, without a device sync."""
    seed = _seed_of(numbers)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextmanager
def _seeded(*numbers: int) -> Iterator[None]:
    """Within the block, the generators of Python, numpy and torch's CPU start from several numbers.

    Afterwards they continue where they were: samples that are read in the main process leave no trace in its noise.
    """
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed = _seed_of(numbers)
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # augmentations run on the CPU: those of other devices are not touched
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def repeat_factors(labels: Sequence[Collection[int]], threshold: float) -> Tensor:
    """How often each image is shown per epoch (repeat factors of LVIS, arXiv 1908.03195, appendix B.2).

    Args:
        labels: of the objects of each image.
        threshold: classes on less than this share of the images have theirs shown more often.

    Returns:
        (number of images,) float32, at least 1.
    """
    images = Counter(label for found in labels for label in set(found))
    factors = {label: max(1.0, math.sqrt(threshold / (count / len(labels)))) for label, count in images.items()}
    return torch.tensor([max((factors[label] for label in set(found)), default=1.0) for found in labels])


def endless_order(num_images: int, seed: int, factors: Tensor | None = None) -> Iterator[int]:
    """Indices of images, endlessly: each epoch in a new random order.

    The streams are those of Detectron2's `TrainingSampler` and `RepeatFactorTrainingSampler`.

    Args:
        factors: of `repeat_factors`; None shows each image once per epoch. Fractions are rounded at random.
    """
    generator = torch.Generator()
    generator.manual_seed(seed)
    indices = torch.arange(num_images)
    while True:
        if factors is not None:
            rounded = factors.trunc() + (torch.rand(num_images, generator=generator) < factors.frac()).float()
            indices = torch.arange(num_images).repeat_interleave(rounded.long())
        yield from indices[torch.randperm(len(indices), generator=generator)].tolist()


def sort_by_shape(
    indices: Iterator[int], ratios: Sequence[float], batch_size: int, num_batches: int, seed: int
) -> Iterator[int]:
    """Gather images of like shapes in batches, which then need little padding.

    Each run of `num_batches` batches is sorted by shape and divided anew; its batches come in random order. So the
    stream stays a function of the seed.

    Args:
        indices: of `endless_order`.
        ratios: width / height of each image of the data set.
        batch_size: images of a batch.
        num_batches: batches that are sorted together.
        seed: of their order.
    """
    numbers = np.random.default_rng(seed)
    while True:
        run = sorted(itertools.islice(indices, batch_size * num_batches), key=ratios.__getitem__)
        for place in numbers.permutation(num_batches) * batch_size:
            yield from run[place : place + batch_size]


class Stream(Sampler):
    """A process's share of an endless stream, as pairs of a position in the whole stream and an index.

    Args:
        indices: () -> the whole stream.
        start: number of its positions to skip.
        rank, world_size: number of the process, and of processes.
    """

    def __init__(self, indices: Callable[[], Iterator[int]], start: int, rank: int = 0, world_size: int = 1):
        self.indices = indices
        self.start = start
        self.rank = rank
        self.world_size = world_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Yield (position, index) endlessly."""
        return itertools.islice(enumerate(self.indices()), self.start + self.rank, None, self.world_size)


class Place(NamedTuple):
    """The place of an image in the training, for a mapper that combines images.

    It depends on the seed and the position in the stream only. So a resumed run combines the same images as an
    uninterrupted one, and so does any number of processes and workers.
    """

    images: Dataset  # entries of the data set
    index: int  # of the image in it
    iteration: int  # in which the image is shown, from 0
    numbers: np.random.Generator  # of this place; drawing from it doesn't change what augmentations draw

    def others(self, count: int) -> list[Any]:
        """Draw entries of other images, with replacement, each image with the same chance.

        A data set of one image gives that image.
        """
        total = len(self.images)
        steps = 1 + self.numbers.integers(max(1, total - 1), size=count)
        return [self.images[(self.index + step) % total] for step in steps.tolist()]


class SeededImages(Dataset):
    """Maps an image with random numbers from the seed and its position in the stream.

    Random numbers of the process that reads the image continue as if no image had been read.

    Args:
        images: entries of a data set.
        mapper: entry, and its `Place` as `place` -> the mapped image.
        seed: of the run.
        total_batch_size: number of positions in an iteration.
    """

    def __init__(self, images: Dataset, mapper: Callable[..., Any], seed: int, total_batch_size: int):
        self.images = images
        self.mapper = mapper
        self.seed = seed
        self.total_batch_size = total_batch_size

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> Any:
        """(position, index) -> the mapped image."""
        position, index = key
        own = np.random.SeedSequence((self.seed, position)).spawn(1)[0]
        place = Place(self.images, index, position // self.total_batch_size, np.random.default_rng(own))
        with _seeded(self.seed, position):
            return self.mapper(self.images[index], place=place)

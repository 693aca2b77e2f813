"""The data of a recipe without Detectron2: files of its data sets, training batches, validation images."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import tv_tensors

from dino.data.augmentations import Augmentations
from dino.data.coco import CocoImages
from dino.data.images import read_image
from dino.data.mixing import Combination, Picture
from dino.modeling.detector import to_target
from dino.structures import Target
from dino.utils.files import DataError, UserError

from .image_order import Place, SeededImages, Stream, endless_order, repeat_factors, sort_by_shape

_COCO = {  # data sets of Detectron2's catalog -> images and annotations below the folder of COCO
    f"coco_{year}_{split}": (f"{split}{year}", f"annotations/instances_{split}{year}.json")
    for year in (2014, 2017)
    for split in ("train", "val")
}


class SplitFiles(NamedTuple):
    """The files of a recipe's training or validation data."""

    annotations: str
    images: str
    crowd: str = "ignore"
    filter_empty: bool = False


def files_of(node: Mapping) -> SplitFiles:
    """The files of a data set in a recipe's `L(dataset)(…)`.

    Raises:
        UserError: the data set is written in another way.
        DataError: it has no files, and is not COCO in the folder that DETECTRON2_DATASETS names.
    """
    if "name" not in node:
        raise UserError("the recipe's data sets must be written as L(dino.d2.data_loading.dataset)(name=…)")
    filter_empty = bool(node.get("filter_empty", False))
    if node.get("annotations") is not None:
        crowd = node.get("crowd", "ignore")
        return SplitFiles(str(node["annotations"]), str(node["images"]), crowd, filter_empty)
    if node["name"] not in _COCO:
        raise DataError(
            f"the recipe's data set {node['name']!r} has no files: give --train and --val ANNOTATIONS IMAGES"
        )
    folder = Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser() / "coco"
    images, annotations = (folder / part for part in _COCO[node["name"]])
    if not annotations.is_file():
        raise DataError(
            f"the recipe's data set is COCO, but there is no file {annotations}: give --train and --val ANNOTATIONS "
            "IMAGES, or set DETECTRON2_DATASETS to the folder that holds coco/"
        )
    return SplitFiles(str(annotations), str(images), filter_empty=filter_empty)


def class_names(node: Mapping) -> list[str]:
    """Class names of a data set in a recipe, by label. Errors as of `files_of` and `read_annotations`."""
    return list(open_images(files_of(node)).names)


def open_images(files: SplitFiles) -> CocoImages:
    """Open a data set, without transforms; the last two stay in memory, until their files change.

    Raises:
        DataError: see `read_annotations`.
    """
    path = Path(files.annotations)
    return _open(files, path.stat().st_mtime_ns if path.is_file() else 0)


@functools.lru_cache(maxsize=2)
def _open(files: SplitFiles, changed: int) -> CocoImages:
    """`open_images` of a file that was `changed` at this time."""
    images = CocoImages(files.annotations, files.images, _unchanged, crowd=files.crowd)
    for annotation in images.data["annotations"]:
        annotation.pop("segmentation", None)  # COCO's outlines take gigabytes; only boxes are learned and evaluated
    if files.filter_empty:  # as `dino.d2.data_loading.dataset` does
        images.images = [entry for entry in images.images if images.objects[entry["id"]]] or images.images
    return images


def _unchanged(image: Any, objects: Any) -> tuple[Any, Any]:
    return image, objects


def forget_files() -> None:
    """Forget the classes of files that an earlier job of this process has read: the files may have changed."""
    _open.cache_clear()


class TrainLoader:
    """Endless batches: lists of (image (3, h, w) uint8 RGB, `Target`, {"file_name", "image_id", "height", "width"}).

    Order, augmentation and combination of images are those of Detectron2's road, see `dino.training.image_order`.

    Args:
        dataset: of the training images.
        mapper: reads and augments an image.
        total_batch_size, num_workers, repeat_threshold, sorted_batches, seed, start: as of
            `dino.d2.training.sampler.TrainLoader`.
        settings: not used; for the same arguments.
    """

    def __init__(
        self,
        dataset: SplitFiles,
        mapper: TrainMapper,
        *,
        total_batch_size: int,
        num_workers: int = 0,
        repeat_threshold: float = 0.0,
        sorted_batches: int = 1,
        seed: int = 0,
        start: int | None = None,
        settings: Mapping | None = None,
    ):
        self.images = _Entries(open_images(dataset))
        self.mapper = mapper
        self.total_batch_size = total_batch_size
        self.num_workers = num_workers
        self.sorted_batches = min(sorted_batches, max(1, len(self.images) // total_batch_size))
        self.ratios = [entry["width"] / entry["height"] for entry in self.images.data.images]
        self.seed, self.start, self.parts = seed, start or 0, 1
        self.repeats: Tensor | None = None
        if repeat_threshold > 0:
            self.repeats = repeat_factors([entry.labels for entry in self.images], repeat_threshold)

    def begin(self, *, seed: int, start: int, parts: int) -> None:
        """Prepare the first batch: the seed of the run, its first iteration, the number of batches of one step."""
        self.seed, self.start, self.parts = seed, start, parts

    def __iter__(self) -> Iterator[list[tuple[Tensor, Target, dict]]]:
        """Yield batches from iteration `start` on.

        Raises:
            UserError: the batch of a step can't be divided.
        """
        if self.total_batch_size % self.parts:
            raise UserError(
                f"dataloader.train.total_batch_size={self.total_batch_size} can't be divided by "
                f"train.grad_accum_steps={self.parts}"
            )
        loader = DataLoader(
            SeededImages(self.images, self.mapper, self.seed, self.total_batch_size),
            batch_size=self.total_batch_size // self.parts,
            sampler=Stream(self._indices, self.start * self.total_batch_size),
            num_workers=self.num_workers,
            collate_fn=list,
            pin_memory=torch.cuda.is_available(),
        )
        return iter(loader)

    def _indices(self) -> Iterator[int]:
        indices = endless_order(len(self.images), self.seed, self.repeats)
        if self.sorted_batches <= 1:
            return indices
        return sort_by_shape(indices, self.ratios, self.total_batch_size, self.sorted_batches, self.seed)


class _Entry(NamedTuple):
    """An image of a data set and its objects."""

    path: str
    image_id: int
    size: tuple[int, int]  # height, width
    boxes: np.ndarray  # (G, 4) float64, xyxy in pixels, inside the image
    labels: np.ndarray  # (G,) int64


class _Entries(torch.utils.data.Dataset):
    """The entries of a data set."""

    def __init__(self, data: CocoImages):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> _Entry:
        if index >= len(self.data):
            raise IndexError(index)
        entry = self.data.images[index]
        objects = self.data.objects[entry["id"]]
        boxes = np.array([box for _, box in objects], dtype=np.float64).reshape(-1, 4)
        labels = np.array([label for label, _ in objects], dtype=np.int64)
        path = os.path.join(self.data.folder, entry["file_name"])
        return _Entry(path, entry["id"], (entry["height"], entry["width"]), boxes, labels)


class TrainMapper:
    """Reads and augments one training image.

    Args:
        augmentations: of `dino.data.augmentations`.
        input_range: of `read_image`.
        combination: of several images, see `dino.data.mixing.Combination`.
    """

    def __init__(self, augmentations: Sequence, input_range: Sequence[float] | None = None, **combination: Any):
        self.augmentations = Augmentations(augmentations)
        self.input_range = input_range
        self.combination = Combination(**combination) if combination else None

    @property
    def first_combined(self) -> int | None:
        """The first iteration that may show combined images; None where no images are combined."""
        return self.combination and self.combination.first_iteration

    def __call__(self, entry: _Entry, place: Place) -> tuple[Tensor, Target, dict]:
        """An image of the data set -> an entry of a batch; drops objects that were cropped away.

        Raises:
            DataError: the file can't be read, or its size is not that of the annotations.
        """
        picture = self.combination(entry, place, self._read) if self.combination else self._read(entry)
        return self._augment(entry, picture)

    def _read(self, entry: _Entry) -> Picture:
        image = read_image(entry.path, self.input_range)
        if image.shape[:2] != entry.size:
            (height, width), (stated_height, stated_width) = image.shape[:2], entry.size
            raise DataError(f"{entry.path} is {width}x{height}, but the annotations say {stated_width}x{stated_height}")
        return Picture(image, entry.boxes, entry.labels, (entry.path,))

    def _augment(self, entry: _Entry, picture: Picture) -> tuple[Tensor, Target, dict]:
        image, boxes, labels = _augmented(self.augmentations, *picture[:3])
        height, width = picture.image.shape[:2]
        info = {"file_name": " + ".join(picture.files), "image_id": entry.image_id, "height": height, "width": width}
        return image, to_target(labels, boxes, image.shape[1:]), info


def _augmented(
    augmentations: Augmentations, image: np.ndarray, boxes: np.ndarray, labels: np.ndarray
) -> tuple[Tensor, Tensor, Tensor]:
    """Augment an image (H, W, 3) -> (3, h, w), boxes (G, 4) float32 xyxy in pixels, clipped, and labels of the rest."""
    image, boxes = augmentations(image, boxes)
    boxes = boxes.astype(np.float32).clip(0, np.tile(image.shape[1::-1], 2).astype(np.float32))
    kept = (boxes[:, 2:] > boxes[:, :2]).all(1)
    pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
    return pixels, torch.from_numpy(boxes[kept]), torch.from_numpy(labels[kept])


class ValTransform:
    """The augmentations of validation images as a transform of `CocoImages`.

    Args:
        augmentations: of `dino.data.augmentations`.
    """

    def __init__(self, augmentations: Sequence):
        self.augmentations = Augmentations(augmentations)

    def __call__(self, image: tv_tensors.Image, objects: dict[str, Any]) -> tuple[tv_tensors.Image, dict[str, Any]]:
        """image (3, H, W); objects: its `boxes` and `labels`."""
        arrays = (image.permute(1, 2, 0), objects["boxes"], objects["labels"])
        pixels, boxes, labels = _augmented(self.augmentations, *(part.as_subclass(Tensor).numpy() for part in arrays))
        boxes = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=pixels.shape[1:])
        return tv_tensors.Image(pixels), {"boxes": boxes, "labels": labels}

"""The only reader of COCO-format annotations: checks a file, lists its classes, cleans its objects."""

from __future__ import annotations

import copy
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from dino.modeling.detector import Detector, resized_size, to_target
from dino.structures import Detections, Target
from dino.utils.files import DataError, UserError, counted, resolve_inside

from .coco_values import LARGEST_AREA, crowds_as_objects, is_area, is_box, short, to_plain
from .file_names import match_names
from .images import image_size, read_image, resize_tensor
from .importers.recognition import explain

CROWDS = ("ignore", "objects")  # what crowd regions are: regions that training leaves out, or objects


def read_annotations(path: str | Path, folder: str | Path, crowd: str = "ignore") -> dict[str, Any]:
    """Read and check a COCO-format file -> its content, with plain values, see `to_plain`.

    Sizes that the file lacks are read from the images.

    Args:
        path: the JSON file.
        folder: of its images.
        crowd: one of CROWDS; "objects" turns crowd regions into objects.

    Raises:
        DataError: the file or the folder is missing; the JSON is broken or lacks a list; an id occurs twice or refers
            to nothing; a category has no name of its own; a file is listed twice, or its name leaves the folder; a box
            is not four numbers; a size is missing, and the image can't be read; names need a change to match a file.
    """
    data = _check_file(load_json(path, "annotations"), path, folder)
    _check_first_name(data["images"], path, folder)
    if crowd not in CROWDS:
        raise UserError(f"crowd={crowd!r}: write {' or '.join(CROWDS)}")
    return crowds_as_objects(data) if crowd == "objects" else data


def read_images(path: str | Path, folder: str | Path) -> dict[str, Any]:
    """As `read_annotations`. A missing list of annotations counts as empty."""
    data = load_json(path, "annotations")
    return _check_file({"annotations": [], **data} if isinstance(data, dict) else data, path, folder)


def _check_file(data: Any, path: str | Path, folder: str | Path) -> dict[str, Any]:
    """Return the content of a parsed file after `read_annotations`' conversions and checks."""
    if not Path(folder).is_dir():
        raise DataError(f"image folder not found: {folder}")
    try:
        check_lists(data, path)
        data, _ = to_plain(data)
        data["images"] = [_with_size(image, folder) for image in data["images"]]
        _check_annotations(data, folder)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    return data


def _check_first_name(images: list[dict], path: str | Path, folder: str | Path) -> None:
    """Raise a DataError if the first image has no file, but probably means another one: so do most of the rest."""
    for name in match_names(images[:1], folder).values():
        raise DataError(
            f"{path}: no file {images[0]['file_name']!r} in {folder}, but {name!r}: `dino check … --fix` writes "
            "the names that match"
        )


def _with_size(image: Any, folder: str | Path) -> Any:
    """An image with the size of its file, if it states none."""
    if not isinstance(image, dict) or not isinstance(image.get("file_name"), str) or has_size(image):
        return image
    try:
        width, height = image_size(resolve_inside(folder, image["file_name"]))
    except DataError as error:
        stated = f"{short(image.get('width'))} and {short(image.get('height'))}"
        raise DataError(
            f"image {image['file_name']}: width and height must be positive whole numbers, but are {stated}; {error}"
        ) from None
    return {**image, "width": width, "height": height}


def has_size(image: dict) -> bool:
    """Whether an image states a size that one can have."""
    width, height = image.get("width"), image.get("height")
    return type(width) is int and type(height) is int and 0 < width < 2**31 and 0 < height < 2**31


def load_json(path: str | Path, what: str) -> Any:
    """Parse a JSON file in UTF-8 or UTF-16, with or without a byte order mark. Its DataErrors call it `what`."""
    try:
        return json.loads(Path(path).read_bytes())
    except FileNotFoundError:
        raise DataError(f"{what} not found: {path}") from None
    except (OSError, ValueError, RecursionError) as error:
        reason = explain(Path(path)) or error
        raise DataError(f"can't read {what} {path}: {reason}. It must be a JSON file in COCO format") from error


def check_lists(data: Any, path: str | Path = "SOURCE") -> None:
    """Raise a DataError unless parsed annotations have the three lists of COCO's format; it names other formats."""
    other = explain(Path(path), data)
    for key in ("images", "annotations", "categories"):
        if other or not isinstance(data, dict) or not isinstance(data.get(key), list):
            reason = other or f"the list {key!r} is missing"
            raise DataError(f"{reason}. It must be a JSON file in COCO format")


def _check_annotations(data: Any, folder: str | Path) -> None:
    """Raise a DataError that names the first issue of parsed annotations; see `read_annotations`."""
    check_lists(data)
    categories = _unique_ids(data["categories"], "category")
    _check_names(data["categories"])
    images = _unique_ids(data["images"], "image")
    _unique_ids(data["annotations"], "annotation")
    _check_images(data["images"], folder)
    for annotation in data["annotations"]:
        _check_annotation(annotation, images, categories)


def _check_images(images: list[dict], folder: str | Path) -> None:
    """Raise a DataError unless each image has a file of its own, inside the folder."""
    files: dict[PurePosixPath, int] = {}
    for image in images:
        if not isinstance(image.get("file_name"), str):
            raise DataError(f"image {image['id']} has no file_name")
        resolve_inside(folder, image["file_name"])
        first = files.setdefault(PurePosixPath(image["file_name"]), image["id"])
        if first != image["id"]:
            raise DataError(
                f"{image['file_name']} is listed as image {first} and as image {image['id']}: "
                "`dino check … --fix` merges them"
            )


def _check_names(categories: list[dict]) -> None:
    """Raise a DataError unless there are categories with unique names."""
    if not categories:
        raise DataError("there are no categories")
    seen = set()
    for category in categories:
        name = category.get("name")
        if not isinstance(name, str):
            raise DataError(f"category {category['id']} has no name")
        if name in seen:
            raise DataError(
                f"two categories are called {name!r}; if one is a super-category without objects, `dino check … --fix` "
                "leaves it out"
            )
        seen.add(name)


def _check_annotation(annotation: dict, images: dict[int, dict], categories: dict[int, dict]) -> None:
    """Raise a DataError if an annotation refers to nothing or has no box. (Boxes without area are dropped later.)"""
    image = find(images, annotation.get("image_id"))
    if image is None:
        raise DataError(f"annotation {annotation['id']}: no image has the id {annotation.get('image_id')!r}")
    where = f"annotation {annotation['id']} of image {image.get('file_name')}"
    if find(categories, annotation.get("category_id")) is None:
        raise DataError(
            f"{where}: no category has the id {annotation.get('category_id')!r}; known: {sorted(categories)}"
        )
    box = annotation.get("bbox")
    if not is_box(box):
        raise DataError(f"{where}: bbox must be four numbers [x, y, width, height] in pixels, but is {short(box)}")
    if annotation.get("iscrowd", 0) not in (0, 1):
        raise DataError(f"{where}: iscrowd must be 0 or 1, but is {short(annotation['iscrowd'])}")
    if "area" in annotation and not is_area(annotation["area"]):
        raise DataError(
            f"{where}: area must be a number of pixels from 0 to {LARGEST_AREA:.0e}, but is {short(annotation['area'])}"
        )


def _unique_ids(entries: list, kind: str) -> dict[int, dict]:
    """Entries by id. Raise a DataError unless each id is a whole number and occurs once."""
    by_id: dict[int, dict] = {}
    for entry in entries:
        number = entry.get("id") if isinstance(entry, dict) else None
        if type(number) is not int:
            raise DataError(f"{kind} {number!r}: an id must be a whole number")
        if number in by_id:
            raise DataError(f"the {kind} id {number} occurs twice. Number them uniquely over the whole file")
        by_id[number] = entry
    return by_id


def find(entries: dict[int, dict], number: Any) -> dict | None:
    """Entry of an id; None for an unknown id, and for values of other types, such as a list."""
    return entries.get(number) if type(number) is int else None


def usable_box(box: list[float], width: int, height: int) -> list[float] | None:
    """xywh in pixels -> xyxy clipped to the image; None where nothing of positive size remains."""
    x, y, w, h = box
    if not all(map(math.isfinite, box)) or w <= 0 or h <= 0:
        return None
    clipped = [max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)]
    return clipped if clipped[2] > clipped[0] and clipped[3] > clipped[1] else None


class _Classes(NamedTuple):
    """The classes of a file in the order of their ids. A label is a position in this order, whatever the ids are."""

    names: list[str]
    ids: list[int]  # label -> category id

    @property
    def labels(self) -> dict[int, int]:
        """Category id -> label."""
        return {number: label for label, number in enumerate(self.ids)}


def classes_of(data: dict[str, Any]) -> _Classes:
    """The classes of checked annotations."""
    categories = sorted(data["categories"], key=lambda c: c["id"])
    return _Classes([c["name"] for c in categories], [c["id"] for c in categories])


class _ImageObjects(NamedTuple):
    """The objects of one image that a detector can learn."""

    objects: list[tuple[int, list[float]]]  # label; box xyxy in pixels, inside the image
    dropped: int  # boxes without area inside the image


def clean_objects(objects: Iterable[tuple[int, list[float], bool]], width: int, height: int) -> _ImageObjects:
    """Clip the boxes of an image. Drop crowd regions, and boxes without area.

    Args:
        objects: label, box xywh in pixels, and whether it is a crowd region.
        width, height: of the image in pixels.
    """
    boxes = [(label, usable_box(box, width, height)) for label, box, crowd in objects if not crowd]
    kept = [(label, box) for label, box in boxes if box is not None]
    return _ImageObjects(kept, len(boxes) - len(kept))


def no_objects(where: str | Path, num_images: int, annotations: Sequence[dict], usable: int) -> str | None:
    """One line about a data set without any object; None if it has one.

    Args:
        where: file or name of the data set.
        annotations: all of them; only `iscrowd` is read.
        usable: how many of them are objects, see `clean_objects`.
    """
    if usable:
        return None
    crowd = sum(bool(a.get("iscrowd", 0)) for a in annotations)
    numbers = (
        f"{where} has no objects: {counted(num_images, 'image')}, {counted(len(annotations), 'annotation')}, "
        f"{crowd:,} of them crowd regions (iscrowd=1), {len(annotations) - crowd:,} boxes without area in the image"
    )
    cure = (
        ". If each crowd region is one object: crowd=objects of the data set, or `dino check … --crowd objects --fix`"
    )
    return numbers + cure * bool(crowd)


def _objects_of(data: dict[str, Any]) -> dict[int, _ImageObjects]:
    """Image id -> objects of checked annotations; images without objects are there too."""
    labels = classes_of(data).labels
    by_image = defaultdict(list)
    for a in data["annotations"]:
        by_image[a["image_id"]].append((labels[a["category_id"]], a["bbox"], bool(a.get("iscrowd", 0))))
    return {i["id"]: clean_objects(by_image[i["id"]], i["width"], i["height"]) for i in data["images"]}


class CocoImages(Dataset):
    """Images and objects of a COCO-format file. Keeps images without objects; crowd regions are not objects.

    Args:
        annotations, folder: the JSON file and the folder of its images.
        transforms: called with a `tv_tensors.Image` (3, H, W) uint8 RGB and {"boxes": BoundingBoxes xyxy in pixels,
            "labels": (G,) int64}, returns the same two (torchvision transforms v2).
        limit: how many images to keep, the first ones; None keeps all.
        crowd: see `read_annotations`.
        input_range: of `read_image`.

    Attributes:
        data: the content of the file, without the images beyond `limit` and their annotations.
        images: its entries, in order. objects: image id -> list of (label, box xyxy).
        names, category_ids: of the classes, by label.
        dropped: how many boxes had no area inside their image.
        problem: one line if there is no object at all, else None.

    Raises:
        DataError: see `read_annotations`; when indexed, see `read_image`.
    """

    def __init__(
        self,
        annotations: str | Path,
        folder: str | Path,
        transforms: Callable,
        limit: int | None = None,
        crowd: str = "ignore",
        input_range: Sequence[float] | None = None,
    ):
        self.data = _first_images(read_annotations(annotations, folder, crowd), limit)
        self.folder = Path(folder)
        self.transforms = transforms
        self.input_range = input_range
        self.images = self.data["images"]
        self.names, self.category_ids = classes_of(self.data)
        cleaned = _objects_of(self.data)
        self.objects = {number: found.objects for number, found in cleaned.items()}
        self.dropped = sum(found.dropped for found in cleaned.values())
        self.problem = no_objects(
            annotations, len(self.images), self.data["annotations"], sum(map(len, self.objects.values()))
        )

    @classmethod
    def for_detector(cls, annotations: str | Path, folder: str | Path, detector: Detector) -> CocoImages:
        """Open a data set whose images are resized for a detector.

        Raises:
            DataError: as above; or the detector was trained for other classes.
        """
        resize = ResizeShortSide(detector.preprocessing.short_side, detector.preprocessing.max_size)
        clean = [v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes(min_size=1)]
        input_range = detector.preprocessing.input_range
        data = cls(annotations, folder, v2.Compose([resize, *clean]), input_range=input_range)
        if data.names != detector.names:
            raise DataError(
                f"the checkpoint was trained for the classes {detector.names}, {annotations} has {data.names}"
            )
        return data

    def with_transforms(self, transforms: Callable, input_range: Sequence[float] | None = None) -> CocoImages:
        """The same images, transformed and read in another way; arguments as of the class."""
        other = copy.copy(self)
        other.transforms, other.input_range = transforms, input_range
        return other

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict]:
        """-> image, objects, and the entry of the file with `id`, `height`, `width`."""
        entry = self.images[index]
        path = resolve_inside(self.folder, entry["file_name"])
        image = tv_tensors.Image(torch.from_numpy(read_image(path, self.input_range)).permute(2, 0, 1))
        if image.shape[1:] != (entry["height"], entry["width"]):
            found = f"{image.shape[2]}x{image.shape[1]}"
            raise DataError(f"{path} is {found}, but the annotations say {entry['width']}x{entry['height']}")
        objects = self.objects[entry["id"]]
        boxes = torch.tensor([box for _, box in objects], dtype=torch.float32).reshape(-1, 4)
        labels = torch.tensor([label for label, _ in objects], dtype=torch.int64)
        boxes = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=image.shape[1:])
        image, objects = self.transforms(image, {"boxes": boxes, "labels": labels})
        return image, objects, entry


class ResizeShortSide:
    """A transform for `CocoImages`: resizes by `resized_size`, as prediction and evaluation do.

    Args:
        short_side, max_size: in pixels, see `resized_size`.
    """

    def __init__(self, short_side: int, max_size: int | None):
        self.short_side = short_side
        self.max_size = max_size

    def __call__(self, image: tv_tensors.Image, objects: dict) -> tuple[tv_tensors.Image, dict]:
        """image (3, H, W); objects: its `boxes` and `labels`."""
        size = resized_size(*image.shape[1:], self.short_side, self.max_size)
        boxes = v2.functional.resize(objects["boxes"], size)
        return tv_tensors.Image(resize_tensor(image, size)), {**objects, "boxes": boxes}


def collate(samples: list[tuple]) -> tuple[list[torch.Tensor], list[Target], list[dict]]:
    """Samples of `CocoImages` -> images (3, H, W) of any sizes, targets, and entries of the file."""
    images, objects, entries = zip(*samples, strict=True)
    targets = [
        to_target(o["labels"], o["boxes"].as_subclass(torch.Tensor), image.shape[1:])
        for o, image in zip(objects, images, strict=True)
    ]
    return [image.as_subclass(torch.Tensor) for image in images], targets, list(entries)


def _first_images(data: dict[str, Any], limit: int | None) -> dict[str, Any]:
    """The content of a file, cut to its first images."""
    if limit is None:
        return data
    return take_images(data, {image["id"] for image in data["images"][:limit]})


def take_images(data: dict[str, Any], ids: set[int]) -> dict[str, Any]:
    """The annotations of some images."""
    return {
        **data,
        "images": [image for image in data["images"] if image["id"] in ids],
        "annotations": [a for a in data["annotations"] if a["image_id"] in ids],
    }


def to_results(found: Detections, image_id: int, category_ids: Sequence[int]) -> list[dict]:
    """Detections of one image (xyxy in pixels of the file's size) -> entries of COCO's results format.

    Args:
        category_ids: label -> id in the annotations.
    """
    boxes = torch.cat([found.boxes[:, :2], found.boxes[:, 2:] - found.boxes[:, :2]], 1).tolist()
    rows = zip(boxes, found.scores.tolist(), found.labels.tolist(), strict=True)
    return [{"image_id": image_id, "category_id": category_ids[c], "bbox": b, "score": s} for b, s, c in rows]

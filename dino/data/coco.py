"""COCO-format annotations: checked once before anything is trained, read as a data set, and evaluated."""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional

from dino.layers.boxes import xyxy_to_cxcywh
from dino.modeling.detector import resized_size
from dino.structures import Detections, Target
from dino.utils.files import DataError, resolve_inside

from .images import read_image

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")  # the first six of COCO's twelve


def read_annotations(path: str | Path, folder: str | Path) -> dict[str, Any]:
    """Read and check a COCO-format file.

    Returns:
        its content, as parsed from JSON.

    Raises:
        DataError: the file or the folder is missing; the JSON is broken or lacks a list; an id occurs twice or refers
            to nothing; a category has no name of its own; a file name leaves the folder; a box is not four numbers.
    """
    return check_file(load_json(path, "annotations"), path, folder)


def read_images(path: str | Path, folder: str | Path) -> dict[str, Any]:
    """As `read_annotations`, for data that may come without the list of annotations: it is empty then."""
    data = load_json(path, "annotations")
    return check_file({"annotations": [], **data} if isinstance(data, dict) else data, path, folder)


def check_file(data: Any, path: str | Path, folder: str | Path) -> dict[str, Any]:
    """The parsed content of a file, if it is sound; see `read_annotations`."""
    if not Path(folder).is_dir():
        raise DataError(f"image folder not found: {folder}")
    try:
        check_annotations(data, folder)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    return data


def load_json(path: str | Path, what: str) -> Any:
    """Parse a JSON file; `what` it should be is named by the DataError where that fails."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{what} not found: {path}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"can't read {what} {path}: {error}. It must be a JSON file in COCO format") from error


def check_lists(data: Any) -> None:
    """Raise a DataError unless the three lists of a COCO-format file are there."""
    for key in ("images", "annotations", "categories"):
        if not isinstance(data, dict) or not isinstance(data.get(key), list):
            raise DataError(f"the list {key!r} is missing. It must be a JSON file in COCO format")


def check_annotations(data: Any, folder: str | Path) -> None:
    """Raise a DataError that names the first fault of parsed annotations; see `read_annotations`."""
    check_lists(data)
    categories = unique_ids(data["categories"], "category")
    check_names(data["categories"])
    images = unique_ids(data["images"], "image")
    unique_ids(data["annotations"], "annotation")
    for image in data["images"]:
        if not isinstance(image.get("file_name"), str):
            raise DataError(f"image {image['id']} has no file_name")
        resolve_inside(folder, image["file_name"])
        if not all(isinstance(image.get(key), int) and image[key] > 0 for key in ("height", "width")):
            raise DataError(f"image {image['file_name']}: height and width must be positive whole numbers")
    for annotation in data["annotations"]:
        check_annotation(annotation, images, categories)


def check_names(categories: list[dict]) -> None:
    """Raise a DataError unless there are categories, each with a name of its own."""
    if not categories:
        raise DataError("there are no categories")
    seen = set()
    for category in categories:
        name = category.get("name")
        if not isinstance(name, str):
            raise DataError(f"category {category['id']} has no name")
        if name in seen:
            raise DataError(f"two categories are called {name!r}")
        seen.add(name)


def check_annotation(annotation: dict, images: dict[int, dict], categories: dict[int, dict]) -> None:
    """Raise a DataError if one annotation refers to nothing or has no box. (Boxes without area are dropped later.)"""
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
        raise DataError(f"{where}: bbox must be four numbers [x, y, width, height] in pixels, but is {box!r}")


def is_box(value: Any) -> bool:
    """Whether a value from a file is a list of four numbers, which may still be infinite."""
    return isinstance(value, list) and len(value) == 4 and all(map(is_number, value))


def is_number(value: Any) -> bool:
    """Whether a value from a file is a number that fits a float (JSON knows whole numbers of any length)."""
    return type(value) is float or (type(value) is int and abs(value) < 2**63)


def unique_ids(entries: list, kind: str) -> dict[int, dict]:
    """Entries by their id, each of which must be a whole number and occur once."""
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
    """The entry of this id; None also for what can be no id, such as a list."""
    return entries.get(number) if type(number) is int else None


def usable_box(box: list[float], width: int, height: int) -> list[float] | None:
    """xywh in pixels -> xyxy clipped to the image; None where nothing of positive size remains."""
    x, y, w, h = box
    if not all(map(math.isfinite, box)) or w <= 0 or h <= 0:
        return None
    clipped = [max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)]
    return clipped if clipped[2] > clipped[0] and clipped[3] > clipped[1] else None


class CocoImages(Dataset):
    """Images and objects of a COCO-format file. Images without objects are kept, crowd regions are not objects.

    Args:
        annotations, folder: the JSON file and the folder of its images.
        transforms: called with a `tv_tensors.Image` (3, H, W) uint8 RGB and {"boxes": BoundingBoxes xyxy in pixels,
            "labels": (G,) int64}, returns the same two (torchvision transforms v2).

    Raises:
        DataError: see `read_annotations`; when indexed, see `read_image`.
    """

    def __init__(self, annotations: str | Path, folder: str | Path, transforms: Callable):
        data = read_annotations(annotations, folder)
        self.folder = Path(folder)
        self.transforms = transforms
        self.images = data["images"]
        categories = sorted(data["categories"], key=lambda c: c["id"])
        self.category_ids = [c["id"] for c in categories]  # label -> id in the file
        self.names = [c["name"] for c in categories]
        labels = {number: label for label, number in enumerate(self.category_ids)}
        sizes = {image["id"]: (image["width"], image["height"]) for image in self.images}
        self.objects: dict[int, list] = {number: [] for number in sizes}
        self.dropped = 0
        for a in data["annotations"]:
            if a.get("iscrowd", 0):
                continue
            box = usable_box(a["bbox"], *sizes[a["image_id"]])
            self.dropped += box is None
            if box is not None:
                self.objects[a["image_id"]].append((labels[a["category_id"]], box))
        with contextlib.redirect_stdout(io.StringIO()):
            self.truth = COCO()
            self.truth.dataset = with_areas(data)
            self.truth.createIndex()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict]:
        """-> image, objects, and the entry of the file with `id`, `height`, `width`."""
        entry = self.images[index]
        path = resolve_inside(self.folder, entry["file_name"])
        image = tv_tensors.Image(torch.from_numpy(read_image(path)).permute(2, 0, 1))
        if image.shape[1:] != (entry["height"], entry["width"]):
            found = f"{image.shape[2]}x{image.shape[1]}"
            raise DataError(f"{path} is {found}, but the annotations say {entry['width']}x{entry['height']}")
        objects = self.objects[entry["id"]]
        boxes = torch.tensor([box for _, box in objects], dtype=torch.float32).reshape(-1, 4)
        labels = torch.tensor([label for label, _ in objects], dtype=torch.int64)
        boxes = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=image.shape[1:])
        image, objects = self.transforms(image, {"boxes": boxes, "labels": labels})
        return image, objects, entry


class ShortSide:
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
        boxes = functional.resize(objects["boxes"], size)
        return functional.resize(image, size), {**objects, "boxes": boxes}


def collate(samples: list[tuple]) -> tuple[torch.Tensor, torch.Tensor, list[Target], list[dict]]:
    """Samples of `CocoImages`, transformed -> images (B, 3, H, W) zero-padded, padding (B, H, W), targets, entries."""
    images = [image for image, _, _ in samples]
    height, width = (max(i.shape[d] for i in images) for d in (1, 2))
    batch = torch.zeros(len(images), 3, height, width)
    padding = torch.ones(len(images), height, width, dtype=torch.bool)
    targets = []
    for b, (image, objects, _) in enumerate(samples):
        h, w = image.shape[1:]
        batch[b, :, :h, :w], padding[b, :h, :w] = image, False
        boxes = xyxy_to_cxcywh(objects["boxes"].as_subclass(torch.Tensor)) / torch.tensor([w, h, w, h])
        targets.append(Target(objects["labels"], boxes))
    return batch, padding, targets, [entry for _, _, entry in samples]


def with_areas(data: dict[str, Any]) -> dict[str, Any]:
    """A copy for COCO's evaluation, which needs `area` and `iscrowd` and takes an object's id 0 for "not found"."""
    full = [
        {"area": a["bbox"][2] * a["bbox"][3], "iscrowd": 0, **{k: v for k, v in a.items() if k != "segmentation"}}
        | {"id": number}
        for number, a in enumerate(data["annotations"], 1)
    ]
    return {"info": {}, **data, "annotations": full}


def to_results(found: Detections, image_id: int, category_ids: list[int]) -> list[dict]:
    """Detections of one image (xyxy in pixels of the file's size) -> entries of COCO's results format."""
    boxes = torch.cat([found.boxes[:, :2], found.boxes[:, 2:] - found.boxes[:, :2]], 1).tolist()
    rows = zip(boxes, found.scores.tolist(), found.labels.tolist(), strict=True)
    return [{"image_id": image_id, "category_id": category_ids[c], "bbox": b, "score": s} for b, s, c in rows]


def evaluate(truth: COCO, results: Iterable[dict], names: list[str]) -> dict[str, float]:
    """COCO box AP in [0, 1], -1 where undefined: AP, AP50, AP75, APs, APm, APl, and `AP-<name>` of each class."""
    results = list(results)
    if not results:
        return dict.fromkeys([*METRICS, *(f"AP-{n}" for n in names)], 0.0)
    with contextlib.redirect_stdout(io.StringIO()):
        coco_eval = COCOeval(truth, truth.loadRes(results), "bbox")
        coco_eval.evaluate()
        coco_eval.accumulate()
        coco_eval.summarize()
    precision = coco_eval.eval["precision"][:, :, :, 0, -1]  # (IoU, recall, class)
    per_class = [p[p > -1] for p in precision.transpose(2, 0, 1)]
    metrics = dict(zip(METRICS, map(float, coco_eval.stats[:6]), strict=True))
    return metrics | {f"AP-{n}": float(np.mean(p)) if p.size else -1.0 for n, p in zip(names, per_class, strict=True)}

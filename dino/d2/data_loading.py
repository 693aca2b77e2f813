"""Data sets for Detectron2: registration, cleaning of objects, augmentation of DETR."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import json
import logging
import os
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, BoxMode, Instances
from PIL import Image

from dino.data.coco import classes_of, clean_objects, load_json, read_annotations
from dino.data.coco_values import to_crowd, to_plain
from dino.data.images import read_image
from dino.data.mixing import Picture
from dino.evaluation.average_precision import complete_annotations
from dino.modeling.detector import resized_size
from dino.utils.files import DataError, write_whole
from dino.utils.printable import printable

logger = logging.getLogger("detectron2.dino")
_OF_A_JOB = ("custom_train", "custom_val")  # names of the data that `dino.d2.recipe.DataFiles` states


def dataset(
    name: str,
    annotations: str | None = None,
    images: str | None = None,
    crowd: str = "ignore",
    filter_empty: bool = False,
) -> list[dict]:
    """Load the dicts of a data set. Register its files first where `annotations` and `images` name them.

    Drops crowd regions, and boxes without area with a warning. The last two data sets stay in memory;
    `load_dataset.cache_clear()` frees them.

    Args:
        name: of the set in Detectron2's catalog.
        annotations, images: a COCO-format JSON file and the folder of its images; None for a registered set.
        crowd: of such a file: "ignore" leaves crowd regions out, "objects" learns them as objects.
        filter_empty: drop images without objects, as detrex does in all but its 24-epoch configuration. (Detectron2's
            name. The official program keeps them.)

    Raises:
        DataError: `name` is not registered, the files have an issue, or a label is outside the classes.
    """
    dicts = load_dataset(name, annotations, images, crowd)  # by position: the cache distinguishes keywords
    # Data without any object keep their images: the summary of a training says what is wrong with such data.
    return ([entry for entry in dicts if entry["annotations"]] or dicts) if filter_empty else dicts


@functools.lru_cache(maxsize=2)
def load_dataset(name: str, annotations: str | None, images: str | None, crowd: str = "ignore") -> list[dict]:
    """As `dataset`, with a cache."""
    if annotations is not None:
        _register(name, str(annotations), str(images), crowd)
    if name not in DatasetCatalog:
        near = ", ".join(DatasetCatalog.list()) if len(DatasetCatalog.list()) < 20 else "see DatasetCatalog.list()"
        raise DataError(f"no data set is registered as {name!r} ({near}). Register it, or give its files")
    try:
        dicts = DatasetCatalog.get(name)
    except FileNotFoundError as error:
        raise DataError(f"data set {name!r}: {error}. Is DETECTRON2_DATASETS set?") from error
    return _sanitise(name, dicts)


def _register(name: str, annotations: str, images: str, crowd: str) -> None:
    """Check COCO-format files and register them under `name`; registering the same files again does nothing."""
    data = read_annotations(annotations, images, crowd)
    if name in DatasetCatalog:
        known = MetadataCatalog.get(name)
        if (known.get("json_file"), known.get("image_root")) != (annotations, images):
            raise DataError(f"{name!r} is registered for other files: {known.get('json_file')}")
        if known.get("crowd", "ignore") != crowd:
            raise DataError(f"{name!r} is registered with crowd={known.get('crowd', 'ignore')}, not {crowd}")
        return
    classes, scores = classes_of(data), sum("score" in a for a in data["annotations"])
    unused = [data]  # once: a file of millions takes seconds to read

    def load() -> list[dict]:
        content = unused.pop() if unused else read_annotations(annotations, images, crowd)
        return _to_dicts(content, images, classes.labels)

    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(
        json_file=annotations,
        image_root=images,
        crowd=crowd,
        evaluator_type="coco",
        thing_classes=classes.names,
        thing_dataset_id_to_contiguous_id=classes.labels,
        scores=scores,
    )


@contextlib.contextmanager
def files_of_one_job() -> Iterator[None]:
    """Within the block, read data files anew; forget them at its end: the next job of this process may have others."""
    _forget_files()
    try:
        yield
    finally:
        _forget_files()


def _forget_files() -> None:
    """Forget the data files of a job."""
    for name in _OF_A_JOB:
        if name in DatasetCatalog:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
    load_dataset.cache_clear()


def annotations_of(name: str) -> dict:
    """The annotations of a registered data set with a file, as training reads them. Without a list of annotations: [].

    Raises:
        DataError: the file can't be read; of data sets that `dataset` registered, see `read_annotations`.
    """
    metadata = MetadataCatalog.get(name)
    if metadata.get("crowd"):
        return read_annotations(metadata.json_file, metadata.image_root, metadata.crowd)
    data = {"annotations": [], **load_json(metadata.json_file, "annotations")}
    return to_plain(data)[0] if "categories" in data and "images" in data else data


def _to_dicts(data: dict, images: str, labels: dict[int, int]) -> list[dict]:
    """Checked annotations -> Detectron2's dicts, boxes only.

    (Detectron2's own reader drops boxes whose polygon is empty or too short, and fails on unusual keys.)

    Args:
        data: as from `read_annotations`. images: their folder. labels: category id -> label.
    """
    dicts = {
        image["id"]: {
            "file_name": os.path.join(images, image["file_name"]),
            "image_id": image["id"],
            "height": image["height"],
            "width": image["width"],
            "annotations": [],
        }
        for image in data["images"]
    }
    for a in data["annotations"]:
        dicts[a["image_id"]]["annotations"].append(
            {
                "bbox": a["bbox"],
                "bbox_mode": BoxMode.XYWH_ABS,
                "category_id": labels[a["category_id"]],
                "iscrowd": a.get("iscrowd", 0),
            }
        )
    return list(dicts.values())


def class_names(name: str, annotations: str | None = None, images: str | None = None) -> list[str]:
    """Class names of a data set, in the order of its labels. Arguments as of `dataset`."""
    metadata = MetadataCatalog.get(name)
    if not metadata.get("thing_classes"):
        dataset(name, annotations, images)
    names = metadata.get("thing_classes")
    if not names:
        raise DataError(f"the data set {name!r} has no class names: set MetadataCatalog.get({name!r}).thing_classes")
    return list(names)


def _sanitise(name: str, dicts: list[dict]) -> list[dict]:
    """Copy `dicts` with clean objects, and with the number of classes, which `DINODetector` compares with its own.

    Log how many boxes are dropped, and the first one's file.
    """
    num_classes = len(MetadataCatalog.get(name).get("thing_classes", ()))
    known = {"num_classes": num_classes} if num_classes else {}
    clean, dropped, first = [], 0, ""
    for entry in dicts:
        found = clean_objects(_objects_of(entry, num_classes), entry["width"], entry["height"])
        objects = [{"category_id": c, "bbox": box, "bbox_mode": BoxMode.XYXY_ABS} for c, box in found.objects]
        clean.append({**entry, **known, "annotations": objects})
        if found.dropped:
            dropped, first = dropped + found.dropped, first or entry["file_name"]
    if dropped:
        logger.warning(f"{name}: {dropped} boxes of no size or outside their image dropped, first in {first}")
    return clean


def _objects_of(entry: dict, num_classes: int) -> Iterator[tuple[int, list[float], bool]]:
    """Label, box xywh in pixels, and whether it is a crowd region, of each annotation of a dict."""
    for annotation in entry.get("annotations", []):
        label = annotation["category_id"]
        if num_classes and not 0 <= label < num_classes:
            raise DataError(f"{entry['file_name']}: label {label} is not in [0, {num_classes})")
        box = list(annotation["bbox"])
        if annotation["bbox_mode"] != BoxMode.XYWH_ABS:
            box = BoxMode.convert(box, annotation["bbox_mode"], BoxMode.XYWH_ABS)
        yield label, box, bool(to_crowd(annotation.get("iscrowd")))


class ShortSide(T.Augmentation):
    """Resize so that the short side is one of `sizes`, unless that makes the long side exceed `max_size`.

    Args:
        sizes: lengths in pixels, one of which is drawn.
        max_size: bound of the long side in pixels; None for no bound.
    """

    def __init__(self, sizes: Sequence[int], max_size: int | None = None):
        super().__init__()
        self.sizes = list(sizes)
        self.max_size = max_size

    def get_transform(self, image: np.ndarray) -> T.Transform:
        """image (H, W, 3)."""
        height, width = image.shape[:2]
        new = resized_size(height, width, int(np.random.choice(self.sizes)), self.max_size)
        return T.ResizeTransform(height, width, *new, interp=Image.BILINEAR)


class OneOf(T.Augmentation):
    """Apply one of several augmentations, each with the same chance.

    Args:
        branches: lists of Detectron2 augmentations.
    """

    def __init__(self, branches: Sequence[Sequence[T.Augmentation]]):
        super().__init__()
        self.branches = [T.AugmentationList(list(branch)) for branch in branches]

    def __call__(self, aug_input: T.AugInput) -> T.Transform:
        """Choose and apply."""
        return self.branches[np.random.randint(len(self.branches))](aug_input)


class TrainMapper:
    """Reads and augments one training image.

    Args:
        augmentations: Detectron2 augmentations, applied to an RGB image.
        input_range: of `read_image`; in a recipe, `model.input_range` fills it in.
    """

    def __init__(self, augmentations: Sequence[T.Augmentation], input_range: Sequence[float] | None = None):
        self.augmentations = T.AugmentationList(list(augmentations))
        self.input_range = input_range

    def __call__(self, entry: dict) -> dict:
        """Dict of a data set -> dict for `DINODetector` in training; drops objects that were cropped away."""
        return self.augment(entry, self.read(entry))

    def read(self, entry: dict) -> Picture:
        """Dict of a data set -> its image and objects.

        Raises:
            DataError: the file can't be read, or its size is not that of the annotations.
        """
        objects = entry.get("annotations", [])
        boxes = np.array([o["bbox"] for o in objects], dtype=np.float64).reshape(-1, 4)
        labels = np.array([o["category_id"] for o in objects], dtype=np.int64)
        return Picture(_read({**entry}, self.input_range), boxes, labels, (str(entry["file_name"]),))

    def augment(self, entry: dict, picture: Picture) -> dict:
        """The picture made of an entry -> dict for `DINODetector`, with the names of the picture's files."""
        aug_input = T.AugInput(picture.image)
        transforms = self.augmentations(aug_input)
        size = aug_input.image.shape[:2]
        boxes = Boxes(torch.as_tensor(transforms.apply_box(picture.boxes), dtype=torch.float32))
        boxes.clip(size)
        instances = Instances(size, gt_boxes=boxes, gt_classes=torch.from_numpy(picture.labels))
        height, width = picture.image.shape[:2]
        return {
            **copy.deepcopy({k: v for k, v in entry.items() if k != "annotations"}),
            "file_name": " + ".join(picture.files),
            "height": height,
            "width": width,
            "image": _to_tensor(aug_input.image),
            "instances": instances[boxes.nonempty()],
        }


class TestMapper:
    """Reads and resizes one image for evaluation.

    Args:
        augmentations, input_range: as of `TrainMapper`.
    """

    __test__ = False  # not a test case of pytest

    def __init__(self, augmentations: Sequence[T.Augmentation], input_range: Sequence[float] | None = None):
        self.augmentations = T.AugmentationList(list(augmentations))
        self.input_range = input_range

    def __call__(self, entry: dict) -> dict:
        """Dict of a data set -> dict for `DINODetector` in evaluation, without annotations."""
        aug_input = T.AugInput(_read(entry, self.input_range))
        self.augmentations(aug_input)
        return {**{k: v for k, v in entry.items() if k != "annotations"}, "image": _to_tensor(aug_input.image)}


def _read(entry: dict, input_range: Sequence[float] | None) -> np.ndarray:
    """Read a dict's file as (H, W, 3) uint8 RGB. Raise a DataError unless its size is that of the annotations."""
    image = read_image(entry["file_name"], input_range)
    try:
        utils.check_image_size(entry, image)
    except utils.SizeMismatchError as error:
        raise DataError(f"{entry['file_name']}: {error}") from error
    return image


def _to_tensor(image: np.ndarray) -> torch.Tensor:
    """(H, W, 3) -> (3, H, W), in memory of its own."""
    return torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))


class Evaluator(COCOEvaluator):
    """Detectron2's COCOEvaluator, with the annotations as training reads them: see `annotations_of`.

    Files may lack `area` and `iscrowd`, see `complete_annotations`.

    Args:
        dataset_name: of a registered set.
        output_dir: folder for the detections.
        max_dets_per_image: how many detections of an image count, the best first.
    """

    def __init__(self, dataset_name: str, **kwargs):
        super().__init__(dataset_name, **kwargs)
        if self._do_evaluation:
            data = annotations_of(dataset_name)
            self._coco_api.dataset = {"info": {}, **data, "annotations": complete_annotations(data["annotations"])}
            with contextlib.redirect_stdout(io.StringIO()):
                self._coco_api.createIndex()

    def _eval_predictions(self, predictions, img_ids=None):
        """Detectron2's. The classes are written beside the detections: they describe the checkpoints of such a run."""
        super()._eval_predictions(predictions, img_ids)
        labels = self._metadata.get("thing_dataset_id_to_contiguous_id", {})
        names = self._metadata.get("thing_classes")
        if self._output_dir and names and len(labels) == len(names):
            classes = {"names": list(names), "category_ids": sorted(labels, key=labels.get)}
            write_whole(
                os.path.join(self._output_dir, "classes.json"), lambda part: part.write_text(json.dumps(classes))
            )

    def _derive_coco_results(self, coco_eval, iou_type, class_names=None):
        """Detectron2's, with names that can be printed."""
        names = class_names and [printable(name, None) for name in class_names]
        return super()._derive_coco_results(coco_eval, iou_type, names)

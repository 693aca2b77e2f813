"""Detections of a data set by models that were not trained on it: one model of other data, or one for each half."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dino.data.coco import classes_of, read_annotations
from dino.data.halves import split_halves
from dino.inference.cpu import keep_freed_memory
from dino.inference.predictor import Predictor
from dino.inference.tiling import clip
from dino.utils.files import DataError, UserError, make_folder, resolve_inside, write_whole

from .average_precision import to_results
from .label_errors import LEAST_SCORE, LabelError, find_label_errors

HALVES = ("half_a.json", "half_b.json")


def write_halves(path: Path, images: Path, folder: Path) -> None:
    """Write both halves of a file, and print how to train and check with them.

    Raises:
        DataError: the annotations can't be used, or are too few.
        UserError: the folder has halves, or can't be written.
    """
    data = read_annotations(path, images)
    if len(data["images"]) < 2:
        raise DataError(f"{path} has {len(data['images'])} images: two halves need two at least")
    make_folder(folder)
    targets = [folder / name for name in HALVES]
    for target in targets:
        if target.exists():
            raise UserError(
                f"{target} exists: choose another folder, or give the two models of these halves: --weights"
            )
    for target, half in zip(targets, split_halves(data), strict=True):
        write_whole(target, lambda part, half=half: part.write_text(json.dumps(half), encoding="utf-8"))
        print(f"{target}: {len(half['images']):,} images, {len(half['annotations']):,} objects")
    first, second = targets
    print(
        "Train a model on each half, with the recipe of your choice, then let each predict the other half:\n"
        f"  dino train RECIPE --train {first} {images} --val {second} {images} --output output/half_a\n"
        f"  dino train RECIPE --train {second} {images} --val {first} {images} --output output/half_b\n"
        f"  dino check {path} {images} --weights output/half_a/model_final.pth output/half_b/model_final.pth "
        f"--halves {folder} --label-errors errors.json"
    )


def find_by_models(
    path: Path, images: Path, weights: Sequence[Path], halves: Path | None
) -> tuple[dict[str, Any], list[LabelError]]:
    """Predict with one or two checkpoints, and rank the likely label errors -> annotations, errors.

    Args:
        path, images: annotations, and the folder of their images.
        weights: one checkpoint, which predicts all images; or that of the first half, then that of the second.
        halves: folder of the halves of two checkpoints, which `write_halves` wrote.

    Raises:
        DataError: a file can't be used; the halves don't belong to the annotations; no class has a name in common.
    """
    data = read_annotations(path, images)
    parts = _parts_for(data, path, images, halves) if halves else [data]
    keep_freed_memory()
    results: list[dict] = []
    known = {category["id"] for category in data["categories"]}
    for checkpoint, part in zip(weights, parts, strict=True):
        predictor = Predictor.from_checkpoint(checkpoint, score_thresh=LEAST_SCORE)
        ids = _ids_by_label(data, predictor.names, path, checkpoint)
        known &= set(ids.values())
        results += _predict(predictor, ids, part, images)
    if len(weights) == 1:
        print(
            f"one model judges all images: if {weights[0]} was trained on them, it has learned their label errors and "
            "can't see them. --halves shows what such a model misses"
        )
    unknown = [category["name"] for category in data["categories"] if category["id"] not in known]
    if unknown:
        print(f"the model has no class of these names, whose annotations are not judged: {unknown}")
    return data, find_label_errors(data, results, known=known)


def _parts_for(data: dict[str, Any], path: Path, images: Path, folder: Path) -> list[dict[str, Any]]:
    """For the model of each half, in order, the part of the annotations that it did not see: the other half."""
    seen = [read_annotations(folder / name, images) for name in HALVES]
    names = [{image["file_name"] for image in half["images"]} for half in seen]
    own = {image["file_name"] for image in data["images"]}
    if names[0] & names[1] or (names[0] | names[1]) != own:
        raise DataError(f"the halves in {folder} are not those of {path}: write them again, and train on them")
    return [{**data, "images": [i for i in data["images"] if i["file_name"] not in trained]} for trained in names]


def _ids_by_label(data: dict[str, Any], names: Sequence[str], path: Path, checkpoint: Path) -> dict[int, int]:
    """Label of the model -> category id of the annotations, for classes that both have."""
    classes = classes_of(data)
    ids = dict(zip(classes.names, classes.ids, strict=True))
    common = {label: ids[name] for label, name in enumerate(names) if name in ids}
    if not common:
        raise DataError(f"{checkpoint} knows {list(names)[:20]}, {path} has {classes.names[:20]}: no class in common")
    return common


def _predict(predictor: Predictor, ids: dict[int, int], part: dict[str, Any], folder: Path) -> list[dict]:
    """COCO-format detections of the images of `part`, clipped to the images, of the classes among `ids`."""
    entries = [(resolve_inside(folder, image["file_name"]), image) for image in part["images"]]
    found = predictor.stream([path for path, _ in entries])
    results = []
    progress = tqdm(zip(entries, found, strict=True), total=len(entries), desc="predict", unit="image", disable=None)
    for (path, image), prediction in progress:
        height, width = prediction.image_size
        if (image["height"], image["width"]) != (height, width):
            raise DataError(f"{path} is {width}x{height}, the annotations say {image['width']}x{image['height']}")
        clipped = clip(prediction.detections, (height, width))
        rows = to_results(clipped, image["id"], list(range(len(predictor.names))))
        results += [{**row, "category_id": ids[row["category_id"]]} for row in rows if row["category_id"] in ids]
    return results

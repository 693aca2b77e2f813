"""What `dino check` corrects before it looks for issues: values, file names, files listed twice, sizes, orientations.

The order matters: a file must be found before its size is known, and sizes must be right before boxes are judged. Each
correction is an issue of its own, so that the report shows it; `--fix` writes the corrected data.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from dino.data.coco import has_size
from dino.data.coco_values import crowds_as_objects, is_area, is_box, short, to_plain
from dino.data.file_names import match_names
from dino.utils.files import DataError, resolve_inside

from .image_files import ImageFile, read_files
from .issues import Issue
from .orientations import STORED, UPRIGHT, drawn_on, turn

EXIF = (UPRIGHT, STORED)


class Choices(NamedTuple):
    """What a person decides.

    Args:
        crowd: "objects" makes objects of crowd regions, "ignore" leaves them.
        exif: the picture that the boxes were drawn on, one of EXIF; None to decide by where they fit.
    """

    crowd: str = "ignore"
    exif: str | None = None


class Corrected(NamedTuple):
    """Annotations after the corrections.

    Args:
        data: lists of the same lengths as in the file.
        issues: one for each correction.
        files: of the images whose file was opened, by their index in the list.
    """

    data: dict[str, Any]
    issues: list[Issue]
    files: dict[int, ImageFile]


def correct(data: dict[str, Any], folder: Path, choices: Choices, label: str | None) -> Corrected:
    """Correct parsed annotations; the given ones stay as they are.

    Args:
        data: lists under "images", "annotations" and "categories".
        label: of the progress bar; None opens no file, so that names, sizes and orientations stay.
    """
    data, issues = to_plain(data)
    if choices.crowd == "objects":
        issues += _list_crowds(data, "crowd_objects")
        data = crowds_as_objects(data)
    else:
        issues += _list_crowds(data, "crowd")
    data = {part: list(data[part]) if isinstance(data[part], list) else data[part] for part in data}
    if label is not None:
        issues += _correct_names(data["images"], folder)
    issues += _merge_entries(data)
    files: dict[int, ImageFile] = {}
    if label is not None:
        openable = {i: entry for i, entry in enumerate(data["images"]) if _has_file_name(entry, folder)}
        files = dict(zip(openable, read_files(list(openable.values()), folder, label), strict=True))
        issues += _fill_sizes(data["images"], files)
        issues += _correct_orientations(data, files, choices.exif)
    issues += _check_areas(data["annotations"])
    return Corrected(data, issues, files)


def _list_crowds(data: dict[str, Any], kind: str) -> Iterator[Issue]:
    """An issue for each crowd region."""
    for index, entry in enumerate(data["annotations"]):
        if isinstance(entry, dict) and entry.get("iscrowd", 0) == 1:
            text = f"annotation {short(entry.get('id'))} of image {short(entry.get('image_id'))}"
            yield Issue(kind, "annotations", index, text)


def _correct_names(images: list[Any], folder: Path) -> Iterator[Issue]:
    """Replace the names that match no file by the names of the files that they mean."""
    for index, name in match_names(images, folder).items():
        yield Issue("name", "images", index, f"{images[index]['file_name']} is {name}")
        images[index] = {**images[index], "file_name": name}


def _merge_entries(data: dict[str, Any]) -> Iterator[Issue]:
    """Give the objects of a file that is listed several times to its first entry."""
    images = data["images"]
    first: dict[PurePosixPath, int] = {}
    moved: dict[int, int] = {}
    for index, (number, name) in _clear_entries(images):
        kept = images[first.setdefault(name, index)]
        if kept is not images[index]:
            moved[number] = kept["id"]
            yield Issue("file_twice", "images", index, f"image {number}: {name} is image {kept['id']} already")
    for index, entry in enumerate(data["annotations"] if moved else ()):
        if isinstance(entry, dict) and type(entry.get("image_id")) is int and entry["image_id"] in moved:
            data["annotations"][index] = {**entry, "image_id": moved[entry["image_id"]]}


def _clear_entries(images: list[Any]) -> list[tuple[int, tuple[int, PurePosixPath]]]:
    """Index, id and file of the images with both, without those whose id stands for several files."""
    found = [(index, (e["id"], PurePosixPath(e["file_name"]))) for index, e in enumerate(images) if _has_both(e)]
    times = Counter(number for number, _ in {pair for _, pair in found})
    return [(index, pair) for index, pair in found if times[pair[0]] == 1]


def _has_both(entry: Any) -> bool:
    return isinstance(entry, dict) and type(entry.get("id")) is int and isinstance(entry.get("file_name"), str)


def _has_file_name(entry: Any, folder: Path) -> bool:
    """Whether an image names a file inside the folder."""
    if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str):
        return False
    try:
        resolve_inside(folder, entry["file_name"])
    except DataError:
        return False
    return True


def _fill_sizes(images: list[Any], files: dict[int, ImageFile]) -> Iterator[Issue]:
    """Take sizes that the annotations lack from the files."""
    for index, file in files.items():
        image = images[index]
        if file.problem is None and not has_size(image):
            stated = f"{short(image.get('width'))} and {short(image.get('height'))}"
            width, height = file.upright
            yield Issue("no_size", "images", index, f"{image['file_name']}: {stated}, the file is {width}x{height}")
            images[index] = {**image, "width": width, "height": height}


def _correct_orientations(data: dict[str, Any], files: dict[int, ImageFile], choice: str | None) -> Iterator[Issue]:
    """Find the picture that boxes were drawn on, and bring sizes and boxes to the upright one, which DINO reads.

    Images that state their stored size, and those that state the upright one, are decided apart: they come from
    different programs.
    """
    by_image = _boxes_by_image(data["annotations"])
    groups: dict[bool, list[int]] = {True: [], False: []}
    for index, file in files.items():
        stated = _size(data["images"][index])
        if file.problem is None and file.size != file.upright and stated in (file.size, file.upright):
            groups[stated == file.upright].append(index)
    for states_upright, group in groups.items():
        drawn = choice or _drawn_on(data["images"], files, group, by_image) or (UPRIGHT if states_upright else None)
        for index in group:
            yield from _correct_one(data, index, files[index], by_image, drawn)


def _drawn_on(images: list, files: dict[int, ImageFile], group: list[int], by_image: dict[Any, list]) -> str | None:
    """`drawn_on` of all boxes of a group of images."""
    boxes = [(box, files[i].size) for i in group for _, box in by_image.get(images[i].get("id"), ())]
    return drawn_on([box for box, _ in boxes], [size for _, size in boxes])


def _correct_one(
    data: dict[str, Any], index: int, file: ImageFile, by_image: dict[Any, list], drawn: str | None
) -> Iterator[Issue]:
    """As `_correct_orientations`, for one image, whose boxes were `drawn` on one of EXIF, or None if nobody knows."""
    image = data["images"][index]
    width, height = file.upright
    text = f"{image['file_name']} is {width}x{height}, stored as {height}x{width} (orientation {file.orientation})"
    if drawn is None:
        yield Issue("exif", "images", index, text)
        return
    if drawn == UPRIGHT and _size(image) == file.upright:
        return  # as it should be: see the warning "rotated"
    kind = "exif_size" if drawn == UPRIGHT else "exif_boxes"
    yield Issue(kind, "images", index, text)
    data["images"][index] = {**image, "width": width, "height": height}
    if drawn == STORED:
        for number, box in by_image.get(image.get("id"), ()):
            upright = turn(box, file.size, file.orientation)
            data["annotations"][number] = {**data["annotations"][number], "bbox": upright, "segmentation": []}


def _size(image: dict) -> tuple[Any, Any]:
    return image.get("width"), image.get("height")


def _boxes_by_image(annotations: list[Any]) -> dict[Any, list[tuple[int, list[float]]]]:
    """Index and box of the annotations of each image."""
    found: dict[Any, list] = {}
    for index, entry in enumerate(annotations):
        if isinstance(entry, dict) and type(entry.get("image_id")) is int and is_box(entry.get("bbox")):
            found.setdefault(entry["image_id"], []).append((index, entry["bbox"]))
    return found


def _check_areas(annotations: list[Any]) -> Iterator[Issue]:
    """Let the box state an area that is no positive number."""
    for index, entry in enumerate(annotations):
        if isinstance(entry, dict) and "area" in entry and not is_area(entry["area"]):
            number, value = short(entry.get("id")), short(entry["area"])
            yield Issue("area", "annotations", index, f"annotation {number}: area {value}")
            annotations[index] = {key: value for key, value in entry.items() if key != "area"}

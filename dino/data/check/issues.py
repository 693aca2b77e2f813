"""The kinds of issues of a data set: one table, from which the report, the exit code and the repair follow."""

from __future__ import annotations

from typing import NamedTuple

from dino.data.coco_values import Issue


class Kind(NamedTuple):
    """A kind of issue.

    Args:
        level: "error" makes the exit code 1, "warning" does not.
        title: the issue, for a heading.
        advice: what to do.
        cure: what `--fix` does: "drop" the entry, "renumber" all, "clip" or "convert" the box, write the "corrected"
            value that the check worked with, or None for nothing.
    """

    level: str
    title: str
    advice: str
    cure: str | None = None


CURES = {  # of `--fix`, for the table
    "drop": "drops",
    "renumber": "renumbers",
    "clip": "clips",
    "convert": "converts",
    "corrected": "corrects",
    None: "",
}

KINDS = {
    "category": Kind("error", "categories without an id or a name of their own", "Give each class one id and one name"),
    "namesake": Kind(
        "error",
        "super-categories with the name of a class, and no objects",
        "Remove them; --fix leaves them out",
        "drop",
    ),
    "image": Kind("error", "images without id, file name or size", "Write id, file_name, width and height", "drop"),
    "image_id": Kind("error", "image ids that occur twice", "Number the images uniquely over the whole file", "drop"),
    "file_twice": Kind("error", "files listed twice", "List each file once; --fix merges the entries", "corrected"),
    "name": Kind("error", "file names that match a file only after a change", "Write the names shown", "corrected"),
    "path": Kind("error", "file names that leave the folder", "Write them relative to the image folder", "drop"),
    "missing": Kind(
        "error", "missing files", "Check the file names and the image folder; --val takes a folder of its own", "drop"
    ),
    "truncated": Kind("error", "truncated files", "Replace them; --truncated keep completes JPEG files", "drop"),
    "unreadable": Kind("error", "unreadable files", "Replace the files, or drop their images", "drop"),
    "size": Kind("error", "sizes that disagree with the file", "Export the annotations again for these files", "drop"),
    "exif_size": Kind(
        "error",
        "sizes before the EXIF rotation, boxes after it",
        "The boxes fit the upright pictures: exchange width and height",
        "corrected",
    ),
    "exif_boxes": Kind(
        "error",
        "boxes drawn before the EXIF rotation",
        "The boxes fit the stored pictures: rotate them, or remove the orientation from the files",
        "corrected",
    ),
    "exif": Kind(
        "error",
        "sizes before the EXIF rotation, and boxes that fit both pictures",
        "Look at some: --exif upright if the boxes are right on the upright picture, else --exif stored",
    ),
    "shared": Kind("error", "images that the validation data has too", "Keep each image in one of the two", "drop"),
    "classes_differ": Kind(
        "error", "classes that differ from the validation data", "Both need the same names and order"
    ),
    "annotation_id": Kind(
        "error",
        "annotation ids that occur twice or are no whole numbers",
        "Number them uniquely over the whole file",
        "renumber",
    ),
    "reference": Kind("error", "objects of no known image or class", "Remove them, or add the image or class", "drop"),
    "box": Kind("error", "boxes that are not four finite numbers", "Write [x, y, width, height] in pixels", "drop"),
    "xyxy": Kind("error", "boxes written as corners (XYXY)", "Write [x, y, width, height], not two corners", "convert"),
    "centres": Kind(
        "error", "boxes written as centre and size", "Write [x, y, width, height] with the upper left corner", "convert"
    ),
    "fractions": Kind(
        "error", "boxes in fractions of the image", "Write pixels: x and width times the image's width", "convert"
    ),
    "fraction_corners": Kind(
        "error", "corners in fractions of the image", "Write [x, y, width, height] in pixels", "convert"
    ),
    "fraction_centres": Kind(
        "error",
        "centre and size in fractions of the image, as YOLO writes",
        "Write [x, y, width, height] in pixels",
        "convert",
    ),
    "unclear": Kind(
        "error",
        "boxes in fractions of the image",
        "Corners, centres, or width and height? Write [x, y, width, height] in pixels",
    ),
    "iscrowd": Kind("error", "iscrowd that is neither 0 nor 1", "Write 0 for an object, 1 for a crowd region", "drop"),
    "area": Kind("error", "areas that are no positive number", "Leave them out, or write pixels", "corrected"),
    "zero": Kind("error", "boxes without area", "Remove them; an image without objects needs none", "drop"),
    "outside": Kind("error", "boxes outside their image", "Remove them, or look for swapped x and y", "drop"),
    "no_objects": Kind("error", "no objects at all", "Annotate objects; a training has nothing to learn without them"),
    "no_val_objects": Kind("warning", "no objects at all in the validation data", "Annotate them, or expect no AP"),
    "number": Kind(
        "warning", "numbers written as text, or whole ones with a decimal point", "Read as numbers", "corrected"
    ),
    "outline": Kind("warning", "boxes that only an outline states", "Read from the outline", "corrected"),
    "no_size": Kind("warning", "sizes that only the files state", "Read from the files", "corrected"),
    "crowd": Kind("warning", "crowd regions, which training leaves out", "If each is one object, add --crowd objects"),
    "crowd_objects": Kind("warning", "crowd regions that count as objects", "--crowd objects asks for it", "corrected"),
    "beyond": Kind("warning", "boxes that cross the border of their image", "Training clips them", "clip"),
    "object_twice": Kind("warning", "objects annotated twice", "Remove the copies", "drop"),
    "zero_id": Kind(
        "warning", "annotations with the id 0", "pycocotools counts such an object as missed: start at 1", "renumber"
    ),
    "tiny": Kind("warning", "objects of less than 8 pixels after resizing", "Train at a larger size, or with tiles"),
    "crowded": Kind("warning", "images with more than 100 objects", "COCO's AP counts 100 detections of an image"),
    "supercategory": Kind(
        "warning", "super-categories listed as classes", "Remove them from training and validation data", "drop"
    ),
    "unused": Kind("warning", "classes without objects", "Remove them, or expect no AP for them"),
    "rotated": Kind("warning", "images with an EXIF orientation", "DINO rotates them: make sure that the boxes fit"),
    "wide": Kind(
        "warning",
        "images without a range of values",
        "Set model.input_range=[low, high], the values of black and white",
    ),
    "score": Kind(
        "warning", "annotations with a score, as predictions have", "Training ignores scores: each box is an object"
    ),
    "same_image": Kind("warning", "images that the set has twice", "Keep one of them"),
    "ids_differ": Kind(
        "warning", "class ids that differ from the validation data", "Harmless: labels follow the order of the ids"
    ),
}


def count_errors(issues: list[Issue]) -> int:
    """How many issues are errors."""
    return sum(KINDS[issue.kind].level == "error" for issue in issues)

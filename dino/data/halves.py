"""Two halves of a data set, each to train a model that predicts the other one."""

from __future__ import annotations

from typing import Any

from .coco import take_images

_BLOCKS = 20  # runs of images, in the order of their file names, that go to the halves in turn


def split_halves(data: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split checked annotations by images -> two files' contents, the same for the same file names.

    Runs of images that follow each other in the order of their names stay together: frames of a video are near copies,
    and a model that was trained on one of them has seen the next.

    Args:
        data: checked COCO-format annotations; stays as it is.
    """
    images = sorted(data["images"], key=lambda image: (image["file_name"], image["id"]))
    blocks = min(_BLOCKS, len(images))
    second = {image["id"] for number, image in enumerate(images) if number * blocks // len(images) % 2}
    return take_images(data, {image["id"] for image in images} - second), take_images(data, second)

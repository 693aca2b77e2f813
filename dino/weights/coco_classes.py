"""COCO's 80 classes: names and category ids; and the 91 raw ids, which other programs use as labels."""

from __future__ import annotations

# The category ids that COCO uses, in order: 80 of 1 to 90.
COCO_IDS = (
    *range(1, 12),
    *range(13, 26),
    27,
    28,
    *range(31, 45),
    *range(46, 66),
    67,
    70,
    *range(72, 83),
    *range(84, 91),
)
RAW_COCO_CLASSES = 91  # of a model whose labels are these ids themselves
NO_CLASS = "N/A"  # what torchvision calls an id that COCO does not use
BACKGROUND = "__background__"  # and id 0
_ALL_NAMES = (
    "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign, "
    "parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, "
    "handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, "
    "surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, "
    "broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, "
    "mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, "
    "teddy bear, hair drier, toothbrush"
)
_NAMES = _ALL_NAMES.split(", ")


def coco_names(classes: int) -> list[str] | None:
    """COCO's class names for a model of its 80 classes or 91 raw ids, by label; None for another number.

    Ids that COCO does not use are called "N/A", id 0 "__background__", as in torchvision.
    """
    if classes == len(COCO_IDS):
        return list(_NAMES)
    if classes != RAW_COCO_CLASSES:
        return None
    by_id = dict(zip(COCO_IDS, _NAMES, strict=True))
    return [BACKGROUND, *(by_id.get(number, NO_CLASS) for number in range(1, RAW_COCO_CLASSES))]


def coco_ids(classes: int) -> list[int]:
    """The category ids of `coco_names`: label -> COCO's id."""
    return list(COCO_IDS) if classes == len(COCO_IDS) else list(range(classes))

"""Writes small data sets in COCO format: coloured rectangles on noise."""

import json
from typing import NamedTuple

import numpy as np
from PIL import Image

COLOURS = ((230, 20, 20), (20, 230, 20), (20, 20, 230))
NAMES = ("red", "green", "blue")


class CocoFiles(NamedTuple):
    annotations: str
    images: str

    def read(self):
        with open(self.annotations) as file:
            return json.load(file)

    def write(self, content):
        with open(self.annotations, "w") as file:
            json.dump(content, file)

    def change(self, change):
        """Let `change` edit the parsed annotations in place."""
        content = self.read()
        change(content)
        self.write(content)


def random_rectangle(random, width, height):
    """xywh in whole pixels, inside the image."""
    w, h = (int(n) for n in random.integers(12, 30, 2))
    return [int(random.integers(0, width - w)), int(random.integers(0, height - h)), w, h]


def write_coco(folder, counts=(2, 0, 3, 1), category_ids=(1, 2, 3), width=72, height=64, suffix=".png", seed=0):
    """One image per entry of `counts`, with so many objects; the `seed` decides about everything but the ids."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for number, count in enumerate(counts, 1):
        pixels = random.integers(90, 160, (height, width, 3), dtype=np.uint8)
        for _ in range(count):
            x, y, w, h = random_rectangle(random, width, height)
            label = int(random.integers(len(category_ids)))
            pixels[y : y + h, x : x + w] = COLOURS[label]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": category_ids[label],
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                }
            )
        name = f"image_{number}{suffix}"
        Image.fromarray(pixels).save(folder / name)
        images.append({"id": number, "file_name": name, "width": width, "height": height})
    categories = [{"id": i, "name": name} for i, name in zip(category_ids, NAMES, strict=False)]
    files = CocoFiles(str(folder / "annotations.json"), str(folder))
    files.write({"info": {}, "images": images, "annotations": annotations, "categories": categories})
    return files

"""Detections made from the truth, with errors of which kind and number are known."""

from collections import Counter

import numpy as np


def imperfect(data, seed=0, rates=None):
    """-> detections in COCO's results format, and a Counter of what was done to the objects.

    Args:
        rates: chance of each of "missed", "misplaced", "confused", "duplicate", per object.
    """
    random = np.random.default_rng(seed)
    rates = {"missed": 0.1, "misplaced": 0.06, "confused": 0.05, "duplicate": 0.04} if rates is None else rates
    sizes = {image["id"]: (image["width"], image["height"]) for image in data["images"]}
    ids = [c["id"] for c in data["categories"]]
    results, done = [], Counter()

    def add(a, box, category, score):
        box = [float(x) for x in box]
        results.append({"image_id": a["image_id"], "category_id": category, "bbox": box, "score": float(score)})

    for a in data["annotations"]:
        kind = str(random.choice(["found", *rates], p=[1 - sum(rates.values()), *rates.values()]))
        x, y, w, h = a["bbox"]
        right = [x + random.uniform(-0.05, 0.05) * w, y + random.uniform(-0.05, 0.05) * h, w, h]
        done[kind] += 1
        if kind == "misplaced":
            add(a, [x + 0.5 * w, y + 0.3 * h, w, h], a["category_id"], random.uniform(0.3, 0.8))
        elif kind == "confused":
            others = [i for i in ids if i != a["category_id"]]
            add(a, right, int(random.choice(others)), random.uniform(0.3, 0.8))
        elif kind != "missed":
            add(a, right, a["category_id"], random.beta(6, 2))
        if kind == "duplicate":
            add(a, [x + 0.1 * w, y, w, h], a["category_id"], random.uniform(0.05, 0.2))
    for image, (width, height) in sizes.items():
        if random.random() < 0.3:
            box = [random.uniform(0, 0.8) * width, random.uniform(0, 0.8) * height, 0.1 * width, 0.1 * height]
            add({"image_id": image}, box, int(random.choice(ids)), random.beta(2, 4))
    return results, done

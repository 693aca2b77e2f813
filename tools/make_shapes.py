"""Write a synthetic detection data set in COCO format: coloured circles, squares and triangles on textured ground.

    python tools/make_shapes.py datasets/shapes --train 600 --val 200

makes datasets/shapes/{train,val}.json and the images in datasets/shapes/{train,val}/. The two splits come from
different seeds. Each image has 1 to 10 objects, some of them overlapping, a third of them under 32 pixels; one image in
12 has none. Category ids are 2, 5 and 9: programs that confuse ids and labels fail early.

    python tools/make_shapes.py datasets/hard --train 600 --val 100 --hard

crowds the images: 10 to 25 objects each, many of them overlapping, half of them under 32 pixels.
"""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

CATEGORIES = [{"id": 2, "name": "circle"}, {"id": 5, "name": "square"}, {"id": 9, "name": "triangle"}]
WIDTH, HEIGHT = 192, 160  # of an image, in pixels
SMALL, LARGE = (14, 31), (38, 66)  # longer sides of objects in pixels


class Scene(NamedTuple):
    """How many objects an image gets.

    Args:
        empty: share of the images without objects.
        least, most: number of objects of the other images; fewer if there is no room.
        small_share: share of attempts to place a small object; small objects find room more often than large ones.
        max_overlap: share of the smaller of two boxes that the other may cover.
    """

    empty: float
    least: int
    most: int
    small_share: float
    max_overlap: float


EASY = Scene(empty=1 / 12, least=1, most=10, small_share=0.27, max_overlap=0.35)
HARD = Scene(empty=0, least=10, most=25, small_share=0.43, max_overlap=0.6)


def texture(random):
    """(HEIGHT, WIDTH, 3) uint8: soft blotches, fine grain and a few faint lines."""
    coarse = random.uniform(70, 190, (8, 10, 3)).astype(np.uint8)
    ground = Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.BICUBIC)
    draw = ImageDraw.Draw(ground)
    for _ in range(random.integers(4, 12)):
        ends = [(int(random.integers(WIDTH)), int(random.integers(HEIGHT))) for _ in range(2)]
        draw.line(ends, fill=tuple(int(c) for c in random.integers(60, 200, 3)), width=1)
    grain = random.normal(0, 12, (HEIGHT, WIDTH, 1))
    return Image.fromarray(np.clip(np.asarray(ground) + grain, 0, 255).astype(np.uint8))


def draw_shape(draw, name, box, random):
    """Fill one shape that touches all four sides of `box` (xyxy in pixels)."""
    x0, y0, x1, y1 = box
    fill = [int(c) for c in random.integers(0, 256, 3)]
    fill[random.integers(3)] = int(random.choice([0, 255]))  # keeps clear of the greyish ground
    style = {"fill": tuple(fill), "outline": tuple(c // 2 for c in fill)}
    if name == "circle":
        draw.ellipse(box, **style)
    elif name == "square":
        draw.rectangle(box, **style)
    else:
        draw.polygon([((x0 + x1) / 2, y0), (x1, y1), (x0, y1)], **style)


def overlaps(box, others, most):
    """Whether `box` shares more than `most` of the smaller one's area with one of `others` (all xyxy)."""
    for other in others:
        width = min(box[2], other[2]) - max(box[0], other[0])
        height = min(box[3], other[3]) - max(box[1], other[1])
        smaller = min((b[2] - b[0]) * (b[3] - b[1]) for b in (box, other))
        if width > 0 and height > 0 and width * height > most * smaller:
            return True
    return False


def make_image(random, scene):
    """One picture and its objects as (category, box xyxy in pixels)."""
    image = texture(random)
    draw = ImageDraw.Draw(image)
    objects = []
    wanted = 0 if random.random() < scene.empty else int(random.integers(scene.least, scene.most + 1))
    for _ in range(20 * wanted):
        if len(objects) == wanted:
            break
        low, high = SMALL if random.random() < scene.small_share else LARGE
        width, height = (int(s) for s in random.integers(low, high + 1) * random.uniform(0.85, 1, 2))
        x, y = int(random.integers(WIDTH - width)), int(random.integers(HEIGHT - height))
        box = (x, y, x + width, y + height)
        if not overlaps(box, [b for _, b in objects], scene.max_overlap):
            category = CATEGORIES[random.integers(len(CATEGORIES))]
            draw_shape(draw, category["name"], box, random)
            objects.append((category, box))
    return image, objects


def write_split(folder, split, count, seed, scene):
    """`count` images and their annotations."""
    random = np.random.default_rng(seed)
    (folder / split).mkdir(parents=True)
    images, annotations = [], []
    for number in tqdm(range(1, count + 1), desc=f"draw {split}", disable=None):
        image, objects = make_image(random, scene)
        name = f"{number:05d}.png"
        image.save(folder / split / name)
        images.append({"id": number, "file_name": name, "width": WIDTH, "height": HEIGHT})
        for category, (x0, y0, x1, y1) in objects:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": category["id"],
                    "bbox": [x0, y0, x1 - x0 + 1, y1 - y0 + 1],
                    "area": (x1 - x0 + 1) * (y1 - y0 + 1),
                    "iscrowd": 0,
                }
            )
    content = {"info": {}, "images": images, "annotations": annotations, "categories": CATEGORIES}
    (folder / f"{split}.json").write_text(json.dumps(content))


def make_shapes(folder, train, val, seed, scene):
    """Write both splits to `folder`, which appears whole or not at all."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    write_split(part, "train", train, seed, scene)
    write_split(part, "val", val, seed + 1, scene)
    os.replace(part, folder)


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a new folder for images and annotations")
    parser.add_argument("--train", type=int, default=600, help="number of training images")
    parser.add_argument("--val", type=int, default=200, help="number of validation images")
    parser.add_argument("--seed", type=int, default=0, help="of the random shapes")
    parser.add_argument("--hard", action="store_true", help="many overlapping and small objects in each image")
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)
    if args.folder.exists():
        sys.exit(f"error: {args.folder} exists: choose another folder, or remove it")
    make_shapes(args.folder, args.train, args.val, args.seed, HARD if args.hard else EASY)
    print(f"written to {args.folder}")


if __name__ == "__main__":
    main()

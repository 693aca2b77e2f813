"""Plant label errors in synthetic data, train a model on each half of it, and count the errors that are found.

    python benchmarks/label_errors.py --seeds 0 1 --results benchmarks/results/label_errors.json

For each seed: draws shapes (`tools/make_shapes.py`), removes 10 % of the labels, shifts 5 %, swaps the class of 5 %,
adds as many boxes on the background as 5 % of the labels, writes the halves as `dino check --halves` does, trains a
model on each (`dino.train`, no Detectron2), and lists likely label errors as `dino check --weights A B --halves` does.
Prints, for each kind, the share of the planted errors that the first proposals find, as many, and twice as many, as
were planted. Finished trainings of the folder are used again. found_as_any_kind: the share that is among all proposals.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

from pycocotools import mask

from dino.evaluation import held_out
from dino.training import plain

ROOT = Path(__file__).resolve().parent.parent
SHARES = {"missing": 0.10, "box": 0.05, "class": 0.05, "spurious": 0.05}  # of the labels
SHIFT = (0.10, 0.30)  # of the sides of a box, along both axes: IoU 0.68 to 0.32
SETTINGS = {"size": 160, "embed_dim": 64, "layers": 3, "queries": 50, "lr": 4e-4, "device": "cpu"}


def plant(data, seed, shares=SHARES):
    """Annotations with planted errors, and the errors of each kind.

    Args:
        data: COCO-format annotations, which stay as they are.
        shares: of the labels, by kind of error.

    Returns:
        the content, and for each kind a list of annotations: as they were, for missing ones; as they are now else.
    """
    draw = random.Random(seed)
    labels = [dict(a) for a in data["annotations"]]
    draw.shuffle(labels)
    counts = {kind: round(share * len(labels)) for kind, share in shares.items()}
    images = {image["id"]: image for image in data["images"]}
    planted = {kind: [labels.pop() for _ in range(counts[kind])] for kind in ("missing", "box", "class")}
    for a in planted["box"]:
        a["bbox"] = shifted(a["bbox"], images[a["image_id"]], draw)
    for a in planted["class"]:
        a["category_id"] = another_class(a, data["categories"], draw)
    planted["spurious"] = list(islice(boxes_of_nothing(data, draw), counts["spurious"]))
    kept = [*labels, *planted["box"], *planted["class"], *planted["spurious"]]
    return {**data, "annotations": sorted(kept, key=lambda a: a["id"])}, planted


def another_class(annotation, categories, draw):
    """The id of a class that is not the annotation's."""
    return draw.choice([c["id"] for c in categories if c["id"] != annotation["category_id"]])


def boxes_of_nothing(data, draw):
    """Annotations on the background, of the sizes of objects, with new ids; ends after 10,000 tries."""
    first = max(a["id"] for a in data["annotations"]) + 1
    ids = [category["id"] for category in data["categories"]]
    sizes = [a["bbox"][2:] for a in data["annotations"]]
    for number in range(first, first + 10_000):
        image = draw.choice(data["images"])
        box = on_background(image, draw.choice(sizes), data["annotations"], draw)
        if box:
            entry = {"id": number, "image_id": image["id"], "category_id": draw.choice(ids), "bbox": box}
            yield {**entry, "area": box[2] * box[3], "iscrowd": 0}


def shifted(box, image, draw):
    """A box moved along both axes, inside the image; larger moves to the other side where there is no room."""
    moved = []
    for start, length, limit in zip(box[:2], box[2:], (image["width"], image["height"]), strict=True):
        step = draw.uniform(*SHIFT) * length
        steps = [s for s in (step, -step) if 0 <= start + s <= limit - length]
        moved.append(start + draw.choice(steps or [0]))
    return [*moved, *box[2:]]


def on_background(image, size, annotations, draw):
    """A box of this size that meets no object of the image, or None after some tries."""
    others = [a["bbox"] for a in annotations if a["image_id"] == image["id"]]
    width, height = size
    for _ in range(20):
        x, y = draw.uniform(0, image["width"] - width), draw.uniform(0, image["height"] - height)
        if not any(x < ox + ow and ox < x + width and y < oy + oh and oy < y + height for ox, oy, ow, oh in others):
            return [x, y, width, height]
    return None


def prepare(folder, seed, images):
    """Draw the images, plant the errors and write the halves -> the planted errors. What is there is used again."""
    if not (folder / "shapes").exists():
        command = [sys.executable, ROOT / "tools/make_shapes.py", folder / "shapes", "--seed", 100 + seed]
        subprocess.run([*map(str, command), "--train", str(images), "--val", "100"], check=True)
        data, planted = plant(json.loads((folder / "shapes/train.json").read_text()), seed)
        (folder / "train.json").write_text(json.dumps(data))
        (folder / "planted.json").write_text(json.dumps(planted))
        held_out.write_halves(folder / "train.json", folder / "shapes/train", folder)
    return json.loads((folder / "planted.json").read_text())


def train_halves(folder, epochs):
    """A model of each half, evaluated on the other -> their AP against the annotations with planted errors."""
    images, ap = folder / "shapes/train", []
    for name, half, other in zip("ab", held_out.HALVES, reversed(held_out.HALVES), strict=True):
        output = folder / name
        if not (output / "metrics.json").exists():
            plain.train(folder / half, images, folder / other, images, output, epochs=epochs, **SETTINGS)
        ap.append(round(json.loads((output / "metrics.json").read_text())["AP"], 3))
    return ap


def judge(planted, errors):
    """For each kind: how many were planted and proposed, and the shares found among as many and twice as many."""
    figures = {}
    for kind, wanted in planted.items():
        proposed = [e for e in errors if e.kind == kind]
        number = len(wanted)
        shares = [sum(is_found(kind, p, proposed[: times * number]) for p in wanted) / number for times in (1, 2)]
        shares.append(sum(is_found(kind, p, errors) for p in wanted) / number)
        names = ("found_in_first_n", "found_in_first_2n", "found_as_any_kind")
        rounded = {name: round(share, 3) for name, share in zip(names, shares, strict=True)}
        figures[kind] = {"planted": number, "proposed": len(proposed), **rounded}
    return figures


def is_found(kind, wanted, errors):
    """Whether one of the proposals is about a planted error."""
    if kind != "missing":
        return any(e.annotation is not None and e.annotation["id"] == wanted["id"] for e in errors)
    boxes = [e.box for e in errors if e.image_id == wanted["image_id"] and e.annotation is None]
    return bool(boxes) and bool(mask.iou(boxes, [wanted["bbox"]], [0]).max() >= 0.5)


def run(folder, seed, images, epochs):
    """Everything of one seed -> its figures."""
    folder.mkdir(parents=True, exist_ok=True)
    planted = prepare(folder, seed, images)
    ap = train_halves(folder, epochs)
    start = time.perf_counter()
    weights = [folder / name / "model.pth" for name in "ab"]
    _, errors = held_out.find_by_models(folder / "train.json", folder / "shapes/train", weights, folder)
    seconds = round(time.perf_counter() - start, 1)
    return {"seed": seed, "AP_of_halves": ap, "predict_and_rank_seconds": seconds, "kinds": judge(planted, errors)}


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "output/label_errors", help="folder of data and models")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of images and planted errors")
    parser.add_argument("--images", type=int, default=600, help="number of images")
    parser.add_argument("--epochs", type=float, default=12, help="of each training")
    parser.add_argument("--results", type=Path, help="JSON file to write")
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)
    runs = [run(args.output / f"seed_{seed}", seed, args.images, args.epochs) for seed in args.seeds]
    shares = {"shares": SHARES, "shift": SHIFT, "images": args.images, "epochs": args.epochs, "settings": SETTINGS}
    for one in runs:
        print(f"seed {one['seed']}: AP of the halves {one['AP_of_halves']}")
        for kind, row in one["kinds"].items():
            print(f"  {kind:<9}" + "  ".join(f"{name} {value}" for name, value in row.items()))
    if args.results:
        args.results.write_text(json.dumps({**shares, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()

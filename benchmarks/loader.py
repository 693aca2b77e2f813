"""How many images a second the training loader makes: `python benchmarks/loader.py`.

    python benchmarks/loader.py --images coco/train2017 --count 200
    python benchmarks/loader.py --workers 2

Reads the recipe's own data part (configs/common/data.py: flip, crop with a chance of a half, short side 480 to 800,
long side up to 1333). Without `--images` it makes JPEG files of COCO's usual size, 640x480. First each step is timed in
this process, so that its share is known and what one core does; then the whole loader with its worker processes. Last,
in this process, images of a recipe that combines several: mosaics, blends, and its own mixture of both.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from detectron2.config import LazyConfig, instantiate  # noqa: E402
from detectron2.structures import BoxMode, ImageList  # noqa: E402
from measure import origin  # noqa: E402

from dino.d2 import data_loading as d2_data  # noqa: E402
from dino.d2.training.sampler import TrainLoader, seed_random  # noqa: E402
from dino.data.images import list_images, read_image  # noqa: E402

OBJECTS = 7  # per image, as in COCO
COMBINING = ROOT / "projects/dino/configs/dino_r50_4scale_12ep_dense_o2o.py"
COMBINED = {"plain": (0, 0), "mosaic": (1, 0), "mixup": (0, 1), "both": (0.5, 0.5)}  # probabilities; last: the recipe's
STEPS = ("decode", "augment", "to tensor", "boxes and copies", "pad to a batch")


def make_images(folder, count):
    """JPEG files with smooth colours and some noise, about as large as COCO's."""
    draw = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(draw.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((640, 480), Image.BICUBIC)
        noisy = np.clip(np.asarray(coarse) + draw.normal(0, 12, (480, 640, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{number:06}.jpg", quality=90)


def to_entries(paths):
    """Dicts as Detectron2 has them, with objects at random locations."""
    draw, entries = np.random.default_rng(1), []
    for number, path in enumerate(paths):
        height, width = read_image(path).shape[:2]
        corners = draw.random((OBJECTS, 2, 2)) * [width, height]
        boxes = np.concatenate([corners.min(1), corners.max(1)], 1)
        objects = [{"bbox": list(b), "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0} for b in boxes]
        entry = {"file_name": str(path), "image_id": number, "height": height, "width": width}
        entries.append({**entry, "annotations": objects})
    return entries


def timed(function, step, seconds):
    """`function`, whose processor time is added to `seconds[step]`."""

    def run(*arguments):
        start = time.process_time()
        result = function(*arguments)
        seconds[step] += time.process_time() - start
        return result

    return run


def seconds_of_steps(mapper, entries):
    """Processor seconds of each step for one image, in this process: means over `entries`, after one that is left out.

    A batch of two is padded by the training process itself; all else is done by the workers.
    """
    mapper(entries[0])
    seconds, images = dict.fromkeys(STEPS, 0.0), []
    augmentations, mapper.augmentations = mapper.augmentations, timed(mapper.augmentations, "augment", seconds)
    read, to_tensor = timed(d2_data._read, "decode", seconds), timed(d2_data._to_tensor, "to tensor", seconds)
    with mock.patch.object(d2_data, "_read", read), mock.patch.object(d2_data, "_to_tensor", to_tensor):
        start = time.process_time()
        for position, entry in enumerate(entries):
            seed_random(0, position)
            images.append(mapper(entry)["image"])
        seconds["boxes and copies"] = time.process_time() - start - sum(seconds.values())
    mapper.augmentations = augmentations
    pad = timed(ImageList.from_tensors, "pad to a batch", seconds)
    for first in range(0, len(images), 2):
        pad(images[first : first + 2])
    return {step: total / len(entries) for step, total in seconds.items()}


def seconds_of_combined(entries):
    """Processor seconds for an image of each of COMBINED, in this process: means over as many images as `entries`."""
    seconds = {}
    for name, (mosaic, mixup) in COMBINED.items():
        cfg = LazyConfig.load(str(COMBINING))
        cfg.train.max_iter = 1 + len(entries)
        mapper = cfg.dataloader.train.mapper
        mapper.begin, mapper.end, mapper.mosaic.probability, mapper.mixup.probability = 0, 1, mosaic, mixup
        batches = iter(TrainLoader(entries, instantiate(mapper), total_batch_size=1))
        next(batches)
        start = time.process_time()
        for _ in entries:
            next(batches)
        seconds[name] = (time.process_time() - start) / len(entries)
    return seconds


def images_per_second(loader, seconds):
    """Of the loader with its workers, once its first two batches have come."""
    batches, count = iter(loader), 0
    for _ in range(2):
        next(batches)
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        count += len(next(batches))
    return count / (time.perf_counter() - start)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", default=ROOT / "benchmarks/results", type=Path, help="folder of the JSON file")
    parser.add_argument("--images", type=Path, help="a folder of images; default: made ones")
    parser.add_argument("--count", default=64, type=int, help="how many of them")
    parser.add_argument("--workers", default=os.cpu_count(), type=int, help="reading processes of the loader")
    parser.add_argument("--seconds", default=20.0, type=float, help="how long the loader runs")
    return parser.parse_args()


def main():
    options = parse_arguments()
    torch.set_num_threads(1)  # as each worker has
    recipe = LazyConfig.load(str(ROOT / "configs/common/data.py")).dataloader.train
    mapper = instantiate(recipe.mapper)
    with tempfile.TemporaryDirectory() as folder:
        if options.images is None:
            make_images(Path(folder), options.count)
        entries = to_entries(list_images(options.images or folder)[: options.count])
        steps = seconds_of_steps(mapper, entries)
        loader = TrainLoader(entries, mapper, total_batch_size=2, num_workers=options.workers)
        rate = images_per_second(loader, options.seconds)
        combined = seconds_of_combined(entries)
    report = {**origin(torch.device("cpu")), "made": options.images is None, "images": len(entries), "steps": steps}
    report |= {"workers": options.workers, "images_per_second": rate, "combined": combined}
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / f"loader_{options.workers}workers.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    total = sum(steps.values())
    for step, seconds in steps.items():
        print(f"{step}: {1e3 * seconds:.1f} ms, {seconds / total:.0%}")
    print(f"one core: {1 / total:.1f} images/s; {options.workers} workers: {rate:.1f} images/s")
    for name, seconds in combined.items():
        print(f"{name}: {1e3 * seconds:.1f} ms, {seconds / combined['plain']:.2f} x plain")


if __name__ == "__main__":
    main()

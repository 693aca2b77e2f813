"""Run a checkpoint over data in COCO format for `dino eval`, without Detectron2."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from dino.data.coco import classes_of, read_images, to_results
from dino.data.images import read_image, resize_image
from dino.inference.cpu import keep_freed_memory
from dino.layers.cpu_feed_forward import use_cpu_feed_forward
from dino.modeling import use_float32_precision
from dino.modeling.detector import Detector
from dino.utils.files import DataError, make_folder, resolve_inside, write_whole
from dino.weights.description import detector_for_classes
from dino.weights.inferred_description import open_checkpoint

from .average_precision import evaluate
from .report.error_analysis import show
from .report.evaluate import RESULTS, Detected, choose_weights, image_paths

_WORKERS = 4  # processes that read images for a GPU; a CPU has no use for them


class _Copy(NamedTuple):
    """Weights of a checkpoint, and where their detections go: the same folders as with Detectron2."""

    copy: str  # of `load_weights`
    kind: str
    folder: str


_AS_TRAINED = _Copy("model", "weights as trained", "inference")
_AVERAGED = _Copy("ema", "averaged weights", "inference/averaged")


def detect(folder: Path, weights: str, val_json: str, val_images: str, device: str | None = None) -> Detected:
    """Run a checkpoint, and its averaged weights if it has both, over a data set.

    Args:
        folder: a new folder for the detections; those of averaged weights go to `inference/averaged`.
        weights: a file, an address or the name of published weights.
        val_json, val_images: data in COCO format; without a list of annotations there is no AP.
        device: where to run; a GPU where there is one, by default.

    Returns:
        the detections, see `choose_weights`.

    Raises:
        UserError: the weights can't be fetched.
        DataError: weights or data are missing or broken, or their classes do not fit.
    """
    keep_freed_memory()
    use_float32_precision("high")
    path, content = open_checkpoint(weights)
    data = read_images(val_json, val_images)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    copies = [_AS_TRAINED, _AVERAGED] if "ema" in content else [_AS_TRAINED._replace(copy="auto")]
    for chosen in copies:
        detector = _build(content, path, data, chosen.copy, device)
        results = _run(detector, data, Path(val_images))
        make_folder(folder / chosen.folder)
        _write(folder / chosen.folder / RESULTS, results)
        if len(copies) > 1 and data["annotations"]:
            figures = "  ".join(f"{key} {show(key, ap)}" for key, ap in _main_figures(data, results).items())
            print(f"{chosen.kind}: {figures}")
    results, details = choose_weights(folder, {"Data": val_json, "Weights": weights})
    return Detected(data, image_paths(data, val_images), results, details)


def _build(content: Mapping[str, Any], path: str, data: dict[str, Any], copy: str, device: str) -> Detector:
    """The detector of a checkpoint for the classes of the data; prints what may be wrong with its weights."""
    detector, report = detector_for_classes(content, path, classes_of(data).names, copy=copy)
    for doubt in report.doubts:
        print(f"warning: {doubt}")
    if torch.device(device).type == "cpu":
        use_cpu_feed_forward(detector.network)
    return detector.to(device)


def _main_figures(data: dict[str, Any], results: list[dict]) -> dict[str, float]:
    """AP of all classes together."""
    return {key: value for key, value in evaluate(data, results).items() if not key.startswith("AP-")}


def _write(path: Path, results: list[dict]) -> None:
    write_whole(path, lambda part: part.write_text(json.dumps(results), encoding="utf-8"))


class _Pictures(Dataset):
    """The images of a data set, resized for a detector."""

    def __init__(self, entries: list[dict], folder: Path, detector: Detector):
        self.entries = entries
        self.folder = folder
        self.size = detector.size
        self.input_range = detector.preprocessing.input_range

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> tuple[np.ndarray, dict]:
        """(h, w, 3) uint8, RGB, and the entry of the annotations.

        Raises:
            DataError: the file can't be read, or its size is not that of the annotations.
        """
        entry = self.entries[index]
        path = resolve_inside(self.folder, entry["file_name"])
        pixels = read_image(path, self.input_range)
        size = entry["height"], entry["width"]
        if pixels.shape[:2] != size:
            found = f"{pixels.shape[1]}x{pixels.shape[0]}"
            raise DataError(f"{path} is {found}, but the annotations say {entry['width']}x{entry['height']}")
        return resize_image(pixels, self.size(*size)), entry


def _keep(sample: tuple) -> tuple:
    """A sample as it is, without PyTorch's conversions."""
    return sample


def _run(detector: Detector, data: dict[str, Any], folder: Path) -> list[dict]:
    """Entries of COCO's results format."""
    on_cpu = detector.device.type == "cpu"
    pictures = _Pictures(data["images"], folder, detector)
    loader = DataLoader(pictures, batch_size=None, num_workers=0 if on_cpu else _WORKERS, collate_fn=_keep)
    category_ids = classes_of(data).ids
    results = []
    for pixels, entry in tqdm(loader, desc="evaluate", unit="image", disable=None):
        image = torch.from_numpy(pixels).permute(2, 0, 1)
        (found,) = detector.detect([image], [(entry["height"], entry["width"])], sources=[entry["file_name"]])
        results += to_results(found, entry["id"], category_ids)
    return results

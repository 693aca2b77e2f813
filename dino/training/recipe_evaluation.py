"""AP of a recipe's detector on its validation images, without Detectron2."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch.utils.data import DataLoader

from dino.data.coco import CocoImages, collate
from dino.evaluation import average_precision
from dino.modeling.detector import Detector
from dino.structures import Detections
from dino.utils.files import make_folder, write_whole

from .ema import Ema
from .gpu_speed import replayed
from .progress_bar import ProgressLine
from .run_pictures import MOST_IMAGES, draw_val_predictions


def evaluate(cfg: DictConfig, detector: Detector, val: CocoImages, ema: Ema | None = None) -> dict[str, dict]:
    """Evaluate a detector; writes its detections below `inference` in the folder of the run.

    Args:
        cfg: a complete recipe.
        detector: is in evaluation mode afterwards.
        val: the images.
        ema: the averaged weights, which are evaluated too.

    Returns:
        {"bbox": {"AP": percent, …, "AP-<class>": percent}}, NaN where undefined; of averaged weights under "ema".
    """
    folder = Path(cfg.train.output_dir) / "inference"
    results = {"bbox": _evaluate_weights(cfg, detector, val, folder, "raw weights")}
    if ema:
        with ema.applied():
            averaged = _evaluate_weights(cfg, detector, val, folder / "averaged", "averaged weights")
        results["ema"] = {"bbox": averaged}
    return results


def flatten(results: dict[str, dict]) -> dict[str, float]:
    """Results of `evaluate` -> {"bbox/AP": …, "ema/bbox/AP": …}, as metrics.json has them."""
    averaged = results.get("ema", {})
    values = {f"{task}/{name}": x for task, found in results.items() if task != "ema" for name, x in found.items()}
    return values | {f"ema/{task}/{name}": x for task, found in averaged.items() for name, x in found.items()}


@torch.inference_mode()
def detect_in(cfg: DictConfig, detector: Detector, val: CocoImages, label: str) -> list[tuple[dict, Detections]]:
    """The entry of each image in the file, and the detections in its pixels."""
    detector.eval()
    options = {"batch_size": cfg.dataloader.test.get("batch_size", 1), "num_workers": cfg.dataloader.test.num_workers}
    loader = DataLoader(val, collate_fn=collate, **options)
    found, amp = [], cfg.train.amp
    low = amp.enabled and amp.evaluation
    autocast = torch.autocast(detector.device.type, getattr(torch, amp.dtype)) if low else nullcontext()
    with autocast, replayed(detector, cfg.train.cuda_graphs), ProgressLine(0, len(loader), label=label) as line:
        for number, (images, _, entries) in enumerate(loader, 1):
            sizes, names = zip(*[((x["height"], x["width"]), x["file_name"]) for x in entries], strict=True)
            results = detector.detect(images, sizes, sources=names)
            found += zip(entries, [Detections(*(x.cpu() for x in result)) for result in results], strict=True)
            line.step(number, {})
    return found


def show_predictions(detector: Detector, val: CocoImages, path: str | Path) -> None:
    """Draw the detections in the first validation images beside the true boxes.

    Args:
        detector: is in evaluation mode afterwards.
        path: of the PNG.
    """
    detector.eval()
    images, objects, _ = zip(*(val[i] for i in range(min(len(val), MOST_IMAGES))), strict=True)
    images = [image.as_subclass(torch.Tensor) for image in images]
    found = detector.detect(images, batch_size=1)
    boxes, labels = ([x[key].as_subclass(torch.Tensor) for x in objects] for key in ("boxes", "labels"))
    draw_val_predictions(path, images, [Detections(*(x.cpu() for x in own)) for own in found], boxes, labels, val.names)


def _evaluate_weights(
    cfg: DictConfig, detector: Detector, val: CocoImages, folder: Path, kind: str
) -> dict[str, float]:
    """AP of the current weights in percent; writes the detections into `folder`."""
    found = detect_in(cfg, detector, val, f"evaluation, {kind}: image")
    results = [
        row
        for entry, detections in found
        for row in average_precision.to_results(detections, entry["id"], val.category_ids)
    ]
    make_folder(folder)
    text = json.dumps(results)
    write_whole(folder / "coco_instances_results.json", lambda part: part.write_text(text))
    metrics = average_precision.evaluate(val.data, results)
    return {name: 100 * value if value >= 0 else math.nan for name, value in metrics.items()}

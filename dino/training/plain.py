"""Training and evaluation in a plain PyTorch loop on data in COCO format, without Detectron2."""

from __future__ import annotations

import json
import math
import random
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from tqdm import tqdm

from dino.data.coco import CocoImages, ResizeShortSide, collate
from dino.evaluation import average_precision
from dino.inference.cpu import keep_freed_memory
from dino.layers import HungarianMatcher, SetCriterion
from dino.layers.cpu_feed_forward import use_cpu_feed_forward
from dino.modeling import compile_network, use_float32_precision
from dino.modeling.detector import Detector, Preprocessing, resized_size
from dino.utils.files import DataError, UserError, free_name, write_whole
from dino.weights import read_content
from dino.weights.description import build_network

from .progress import Objects, Progress

FLIPS = ("none", "horizontal", "both")


class Settings(NamedTuple):
    """A network for small data, and how to train it. The recipes of `configs/` are for Detectron2.

    Args:
        backbone: any of `TorchvisionBackbone`.
        size: short side of the images in pixels; the long one has at most twice as many.
        flips: of training images, one of FLIPS.
        embed_dim: width of encoder and decoder.
        layers: of the encoder, and of the decoder.
        queries: candidates of an image.
        epochs: length of the training.
        batch: images of a step.
        lr: falls to a tenth over the last fifth of the training.
        workers: reading processes.
        seed: of weights, order, flips and noise.
        device: "cpu", "cuda", …; None for a GPU where there is one.
        bf16: run the network under bfloat16 autocast.
        float32_precision: of products in float32 on a GPU, see `use_float32_precision`.
        compile: compile the network: a slow start, then faster.
        cuda_graphs: evaluate so many sizes of images by CUDA graphs.
    """

    backbone: str = "resnet18"
    size: int = 240
    flips: str = "horizontal"
    embed_dim: int = 128
    layers: int = 3
    queries: int = 100
    epochs: float = 20
    batch: int = 4
    lr: float = 2e-4
    workers: int = 1
    seed: int = 42
    device: str | None = None
    bf16: bool = False
    float32_precision: str = "high"
    compile: bool = False
    cuda_graphs: int = 0

    @property
    def preprocessing(self) -> Preprocessing:
        """What the network expects of its images."""
        return Preprocessing(short_side=self.size, max_size=2 * self.size, max_detections=100)

    @property
    def torch_device(self) -> torch.device:
        """`device`, chosen."""
        return torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def autocast(self) -> torch.autocast:
        """A context for the network's forward pass."""
        return torch.autocast(self.torch_device.type, torch.bfloat16, enabled=self.bf16)


def train(
    train_json: str | Path,
    train_images: str | Path,
    val_json: str | Path,
    val_images: str | Path,
    output: str | Path,
    *,
    weights: str | Path | None = None,
    **settings: Any,
) -> dict[str, float]:
    """Train a network, evaluate it, and write model.pth, results.json and metrics.json.

    Args:
        train_json, val_json: COCO-format annotations. train_images, val_images: the folders of their images.
        output: folder for the files, which must not hold a model.
        weights: a model.pth of this program to start from; None for random weights.
        settings: see `Settings`.

    Returns:
        the metrics: "AP", …, see `average_precision.evaluate`, and "training_seconds".

    Raises:
        DataError: a file can't be used; training and validation data have other classes; there are no training objects.
        UserError: output holds a model, or the settings make no network.
        FloatingPointError: the loss or a prediction is NaN or infinite; names the images.
    """
    settings, output = Settings(**settings), Path(output)
    if (output / "model.pth").exists():
        raise UserError(f"{output} holds a trained model: choose another --output, or move it away")
    _prepare_process(settings)
    val = CocoImages(val_json, val_images, _transforms(settings, "none"))
    detector = _start(settings, val.names, weights)
    data = CocoImages(train_json, train_images, _transforms(settings, settings.flips))
    if data.names != val.names:
        raise DataError(f"training and validation data differ in their classes: {data.names}, {val.names}")
    _check_objects(data, val)
    output.mkdir(parents=True, exist_ok=True)
    empty = sum(not objects for objects in data.objects.values())
    print(f"{len(data)} images, {empty} without objects, {data.dropped} boxes of no size dropped; {data.names}")
    start = time.perf_counter()
    objects = Objects(*_sizes(data, settings), *map(_count_classes, (data, val)))
    progress = _fit(detector, data, settings, objects.doubts())
    seconds = time.perf_counter() - start
    save(output / "model.pth", detector, settings)
    metrics = _write_results(detector, val, settings, output, seconds)
    _warn(progress.zero_ap(progress.length, metrics["AP"], metrics["AP50"]))
    return metrics


def evaluate(
    val_json: str | Path, val_images: str | Path, weights: str | Path, output: str | Path, **settings: Any
) -> dict[str, float]:
    """Evaluate a model.pth, and write results.json and metrics.json into a new folder `evaluation` in `output`.

    Arguments, results and errors as of `train`.
    """
    settings = Settings(**settings)
    _prepare_process(settings)
    val = CocoImages(val_json, val_images, _transforms(settings, "none"))
    detector = _start(settings, val.names, weights)
    folder = free_name(Path(output) / "evaluation")  # the results of the training stay as they are
    folder.mkdir(parents=True)
    return _write_results(detector, val, settings, folder, seconds=0.0)


def build(settings: Settings, names: Sequence[str]) -> Detector:
    """Build a detector of these classes with random weights.

    Raises:
        UserError: no network can be built from these settings.
    """
    try:
        network = build_network(_describe(settings, len(names)))
    except ValueError as error:
        raise UserError(f"no network can be built from these arguments: {error}") from error
    if settings.torch_device.type == "cpu":
        use_cpu_feed_forward(network)
    criterion = SetCriterion(matcher=HungarianMatcher())
    return Detector(network, settings.preprocessing, names, criterion=criterion).to(settings.torch_device)


def save(path: Path, detector: Detector, settings: Settings) -> None:
    """Write a checkpoint with its description, see `dino.weights.description`."""
    config = json.dumps(_describe(settings, len(detector.names)))
    about = {"config": config, "preprocessing": detector.preprocessing._asdict()}
    content = {"model": detector.network.state_dict(), "names": detector.names, "about": about}
    write_whole(path, lambda part: torch.save(content, part))


def _prepare_process(settings: Settings) -> None:
    """Set what holds for the whole process: memory, precision, random numbers."""
    keep_freed_memory()
    use_float32_precision(settings.float32_precision)
    random.seed(settings.seed)
    torch.manual_seed(settings.seed)


def _transforms(settings: Settings, flips: str) -> v2.Compose:
    """Flips and resizing for `CocoImages`."""
    chosen = {"none": [], "horizontal": [v2.RandomHorizontalFlip()]}
    chosen["both"] = [*chosen["horizontal"], v2.RandomVerticalFlip()]
    resize = ResizeShortSide(settings.preprocessing.short_side, settings.preprocessing.max_size)
    return v2.Compose([*chosen[flips], resize, v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes(min_size=1)])


def _describe(settings: Settings, num_classes: int) -> dict:
    """The network in the words of `dino.weights.description`, which the checkpoint carries."""
    backbone = {"_target_": "dino.modeling.TorchvisionBackbone", "name": settings.backbone, "norm": "BN"}
    return {
        "network": {
            "_target_": "dino.modeling.build_dino",
            "backbone": backbone,
            "num_classes": num_classes,
            "num_queries": settings.queries,
            "embed_dim": settings.embed_dim,
            "hidden_dim": 4 * settings.embed_dim,
            "encoder_layers": settings.layers,
            "decoder_layers": settings.layers,
        }
    }


def _start(settings: Settings, names: list[str], weights: str | Path | None) -> Detector:
    """A detector with random or given weights, compiled if `settings` ask for it."""
    detector = build(settings, names)
    if weights:
        _load(detector.network, weights, names)
    if settings.compile:
        compile_network(detector.network)
    return detector


def _load(network: nn.Module, path: str | Path, names: list[str]) -> None:
    """Load weights that `save` wrote."""
    checkpoint = read_content(path)
    try:
        network.load_state_dict(checkpoint["model"])
    except Exception as error:  # a foreign file can raise anything
        raise DataError(f"can't use the weights {path}: {str(error)[:500]}") from error
    if checkpoint.get("names") != names:
        raise DataError(f"{path} was trained for the classes {checkpoint.get('names')}, the data has {names}")


def _load_data(data: CocoImages, settings: Settings, **options: Any) -> DataLoader:
    """Batches of `data`, see `collate`."""
    return DataLoader(data, collate_fn=collate, num_workers=settings.workers, **options)


def _check_objects(data: CocoImages, val: CocoImages) -> None:
    """Raise a DataError if there is nothing to learn; warn if there is no AP to expect."""
    if data.problem:
        raise DataError(f"nothing to learn: {data.problem}")
    if val.problem:
        _warn(f"AP will be undefined: {val.problem}")


def _sizes(data: CocoImages, settings: Settings) -> tuple[np.ndarray, np.ndarray]:
    """(N,) square roots of the areas of all boxes after the resize in pixels, and their shares of the image."""
    sizes, shares = [], []
    for entry in data.images:
        height, width = entry["height"], entry["width"]
        resized = math.prod(resized_size(height, width, settings.size, settings.preprocessing.max_size))
        for _, (x0, y0, x1, y1) in data.objects[entry["id"]]:
            shares.append((x1 - x0) * (y1 - y0) / (height * width))
            sizes.append(math.sqrt(shares[-1] * resized))
    return np.array(sizes), np.array(shares)


def _count_classes(data: CocoImages) -> Counter[str]:
    """Number of objects of each class, by its name."""
    return Counter(data.names[label] for objects in data.objects.values() for label, _ in objects)


def _warn(message: str | None) -> None:
    """Print a warning, if there is one."""
    if message:
        tqdm.write(f"warning: {message}")


def _fit(detector: Detector, data: CocoImages, settings: Settings, doubts: Sequence[str] = ()) -> Progress:
    """The training loop -> how it went."""
    detector.train()
    weights = [p for p in detector.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=settings.lr, weight_decay=1e-4)
    loader = _load_data(data, settings, batch_size=settings.batch, shuffle=True, drop_last=len(data) > settings.batch)
    steps = max(1, round(settings.epochs * len(loader)))
    drop = torch.optim.lr_scheduler.MultiStepLR(optimizer, [round(0.8 * steps)])
    batches = (batch for _ in range(math.ceil(settings.epochs)) for batch in loader)
    progress = Progress(steps, {}, "--lr", settings.lr, doubts)
    bar = tqdm(range(steps), desc="train", disable=None)
    for step, (images, targets, entries) in zip(bar, batches, strict=False):
        names = [entry["file_name"] for entry in entries]
        with settings.autocast():
            loss = sum(detector.losses(images, targets, sources=names).values())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(weights, 0.1)
        # One transfer from the device:
        progress.losses[step], norm = torch.stack([loss.detach().float(), norm.float()]).tolist()
        if not math.isfinite(progress.losses[step] + norm):
            what = f"the loss is {progress.losses[step]}, the norm of its gradients {norm}"
            raise FloatingPointError(f"{what} at step {step}, images {names}. Lower --lr")
        optimizer.step()
        drop.step()
        _warn(progress.rising_loss(step + 1))
        if step % 50 == 0 or step == steps - 1:
            tqdm.write(f"step {step + 1}/{steps}  loss {progress.losses[step]:.2f}")
    return progress


def _write_results(
    detector: Detector, data: CocoImages, settings: Settings, folder: Path, seconds: float
) -> dict[str, float]:
    """Evaluate, and write results.json and metrics.json -> the metrics."""
    results = _predict(detector, data, settings)
    metrics = {**average_precision.evaluate(data.data, results), "training_seconds": round(seconds, 1)}
    for name, content in (("results.json", results), ("metrics.json", metrics)):
        write_whole(folder / name, lambda part, content=content: part.write_text(json.dumps(content)))
    print("\n".join(f"{name:>18} {value:.3f}" for name, value in metrics.items()), f"\nwritten to {folder}")
    return metrics


def _predict(detector: Detector, data: CocoImages, settings: Settings) -> list[dict]:
    """Entries of COCO's results format."""
    detector.eval()
    results = []
    with torch.inference_mode(), settings.autocast(), detector.replay(settings.cuda_graphs):
        for images, _, (entry,) in tqdm(_load_data(data, settings), desc="evaluate", disable=None):
            size = entry["height"], entry["width"]
            (found,) = detector.detect(images, [size], sources=[entry["file_name"]])
            results += average_precision.to_results(found, entry["id"], data.category_ids)
    return results

"""Training and evaluation in a plain PyTorch loop on data in COCO format, without Detectron2."""

from __future__ import annotations

import contextlib
import json
import math
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from tqdm import tqdm

from dino.data.coco import CocoImages, ResizeShortSide, collate
from dino.data.images import check_input_range
from dino.evaluation import average_precision
from dino.inference.cpu import keep_freed_memory
from dino.layers import LossScaling, SetCriterion, SquaredIoULoss
from dino.layers.cpu_feed_forward import use_cpu_feed_forward
from dino.modeling import TorchvisionBackbone, compile_network, use_float32_precision
from dino.modeling.detector import Detector, Preprocessing, resized_size
from dino.modeling.variants import PositionModulatedMatcher
from dino.utils.files import DataError, UserError, make_free_folder, write_whole
from dino.utils.printable import printable
from dino.weights import load_weights, locate, read_content, recognise, weights_of
from dino.weights.description import build_network, read_description

from .progress import Objects, Progress
from .start_summary import percent

FLIPS = ("none", "horizontal", "both")
NORMS = ("FrozenBN", "BN")
_CLASS_WEIGHT = 6.0  # of the class loss, but for denoising
_COUNTER = ".num_batches_tracked"


class Settings(NamedTuple):
    """A network for small data, and how to train it. The recipes of `configs/` are for Detectron2.

    Args:
        backbone: any of `TorchvisionBackbone`, or of `TimmBackbone`, for example `tf_efficientnet_lite0`.
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
        norm: of the backbone. `FrozenBN` fine-tunes it: statistics and first convolution stay, the rest learns at a
            tenth of `lr`. `BN` trains it like everything else. None is `FrozenBN` for weights of a backbone, the one of
            a model.pth, `BN` for random weights.
        input_range: values (low, high) of grey images of more than 8 bits that become 0 and 255, see `read_image`; None
            for that of `weights`, or the rule by type.
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
    norm: str | None = None
    input_range: Sequence[float] | None = None

    @property
    def preprocessing(self) -> Preprocessing:
        """What the network expects of its images."""
        sizes = {"short_side": self.size, "max_size": 2 * self.size}
        return Preprocessing(**sizes, max_detections=100, input_range=self.input_range)

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
    parts: str = "all",
    **settings: Any,
) -> dict[str, float]:
    """Train a network, evaluate it, and write model.pth, results.json and metrics.json.

    Args:
        train_json, val_json: COCO-format annotations. train_images, val_images: the folders of their images.
        output: folder for the files, which must not hold a model. settings: see `Settings`.
        weights: a model.pth of this program, whose classes keep their rows by name, or the weights of a backbone: a
            file, see `load_weights`, or an address, see `locate`; None for random weights.
        parts: of the file: "all", or "backbone" for the backbone alone, from any detector's.

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
    content = read_content(locate(str(weights))) if weights else None
    settings = _with_input_range(_with_norm(settings, weights, content), weights, content)
    val = _open(val_json, val_images, settings, "none")
    detector = _start(settings, val.names, weights, content, parts)
    data = _open(train_json, train_images, settings, settings.flips)
    _check_data(data, val)
    output.mkdir(parents=True, exist_ok=True)
    _print_summary(data)
    start = time.perf_counter()
    scores = sum("score" in a for a in data.data["annotations"])
    objects = Objects(*_sizes(data, settings), *map(_count_classes, (data, val)), scores)
    progress = _fit(detector, data, settings, objects.doubts())
    seconds = time.perf_counter() - start
    save(output / "model.pth", detector, settings, data.category_ids)
    metrics = _write_results(detector, val, settings, output, seconds)
    _warn(progress.zero_ap(progress.length, metrics["AP"], metrics["AP50"]))
    return metrics


def evaluate(
    val_json: str | Path, val_images: str | Path, weights: str | Path, output: str | Path, **settings: Any
) -> dict[str, float]:
    """Evaluate a model.pth, and write results.json and metrics.json into a new folder `evaluation` in `output`.

    Arguments, results and errors as of `train`; weights of a backbone are a DataError.
    """
    settings = Settings(**settings)
    _prepare_process(settings)
    content = read_content(locate(str(weights)))
    if _is_backbone(weights, content):
        raise DataError(
            f"{weights} has the weights of a backbone at most: train a detector from them, then evaluate it"
        )
    settings = _with_input_range(_with_norm(settings, weights, content), weights, content)
    val = _open(val_json, val_images, settings, "none")
    detector = build(settings, val.names)
    _load(detector.network, weights, content, val.names)
    if settings.compile:
        compile_network(detector.network)
    folder = make_free_folder(Path(output) / "evaluation")  # the results of the training stay as they are
    return _write_results(detector, val, settings, folder, seconds=0.0)


def build(settings: Settings, names: Sequence[str]) -> Detector:
    """Build a detector of these classes with random weights.

    timm's backbones get images normalised as their weights expect, all others as ImageNet's.

    Raises:
        UserError: no network can be built from these settings.
    """
    try:
        network = build_network(_describe(settings, len(names)))
    except (ImportError, ValueError) as error:
        raise UserError(f"no network can be built from these arguments: {error}{_or_torchvision(settings)}") from error
    statistics = getattr(network.neck.backbone, "pixel_statistics", {})
    preprocessing = settings.preprocessing._replace(**statistics)
    if settings.torch_device.type == "cpu":
        use_cpu_feed_forward(network)
    return Detector(network, preprocessing, names, criterion=_criterion()).to(settings.torch_device)


def _criterion() -> nn.Module:
    """The losses of the recipes for small data."""
    losses = SetCriterion(matcher=PositionModulatedMatcher(), class_loss=SquaredIoULoss(), class_weight=_CLASS_WEIGHT)
    return LossScaling(criterion=losses, factors={"loss_ce_dn": 1 / _CLASS_WEIGHT})


def save(path: Path, detector: Detector, settings: Settings, category_ids: Sequence[int] = ()) -> None:
    """Write a checkpoint with its description, see `dino.weights.description`; the detector's ids by default."""
    config = json.dumps(_describe(settings, len(detector.names)))
    about = {"config": config, "preprocessing": detector.preprocessing._asdict()}
    described = {"names": detector.names, "category_ids": list(category_ids) or detector.category_ids}
    content = {"model": detector.network.state_dict(), **described, "about": about}
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


def _open(annotations: str | Path, folder: str | Path, settings: Settings, flips: str) -> CocoImages:
    """A data set, read and resized as the settings say."""
    return CocoImages(annotations, folder, _transforms(settings, flips), input_range=settings.input_range)


def _describe(settings: Settings, num_classes: int) -> dict:
    """The network in the words of `dino.weights.description`, which the checkpoint carries."""
    library = "Torchvision" if settings.backbone in TorchvisionBackbone.names_of_models() else "Timm"
    norm = settings.norm or "BN"
    backbone = {"_target_": f"dino.modeling.{library}Backbone", "name": settings.backbone, "norm": norm}
    sizes = {"num_classes": num_classes, "num_queries": settings.queries, "embed_dim": settings.embed_dim}
    return {
        "network": {
            "_target_": "dino.modeling.build_dino",
            "backbone": backbone,
            "query_selection": {"_target_": "dino.modeling.variants.DistinctSelection", **sizes},
            **sizes,
            "hidden_dim": 4 * settings.embed_dim,
            "encoder_layers": settings.layers,
            "decoder_layers": settings.layers,
        }
    }


def _or_torchvision(settings: Settings) -> str:
    """What an error adds where the backbone was looked for in timm."""
    known = TorchvisionBackbone.names_of_models()
    return "" if settings.backbone in known else f"; torchvision's backbones are {', '.join(known)}"


def _is_backbone(path: str | Path, content: Mapping) -> bool:
    """Whether the content of a file has no detector, but perhaps a backbone."""
    try:
        return recognise(weights_of(content)) is None
    except ValueError as error:
        raise DataError(f"can't use the weights {path}: {error}") from error


def _with_norm(settings: Settings, path: str | Path | None, content: Mapping | None) -> Settings:
    """Choose the norm, if the settings leave it open, by the content of the file to start from."""
    if settings.norm or content is None:
        return settings._replace(norm=settings.norm or "BN")
    if _is_backbone(path, content):
        return settings._replace(norm="FrozenBN")
    try:
        return settings._replace(norm=read_description(content, path)[0]["network"]["backbone"]["norm"])
    except (DataError, LookupError, TypeError):  # from before files described their models, or by Detectron2
        return settings._replace(norm="BN")


def _with_input_range(settings: Settings, path: str | Path | None, content: Mapping | None) -> Settings:
    """Take the input range, if the settings leave it open, from the file to start from."""
    chosen = check_input_range(settings.input_range)
    if chosen is None and content is not None:
        with contextlib.suppress(DataError):  # from before files described their models, or weights of a backbone
            chosen = read_description(content, path)[2].input_range
    return settings._replace(input_range=chosen)


def _start(
    settings: Settings, names: list[str], path: str | Path | None, content: Mapping | None, parts: str
) -> Detector:
    """A detector to train, with random weights or those of a file, compiled if `settings` ask for it."""
    detector = build(settings, names)
    if content is not None:
        wishes = {"classes": names, "class_rows": "name", "parts": parts}
        print(f"weights: {load_weights(detector, content, name=str(path), **wishes)}")
    if settings.compile:
        compile_network(detector.network)
    return detector


def _load(network: nn.Module, path: str | Path, checkpoint: Mapping, names: list[str]) -> None:
    """Load weights that `save` wrote; norms may be frozen in one of file and network, which changes their counters."""
    counters = {key: value for key, value in network.state_dict().items() if key.endswith(_COUNTER)}
    try:
        theirs = {k: v for k, v in checkpoint["model"].items() if not k.endswith(_COUNTER) or k in counters}
        network.load_state_dict({**counters, **theirs})
    except Exception as error:  # a foreign file can raise anything
        raise DataError(f"can't use the weights {path}: {str(error)[:500]}") from error
    if checkpoint.get("names") != names:
        raise DataError(f"{path} was trained for the classes {checkpoint.get('names')}, the data has {names}")


def _load_data(data: CocoImages, settings: Settings, **options: Any) -> DataLoader:
    """Batches of `data`, see `collate`."""
    return DataLoader(data, collate_fn=collate, num_workers=settings.workers, **options)


def _freeze_stem(backbone: nn.Module) -> None:
    """Freeze the first convolution, if there is one."""
    first = next((module for module in backbone.modules() if isinstance(module, nn.Conv2d)), nn.Identity())
    first.requires_grad_(False)


def _parameter_groups(detector: Detector, settings: Settings) -> list[dict]:
    """What the optimizer trains, and how fast, see `Settings.norm`."""
    backbone = detector.network.neck.backbone
    if settings.norm == "FrozenBN":
        _freeze_stem(backbone)
    slow = dict.fromkeys(backbone.parameters())
    others = [p for p in detector.parameters() if p.requires_grad and p not in slow]
    trained = [p for p in slow if p.requires_grad]
    return [{"params": others}, {"params": trained, "lr": settings.lr * (0.1 if settings.norm == "FrozenBN" else 1)}]


def _check_data(data: CocoImages, val: CocoImages) -> None:
    """Raise a DataError if classes differ, or there is nothing to learn; warn if there is no AP to expect."""
    if data.names != val.names:
        raise DataError(f"training and validation data differ in their classes: {data.names}, {val.names}")
    if data.problem:
        raise DataError(f"nothing to learn: {data.problem}")
    if val.problem:
        _warn(f"AP will be undefined: {val.problem}")


def _print_summary(data: CocoImages) -> None:
    """Print what the training data holds."""
    empty = sum(not objects for objects in data.objects.values())
    names = [printable(name) for name in data.names]
    print(f"{len(data)} images, {empty} without objects, {data.dropped} boxes of no size dropped; {names}")


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
        tqdm.write(f"warning: {printable(message, None)}")


def _fit(detector: Detector, data: CocoImages, settings: Settings, doubts: Sequence[str] = ()) -> Progress:
    """The training loop -> how it went."""
    detector.train()
    groups = _parameter_groups(detector, settings)
    weights = [p for p in detector.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, weight_decay=1e-4)
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
    metrics = {**average_precision.evaluate(data.data, results), "training_seconds": round(seconds, 3)}
    for name, content in (("results.json", results), ("metrics.json", metrics)):
        write_whole(folder / name, lambda part, content=content: part.write_text(json.dumps(content)))
    print("\n".join(f"{printable(name, 66):>18} {_shown(name, value)}" for name, value in metrics.items()))
    print(f"\nwritten to {folder}")
    return metrics


def _shown(name: str, value: float) -> str:
    """A metric as text: AP in percent."""
    return percent(100 * value) if name.startswith("AP") else f"{value:.1f}"


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

"""Adapters that run other DINO programs from a checkout: the same images, targets and weights as ours.

The checkouts are read where they lie and are not part of this project. Where a checkout's CUDA extension is not built,
its kernels are built aside for a GPU; on a CPU its own fallback in plain PyTorch is used, as its authors wrote it.
"""

import importlib
import runpy
import sys
import types
from argparse import Namespace
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest.mock import MagicMock

import torch
import torchvision
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))

from original import as_extension

from dino.layers import Outputs
from dino.layers.boxes import cxcywh_to_xyxy

NUM_CLASSES = 91  # of the official program's model: the ids of COCO


class Contender(NamedTuple):
    """One program with its model."""

    model: nn.Module
    detect: Callable  # images (B, 3, H, W) normalised -> logits (B, Q, C), boxes (B, Q, 4) of the last layer
    losses: Callable  # images, list of Target -> scalar
    criterion_loss: Callable  # Outputs of this project, list of Target -> scalar: matcher and criterion alone
    stages: dict[str, nn.Module]  # name -> the module that does this part of the work


def recognise(folder: Path) -> str:
    """Which program's checkout lies in a folder: a key of `PROGRAMS`."""
    for name, (_, file) in PROGRAMS.items():
        if (folder / file).exists():
            return name
    sys.exit(f"{folder} is no checkout of IDEA-Research/DINO or IDEA-Research/detrex: neither's files are there")


def official(folder: Path, device: torch.device) -> Contender:
    """IDEA-Research/DINO, R50, 4 scales, with random weights."""
    sys.path.insert(0, str(folder))
    replace_extension(folder, device)
    if device.type == "cpu":
        stay_on_cpu()
    args = {"device": str(device), "backbone_dir": None, **config_of(folder / "config/DINO/DINO_4scale.py")}
    build = importlib.import_module("models.dino.dino").build_dino
    with random_backbone():
        model, criterion, _ = build(Namespace(**args))
    model.to(device)

    def detect(images: Tensor):
        found = model(list(images))
        return found["pred_logits"], found["pred_boxes"]

    def losses(images: Tensor, targets):
        labelled = [t._asdict() for t in targets]
        return weigh(model(list(images), labelled), labelled)

    def criterion_loss(outputs: Outputs, targets):
        return weigh(official_outputs(outputs), [t._asdict() for t in targets])

    def weigh(outputs, labelled):
        found = criterion(outputs, labelled)
        return sum(found[name] * weight for name, weight in criterion.weight_dict.items() if name in found)

    parts = {"backbone": model.backbone, "encoder": model.transformer.encoder, "decoder": model.transformer.decoder}
    return Contender(model, detect, losses, criterion_loss, {**parts, "criterion": criterion})


def official_outputs(outputs: Outputs) -> dict:
    """What the official model would have returned."""
    slots = outputs.denoising.predictions.boxes.shape[2]
    noised = {"pad_size": slots, "num_dn_group": outputs.denoising.num_groups}
    noised["output_known_lbs_bboxes"] = layers(outputs.denoising.predictions)
    (interm,) = each_layer(outputs.proposals)
    return {**layers(outputs.decoder), "interm_outputs": interm, "dn_meta": noised}


def each_layer(predictions) -> list[dict]:
    """Both programs' form of the predictions of each layer."""
    return [{"pred_logits": logits, "pred_boxes": boxes} for logits, boxes in zip(*predictions, strict=True)]


def layers(predictions) -> dict:
    """Both programs' form of the predictions of all layers: the last one, with the earlier ones inside."""
    *earlier, last = each_layer(predictions)
    return {**last, "aux_outputs": earlier}


def detrex(folder: Path, device: torch.device) -> Contender:
    """IDEA-Research/detrex, R50, 4 scales, with random weights; each decoder layer has its own pair of heads.

    Its recipe is taken as it is, but for three things, so that networks and work are the same: 91 classes instead of
    80, images that are normalised already, and the position encoding of its 24-epoch models, which is the official one
    (temperature 20, no offset; the 12-epoch recipe has 10000 and -0.5).
    """
    sys.path.insert(0, str(folder))
    replace_missing("wandb", "einops", "fairscale", "fairscale.nn", "fairscale.nn.checkpoint")
    sys.modules.setdefault("detrex._C", types.ModuleType("detrex._C"))  # else it refuses to build the model
    module = importlib.import_module("detrex.layers.multi_scale_deform_attn")
    if device.type == "cpu":
        stay_on_cpu()
    if device.type == "cuda":
        module._C = extension_of(folder, device, sys.modules["detrex._C"])
    elif not hasattr(sys.modules["detrex._C"], "ms_deform_attn_forward"):
        module.MultiScaleDeformableAttnFunction = plain_function(module.multi_scale_deformable_attn_pytorch)
    model = detrex_model(folder / PROGRAMS["detrex"][1], device)

    def detect(images: Tensor):
        found = []
        model.inference = lambda logits, boxes, sizes: found.extend((logits, boxes)) or []
        model([{"image": image} for image in images])
        return found

    def losses(images: Tensor, targets):
        return sum(model([detrex_input(*pair) for pair in zip(images, targets, strict=True)]).values())

    def criterion_loss(outputs: Outputs, targets):
        noised = {"dn_num": outputs.denoising.num_groups}
        noised["single_padding"] = outputs.denoising.predictions.boxes.shape[2] // noised["dn_num"]
        noised["output_known_lbs_bboxes"] = layers(outputs.denoising.predictions)
        (selected,) = each_layer(outputs.proposals)
        predicted = {**layers(outputs.decoder), "enc_outputs": selected}
        found = model.criterion(predicted, [t._asdict() for t in targets], noised)
        return sum(found[name] * weight for name, weight in model.criterion.weight_dict.items() if name in found)

    parts = {"backbone": model.backbone, "encoder": model.transformer.encoder, "decoder": model.transformer.decoder}
    return Contender(model, detect, losses, criterion_loss, {**parts, "criterion": model.criterion})


def detrex_model(recipe: Path, device: torch.device) -> nn.Module:
    """The network of a recipe of detrex, with what `detrex` says of it."""
    from detectron2.config import LazyConfig, instantiate  # here, because the official program does without

    config = LazyConfig.load(str(recipe)).model
    config.num_classes, config.device = NUM_CLASSES, str(device)
    config.pixel_mean, config.pixel_std = [0.0] * 3, [1.0] * 3
    config.position_embedding.temperature, config.position_embedding.offset = 20, 0.0
    return instantiate(config).to(device)


def detrex_input(image: Tensor, target) -> dict:
    """One image with its objects, as Detectron2 hands them over."""
    from detectron2.structures import Boxes, Instances

    height, width = image.shape[1:]
    boxes = cxcywh_to_xyxy(target.boxes) * target.boxes.new_tensor([width, height, width, height])
    return {"image": image, "instances": Instances((height, width), gt_boxes=Boxes(boxes), gt_classes=target.labels)}


def replace_missing(*names: str) -> None:
    """Stand-ins for modules that a program imports, but needs for other work only, where they are not installed."""
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError:
            sys.modules[name] = MagicMock()


def stay_on_cpu() -> None:
    """Both programs move some of what they make to a GPU in any case."""
    move = Tensor.to

    def to(self, *args, **kwargs):
        return self if args == ("cuda",) else move(self, *args, **kwargs)

    Tensor.to, Tensor.cuda = to, lambda self: self


@contextmanager
def random_backbone():
    """torchvision's ResNet-50 from random weights, whatever is asked for: nothing is downloaded."""
    resnet50 = torchvision.models.resnet50

    def build(*, pretrained, **arguments):
        return resnet50(weights=None, **arguments)

    torchvision.models.resnet50 = build
    try:
        yield
    finally:
        torchvision.models.resnet50 = resnet50


def config_of(path: Path) -> dict:
    """The values of a config file of the official program and of those it builds upon."""
    values = runpy.run_path(str(path))
    found: dict = {}
    for base in values.get("_base_", []):
        found |= config_of(path.parent / base)
    return found | {key: value for key, value in values.items() if not key.startswith("_")}


def extension_of(folder: Path, device: torch.device, extension):
    """The extension of a program if it is built, else one made of the kernels in its checkout."""
    return extension if hasattr(extension, "ms_deform_attn_forward") else as_extension(folder, device)


def replace_extension(folder: Path, device: torch.device) -> None:
    """Where the official extension is not built: its kernels, built aside, for a GPU; for a CPU the plain PyTorch."""
    name = "MultiScaleDeformableAttention"
    try:
        extension = importlib.import_module(name)
    except ImportError:
        extension = types.ModuleType(name)
    sys.modules[name] = extension
    if device.type == "cuda":
        sys.modules[name] = extension_of(folder, device, extension)
        return
    functions = importlib.import_module("models.dino.ops.functions")
    plain = importlib.import_module("models.dino.ops.functions.ms_deform_attn_func").ms_deform_attn_core_pytorch
    module = importlib.import_module("models.dino.ops.modules.ms_deform_attn")

    functions.MSDeformAttnFunction = module.MSDeformAttnFunction = plain_function(plain)


def plain_function(form: Callable) -> type:
    """Stands for the autograd function of a compiled operator, and calls the form in plain PyTorch beside it."""

    class Plain:
        @staticmethod
        def apply(value, shapes, starts, locations, weights, step):
            return form(value, shapes, locations, weights)

    return Plain


# name -> (its adapter, a file that no other program has)
PROGRAMS = {
    "official": (official, "models/dino/dino.py"),
    "detrex": (detrex, "projects/dino/configs/models/dino_r50.py"),
}

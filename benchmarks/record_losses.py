"""Records losses, gradients, costs and pairs of published descendants of DINO, for the tests of this project's parts.

    python benchmarks/record_losses.py --align-detr FOLDER --stable-dino FOLDER --relation-detr FOLDER --deim FOLDER

Each FOLDER is a checkout of FelixCaae/AlignDETR, IDEA-Research/Stable-DINO, xiuqhou/Relation-DETR or
Intellindust-AI-Lab/DEIM. Their code runs unchanged, on the CPU, on small random inputs; none of it is copied.
`tests/descendants/README.md` says what each array is.
"""

import argparse
import importlib
import sys
from collections.abc import Callable
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torchvision import ops

sys.path.insert(0, str(Path(__file__).parent))

from others import each_layer, stay_on_cpu
from recording import (
    Arrays,
    Draw,
    Inputs,
    gradients,
    input_arrays,
    loss_arrays,
    one_process,
    pair_array,
    published_form,
    recorded,
    save,
    stand_in,
    stand_in_detrex,
)

FOLDER = Path(__file__).parents[1] / "tests/descendants"
COSTS = {"cost_class": 2.0, "cost_bbox": 5.0, "cost_giou": 2.0}  # of all these programs
NUM_CLASSES = 4
SMALL = {"num_classes": NUM_CLASSES, "num_layers": 2, "num_queries": 20, "groups": 1}
INPUTS = {  # an image of "crowded" has more than Q / 4 objects, one of "overfull" more than Q / 2
    "normal": Draw(1, [3, 5, 1], num_classes=NUM_CLASSES, num_layers=6, num_queries=20, groups=2),
    "empty": Draw(2, [2, 0, 3], **SMALL),
    "crowded": Draw(3, [7, 2], **SMALL),
    "overfull": Draw(4, [11, 2], **SMALL),
    "distinct": Draw(5, [4], labels=[2, 0, 3, 1], **SMALL),
}

Runs = dict[str, tuple[str, Callable]]  # case -> (name of its inputs, Inputs -> Arrays)
Pairs = list[tuple[Tensor, Tensor]]  # for each image: queries, objects


class Apart(nn.Module):
    """Calls a published matcher for each image alone, with one class column for each object.

    So neither the other images of a batch nor other objects of the same class can change the costs of a pair.
    """

    def __init__(self, matcher: nn.Module):
        super().__init__()
        self.matcher = matcher

    def forward(self, outputs: dict, targets: list[dict], *arguments):
        return [self.one(outputs, image, target, arguments) for image, target in enumerate(targets)]

    def one(self, outputs: dict, image: int, target: dict, arguments: tuple):
        count = len(target["labels"])
        if not count:
            return [torch.zeros(0, dtype=torch.int64)] * 2
        own = {"pred_logits": outputs["pred_logits"][image : image + 1, :, target["labels"]]}
        own["pred_boxes"] = outputs["pred_boxes"][image : image + 1]
        return self.matcher(own, [{"labels": torch.arange(count), "boxes": target["boxes"]}], *arguments)[0]


class Witness:
    """Keeps what a matcher returns, and the costs that it gives to SciPy, of every call.

    Args:
        matcher: is called for the last layer, then for the earlier ones, then for the proposals.
        module: where the matcher finds `linear_sum_assignment`.
    """

    def __init__(self, matcher: nn.Module, module):
        self.found: list[Pairs] = []
        self.given: list[list[np.ndarray]] = []
        matcher.register_forward_pre_hook(lambda *_: self.given.append([]))
        matcher.register_forward_hook(lambda _, arguments, found: self.found.append(found))
        module.linear_sum_assignment = self.assign

    def assign(self, cost):
        self.given[-1].append(np.asarray(cost))
        return linear_sum_assignment(cost)

    def pairs(self) -> np.ndarray:
        return pair_array(in_order(self.found))

    def costs(self) -> np.ndarray:
        """(N + 1, Q, objects of all images) float32, where the matcher pairs an object once."""
        return np.stack([np.concatenate(images, 1) for images in in_order(self.given)]).astype(np.float32)


def in_order(calls: list) -> list:
    """Calls of a matcher -> the decoder layers in their order, then the proposals."""
    last, *earlier, proposals = calls
    return [*earlier, last, proposals]


def run_criterion(criterion: nn.Module, inputs: Inputs) -> Arrays:
    """Weighted losses of a criterion of detrex's kind, and gradients of their sum with respect to the inputs."""
    outputs, noised = published_form(inputs.outputs)
    found = criterion(outputs, [target._asdict() for target in inputs.targets], noised)
    weighted = {name: value.sum() * criterion.weight_dict[name] for name, value in found.items()}
    sum(weighted.values()).backward()
    named = {name.replace("class", "ce").replace("enc", "interm"): value for name, value in weighted.items()}
    return loss_arrays(named) | gradients(inputs)


def weights(classes: float, denoised_classes: float) -> dict[str, float]:
    """Weights of losses; the recipes of both programs repeat them for the encoder and the earlier layers."""
    base = {"loss_class": classes, "loss_bbox": 5.0, "loss_giou": 2.0}
    base |= {"loss_class_dn": denoised_classes, "loss_bbox_dn": 5.0, "loss_giou_dn": 2.0}
    suffixes = ["", "_enc", *(f"_{layer}" for layer in range(5))]
    return {name + suffix: weight for name, weight in base.items() for suffix in suffixes}


def fixed_pairs(inputs: Inputs, copies: int) -> Pairs:
    """For each image: object g with the queries g, G + g, ..., which `Draw` puts near it; sorted by object."""
    counts = [len(target.labels) for target in inputs.targets]
    objects = [torch.arange(count).repeat_interleave(copies) for count in counts]
    return [(g + torch.arange(copies).repeat(count) * count, g) for g, count in zip(objects, counts, strict=True)]


def matched(outputs: dict, targets: list[dict], pairs: Pairs):
    """Pairs -> images, queries and labels (K,) of positives, then their predicted and true boxes (K, 4)."""
    images = torch.cat([torch.full_like(query, image) for image, (query, _) in enumerate(pairs)])
    queries = torch.cat([query for query, _ in pairs])
    labels, true = (
        torch.cat([target[key][found] for target, (_, found) in zip(targets, pairs, strict=True)])
        for key in ("labels", "boxes")
    )
    return (images, queries, labels), outputs["pred_boxes"][images, queries], true


def run_class_loss(loss: Callable, pairwise_iou: Callable, copies: int, inputs: Inputs) -> Arrays:
    """A class loss alone, of the last decoder layer, with fixed pairs.

    Args:
        loss: (outputs, targets, pairs, number of objects) -> scalar.
        pairwise_iou: of the program: cxcywh (K, 4), (K, 4) -> (K, K).
        copies: queries of each object.
        inputs: leaves.
    """
    pairs = fixed_pairs(inputs, copies)
    outputs = each_layer(inputs.outputs.decoder)[-1]
    targets = [target._asdict() for target in inputs.targets]
    value = loss(outputs, targets, pairs, sum(len(target["labels"]) for target in targets))
    (gradient,) = torch.autograd.grad(value, inputs.outputs.decoder.logits)
    (images, queries, _), boxes, true = matched(outputs, targets, pairs)
    iou = pairwise_iou(boxes, true).diag().detach().numpy()[np.lexsort((queries, images))]
    arrays = {"loss": value.detach().double().numpy(), "logits_grad": gradient[-1].numpy().astype(np.float32)}
    return arrays | {"pairs": pair_array([pairs]), "iou": iou.astype(np.float64)}


def detrex_iou(boxes: Tensor, true: Tensor) -> Tensor:
    functions = sys.modules["detrex.layers"]
    return functions.box_iou(*map(functions.box_cxcywh_to_xyxy, (boxes, true)))[0]


def align_detr(folder: Path) -> Runs:
    """The criterion with k = 2, as the recipe of 12 epochs, and with k = 1; IA-BCE alone."""
    stand_in("aligndetr", folder / "aligndetr")
    matchers = importlib.import_module("aligndetr.matchers.mixed_matcher")
    build = importlib.import_module("aligndetr.criterions").AlignDETRCriterion
    ia_bce = importlib.import_module("aligndetr.losses.losses").IA_BCE_loss

    def criterion(copies: int, wrap: Callable, inputs: Inputs) -> Arrays:
        matcher = wrap(matchers.MixedMatcher(**COSTS, alpha=0.25, gamma=2.0))
        copied = [copies] * len(inputs.outputs.decoder.logits) + [1]  # the proposals, then the layers
        made = build(NUM_CLASSES, matcher, weights(1.0, 1.0), match_num=copied, gamma=2.0, alpha=0.25, tau=1.5)
        witness = Witness(matcher, matchers)
        return run_criterion(made, inputs) | {"pairs": witness.pairs()}

    def alone(rank_weights, outputs, targets, pairs, count):
        positives, boxes, true = matched(outputs, targets, pairs)
        return ia_bce(outputs["pred_logits"], positives, boxes, true, pairs, count, 0.25, 2.0, rank_weights)[0]

    crowds = ("crowded", "overfull")
    by_rank = torch.exp(-torch.arange(2) / 1.5)
    return {
        "k2": ("normal", partial(criterion, 2, unchanged)),
        "k1": ("normal", without("dn_*", partial(criterion, 1, unchanged))),
        "empty": ("empty", partial(criterion, 2, unchanged)),
        **{name: (name, without("*_grad", partial(criterion, 2, unchanged))) for name in crowds},
        **{f"{name}_apart": (name, without("*_grad", partial(criterion, 2, Apart))) for name in crowds},
        "ia_bce": ("normal", partial(run_class_loss, partial(alone, 1), detrex_iou, 1)),
        "ia_bce_k2": ("normal", partial(run_class_loss, partial(alone, by_rank), detrex_iou, 2)),
    }


def without(pattern: str, run: Callable) -> Callable:
    """Leave out the arrays whose names match a pattern, to keep the files small."""

    def shorter(inputs: Inputs) -> Arrays:
        return {name: array for name, array in run(inputs).items() if not fnmatch(name, pattern)}

    return shorter


def unchanged(matcher: nn.Module) -> nn.Module:
    return matcher


def stable_dino(folder: Path) -> Runs:
    """The criterion with the costs of a batch and of images alone; the class loss alone."""
    stand_in("stabledino", folder / "projects/stabledino/modeling")
    matchers = importlib.import_module("stabledino.matcher")
    build = importlib.import_module("stabledino.dn_criterion").StableDINOCriterion

    def criterion(wrap: Callable) -> nn.Module:
        matcher = wrap(matchers.StableDINOHungarianMatcher(**COSTS, alpha=0.25, gamma=2.0, cec_beta=0.5))
        return build(NUM_CLASSES, matcher, weights(6.0, 1.0), alpha=0.25, gamma=2.0, ta_alpha=0.0, ta_beta=2.0)

    def whole(wrap: Callable, inputs: Inputs) -> Arrays:
        made = criterion(wrap)
        witness = Witness(made.matcher, matchers)
        return run_criterion(made, inputs) | {"pairs": witness.pairs(), "costs": witness.costs()}

    def alone(*arguments):
        return criterion(unchanged).loss_labels_stabledino(*arguments)["loss_class"]

    return {
        "batch": ("normal", partial(whole, unchanged)),
        "apart": ("normal", without("dn_*", partial(whole, Apart))),
        "distinct": ("distinct", partial(whole, unchanged)),
        "empty_apart": ("empty", partial(whole, Apart)),
        "class_loss": ("normal", partial(run_class_loss, alone, detrex_iou, 1)),
    }


def exact_iou(boxes: Tensor, true: Tensor) -> Tensor:
    """Of torchvision, as the two programs below: no 1e-6 is added to the union."""
    return ops.box_iou(*(ops.box_convert(x, "cxcywh", "xyxy") for x in (boxes, true)))


def relation_detr(folder: Path) -> Runs:
    """Its class losses alone; its matcher, which pairs an object `copies` times."""
    for name in ("models", "util"):
        stand_in(name, folder / name)
    stand_in("util.utils", **one_process())
    losses = importlib.import_module("models.bricks.losses")
    matchers = importlib.import_module("models.matcher.hungarian_matcher")
    build = importlib.import_module("models.bricks.set_criterion").HybridSetCriterion

    def hybrid(outputs, targets, pairs, count):
        criterion = build(NUM_CLASSES, matcher=None, weight_dict={}, alpha=0.25, gamma=2.0)
        return criterion.loss_labels(outputs, targets, count, pairs)["loss_class"]

    def function(loss: Callable, outputs, targets, pairs, count):
        positives, boxes, true = matched(outputs, targets, pairs)
        logits = outputs["pred_logits"]
        one_hot = torch.zeros_like(logits).index_put(positives, logits.new_ones(()))
        score = logits.new_zeros(logits.shape[:2]).index_put(positives[:2], exact_iou(boxes, true).diag().detach())
        return loss(logits, one_hot, score, count) * logits.shape[1]

    def match(copies: int, inputs: Inputs) -> Arrays:
        matcher = matchers.HungarianMatcher(**COSTS, focal_alpha=0.25, focal_gamma=2.0, mixed_match=True)
        predictions = [x[-1].detach() for x in inputs.outputs.decoder[::-1]]  # boxes, logits
        cases = [(*both, t.boxes, t.labels) for *both, t in zip(*predictions, inputs.targets, strict=True)]
        costs = np.concatenate([matcher.calculate_cost(*case).numpy() for case in cases], 1)
        return {"pairs": pair_array([[matcher(*case, copies) for case in cases]]), "costs": costs.astype(np.float32)}

    alone = {"hybrid": hybrid}
    for name in ("vari_sigmoid_focal_loss", "ia_bce_loss"):
        alone[name] = partial(function, getattr(losses, name))
    runs = {name: ("normal", partial(run_class_loss, loss, exact_iou, 1)) for name, loss in alone.items()}
    return runs | {f"matcher_k{copies}": ("normal", partial(match, copies)) for copies in (1, 2, 6)}


def deim(folder: Path) -> Runs:
    """The class losses of its criterion alone."""
    stand_in("engine", folder / "engine")
    stand_in("engine.core", register=lambda: unchanged)
    stand_in("engine.misc")
    stand_in("engine.misc.dist_utils", **one_process())
    stand_in("engine.deim", folder / "engine/deim")
    build = importlib.import_module("engine.deim.deim_criterion").DEIMCriterion

    def alone(loss: str, options: dict, *arguments):
        criterion = build(matcher=None, weight_dict={}, losses=[], num_classes=NUM_CLASSES, **options)
        return criterion.get_loss(loss, *arguments)[f"loss_{loss}"]

    losses = {
        "mal": ("mal", {"gamma": 1.5}),
        "mal_alpha": ("mal", {"gamma": 1.5, "mal_alpha": 0.5}),
        "vfl": ("vfl", {"gamma": 2.0, "alpha": 0.75}),
    }
    return {
        name: ("normal", partial(run_class_loss, partial(alone, *loss), exact_iou, 1)) for name, loss in losses.items()
    }


PROGRAMS = {"align_detr": align_detr, "stable_dino": stable_dino, "relation_detr": relation_detr, "deim": deim}


def record(name: str, runs: Runs, inputs: dict[str, Inputs]) -> dict[str, Arrays]:
    """All cases of a program, each with the name of its inputs."""
    return {
        case: recorded(f"{name} {case}", run, inputs[own]) | {"inputs": np.array(own)}
        for case, (own, run) in runs.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in PROGRAMS:
        parser.add_argument(f"--{name.replace('_', '-')}", type=Path, required=True, metavar="FOLDER")
    parser.add_argument(
        "--output", type=Path, default=FOLDER, metavar="FOLDER", help="of the *.npz (default: %(default)s)"
    )
    options = vars(parser.parse_args())
    torch.set_num_threads(1)
    stay_on_cpu()
    stand_in_detrex(options["stable_dino"] / "projects/stabledino/utils/box_ops.py")
    inputs = {name: draw.inputs() for name, draw in INPUTS.items()}
    save(options["output"] / "inputs.npz", {name: input_arrays(one) for name, one in inputs.items()})
    for name, runs in PROGRAMS.items():
        save(options["output"] / f"{name}.npz", record(name, runs(options[name]), inputs))


if __name__ == "__main__":
    main()

"""What the recorders of published programs share: stand-ins for absent modules, random inputs, files of arrays.

Inputs are rounded to float16 before use, so that a file holds them exactly in half the bytes. Results are computed in
float64 and stored as float32 (arrays) or float64 (losses).
"""

import importlib
import sys
import types
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))

from others import each_layer, layers

from dino.structures import DenoisingOutputs, LayerOutputs, Outputs, Target

Arrays = dict[str, np.ndarray]


class Inputs(NamedTuple):
    """One batch: what a network returned, and the objects of its images."""

    outputs: Outputs
    targets: list[Target]


def stand_in(name: str, folder: Path | None = None, **values) -> types.ModuleType:
    """Put a module of this name in the place of one that is not installed, or whose `__init__` imports too much.

    Args:
        name: full name; the modules above it must exist.
        folder: where the modules below it lie; None where it has none.
        values: what it holds.
    """
    module = types.ModuleType(name)
    module.__path__ = [str(folder)] if folder else []
    module.__dict__.update(values)
    sys.modules[name] = module
    above, _, last = name.rpartition(".")
    if above:
        setattr(sys.modules[above], last, module)
    return module


def one_process() -> dict:
    """The functions that published programs ask for the number of processes, under all of their names."""
    alone = {name: lambda: False for name in ("is_dist_avail_and_initialized", "is_dist_available_and_initialized")}
    return {**alone, "get_world_size": lambda: 1}


def stand_in_detrex(boxes: Path) -> None:
    """What criteria and matchers import from detrex.

    Args:
        boxes: a published file with detrex's functions of boxes, whose denominators have the same 1e-6.
    """
    stand_in("_boxes", boxes.parent)
    functions = importlib.import_module(f"_boxes.{boxes.stem}")
    stand_in("detrex")
    stand_in("detrex.layers", **vars(functions))
    sys.modules["detrex.layers.box_ops"] = functions
    stand_in("detrex.utils", **one_process())
    stand_in("detrex.modeling")
    stand_in("detrex.modeling.criterion", SetCriterion=DetrexCriterion)


class DetrexCriterion(nn.Module):
    """Keeps what detrex's SetCriterion keeps; the losses are those of the class that inherits it."""

    def __init__(self, num_classes, matcher, weight_dict, losses, eos_coef, loss_class_type, alpha, gamma):
        super().__init__()
        self.num_classes, self.matcher, self.weight_dict, self.losses = num_classes, matcher, weight_dict, losses
        self.eos_coef, self.loss_class_type, self.alpha, self.gamma = eos_coef, loss_class_type, alpha, gamma

    def _get_src_permutation_idx(self, indices):
        images = torch.cat([torch.full_like(query, image) for image, (query, _) in enumerate(indices)])
        return images, torch.cat([query for query, _ in indices])


def rounded(values: np.ndarray) -> Tensor:
    """Float64 values that float16 holds exactly."""
    return torch.from_numpy(values.astype(np.float16).astype(np.float64))


class Draw:
    """Draws random inputs. Every object has predictions near it, so that IoUs of pairs are not all 0.

    Args:
        seed: of all numbers.
        counts: objects of each image.
        labels: of the objects, image after image; None: random.
        num_layers, num_queries, num_classes: of the decoder.
        groups: of denoising queries.
    """

    def __init__(self, seed, counts, *, labels=None, num_layers=6, num_queries=30, num_classes=5, groups=2):
        self.random = np.random.default_rng(seed)
        drawn = self.random.integers(0, num_classes, sum(counts))
        labels = torch.from_numpy(drawn if labels is None else np.array(labels)).split(counts)
        self.targets = [Target(own, self.boxes(len(own))) for own in labels]
        self.num_layers, self.num_queries, self.num_classes, self.groups = num_layers, num_queries, num_classes, groups

    def inputs(self) -> Inputs:
        longest = max(len(target.labels) for target in self.targets)
        decoder = self.predictions(self.num_layers, self.num_queries, self.num_queries // 2)
        proposals = self.predictions(1, self.num_queries, self.num_queries // 2)
        group = [self.predictions(self.num_layers, 2 * longest, longest) for _ in range(self.groups)]
        denoising = LayerOutputs(*(torch.cat(parts, 2) for parts in zip(*group, strict=True)))
        return Inputs(Outputs(decoder, proposals, DenoisingOutputs(denoising, self.targets, self.groups)), self.targets)

    def boxes(self, count: int) -> Tensor:
        """(count, 4) cxcywh."""
        center = self.random.uniform(0.3, 0.7, (count, 2))
        return rounded(np.concatenate([center, self.random.uniform(0.15, 0.5, (count, 2))], 1))

    def predictions(self, num_layers: int, num_queries: int, near: int) -> LayerOutputs:
        """The first `near` queries lie near the objects: query q near object q modulo their number."""
        logits = self.random.normal(-1, 1.5, (num_layers, len(self.targets), num_queries, self.num_classes))
        boxes = self.boxes(num_layers * len(self.targets) * num_queries).numpy()
        boxes = boxes.reshape(num_layers, len(self.targets), num_queries, 4)
        for image, target in enumerate(self.targets):
            if len(target.labels):
                true = target.boxes.numpy()[np.arange(near) % len(target.labels)]
                center = true[:, :2] + self.random.normal(0, 0.03, (num_layers, near, 2))
                size = true[:, 2:] * np.exp(self.random.normal(0, 0.2, (num_layers, near, 2)))
                boxes[:, image, :near] = np.concatenate([center, size], -1)
        return LayerOutputs(rounded(logits), rounded(boxes))


SETS = ("", "proposal_", "dn_")  # prefixes of the arrays of the decoder, the proposals and the denoising queries


def sets_of(outputs: Outputs) -> dict[str, LayerOutputs]:
    """Prefix of the arrays -> the predictions."""
    return dict(zip(SETS, (outputs.decoder, outputs.proposals, outputs.denoising.predictions), strict=True))


def leaves(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """The same numbers as tensors that collect gradients."""

    def of(predictions: LayerOutputs) -> LayerOutputs:
        return LayerOutputs(*(x.to(dtype).clone().requires_grad_() for x in predictions))

    decoder, proposals, denoising = inputs.outputs
    targets = [Target(labels.clone(), boxes.to(dtype)) for labels, boxes in inputs.targets]
    noised = DenoisingOutputs(of(denoising.predictions), targets, denoising.num_groups)
    return Inputs(Outputs(of(decoder), of(proposals), noised), targets)


def input_arrays(inputs: Inputs) -> Arrays:
    """The arrays from which `tests/descendants/recorded.py` builds the inputs again."""
    arrays = {}
    for prefix, (logits, boxes) in sets_of(inputs.outputs).items():
        arrays |= {f"{prefix}logits": logits.numpy().astype(np.float16)}
        arrays |= {f"{prefix}boxes": boxes.numpy().astype(np.float16)}
    labels, boxes = (torch.cat(parts) for parts in zip(*inputs.targets, strict=True))
    arrays["counts"] = np.array([len(target.labels) for target in inputs.targets], np.int16)
    arrays["true_labels"], arrays["true_boxes"] = labels.numpy().astype(np.int16), boxes.numpy().astype(np.float16)
    return arrays | {"dn_groups": np.array(inputs.outputs.denoising.num_groups, np.int16)}


def gradients(inputs: Inputs) -> Arrays:
    """Gradients of the leaves; 0 where a leaf has none."""
    return {
        f"{prefix}{name}_grad": (torch.zeros_like(x) if x.grad is None else x.grad).numpy().astype(np.float32)
        for prefix, predictions in sets_of(inputs.outputs).items()
        for name, x in predictions._asdict().items()
    }


def published_form(outputs: Outputs) -> tuple[dict, dict]:
    """-> the dict that detrex's criteria take as outputs, and the one about denoising."""
    (proposals,) = each_layer(outputs.proposals)
    predictions, _, groups = outputs.denoising
    noised = {"dn_num": groups, "single_padding": predictions.boxes.shape[2] // groups}
    noised["output_known_lbs_bboxes"] = layers(predictions)
    return {**layers(outputs.decoder), "enc_outputs": proposals}, noised


def loss_arrays(losses: dict[str, Tensor]) -> Arrays:
    """Losses in one array, and their names in another, sorted."""
    names = sorted(losses)
    return {"loss_names": np.array(names), "losses": np.array([losses[n].item() for n in names], np.float64)}


def pair_array(matchings: list) -> np.ndarray:
    """Pairs (queries, objects) for each layer, for each image -> (K, 4) rows layer, image, query, object, sorted."""
    rows = [
        (layer, image, int(query), int(found))
        for layer, images in enumerate(matchings)
        for image, pair in enumerate(images)
        for query, found in zip(*pair, strict=True)
    ]
    return np.array(sorted(rows), np.int16).reshape(-1, 4)


def difference(arrays: Arrays, others: Arrays) -> float:
    """The largest difference of two runs, each array relative to its own largest magnitude."""
    floats = [name for name, x in arrays.items() if x.dtype.kind == "f" and x.size]
    return max(np.abs(arrays[n] - others[n]).max() / max(np.abs(arrays[n]).max(), 1e-30) for n in floats)


def recorded(name: str, run, inputs: Inputs) -> Arrays:
    """Run in float64, and in float32 to see that the same pairs come.

    Args:
        name: for the line that is printed.
        run: Inputs -> arrays.
        inputs: in any dtype.
    """
    truth, single = (run(leaves(inputs, dtype)) for dtype in (torch.float64, torch.float32))
    assert np.array_equal(truth.get("pairs"), single.get("pairs")), f"{name}: rounding decides about pairs"
    print(f"{name}: float32 differs by {difference(truth, single):.1e}")
    return truth


def save(file: Path, cases: dict[str, Arrays]) -> None:
    """Write `case/name` arrays; the bytes depend on the arrays alone."""
    file.parent.mkdir(parents=True, exist_ok=True)
    flat = {f"{case}/{name}": array for case, arrays in cases.items() for name, array in arrays.items()}
    np.savez_compressed(file, allow_pickle=False, **flat)
    print(f"{file}: {file.stat().st_size / 1000:.0f} kB")

"""The numbers that published descendants of DINO computed; `README.md` beside this file says what each array is."""

from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dino.layers.matcher import Pairs
from dino.structures import DenoisingOutputs, LayerOutputs, Outputs, Target

FOLDER = Path(__file__).parent


@cache
def _file(name: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / f"{name}.npz") as arrays:
        return dict(arrays)


def _case(file: str, case: str) -> dict[str, np.ndarray]:
    """The arrays of one case, without its name in front of theirs."""
    found = {key.removeprefix(f"{case}/"): x for key, x in _file(file).items() if key.startswith(f"{case}/")}
    if not found:
        raise KeyError(f"{file}.npz has no case {case!r}")
    return found


def _tensor(array: np.ndarray) -> Tensor:
    """Integers become int64, inputs (stored as float16) float32; results keep their dtype."""
    wider = {"int16": np.int64, "float16": np.float32}
    return torch.from_numpy(array.astype(wider.get(array.dtype.name, array.dtype)))


def load(case: str) -> dict[str, Tensor]:
    """Load a case with its inputs; each loss stands under its own name.

    Args:
        case: file and case, such as "align_detr/k2".
    """
    arrays = _case(*case.split("/"))
    arrays |= _case("inputs", str(arrays.pop("inputs")))
    losses = zip(arrays.pop("loss_names", ()), arrays.pop("losses", ()), strict=True)
    return {name: _tensor(x) for name, x in arrays.items()} | {str(k): torch.tensor(v) for k, v in losses}


def load_wide(case: str) -> dict[str, Tensor]:
    """As `load`, all real numbers in float64, in which everything was computed."""
    return {name: x.double() if x.is_floating_point() else x for name, x in load(case).items()}


def inputs_of(arrays: dict[str, Tensor]) -> tuple[Outputs, list[Target]]:
    """The network's outputs, which collect gradients, and the objects of each image."""

    def predictions(prefix: str) -> LayerOutputs:
        return LayerOutputs(*(arrays[prefix + name].clone().requires_grad_() for name in ("logits", "boxes")))

    counts = arrays["counts"].tolist()
    parts = (arrays[name].split(counts) for name in ("true_labels", "true_boxes"))
    targets = [Target(*pair) for pair in zip(*parts, strict=True)]
    denoising = DenoisingOutputs(predictions("dn_"), targets, arrays["dn_groups"].item())
    return Outputs(predictions(""), predictions("proposal_"), denoising), targets


def pairs_of(arrays: dict[str, Tensor], num_layers: int) -> Pairs:
    """The pairs of each layer and image as a matcher returns them, sorted by query."""
    images = len(arrays["counts"])
    table = arrays["pairs"].numpy()
    own = [[table[(table[:, :2] == (n, b)).all(1)] for b in range(images)] for n in range(num_layers)]
    return [[(rows[:, 2], rows[:, 3]) for rows in layer] for layer in own]


def losses_of(arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weighted losses of a whole criterion."""
    return {name: value for name, value in arrays.items() if name.startswith("loss_")}


def gradients_of(outputs: Outputs) -> dict[str, Tensor]:
    """The gradients that `inputs_of` outputs have collected, under the names of the recorded ones."""
    sets = {"": outputs.decoder, "proposal_": outputs.proposals, "dn_": outputs.denoising.predictions}
    return {f"{prefix}{name}_grad": x.grad for prefix, both in sets.items() for name, x in both._asdict().items()}

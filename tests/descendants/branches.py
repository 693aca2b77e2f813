"""The recorded decoders and groups of queries; `README_branches.md` says what each array is."""

from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dino.structures import LayerOutputs, Target, Tokens

FOLDER = Path(__file__).parent


@cache
def arrays(group: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / f"branches_{group}.npz") as found:
        return dict(found)


def load(place: str) -> dict[str, Tensor]:
    """Arrays below a place such as "dac/criterion", under the rest of their names; float64, int64 and bool."""
    wide = {"f": np.float64, "i": np.int64, "b": np.bool_}
    found = {
        name.removeprefix(f"{place}/"): torch.from_numpy(x.astype(wide[x.dtype.kind]))
        for name, x in arrays(place.split("/")[0]).items()
        if name.startswith(f"{place}/") and x.dtype.kind in wide
    }
    if not found:
        raise KeyError(place)
    return found


def targets_of(values: dict[str, Tensor]) -> list[Target]:
    """The objects of each image."""
    count = sum(name.endswith("/labels") for name in values)
    return [Target(*(values[f"targets/image_{i}/{part}"] for part in ("labels", "boxes"))) for i in range(count)]


def predictions_of(values: dict[str, Tensor], name: str) -> LayerOutputs:
    """Recorded predictions, which collect gradients."""
    return LayerOutputs(
        *(values[f"predictions/{name}/{part}"].clone().requires_grad_() for part in ("logits", "boxes"))
    )


def losses_of(place: str) -> dict[str, Tensor]:
    """The weighted losses of a recorded criterion under their public names."""
    found = arrays(place.split("/")[0])
    names, values, weights = (found[f"{place}/losses/{part}"] for part in ("names", "values", "weights"))
    return {str(name): torch.tensor(float(x) * float(w)) for name, x, w in zip(names, values, weights, strict=True)}


def pairs_of(rows: Tensor, images: int) -> list[list[tuple[int, int]]]:
    """Rows (image, query, object) -> the sorted pairs of each image."""
    return [sorted((q, t) for b, q, t in rows.tolist() if b == image) for image in range(images)]


def memory_of(values: dict[str, Tensor], features: Tensor) -> Tokens:
    """Tokens with these features on the recorded pyramid; no position."""
    shapes = [tuple(shape) for shape in values["shapes"].tolist()]
    sizes = torch.tensor([(w, h) for h, w in shapes], dtype=features.dtype)
    return Tokens(features, torch.zeros_like(features), values["padding"], shapes, values["valid_ratios"] * sizes)

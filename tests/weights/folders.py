"""Tiny models as folders of transformers, written without that library."""

import json
import shutil

import torch

from dino.modeling.detector import Detector, Preprocessing
from dino.weights.network_parts import build_network
from dino.weights.transformers_folder import describe_fields
from dino.weights.transformers_writing import write_folder

from .states import randomise

NAMES, IDS = ["red", "green", "blue"], [7, 3, 90]
PREPROCESSING = Preprocessing((120.0, 110.5, 103.53), (50.0, 57.12, 57.375), 64, 96, 20)
FIELDS = {
    "backbone": "resnet18",
    "backbone_kwargs": {"out_indices": [1, 2]},  # without the large layers
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "num_feature_levels": 3,
    "num_queries": 12,
    "num_labels": len(NAMES),
}


def tiny_detector(**fields):
    """A detector with random weights."""
    network = build_network({"network": describe_fields({**FIELDS, **fields})})
    return Detector(randomise(network), PREPROCESSING, NAMES, category_ids=IDS).eval()


def write_tiny(folder, **fields):
    """Write such a detector as a folder."""
    detector = tiny_detector(**fields)
    write_folder(folder, detector, {"network": describe_fields({**FIELDS, **fields})})
    return detector


def write_own(path, **fields):
    """Write such a detector as a checkpoint of this project."""
    detector = tiny_detector(**fields)
    about = {
        "config": json.dumps({"network": describe_fields({**FIELDS, **fields})}),
        "preprocessing": detector.preprocessing._asdict(),
    }
    content = {"model": detector.network.state_dict(), "names": NAMES, "category_ids": IDS, "about": about}
    torch.save(content, path)
    return detector


def change_json(path, **changes):
    """Replace entries of a JSON file; `...` removes one."""
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in fields.items() if value is not ...}))


def copy(folder, target, **changes):
    """A copy of a folder in which the config has other fields; see `change_json`."""
    shutil.copytree(folder, target)
    change_json(target / "config.json", **changes)
    return target

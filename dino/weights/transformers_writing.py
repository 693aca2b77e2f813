"""A folder that transformers loads: config.json, model.safetensors, preprocessor_config.json and a model card."""

from __future__ import annotations

import json
import os
import secrets
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from dino.modeling.detector import Detector
from dino.utils.files import UserError, make_folder, write_whole
from dino.utils.printable import printable

from .folder_json import CONFIG, MODEL_TYPE, PROCESSOR, WEIGHT_FILES
from .loading import first_names
from .remote_code import AUTO_MAPS, write_remote_code
from .transformers_folder import fields_of
from .transformers_preprocessing import to_processor

_PREFIX = "model.network."  # of the tensors' names, in `DinoDetrForObjectDetection`
_LONGEST_NAME = 60  # letters of a temporary folder's name
_CARD = """---
library_name: transformers
pipeline_tag: object-detection
license: unknown
tags:
- dino
- dino_detr
---

# {name}

A detector of {classes}: DINO (DETR with improved denoising anchor boxes), converted by dino-detectron2.

```python
import dino.hf  # pip install "dino-detectron2[hf]"; registers the model type {model_type}
from transformers import AutoImageProcessor, AutoModelForObjectDetection, pipeline

folder = {quoted}  # this folder
model = AutoModelForObjectDetection.from_pretrained(folder)
processor = AutoImageProcessor.from_pretrained(folder)
detect = pipeline("object-detection", model=model, image_processor=processor)
```

Without transformers: `dino predict {word} PICTURE`, or `dino.load({quoted})`.

Classes: {names}.

The license of the weights is unknown here: it is that of the file they came from.
"""


def write_folder(folder: Path, detector: Detector, config: Mapping[str, Any]) -> None:
    """Write a detector as a folder for transformers, whole or not at all.

    Args:
        folder: to write; must not exist.
        detector: with names and ids of its classes.
        config: of its description, see `dino.weights.transformers_folder.fields_of`.

    Raises:
        UserError: the folder exists, or can't be written.
    """
    if os.path.lexists(folder):
        raise UserError(f"{folder} exists: choose another name, or move it away")
    fields = fields_of(config, detector.names, detector.category_ids)
    kind = {"architectures": ["DinoDetrForObjectDetection"], "dtype": "float32", "model_type": MODEL_TYPE}
    files = {CONFIG: {**fields, **kind}, PROCESSOR: to_processor(detector.preprocessing, detector.category_ids)}
    texts = {name: _to_json({**content, "auto_map": AUTO_MAPS[name]}) for name, content in files.items()}
    texts["README.md"] = _write_card(printable(folder.name, None), detector.names)
    make_folder(folder.parent)
    part = folder.with_name(f".{folder.name[:_LONGEST_NAME]}.{secrets.token_hex(4)}.part")
    try:
        part.mkdir()
        for name, text in texts.items():
            write_whole(part / name, lambda path, text=text: path.write_text(text, encoding="utf-8"))
        write_remote_code(part)
        tensors = _tensors_of(detector.network)
        write_whole(part / WEIGHT_FILES[0], lambda path: save_file(tensors, path, {"format": "pt"}))
        part.rename(folder)
    except OSError as error:
        raise UserError(f"can't write {folder}: {error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _tensors_of(network: nn.Module) -> dict[str, Tensor]:
    """The tensors of a network under the names of `DinoDetrForObjectDetection`; one of several names of a tensor."""
    first, own = first_names(network), network.state_dict()
    return {f"{_PREFIX}{name}": value.contiguous() for name, value in own.items() if first[name] == name}


def _to_json(fields: Mapping[str, Any]) -> str:
    return f"{json.dumps(fields, indent=2, sort_keys=True)}\n"


def _write_card(name: str, names: list[str]) -> str:
    """The model card, README.md."""
    shown = ", ".join(" ".join(text.split()) for text in names[:100])
    more = f" and {len(names) - 100:,} more" if len(names) > 100 else ""
    classes = f"{len(names):,} classes" if len(names) > 1 else "one class"
    written = {"name": name, "quoted": json.dumps(name, ensure_ascii=False), "word": shlex.quote(name)}
    return _CARD.format(**written, classes=classes, model_type=MODEL_TYPE, names=shown + more)

"""The formats in which programs store a DINO: detected from the keys, converted to own names and back."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from dino.utils.files import DataError

from .coco_classes import COCO_IDS, RAW_COCO_CLASSES  # noqa: F401 (RAW_COCO_CLASSES for others)
from .mmdetection import from_mmdetection, to_mmdetection
from .names import (
    DINO_NAMES,
    HUGGING_FACE_NAMES,
    StateDict,
    count_parts,
    is_of_dino,
    rename,
    renumber,
    resnet_to_detectron2,
    resnet_to_torchvision,
    rules,
    to_current_names,
)
from .other_detectors import name_detector
from .signatures import SIGNATURES, recognise, strip_wrappers

_HEADS = re.compile(r"(bbox|class)_embed\.\d+\..+")
_LAYER_HEAD = re.compile(r"(decoder\.(?:class|box)_heads)\.(\d{1,6})\.((?:\d\.)?(?:weight|bias))")
_NEEDED = ("level_embed", "decoder.class_heads.0.bias")
_SIZES = {  # name -> number of dimensions
    **dict(zip(_NEEDED, (2, 1), strict=True)),
    "query_selection.content.weight": 2,
    "query_selection.class_head.bias": 1,
    "denoising.label_embed.weight": 2,
}
_SECOND_NAME = "transformer.decoder."  # other programs keep the decoder's heads under two names
UNUSED_LABELS = "denoising.unused_labels"  # (rows, E): rows of the official label embedding that belong to no class
CLASS_KEYS = re.compile(
    r"(decoder\.class_heads\.\d+|(query_selection|branches\.[^.]+)\.class_head)\.(weight|bias)"
    r"|denoising\.label_embed\.weight"
)
BRANCHES = "branches."  # front of the names of what only training uses

_LEARNED_SIZES = ("query_selection.size.weight", "transformer.two_stage_wh_embedding.weight")  # own · official
_FROM_OFFICIAL = rules([(official, own) for own, official, _ in DINO_NAMES] + [_LEARNED_SIZES[::-1]])
_TO_OFFICIAL = rules([(own, official) for own, official, _ in DINO_NAMES] + [_LEARNED_SIZES])
_FROM_DETREX = rules((detrex, own) for own, _, detrex in DINO_NAMES)
_TO_DETREX = rules((own, detrex) for own, _, detrex in DINO_NAMES)
_FROM_HUGGING_FACE = rules((theirs.removeprefix("model."), official) for official, theirs in HUGGING_FACE_NAMES)
_TO_HUGGING_FACE = rules(HUGGING_FACE_NAMES)


def convert(state_dict: StateDict, to: str = "own") -> StateDict:
    """Convert a state dict of any known format to the format `to`.

    Label embeddings of no class, which this project does not use, become `denoising.unused_labels` in own format. A
    ResNet keeps the names of the file, torchvision's or Detectron2's: `load_weights` takes both. Own names of earlier
    versions become the current ones. Branches, which only training uses, are left out of other formats.

    Args:
        state_dict: names and tensors, with or without the prefixes of wrappers; of two copies of a model, the one that
            is no running average.
        to: own, official, detrex, huggingface or mmdetection.

    Raises:
        DataError: the format is unknown, tensors are missing, or the other program can't express the model.
    """
    found = recognise(state_dict)
    if found is None:
        some = ", ".join(list(state_dict)[:3])
        other = name_detector(state_dict)
        what = f"{other}, and no DINO" if other else "no DINO"
        raise DataError(f"this is {what} in a known format ({', '.join(SIGNATURES)}): its keys are {some}, …")
    own = _READ[found](strip_wrappers(state_dict))
    if to == "own":
        return own
    _check_standard(own)
    if to != "official" and _LEARNED_SIZES[0] in own:
        raise DataError("its anchors have learned sizes: only this project and the official program have them")
    return _WRITE[to]({key: value for key, value in own.items() if not key.startswith(BRANCHES)})


def _complete(own: StateDict) -> StateDict:
    """Give every decoder layer the one head that a file has, whichever layer's it is, and check the sizes.

    safetensors stores a tensor that has several names under one of them only.

    Raises:
        DataError: tensors that tell the sizes of the model are missing, or have another number of dimensions.
    """
    layers = count_parts(own, "decoder.layers.")
    heads: dict[str, list[Tensor]] = {}  # name with a place for the layer's number -> of all layers that have it
    for key, value in own.items():
        if match := _LAYER_HEAD.fullmatch(key):
            heads.setdefault(f"{match[1]}.{{}}.{match[3]}", []).append(value)
    once = all(len(found) == 1 for found in heads.values())  # else a single one that is missing is missing
    shared = {name: found[0] for name, found in heads.items()} if once else {}
    own = {name.format(layer): value for name, value in shared.items() for layer in range(layers)} | own
    _check_sizes(own)
    return own


def _check_sizes(own: StateDict) -> None:
    """Raise the DataError of `_complete`."""
    for name, dimensions in _SIZES.items():
        if name not in own and name not in _NEEDED:
            continue
        shape = tuple(own[name].shape) if name in own else None
        if shape is None or len(shape) != dimensions:
            state = f"has the shape {shape}" if shape is not None else "is missing"
            raise DataError(f"the file is damaged, or of an unknown variant of DINO: its tensor {name} {state}")


def _check_standard(own: StateDict) -> None:
    """Raise a DataError where a model has a variant of a part that no other program has."""
    classes = len(own["decoder.class_heads.0.bias"])
    if "query_selection.content.weight" not in own or len(own.get("query_selection.class_head.bias", ())) != classes:
        raise DataError("its query selection is not DINO's mixed selection: only this project has it")
    if "denoising.label_embed.weight" not in own:
        raise DataError("it has no label embedding (denoising.label_embed.weight), which every other program needs")
    if any(key.startswith("position_encoding.") for key in own):
        raise DataError("its position encoding is learned: only this project has one")
    added = next((key for key in own if key.startswith(("encoder.", "decoder.")) and not is_of_dino(key)), None)
    if added:
        part = added.split(".")[0]
        raise DataError(f"its {part} is not DINO's: only this project has {part}s with the tensor {added}")


def _from_official(state_dict: StateDict) -> StateDict:
    """Official -> own. Shared heads get a name for each decoder layer, so separate heads can load them."""
    state = _merge_second_names(state_dict)
    kernels = [value.shape[-1:] for key, value in state.items() if re.fullmatch(r"input_proj\.\d+\.0\.weight", key)]
    fine = sum(size == (1,) for size in kernels)
    state = renumber(state, "input_proj.", lambda n: f"extra.{n - fine}" if n >= fine else f"{n}")
    own = _complete(rename(state, _FROM_OFFICIAL))
    classes, labels = len(own["decoder.class_heads.0.bias"]), own.get("denoising.label_embed.weight", ())
    if len(labels) > classes:
        own["denoising.label_embed.weight"], unused = labels[:classes], labels[classes:]
        if len(unused) > 1 or unused.any():  # else `_to_official` added it
            own[UNUSED_LABELS] = unused
    return own


def _to_official(own: StateDict) -> StateDict:
    """Own -> official, whose decoder layers share one pair of heads.

    Raises:
        DataError: the heads of the layers differ.
    """
    state = dict(own)
    for key, value in own.items():
        match = re.fullmatch(r"(decoder\.(?:class|box)_heads\.)\d+(\..+)", key)
        if match and not torch.equal(value, own[f"{match[1]}0{match[2]}"]):
            raise DataError(
                f"the official program has one pair of heads for all decoder layers, this model a pair for each ({key} "
                "differs from the first layer's): convert it to detrex' format instead"
            )
    labels = state["denoising.label_embed.weight"]
    unused = state.pop(UNUSED_LABELS, labels.new_zeros(1, labels.shape[1]))  # the official program has at least one
    state["denoising.label_embed.weight"] = torch.cat([labels, unused])
    official = rename(resnet_to_torchvision(state), _TO_OFFICIAL)
    fine = sum(bool(re.fullmatch(r"input_proj\.\d+\.0\.weight", key)) for key in official)
    official = renumber(official, "input_proj.extra.", lambda n: f"{n + fine}", "input_proj.")
    return _add_second_names(official)


def _from_detrex(state_dict: StateDict) -> StateDict:
    """detrex -> own. Its last head is the encoder's."""
    state = _merge_second_names(state_dict)
    last = max((int(key.split(".")[1]) for key in state if _HEADS.fullmatch(key)), default=0)
    for head in ("class_embed.", "bbox_embed."):
        state = renumber(state, head, lambda n: "last" if n == last else f"{n}")
    return _complete(rename(state, _FROM_DETREX))


def _to_detrex(own: StateDict) -> StateDict:
    """Own -> detrex, which has no label embeddings of no class."""
    own = {key: value for key, value in own.items() if key != UNUSED_LABELS}
    last = sum(key.startswith("decoder.class_heads.") and key.endswith(".bias") for key in own)
    state = rename(resnet_to_detectron2(own), _TO_DETREX)
    state = {key.replace("_embed.last.", f"_embed.{last}."): value for key, value in state.items()}
    return _add_second_names(state)


def _merge_second_names(state_dict: StateDict) -> StateDict:
    """Keep one of the two names of each head.

    Raises:
        DataError: the two names of a head have different tensors.
    """
    state = {key: value for key, value in state_dict.items() if not _HEADS.fullmatch(key.removeprefix(_SECOND_NAME))}
    for key, value in state_dict.items():
        name = key.removeprefix(_SECOND_NAME)
        if name in state and not torch.equal(state[name], value):
            raise DataError(f"{name} and {_SECOND_NAME}{name} are two names of one tensor, but differ in this file")
        if _HEADS.fullmatch(name):
            state[name] = value
    return state


def _add_second_names(state_dict: StateDict) -> StateDict:
    """Undo `_merge_second_names`."""
    return state_dict | {f"{_SECOND_NAME}{key}": value for key, value in state_dict.items() if _HEADS.fullmatch(key)}


def coco_to_contiguous(own: StateDict) -> StateDict:
    """Own format with 91 classes, the raw ids of COCO -> with COCO's 80 classes in order; drops the other rows."""
    return select_classes({key: value for key, value in own.items() if key != UNUSED_LABELS}, COCO_IDS)


def select_classes(own: StateDict, rows: Sequence[int]) -> StateDict:
    """Own format -> with these of its classes, in this order. A head of one class for all objects stays."""
    total = len(own["decoder.class_heads.0.bias"])
    wanted = {key for key, value in own.items() if CLASS_KEYS.fullmatch(key) and len(value) == total}
    return {key: value[list(rows)] if key in wanted else value for key, value in own.items()}


_READ = {
    "own": lambda state: _complete(to_current_names(state)),
    "official": _from_official,
    "detrex": _from_detrex,
    "huggingface": lambda state: _from_official(rename(state, _FROM_HUGGING_FACE)),
    "mmdetection": lambda state: _complete(from_mmdetection(state)),
}
_WRITE = {
    "official": _to_official,
    "detrex": _to_detrex,
    "huggingface": lambda own: rename(_to_official(own), _TO_HUGGING_FACE),
    "mmdetection": lambda own: to_mmdetection({key: value for key, value in own.items() if key != UNUSED_LABELS}),
}

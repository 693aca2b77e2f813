"""The forms in which programs store a DINO: told by its keys, brought to own names, and back."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from dino.utils.files import DataError

from .names import DINO_NAMES, HUGGING_FACE_NAMES, StateDict, rename, resnet_to_detectron2, resnet_to_torchvision, rules

# Two keys that every file of a form has, and no file of another form.
SIGNATURES = {
    "own": ("level_embed", "decoder.class_heads.0.bias"),
    "official": ("transformer.level_embed", "transformer.tgt_embed.weight"),
    "detrex": ("transformer.level_embeds", "transformer.tgt_embed.weight"),
    "huggingface": ("model.transformer.level_embed", "model.transformer.content_query_embeddings.weight"),
}
WRAPPERS = re.compile(r"^(module\.|_orig_mod\.|network\.)+")  # of DistributedDataParallel, torch.compile, DINODetector
HEADS = re.compile(r"(bbox|class)_embed\.\d+\..+")
SECOND_NAME = "transformer.decoder."  # other programs keep the decoder's heads under two names
UNUSED_LABELS = "denoising.unused_labels"  # (rows, E): rows of the official label embedding that belong to no class
CLASS_KEYS = re.compile(
    r"(decoder\.class_heads\.\d+|query_selection\.class_head)\.(weight|bias)|denoising\.label_embed\.weight"
)
# The category ids that COCO uses, in order: 80 of 1 to 90.
COCO_IDS = (
    *range(1, 12),
    *range(13, 26),
    27,
    28,
    *range(31, 45),
    *range(46, 66),
    67,
    70,
    *range(72, 83),
    *range(84, 91),
)
RAW_COCO_CLASSES = 91  # of a model whose labels are these ids themselves

FROM_OFFICIAL = rules((official, own) for own, official, _ in DINO_NAMES)
TO_OFFICIAL = rules((own, official) for own, official, _ in DINO_NAMES)
FROM_DETREX = rules((detrex, own) for own, _, detrex in DINO_NAMES)
TO_DETREX = rules((own, detrex) for own, _, detrex in DINO_NAMES)
FROM_HUGGING_FACE = rules((theirs, official) for official, theirs in HUGGING_FACE_NAMES)
TO_HUGGING_FACE = rules(HUGGING_FACE_NAMES)


def strip_wrappers(state_dict: StateDict) -> StateDict:
    """Take from the keys what wrappers put in front of them.

    Raises:
        ValueError: two keys become one.
    """
    stripped = {WRAPPERS.sub("", key).replace("._orig_mod.", "."): value for key, value in state_dict.items()}
    if len(stripped) < len(state_dict):
        raise ValueError("two keys of the state dict differ by a prefix such as 'module.' alone")
    return stripped


def recognise(state_dict: StateDict) -> str | None:
    """The form of a state dict: own, official, detrex, huggingface; None for anything else."""
    keys = strip_wrappers(state_dict).keys()
    return next((form for form, signature in SIGNATURES.items() if keys >= set(signature)), None)


def convert(state_dict: StateDict, to: str = "own") -> StateDict:
    """A state dict of any known form in the form `to`.

    What the own form has no use for, the label embeddings of no class, stands there under `denoising.unused_labels`.
    A ResNet's names stay those of the file, torchvision's or Detectron2's: `load_weights` takes both.

    Args:
        state_dict: names and tensors, with or without the prefixes `module.`, `_orig_mod.` and `network.`.
        to: own, official, detrex or huggingface.

    Raises:
        DataError: the form is unknown, or the other program can't express the model.
    """
    form = recognise(state_dict)
    if form is None:
        some = ", ".join(list(state_dict)[:3])
        raise DataError(f"this is no DINO in a known form ({', '.join(SIGNATURES)}): its keys are {some}, …")
    own = READ[form](strip_wrappers(state_dict))
    if to == "own":
        return own
    check_standard(own)
    return WRITE[to](own)


def check_standard(own: StateDict) -> None:
    """Raise a DataError where a model in own form has a variant of a part that no other program has."""
    classes = len(own["decoder.class_heads.0.bias"])
    if "query_selection.content.weight" not in own or len(own.get("query_selection.class_head.bias", ())) != classes:
        raise DataError("its queries are made in another way than DINO's mixed selection: only this project has them")
    if any(key.startswith("position_encoding.") for key in own):
        raise DataError("its position encoding is learned, that of other programs is not")


def from_official(state_dict: StateDict) -> StateDict:
    """Official -> own. Shared heads stand under a name for each decoder layer, so separate heads take them, too."""
    state = merge_second_names(state_dict)
    kernels = {key: value.shape[-1] for key, value in state.items() if re.fullmatch(r"input_proj\.\d+\.0\.weight", key)}
    fine = sum(size == 1 for size in kernels.values())
    state = renumber(state, "input_proj.", lambda n: f"coarser.{n - fine}" if n >= fine else f"{n}")
    own = rename(state, FROM_OFFICIAL)
    classes, labels = len(own["decoder.class_heads.0.bias"]), own["denoising.label_embed.weight"]
    if len(labels) > classes:
        own["denoising.label_embed.weight"], own[UNUSED_LABELS] = labels[:classes], labels[classes:]
    return own


def to_official(own: StateDict) -> StateDict:
    """Own -> official, whose decoder layers share one pair of heads.

    Raises:
        DataError: the heads of the layers differ.
    """
    state = dict(own)
    for key, value in own.items():
        match = re.fullmatch(r"(decoder\.(?:class|box)_heads\.)\d+(\..+)", key)
        if match and not torch.equal(value, own[f"{match[1]}0{match[2]}"]):
            raise DataError(
                f"the official program has one pair of heads for all decoder layers, this model separate ones ({key} "
                "differs from the first layer's): it can be converted to detrex' form, not to the official one"
            )
    labels = state["denoising.label_embed.weight"]
    unused = state.pop(UNUSED_LABELS, labels.new_zeros(1, labels.shape[1]))  # at least one, as its settings ask for
    state["denoising.label_embed.weight"] = torch.cat([labels, unused])
    official = rename(resnet_to_torchvision(state), TO_OFFICIAL)
    fine = sum(bool(re.fullmatch(r"input_proj\.\d+\.0\.weight", key)) for key in official)
    official = renumber(official, "input_proj.coarser.", lambda n: f"{n + fine}", "input_proj.")
    return add_second_names(official)


def from_detrex(state_dict: StateDict) -> StateDict:
    """detrex -> own. Its last head is the encoder's."""
    state = merge_second_names(state_dict)
    last = max(int(key.split(".")[1]) for key in state if HEADS.fullmatch(key))
    for head in ("class_embed.", "bbox_embed."):
        state = renumber(state, head, lambda n: "last" if n == last else f"{n}")
    return rename(state, FROM_DETREX)


def to_detrex(own: StateDict) -> StateDict:
    """Own -> detrex, which has no unused label embeddings."""
    own = {key: value for key, value in own.items() if key != UNUSED_LABELS}
    last = sum(key.startswith("decoder.class_heads.") and key.endswith(".bias") for key in own)
    state = rename(resnet_to_detectron2(own), TO_DETREX)
    state = {key.replace("_embed.last.", f"_embed.{last}."): value for key, value in state.items()}
    return add_second_names(state)


def renumber(state_dict: StateDict, prefix: str, name, new_prefix: str | None = None) -> StateDict:
    """Replace the number n behind `prefix` in every key that has one there by `name(n)`."""

    def new(match: re.Match) -> str:
        return f"{prefix if new_prefix is None else new_prefix}{name(int(match[1]))}."

    return {re.sub(rf"^{re.escape(prefix)}(\d+)\.", new, key): value for key, value in state_dict.items()}


def merge_second_names(state_dict: StateDict) -> StateDict:
    """One name for each head.

    Raises:
        DataError: the two names of a head carry different tensors.
    """
    state = {key: value for key, value in state_dict.items() if not HEADS.fullmatch(key.removeprefix(SECOND_NAME))}
    for key, value in state_dict.items():
        name = key.removeprefix(SECOND_NAME)
        if name in state and not torch.equal(state[name], value):
            raise DataError(f"{name} and {SECOND_NAME}{name} are two names of one tensor, but differ in this file")
        if HEADS.fullmatch(name):
            state[name] = value
    return state


def add_second_names(state_dict: StateDict) -> StateDict:
    """Add what `merge_second_names` took."""
    return state_dict | {f"{SECOND_NAME}{key}": value for key, value in state_dict.items() if HEADS.fullmatch(key)}


def coco_to_contiguous(own: StateDict) -> StateDict:
    """Own form with 91 classes, the raw ids of COCO -> with its 80 classes in their order; other rows are left out."""
    return select_classes({key: value for key, value in own.items() if key != UNUSED_LABELS}, COCO_IDS)


def select_classes(own: StateDict, rows: Sequence[int]) -> StateDict:
    """Own form -> with these of its classes, in this order. (A head of one class for all objects stays.)"""
    total = len(own["decoder.class_heads.0.bias"])
    wanted = {key for key, value in own.items() if CLASS_KEYS.fullmatch(key) and len(value) == total}
    return {key: value[list(rows)] if key in wanted else value for key, value in own.items()}


READ = {
    "own": dict,
    "official": from_official,
    "detrex": from_detrex,
    "huggingface": lambda state: from_official(rename(state, FROM_HUGGING_FACE)),
}
WRITE = {
    "official": to_official,
    "detrex": to_detrex,
    "huggingface": lambda own: rename(to_official(own), TO_HUGGING_FACE),
}

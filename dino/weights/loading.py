"""Loading weights into a model that may differ from theirs in its classes, queries, levels or heads."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from dino.modeling import DINO
from dino.utils.files import DataError

from .checkpoint_formats import (
    CLASS_KEYS,
    COCO_IDS,
    RAW_COCO_CLASSES,
    UNUSED_LABELS,
    coco_to_contiguous,
    convert,
    recognise,
    select_classes,
    strip_wrappers,
)
from .imagenet import ADDED, fit_backbone
from .levels import fit_levels
from .load_report import Report, shorten
from .names import StateDict
from .reading import average_of, read_content, weights_of

MIN_BACKBONE = 0.95
BACKBONE = "neck.backbone."
PROJECTION_KEYS = re.compile(r"neck\.(lateral|coarser)\.\d+\.0\.weight")
ATTENTION_KEYS = re.compile(r".+\.(sampling_offsets|attention_weights)\.(weight|bias)")
DETREX_NOTE = (
    "the file does not say which position encoding it was trained with: detrex' 12-epoch models want "
    "model.network.position_encoding.temperatures=[10000,10000] model.network.position_encoding.offset=-0.5, its "
    "24-epoch models [20,20] and 0"
)


class Sizes(NamedTuple):
    """What a checkpoint and a model may differ in, and still belong together."""

    classes: int
    queries: int
    levels: int

    @classmethod
    def of(cls, state: StateDict) -> Sizes:
        """Read them off tensors under own names; 0 where there are none."""
        keys = ("decoder.class_heads.0.bias", "query_selection.content.weight", "level_embed")
        return cls(*(len(state[key]) if key in state else 0 for key in keys))


def load_weights(
    model: nn.Module,
    source: str | Path | Mapping,
    *,
    min_backbone: float = MIN_BACKBONE,
    copy: str = "auto",
    name: str = "the state dict",
    classes: Sequence[str] | None = None,
) -> Report:
    """Load the weights of any known program into a model, as far as they fit.

    Tensors whose size depends on the number of classes, queries or levels, where that differs, keep the values that the
    model was built with (class heads: the focal prior); projections and level embeddings are matched by stride. 91
    classes, the raw ids of COCO, become its 80 where the model has 80. A file without a detector is taken for the
    weights of the backbone alone.

    Args:
        model: a `DINO`, or a module that holds one (`DINODetector`, DistributedDataParallel); changed in place.
        source: a file (see `read_content`), its content, or a state dict.
        min_backbone: least share of the backbone's tensors that must be loaded; 0 lets another backbone stay as it was.
        copy: "model", "ema" (the running average), or "auto": the running average where the file has one.
        name: what messages call a source that is no file.
        classes: names of the model's classes. A file that has the same names in another order is put into this one.

    Raises:
        DataError: the file is missing, broken, unsafe or of another model; the model is unchanged.
    """
    network = find_network(model)
    if isinstance(source, str | Path):
        source, name = read_content(source), str(source)
    report = Report(name, "")
    try:
        chosen = choose(network, source, report, min_backbone, copy, classes)
    except ValueError as error:  # a DataError, too
        raise DataError(f"can't use the weights {name}: {error}") from error
    network.load_state_dict(chosen, strict=False)
    return report


def find_network(model: nn.Module) -> DINO:
    """The `DINO` in a model, whatever is wrapped around it."""
    network = next((part for part in model.modules() if isinstance(part, DINO)), None)
    if network is None:
        raise TypeError(f"{type(model).__name__} holds no DINO")
    return network


def choose(
    network: DINO, content: Mapping, report: Report, min_backbone: float, copy: str, classes: Sequence[str] | None
) -> StateDict:
    """The tensors of a file's content that fit the network, by its names; fills in the report."""
    state, average = strip_wrappers(weights_of(content)), average_of(content)
    if copy == "ema" and average is None:
        raise DataError("it has no running average (EMA) of the weights")
    report.form = recognise(state) or "backbone"
    target = network.state_dict()
    if report.form == "backbone":
        report.notes.append("these are weights of a backbone; all other parts keep their initial values")
        own = {f"{BACKBONE}{k}": v for k, v in fit_backbone(state, network.neck.backbone).items()}
        sizes, partial = Sizes.of(own), {}
        target = {key: value for key, value in target.items() if key.startswith(BACKBONE)}
    else:
        own = convert(state)
        if average is not None and copy != "model":
            own |= convert(average)
            report.notes.append("taken: the running average (EMA) of the weights")
        if report.form == "detrex":
            report.notes.append(DETREX_NOTE)
        own = order_classes(fit_classes(own, target, report), content.get("names"), classes, report)
        sizes = Sizes.of(own)
        own, partial = fit_levels(own, network)
        own = rename_backbone(own, network)
    chosen = compare(own, target, sizes, report, tolerant=min_backbone < MIN_BACKBONE)
    report.reinitialised |= partial
    report.loaded = [name for name in report.loaded if name not in partial]
    check_backbone(report, own, target, min_backbone)
    check_shared(chosen, target)
    return chosen


def fit_classes(own: StateDict, target: StateDict, report: Report) -> StateDict:
    """Without the label embeddings of no class, and with COCO's 80 classes where only the model has 80."""
    if (Sizes.of(own).classes, Sizes.of(target).classes) == (RAW_COCO_CLASSES, len(COCO_IDS)):
        report.notes.append("91 raw category ids of COCO became its 80 classes; the rows of the other 11 are left out")
        own = coco_to_contiguous(own)
    return {key: value for key, value in own.items() if key != UNUSED_LABELS}


def order_classes(own: StateDict, theirs: object, ours: Sequence[str] | None, report: Report) -> StateDict:
    """With the classes in the order of `ours`, where a file's `names` are the same in another order."""
    if not ours or theirs == list(ours) or not same_names(theirs, ours):
        return own
    report.notes.append("the same classes in another order: put into that of the data")
    return select_classes(own, [theirs.index(name) for name in ours])


def same_names(theirs: object, ours: Sequence[str]) -> bool:
    """Whether what a file says of its classes are these, in any order."""
    return isinstance(theirs, list) and len(theirs) == len(ours) and all(theirs.count(name) == 1 for name in ours)


def rename_backbone(own: StateDict, network: DINO) -> StateDict:
    """With the backbone's tensors under the names of the network's."""
    backbone = {key.removeprefix(BACKBONE): value for key, value in own.items() if key.startswith(BACKBONE)}
    rest = {key: value for key, value in own.items() if not key.startswith(BACKBONE)}
    return rest | {f"{BACKBONE}{key}": value for key, value in fit_backbone(backbone, network.neck.backbone).items()}


def compare(own: StateDict, target: StateDict, theirs: Sizes, report: Report, tolerant: bool) -> StateDict:
    """Sort all names into the report -> the tensors to load.

    Raises:
        DataError: shapes differ for another reason than the sizes that may.
    """
    chosen, wrong = {}, []
    ours = Sizes.of(target)
    for name, value in target.items():
        if name not in own:
            report.missing += [] if name.endswith("num_batches_tracked") else [name]
        elif own[name].shape == value.shape:
            chosen[name] = own[name]
        elif reason := why_other_size(name, theirs, ours, backbone_may_differ=tolerant or report.form == "backbone"):
            report.reinitialised[name] = reason
        else:
            wrong.append(f"{name} is {tuple(own[name].shape)} in the file and {tuple(value.shape)} in the model")
    if wrong:
        raise DataError(
            f"it is of another model: {shorten(wrong, 3)}. Build the model with the settings that the file was trained "
            "with"
        )
    report.loaded += list(chosen)
    report.unexpected += [name for name in own if name not in target and not name.endswith("num_batches_tracked")]
    return chosen


def why_other_size(name: str, theirs: Sizes, ours: Sizes, backbone_may_differ: bool) -> str | None:
    """The reason for which this tensor may have another shape in a file than in the model; None if there is none."""
    if CLASS_KEYS.fullmatch(name) and theirs.classes != ours.classes:
        return f"{ours.classes} classes instead of {theirs.classes}"
    if name == "query_selection.content.weight" and theirs.queries != ours.queries:
        return f"{ours.queries} queries instead of {theirs.queries}"
    if ATTENTION_KEYS.fullmatch(name) and theirs.levels != ours.levels:
        return f"{ours.levels} levels instead of {theirs.levels}"
    if backbone_may_differ and (name.startswith(BACKBONE) or PROJECTION_KEYS.fullmatch(name)):
        return "another backbone"
    return None


def check_backbone(report: Report, own: StateDict, target: StateDict, min_backbone: float) -> None:
    """Raise a DataError where less than the share `min_backbone` of the backbone's tensors is loaded."""
    wanted = [name for name in target if name.startswith(BACKBONE) and not name.endswith("num_batches_tracked")]
    if report.form == "backbone":
        wanted = [name for name in wanted if not ADDED.search(name.removeprefix(BACKBONE))]
    loaded = set(report.loaded)
    absent = [name.removeprefix(BACKBONE) for name in wanted if name not in loaded]
    if len(absent) > (1 - min_backbone) * len(wanted):
        theirs = [name.removeprefix(BACKBONE) for name in own]
        known = f"a DINO in {report.form} form" if report.form != "backbone" else "no DINO in a known form"
        raise DataError(
            f"it is {known}, and has only {len(wanted) - len(absent)} of the {len(wanted)} tensors of the model's "
            f"backbone. The model wants {shorten(absent, 3)}; the file has {shorten(theirs, 3)}. "
            "min_backbone=0 (train.min_backbone=0) keeps the backbone as it was built"
        )


def check_shared(chosen: StateDict, target: StateDict) -> None:
    """Raise a DataError where the model has one tensor under several names, for which the file has different ones."""
    first: dict[int, str] = {}
    for name in chosen:
        if not name.startswith("decoder."):
            continue
        other = first.setdefault(target[name].data_ptr(), name)
        if not torch.equal(chosen[name], chosen[other]):
            raise DataError(
                f"the model's decoder layers share their heads, the file has separate ones ({name} differs from "
                f"{other}): build the model without share_heads"
            )

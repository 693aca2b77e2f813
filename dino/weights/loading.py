"""Loading weights into a model that may differ from the file's in classes, queries, levels or heads."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dino.modeling import DINO, TimmBackbone
from dino.modeling.detector import Detector
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
from .imagenet import ADDED, check_network, fit_backbone
from .levels import fit_levels
from .load_report import Report, shorten
from .names import StateDict
from .reading import average_of, read_content, weights_of

MIN_BACKBONE = 0.95
_BACKBONE = "neck.backbone."
_PROJECTION_KEYS = re.compile(r"neck\.(lateral|extra_levels)\.\d+\.0\.weight")
_QUERY_KEYS = re.compile(r"(query_selection|branches\.[^.]+)\.content\.weight")
_ATTENTION_KEYS = re.compile(r".+\.(sampling_offsets|attention_weights)\.(weight|bias)")
_DETREX_NOTE = (
    "the file does not name the position encoding that it was trained with: detrex' 12-epoch models need "
    "model.network.position_encoding.temperatures=[10000,10000] model.network.position_encoding.offset=-0.5, its "
    "24-epoch models [20,20] and 0"
)


class _Sizes(NamedTuple):
    """Sizes in which a checkpoint may differ from the model."""

    classes: int
    levels: int

    @classmethod
    def of(cls, state: StateDict) -> _Sizes:
        """Read the sizes from tensors under own names; 0 where there are none."""
        keys = ("decoder.class_heads.0.bias", "level_embed")
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

    Where the number of classes, queries or levels differs, the tensors that depend on it keep their initial values
    (class heads: the focal prior). Projections and level embeddings are matched by stride. 91 classes, the raw ids of
    COCO, become its 80 where the model has 80. A file without a detector is read as the weights of a backbone.

    Args:
        model: a `DINO`, or a module that holds one (`DINODetector`, DistributedDataParallel); changed in place.
        source: a file (see `read_content`), its content, or a state dict.
        min_backbone: least share of the backbone's tensors that must be loaded; 0 lets another backbone stay.
        copy: "model", "ema" (the running average), or "auto" for the running average if the file has one.
        name: the name in messages of a source that is no file.
        classes: names of the model's classes. The classes of a file with the same names are put into this order.

    Raises:
        DataError: the file is missing, broken, unsafe or of another model; the model is unchanged.
    """
    network = _find_network(model)
    if isinstance(source, str | Path):
        source, name = read_content(source), str(source)
    report = Report(name, "")
    try:
        chosen = _choose(network, source, report, min_backbone, copy, classes)
        if report.format == "backbone":
            _check_pixels(model, report)
    except ValueError as error:  # a DataError too
        raise DataError(f"can't use the weights {name}: {error}") from error
    network.load_state_dict(chosen, strict=False)
    return report


def _find_network(model: nn.Module) -> DINO:
    """Find the `DINO` in a model, inside any wrappers."""
    network = _find_part(model, DINO)
    if network is None:
        raise TypeError(f"{type(model).__name__} holds no DINO")
    return network


def _find_part(model: nn.Module, kind: type[nn.Module]) -> Any:
    """Find the first module of a class in a model; None where there is none."""
    return next((part for part in model.modules() if isinstance(part, kind)), None)


def _choose(
    network: DINO, content: Mapping, report: Report, min_backbone: float, copy: str, classes: Sequence[str] | None
) -> StateDict:
    """Choose the tensors of a file that fit the network, under its names; fills in the report."""
    state, average = strip_wrappers(weights_of(content)), average_of(content, copy)
    report.format = recognise(state) or "backbone"
    target, partial = network.state_dict(), {}
    if report.format == "backbone":
        report.notes.append("weights of a backbone alone; all other parts keep their initial values")
        own = fit_backbone(state, network.neck.backbone)
        check_network(state, own, network.neck.backbone)
        own = _with_front(own)
        sizes, target = _Sizes.of(own), _backbone_of(target)
    else:
        own = _in_own_format(state, average, report)
        own = _order_classes(_fit_classes(own, target, report), content.get("names"), classes, report)
        sizes = _Sizes.of(own)
        own, partial = fit_levels(own, network)
        own = _rename_backbone(own, network)
    chosen = _compare(own, target, sizes, report, tolerant=min_backbone < MIN_BACKBONE)
    report.reinitialised |= partial
    report.loaded = [name for name in report.loaded if name not in partial]
    _check_backbone(report, own, target, min_backbone)
    _check_shared(chosen, target)
    return chosen


def _in_own_format(state: StateDict, average: StateDict | None, report: Report) -> StateDict:
    """Convert the weights of a file, and put their running average, if any, in their place."""
    own = convert(state)
    if average is not None:
        own |= convert(average)
        report.notes.append("loaded: the running average (EMA) of the weights")
    if report.format == "detrex":
        report.notes.append(_DETREX_NOTE)
    return own


def _fit_classes(own: StateDict, target: StateDict, report: Report) -> StateDict:
    """Drop the label embeddings of no class, and turn COCO's 91 raw ids into 80 classes where the model has 80."""
    if (_Sizes.of(own).classes, _Sizes.of(target).classes) == (RAW_COCO_CLASSES, len(COCO_IDS)):
        report.notes.append("91 raw category ids of COCO became its 80 classes; the rows of the other 11 were dropped")
        own = coco_to_contiguous(own)
    return {key: value for key, value in own.items() if key != UNUSED_LABELS}


def _order_classes(own: StateDict, theirs: object, ours: Sequence[str] | None, report: Report) -> StateDict:
    """Put the classes into the order of `ours`, where the file has the same names."""
    if not ours or theirs == list(ours) or not same_names(theirs, ours):
        return own
    report.notes.append("the same classes in another order: reordered as in the data")
    return select_classes(own, [theirs.index(name) for name in ours])


def same_names(theirs: object, ours: Sequence[str]) -> bool:
    """Whether a file has these class names, in any order."""
    return isinstance(theirs, list) and len(theirs) == len(ours) and all(theirs.count(name) == 1 for name in ours)


def _rename_backbone(own: StateDict, network: DINO) -> StateDict:
    """Rename the backbone's tensors to the names of the network's backbone."""
    backbone = _backbone_of(own)
    rest = {key: value for key, value in own.items() if key not in backbone}
    named = {key.removeprefix(_BACKBONE): value for key, value in backbone.items()}
    return rest | _with_front(fit_backbone(named, network.neck.backbone))


def _backbone_of(state: StateDict) -> StateDict:
    return {key: value for key, value in state.items() if key.startswith(_BACKBONE)}


def _with_front(backbone: StateDict) -> StateDict:
    return {f"{_BACKBONE}{key}": value for key, value in backbone.items()}


def _compare(own: StateDict, target: StateDict, theirs: _Sizes, report: Report, tolerant: bool) -> StateDict:
    """Sort all names into the report, and return the tensors to load.

    Raises:
        DataError: a shape differs for another reason than `_Sizes` or the number of queries.
    """
    chosen, wrong, missing = {}, [], []
    ours = _Sizes.of(target)
    backbone_may_differ = tolerant or report.format == "backbone"
    for name, value in target.items():
        found = own.get(name)
        if found is None:
            missing.append(name)
        elif found.shape == value.shape:
            chosen[name] = found
        elif reason := _why_other_queries(name, found, value) or _why_other_size(
            name, theirs, ours, backbone_may_differ
        ):
            report.reinitialised[name] = reason
        else:
            wrong.append(f"{name} is {tuple(found.shape)} in the file and {tuple(value.shape)} in the model")
    if wrong:
        raise DataError(
            f"the file is of another model: {shorten(wrong, 3)}. Build the model with the settings that the file was "
            "trained with"
        )
    report.loaded += list(chosen)
    report.missing += filter(_counts, missing)
    report.unexpected += filter(_counts, (name for name in own if name not in target))
    return chosen


def _counts(name: str) -> bool:
    """Whether a tensor matters: counters of batch norms do not."""
    return not name.endswith("num_batches_tracked")


def _why_other_queries(name: str, found: Tensor, value: Tensor) -> str | None:
    """Why contents of queries may have another shape in the file (`found`); None for other tensors."""
    fits = _QUERY_KEYS.fullmatch(name) and found.shape[1:] == value.shape[1:]
    return f"{len(value)} queries instead of {len(found)}" if fits else None


def _why_other_size(name: str, theirs: _Sizes, ours: _Sizes, backbone_may_differ: bool) -> str | None:
    """Why this tensor may have another shape in the file than in the model; None for no reason."""
    if CLASS_KEYS.fullmatch(name) and theirs.classes != ours.classes:
        return f"{ours.classes} classes instead of {theirs.classes}"
    if _ATTENTION_KEYS.fullmatch(name) and theirs.levels != ours.levels:
        return f"{ours.levels} levels instead of {theirs.levels}"
    if backbone_may_differ and (name.startswith(_BACKBONE) or _PROJECTION_KEYS.fullmatch(name)):
        return "another backbone"
    return None


def _check_backbone(report: Report, own: StateDict, target: StateDict, min_backbone: float) -> None:
    """Raise a DataError where less than the share `min_backbone` of the backbone's tensors is loaded."""
    wanted = _wanted_of_backbone(target, classifier=report.format == "backbone")
    loaded = set(report.loaded)
    absent = [name.removeprefix(_BACKBONE) for name in wanted if name not in loaded]
    if len(absent) > (1 - min_backbone) * len(wanted):
        theirs = [name.removeprefix(_BACKBONE) for name in own]
        known = f"a DINO in {report.format} format" if report.format != "backbone" else "no DINO in a known format"
        raise DataError(
            f"the file is {known}, and has only {len(wanted) - len(absent)} of the {len(wanted)} tensors of the "
            f"model's backbone. The model needs {shorten(absent, 3)}; the file has {shorten(theirs, 3)}. "
            "min_backbone=0 (train.min_backbone=0) keeps the initial values of the backbone"
        )


def _wanted_of_backbone(target: StateDict, classifier: bool) -> list[str]:
    """Names of the backbone's tensors that a file must have; that of a classifier can't have what detectors add."""
    names = filter(_counts, _backbone_of(target))
    return [name for name in names if not (classifier and ADDED.search(name.removeprefix(_BACKBONE)))]


def _check_pixels(model: nn.Module, report: Report) -> None:
    """Compare the pixel statistics that weights of a timm backbone expect with the model's; a note for a bare `DINO`.

    Raises:
        DataError: they differ, so features would be wrong.
    """
    backbone, detector = _find_part(model, TimmBackbone), _find_part(model, Detector)
    expected = {} if backbone is None else backbone.pixel_statistics
    stated = [f"{name}={list(values)}".replace(" ", "") for name, values in expected.items()]
    if expected and detector is None:
        report.notes.append(f"the backbone's weights expect images normalised by {', '.join(stated)}")
        return
    ours = {name: _round(getattr(detector, name)) for name in expected}
    if any(abs(a - b) > 0.1 for name in expected for a, b in zip(ours[name], expected[name], strict=True)):
        raise DataError(
            f"the backbone's weights expect other pixel statistics than the model's {ours}, so its features would be "
            f"wrong. {_how_to_set(stated)}"
        )


def _how_to_set(stated: list[str]) -> str:
    """Say how to set `pixel_mean=[…]` and the like, in words to be pasted: shells expand brackets without quotes."""
    words = " ".join(f"'model.{text}'" for text in stated)
    lines = "; ".join(f"model.{text}" for text in stated)
    parts = f"Preprocessing({', '.join(stated)})"
    return f"On the command line, write {words}; in a recipe, {lines}; without a recipe, {parts}"


def _round(values: Tensor) -> list[float]:
    """Numbers for people."""
    return [round(x, 3) for x in values.flatten().tolist()]


def _check_shared(chosen: StateDict, target: StateDict) -> None:
    """Raise a DataError where the model shares a tensor under several names, and the file has different ones."""
    first: dict[int, str] = {}
    for name in chosen:
        if not name.startswith("decoder."):
            continue
        other = first.setdefault(target[name].data_ptr(), name)
        if not torch.equal(chosen[name], chosen[other]):
            raise DataError(
                f"the model's decoder layers share their heads, but the file has separate heads ({name} differs from "
                f"{other}): build the model without share_heads"
            )

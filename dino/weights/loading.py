"""Loading weights into a model that may differ from the file's in classes, queries, levels or heads."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dino.layers import SinePositionEncoding
from dino.modeling import DINO, TimmBackbone
from dino.modeling.detector import Detector
from dino.utils.files import DataError

from .checkpoint_formats import CLASS_KEYS
from .class_rows import fit_classes
from .detector_backbones import cut_backbone, name_any_detector
from .file_facts import Position, find_position
from .file_weights import read_weights
from .imagenet import ADDED, check_network, doubts_of_name, fit_backbone
from .levels import fit_levels
from .load_report import MISSING, Report, reason_of, shorten
from .names import StateDict
from .other_detectors import name_missing_backbone, refuse_missing_backbone
from .reading import read_content
from .values import to_dtypes

MIN_BACKBONE = 0.95
_BACKBONE = "neck.backbone."
_PROJECTION_KEYS = re.compile(r"neck\.(lateral|extra_levels)\.\d+\.0\.weight")
_QUERY_KEYS = re.compile(r"(query_selection|branches\.[^.]+)\.content\.weight")
_LAYER_KEYS = re.compile(r"((?:encoder|decoder)\.(?:layers|class_heads|box_heads)\.)(\d+)\.")
_LEVEL_KEYS = re.compile(r"neck\.(lateral|extra_levels)\.\d+\..+")
_ATTENTION_KEYS = re.compile(r".+\.(sampling_offsets|attention_weights)\.(weight|bias)")
_UNKNOWN_POSITION = (
    "the file does not name the position encoding that it was trained with: detrex' 12-epoch models need "
    "'model.network.position_encoding.temperatures=[10000,10000]' model.network.position_encoding.offset=-0.5, its "
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


class _Wishes(NamedTuple):
    """The arguments of `load_weights` that say how to load."""

    min_backbone: float = MIN_BACKBONE
    copy: str = "auto"
    classes: Sequence[str] | None = None
    class_rows: str = "auto"
    parts: str = "all"


class _Target(NamedTuple):
    """The tensors of the model."""

    tensors: StateDict
    first: dict[str, str]  # name -> the first name of the same tensor, which layers may share

    @classmethod
    def of(cls, network: DINO) -> _Target:
        """Read them from a network."""
        return cls(network.state_dict(), first_names(network))


def first_names(network: nn.Module) -> dict[str, str]:
    """Name of each tensor in the state dict of a network -> the first name of the same tensor: layers may share it."""
    first: dict[int, str] = {}
    own = network.state_dict(keep_vars=True)  # the parameters themselves: a shared one is the same object
    return {name: first.setdefault(id(value), name) for name, value in own.items()}


def load_weights(
    model: nn.Module,
    source: str | Path | Mapping,
    *,
    min_backbone: float = MIN_BACKBONE,
    copy: str = "auto",
    name: str = "the state dict",
    classes: Sequence[str] | None = None,
    class_rows: str = "auto",
    parts: str = "all",
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
        classes: names of the model's classes. Where the file's are known too, each class gets the rows of its name in
            class heads and label embeddings.
        class_rows: "name" leaves the rows of other classes out; "auto" does so where the numbers of classes differ,
            and else leaves all rows in place, unless the names are the same ones in another order.
        parts: "all", or "backbone" for the backbone alone, from a file of any detector.

    Raises:
        DataError: the file is missing, broken, unsafe or of another model; the model is unchanged.
        ValueError: `class_rows` or `parts` is another word.
    """
    network = _find_network(model)
    chosen, report = _read(model, source, name, _Wishes(min_backbone, copy, classes, class_rows, parts))
    network.load_state_dict(chosen, strict=False)
    return report


def _read(model: nn.Module, source: str | Path | Mapping, name: str, wishes: _Wishes) -> tuple[StateDict, Report]:
    """Choose what `load_weights` loads, and report on it."""
    if wishes.parts not in ("all", "backbone") or wishes.class_rows not in ("auto", "name"):
        raise ValueError('parts is "all" or "backbone", class_rows is "auto" or "name"')
    network = _find_network(model)
    if isinstance(source, str | Path):
        source, name = read_content(source), str(source)
    report = Report(name, "")
    try:
        chosen = _choose(network, source, report, wishes)
        if report.format == "backbone" and wishes.parts == "all":
            _check_pixels(model, report)
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise DataError(f"can't use the weights {name}: {reason_of(error)}") from error
    return chosen, report


def _find_network(model: nn.Module) -> DINO:
    """Find the `DINO` in a model, inside any wrappers."""
    network = _find_part(model, DINO)
    if network is None:
        raise TypeError(f"{type(model).__name__} holds no DINO")
    return network


def _find_part(model: nn.Module, kind: type[nn.Module]) -> Any:
    """Find the first module of a class in a model; None where there is none."""
    return next((part for part in model.modules() if isinstance(part, kind)), None)


def _choose(network: DINO, content: Mapping, report: Report, wishes: _Wishes) -> StateDict:
    """Choose the tensors of a file that fit the network, under its names; fills in the report."""
    found = read_weights(content, wishes.copy)
    target = _Target.of(network)
    report.format = found.format
    report.notes += found.notes
    report.doubts += _doubt_position(content, report, network)
    if report.format == "backbone":
        chosen = _choose_backbone(_read_backbone(found.state, network, report, wishes), target, report, wishes)
    elif wishes.parts == "backbone":
        own = _rename_backbone(found.state, network, report)
        report.unexpected += [name for name in own if not name.startswith(_BACKBONE)]
        chosen = _choose_backbone(_backbone_of(own), target, report, wishes)
    else:
        chosen = _choose_all(found.state, content, network, target, report, wishes)
    tensors = len({target.first[name] for name in target.tensors if _counts(name)})
    if tensors < report.total:
        report.notes.append(
            f"layers of the model share tensors: the {report.total} are names, of {tensors} different tensors"
        )
    return to_dtypes(chosen, target.tensors)


def _choose_all(
    own: StateDict, content: Mapping, network: DINO, target: _Target, report: Report, wishes: _Wishes
) -> StateDict:
    """Choose from the tensors of a detector."""
    by_name = wishes.class_rows == "name"
    own, fresh_rows = fit_classes(own, target.tensors, content, wishes.classes, by_name, report)
    sizes = _Sizes.of(own)
    own, fresh_levels = fit_levels(own, network)
    own = _rename_backbone(own, network, report)
    chosen = _compare(own, target, sizes, report, wishes, fresh_rows | fresh_levels)
    _check_shared(chosen, target)
    return chosen


def _read_backbone(state: StateDict, network: DINO, report: Report, wishes: _Wishes) -> StateDict:
    """Read the backbone from a file that has no DINO, under own names.

    Raises:
        DataError: the file is another detector's, and nobody asked for its backbone alone.
    """
    backbone, kind = network.neck.backbone, name_any_detector(state)
    if not kind:
        report.backbone_keys = list(state)
        own = fit_backbone(state, backbone)
        check_network(state, own, backbone)
        report.notes += doubts_of_name(report.source, backbone)
        return _with_front(own)
    own, others = cut_backbone(state, backbone)
    left = set(others)
    report.backbone_keys = [key for key in state if key not in left]
    own = _with_front(own)
    if wishes.parts != "backbone":
        _refuse_detector(kind, own, _backbone_of(network.state_dict()))
    report.notes.append(f"the file is {kind}: its backbone alone is used, as asked for")
    report.unexpected += filter(_counts, others)
    return own


def _refuse_detector(kind: str, own: StateDict, target: StateDict) -> None:
    """Raise the DataError for a file of another detector."""
    wanted = list(filter(_counts, target))
    fitting = sum(name in own and own[name].shape == target[name].shape for name in wanted)
    known = f"the file is {kind}, no DINO in a known format"
    if fitting < MIN_BACKBONE * len(wanted):
        raise DataError(f"{known}, and has only {fitting} of the {len(wanted)} tensors of the model's backbone")
    raise DataError(
        f"{known}: only its backbone fits the model ({fitting} of {len(wanted)} tensors). To start from the backbone "
        'alone, ask for it: train.init_parts=backbone (in Python parts="backbone")'
    )


def _choose_backbone(own: StateDict, target: _Target, report: Report, wishes: _Wishes) -> StateDict:
    """Choose from the tensors of a backbone; all other parts of the model keep their initial values."""
    report.notes.append("weights of a backbone alone; all other parts keep their initial values")
    backbone = target._replace(tensors=_backbone_of(target.tensors))
    report.without_detector = [name for name in target.tensors if name not in backbone.tensors and _counts(name)]
    return _compare(own, backbone, _Sizes.of(own), report, wishes, {})


def _doubt_position(content: Mapping, report: Report, network: DINO) -> list[str]:
    """Say where the network's position encoding may not be that of another program's file."""
    encoding = network.position_encoding
    if report.format in ("own", "backbone") or not isinstance(encoding, SinePositionEncoding):
        return []
    theirs = find_position(content, report.format, report.source)
    if theirs is None:
        return [_UNKNOWN_POSITION] if report.format == "detrex" and encoding.temperatures == (20.0, 20.0) else []
    ours = Position(tuple(encoding.temperatures), encoding.offset)
    same = theirs == ours
    return [] if same else [f"the file was trained with the position encoding {theirs}, the model has {ours}"]


def _rename_backbone(own: StateDict, network: DINO, report: Report) -> StateDict:
    """Rename the backbone's tensors to the names of the network's backbone; the report keeps the names before."""
    backbone = _backbone_of(own)
    rest = {key: value for key, value in own.items() if key not in backbone}
    named = {key.removeprefix(_BACKBONE): value for key, value in backbone.items()}
    report.backbone_keys = list(named)
    return rest | _with_front(fit_backbone(named, network.neck.backbone))


def _backbone_of(state: StateDict) -> StateDict:
    return {key: value for key, value in state.items() if key.startswith(_BACKBONE)}


def _with_front(backbone: StateDict) -> StateDict:
    return {f"{_BACKBONE}{key}": value for key, value in backbone.items()}


def _compare(
    own: StateDict, target: _Target, theirs: _Sizes, report: Report, wishes: _Wishes, fresh: dict[str, str]
) -> StateDict:
    """Sort all names into the report, and return the tensors to load; `fresh` has reasons known before.

    Raises:
        DataError: a shape differs for another reason than `_Sizes` or the number of queries, too little of the
            backbone is there, or it is one that this project lacks.
    """
    tolerant = bool(wishes.min_backbone < MIN_BACKBONE or report.without_detector)
    if not tolerant and name_missing_backbone(target.tensors) is None:
        refuse_missing_backbone(own)
    chosen, reasons = _sort(own, target.tensors, theirs, tolerant)
    _fill_in(report, chosen, fresh | reasons, own, target)
    _check_backbone(report, own, target, wishes.min_backbone)
    return chosen


def _fill_in(report: Report, chosen: StateDict, reasons: dict[str, str], own: StateDict, target: _Target) -> None:
    """Put each name of the model into one list of the report; all names of one tensor into the same."""
    loaded = {target.first[name] for name in chosen}
    by_tensor = {target.first[name]: reason for name, reason in reasons.items()}
    for name in filter(_counts, target.tensors):
        first = target.first[name]
        if first in by_tensor:
            report.reinitialised[name] = by_tensor[first]
        elif first in loaded:
            report.loaded.append(name)
        else:
            report.missing.append(name)
            report.why_missing[name] = _why_missing(name, own, target.tensors)
    report.unexpected += [name for name in own if name not in target.tensors and _counts(name)]


def _sort(own: StateDict, target: StateDict, theirs: _Sizes, tolerant: bool) -> tuple[StateDict, dict[str, str]]:
    """The tensors of a file with the model's shapes, and {name: reason} of those with others.

    Raises:
        DataError: a shape differs without a known reason.
    """
    chosen, reasons, wrong = {}, {}, []
    ours = _Sizes.of(target)
    for name in (name for name in target if name in own):
        found, value = own[name], target[name]
        if found.shape == value.shape:
            chosen[name] = found
        elif reason := _why_other_queries(name, found, value) or _why_other_size(name, theirs, ours, tolerant):
            reasons[name] = reason
        else:
            wrong.append(f"{name} is {tuple(found.shape)} in the file and {tuple(value.shape)} in the model")
    if wrong:
        raise DataError(
            f"the file is of another model: {shorten(wrong, 3)}. Build the model with the settings that the file was "
            "trained with"
        )
    return chosen, reasons


def _why_missing(name: str, own: StateDict, target: StateDict) -> str:
    """Why a file lacks this tensor."""
    if _LEVEL_KEYS.fullmatch(name):
        return "a level that the file lacks"
    match = _LAYER_KEYS.match(name)
    front = match[1] if match else f"{name}."
    theirs, ours = ({n.split(".")[2] for n in state if n.startswith(front)} for state in (own, target))
    if not match or match[2] in theirs:
        return MISSING
    return f"{len(ours)} {front.split('.')[0]} layers instead of {len(theirs)}"


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


def _check_backbone(report: Report, own: StateDict, target: _Target, min_backbone: float) -> None:
    """Raise a DataError where less than the share `min_backbone` of the backbone's tensors is loaded."""
    classifier = report.format == "backbone"  # its file can't have what detectors add
    names = filter(_counts, _backbone_of(target.tensors))
    wanted = [name for name in names if not (classifier and ADDED.search(name.removeprefix(_BACKBONE)))]
    loaded = set(report.loaded)
    absent = [name.removeprefix(_BACKBONE) for name in wanted if name not in loaded]
    if len(absent) > (1 - min_backbone) * len(wanted):
        theirs = list(filter(_counts, report.backbone_keys))
        known = f"a DINO in {report.format} format" if report.format != "backbone" else "no DINO in a known format"
        raise DataError(
            f"the file is {known}, and has only {len(wanted) - len(absent)} of the {len(wanted)} tensors of the "
            f"model's backbone. The model needs {shorten(absent, 3)}; the file has {shorten(theirs, 3) or 'none'}. "
            "min_backbone=0 (train.min_backbone=0) keeps the initial values of the backbone"
        )


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


def _check_shared(chosen: StateDict, target: _Target) -> None:
    """Raise a DataError where the model shares a tensor under several names, and the file has different ones."""
    first: dict[str, str] = {}
    for name in chosen:
        if not name.startswith("decoder."):
            continue
        other = first.setdefault(target.first[name], name)
        if other != name and not torch.equal(chosen[name], chosen[other]):
            raise DataError(
                f"the model's decoder layers share their heads, but the file has separate heads ({name} differs from "
                f"{other}): build the model without share_heads (in a recipe: "
                "model.network.decoder._target_=dino.modeling.Decoder)"
            )

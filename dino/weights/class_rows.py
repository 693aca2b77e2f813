"""Rows of class heads and label embeddings, matched between a file and a model by the names of their classes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from dino.utils.files import DataError

from .checkpoint_formats import CLASS_KEYS, UNUSED_LABELS, coco_to_contiguous, select_classes
from .coco_classes import BACKGROUND, COCO_IDS, NO_CLASS, RAW_COCO_CLASSES, coco_names
from .load_report import Report, shorten
from .mmdetection import classes_of
from .names import StateDict

_COUNTED = "decoder.class_heads.0.bias"  # one number for each class


class _Rows(NamedTuple):
    """Which row of the file each class of the model gets."""

    found: dict[int, int]  # label in the model -> label in the file
    ours: Sequence[str]
    theirs: Sequence[str]

    @property
    def whole(self) -> bool:
        """Whether every class of the model has a row."""
        return len(self.found) == len(self.ours)

    @property
    def known(self) -> list[str]:
        """The model's names of the classes that the file has."""
        return [self.ours[label] for label in self.found]

    @property
    def new(self) -> list[str]:
        """The model's names of all other classes."""
        return [name for label, name in enumerate(self.ours) if label not in self.found]


def fit_classes(
    own: StateDict,
    target: StateDict,
    content: Mapping,
    ours: Sequence[str] | None,
    by_name: bool,
    report: Report,
) -> tuple[StateDict, dict[str, str]]:
    """Choose the class rows of a file that a model starts from; adds notes to the report.

    Args:
        own: the file's tensors in own format.
        target: the model's tensors.
        content: of the file, which may have the names of its classes.
        ours: of the model's classes; None where they are unknown.
        by_name: whether rows of other classes are left out where the numbers of classes agree.
        report: of the loading.

    Returns:
        the tensors, and {name: reason} of those whose rows keep initial values, some or all.
    """
    names, stated = _names_in(content, own, report.format)
    own, names = _to_contiguous(_without_unused(own, report), target, names, report)
    if not names or len(ours or ()) != _count(target) or names == list(ours):
        return own, {}
    if not stated:
        report.notes.append("the file does not name its classes; as many as COCO's, they are taken for COCO's")
    rows = _Rows(match_classes(names, ours), ours, names)
    in_place = len(names) == len(ours) and (rows.whole or not by_name)
    return (_reorder(own, rows, report), {}) if in_place else _select(own, target, rows, report)


def _without_unused(own: StateDict, report: Report) -> StateDict:
    """Leave out the rows of the official label embedding that belong to no class."""
    if UNUSED_LABELS in own:
        report.notes.append(f"not used: rows of the label embedding that belong to no class: {len(own[UNUSED_LABELS])}")
    return {key: value for key, value in own.items() if key != UNUSED_LABELS}


def _to_contiguous(
    own: StateDict, target: StateDict, names: list[str] | None, report: Report
) -> tuple[StateDict, list[str] | None]:
    """Turn the 91 raw ids of COCO into its 80 classes where the model has 80 -> tensors and names of the classes."""
    if (_count(own), _count(target)) != (RAW_COCO_CLASSES, len(COCO_IDS)):
        return own, names
    if names not in (None, coco_names(RAW_COCO_CLASSES)):
        return own, names
    report.notes.append("91 raw category ids of COCO became its 80 classes; the rows of the other 11 were dropped")
    return coco_to_contiguous(own), names and coco_names(len(COCO_IDS))


def _count(state: StateDict) -> int:
    """The number of classes; 0 where there is no class head."""
    return len(state[_COUNTED]) if _COUNTED in state else 0


def _names_in(content: Mapping, own: StateDict, format_: str) -> tuple[list[str] | None, bool]:
    """The names of a file's classes by label, None where they are unknown; and whether the file states them.

    mmdetection states them in its `meta`. Files of other programs without names, but with as many classes as COCO, have
    COCO's.
    """
    classes = _count(own)
    stated = _as_names(content.get("names")) or classes_of(content) or []
    stated = stated if len(stated) == classes else None
    return stated or (coco_names(classes) if format_ != "own" else None), bool(stated)


def _as_names(value: Any) -> list[str]:
    """The value as a list of names; an empty one for anything else."""
    is_list = isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)
    return list(value) if is_list else []


def same_names(theirs: object, ours: Sequence[str]) -> bool:
    """Whether a file has these class names, in any order."""
    return isinstance(theirs, list) and len(theirs) == len(ours) and all(theirs.count(name) == 1 for name in ours)


def match_classes(theirs: Sequence[str], ours: Sequence[str]) -> dict[int, int]:
    """Find the label in `theirs` of each of `ours`: equal names first, then names that differ in spelling only.

    A name that occurs twice on a side is ambiguous, and matches nothing.
    """
    found: dict[int, int] = {}
    for spell in (str, _fold):
        free = {
            "ours": {label: spell(name) for label, name in enumerate(ours) if label not in found},
            "theirs": {label: spell(name) for label, name in enumerate(theirs) if label not in found.values()},
        }
        once = {side: _only_once(names) for side, names in free.items()}
        found |= {label: once["theirs"][name] for name, label in once["ours"].items() if name in once["theirs"]}
    return dict(sorted(found.items()))


def check_known(theirs: Sequence[str], ours: Sequence[str], path: str | Path) -> None:
    """Raise a DataError if the data has classes that a checkpoint lacks, unless both have as many.

    Args:
        theirs: classes of the checkpoint. ours: of the data.
        path: the checkpoint, for the message.
    """
    matched = match_classes(theirs, ours)
    unknown = [name for label, name in enumerate(ours) if label not in matched]
    if unknown and len(ours) != len(theirs):
        raise DataError(
            f"{path} has {len(theirs)} classes, the data has {len(ours)}, and the model does not know "
            f"{', '.join(unknown[:5])}{' and more' if len(unknown) > 5 else ''}"
        )


def _only_once(names: dict[int, str]) -> dict[str, int]:
    """{label: name} -> {name: label} of the names that occur once and belong to a class."""
    counts = Counter(names.values())
    return {name: label for label, name in names.items() if counts[name] == 1 and _fold(name)}


def _fold(name: str) -> str:
    """A name without the differences of spelling: case, and the sign between two words; "" for what is no class."""
    return "" if name in (NO_CLASS, BACKGROUND) else re.sub(r"[\s_-]+", " ", name.casefold()).strip()


def _reorder(own: StateDict, rows: _Rows, report: Report) -> StateDict:
    """As many classes in the file as in the model: the same ones in the model's order; others stay in place."""
    if not rows.whole:
        report.notes.append("the file's classes have other names than the model's; their rows stay in place")
        return own
    if list(rows.found.values()) == list(range(len(rows.ours))):
        return own
    report.notes.append("the same classes in another order: reordered as in the data")
    return select_classes(own, list(rows.found.values()))


def _select(own: StateDict, target: StateDict, rows: _Rows, report: Report) -> tuple[StateDict, dict[str, str]]:
    """Give each class of the model the rows of its name; rows of other classes keep the model's initial values."""
    wanted = [key for key in filter(CLASS_KEYS.fullmatch, own) if _fits(own[key], target.get(key), rows)]
    if not rows.found:
        return _select_none(own, wanted, rows, report)
    unused = sum(bool(_fold(name)) for name in rows.theirs) - len(rows.found)
    report.notes.append(
        f"class rows kept by name: {shorten(rows.known, 20)}; not used: those of {unused} other classes"
    )
    chosen = dict(own)
    for key in wanted:
        _check_numbers(key, own, target)
        value = target[key].detach().clone()
        value[list(rows.found)] = own[key][list(rows.found.values())].to(value)
        chosen[key] = value
    reason = f"the rows of {shorten(list(map(repr, rows.new)), 3)} only"
    return chosen, {} if rows.whole else dict.fromkeys(wanted, reason)


def _select_none(own: StateDict, wanted: list[str], rows: _Rows, report: Report) -> tuple[StateDict, dict[str, str]]:
    """Leave all class rows out: no class of the file has the name of a class of the model."""
    some = shorten(list(filter(_fold, rows.theirs)), 3)
    report.notes.append(f"no class of the file ({some}) has the name of a class of the model")
    if len(rows.theirs) != len(rows.ours):  # their shapes differ: the comparison of all tensors says so
        return own, {}
    return {key: value for key, value in own.items() if key not in wanted}, dict.fromkeys(wanted, "other classes")


def _fits(value: Tensor, initial: Tensor | None, rows: _Rows) -> bool:
    """Whether both tensors have a row for each class, and rows of one width; heads of one class for all have not."""
    if initial is None:
        return False
    return (len(rows.theirs), *value.shape[1:]) == value.shape and (len(rows.ours), *value.shape[1:]) == initial.shape


def _check_numbers(key: str, own: StateDict, target: StateDict) -> None:
    """Raise a DataError where the file's rows are of another kind of number than the model's."""
    if own[key].is_floating_point() != target[key].is_floating_point():
        raise DataError(
            f"{key} is {own[key].dtype} in the file and {target[key].dtype} in the model".replace("torch.", "")
        )

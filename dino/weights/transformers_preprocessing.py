"""What a network expects of its images, in the words of transformers' image processors (`preprocessor_config.json`)."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from dino.modeling.detector import Preprocessing
from dino.utils.files import DataError

_WHITE = 255
_MOST = 1e12  # of any number of the file
_RESCALE = 1 / _WHITE
_BILINEAR = 2  # Pillow's number of the filter
_DIGITS = 14  # of a mean or a deviation; more would show the rounding of the division


def to_processor(preprocessing: Preprocessing, category_ids: Sequence[int]) -> dict[str, Any]:
    """The fields of `preprocessor_config.json`, as `DinoDetrImageProcessor` saves them.

    Args:
        preprocessing: of a `Detector`.
        category_ids: of the classes in the data set, by label.
    """
    fields = {
        "category_ids": list(category_ids),
        "do_convert_annotations": True,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "format": "coco_detection",
        "image_mean": list(map(_to_fraction, preprocessing.pixel_mean)),
        "image_processor_type": "DinoDetrImageProcessor",
        "image_std": list(map(_to_fraction, preprocessing.pixel_std)),
        "max_detections": preprocessing.max_detections,
        "resample": _BILINEAR,
        "rescale_factor": _RESCALE,
        "size": {"longest_edge": preprocessing.max_size, "shortest_edge": preprocessing.short_side},
    }
    stated = preprocessing.input_range
    return {**fields, "input_range": list(stated)} if stated else fields


def _to_fraction(value: float) -> float:
    """A value from 0 to 255 as one from 0 to 1, without digits of rounding where it can be had back without them."""
    plain = round(value / _WHITE, 10)
    return plain if _from_fraction(plain, _RESCALE) == value else value / _WHITE


def _from_fraction(value: float, factor: float) -> float:
    """`_to_fraction` back, for pictures that were multiplied by `factor`."""
    return float(f"{value / factor:.{_DIGITS}g}")


def from_processor(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `Preprocessing` for those of `preprocessor_config.json`; what is missing has the usual value.

    Raises:
        DataError: pictures would be prepared in a way that `Detector` does not know. The message names the field.
    """
    if fields.get("do_resize", True) is not True:
        raise DataError("do_resize is not true: pictures are always resized here")
    if fields.get("resample", _BILINEAR) not in (_BILINEAR, None):
        raise DataError(f"resample is {reprlib.repr(fields['resample'])}: only bilinear, {_BILINEAR}, is known here")
    usual = Preprocessing()
    found: dict[str, Any] = {**usual._asdict(), **_read_statistics(fields), **_read_size(fields)}
    found |= {name: fields[name] for name in ("max_detections", "input_range") if name in fields}
    return found


def _read_statistics(fields: Mapping[str, Any]) -> dict[str, list[float]]:
    """Mean and deviation for values from 0 to 255; {} for the usual ones."""
    factor = fields.get("rescale_factor", _RESCALE) if fields.get("do_rescale", True) else 1.0
    if not _is_number(factor) or not 1e-6 <= factor <= 1e6:
        raise DataError(f"rescale_factor is {reprlib.repr(factor)}: a number such as 1/255 was expected")
    plain = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    given = {name: fields.get(name) for name in plain} if fields.get("do_normalize", True) else plain
    return {
        name.replace("image", "pixel"): [_from_fraction(value, factor) for value in _check_colors(name, values)]
        for name, values in given.items()
        if values is not None
    }


def _check_colors(name: str, values: Any) -> list[float]:
    """The values of a field.

    Raises:
        DataError: they are not three numbers.
    """
    if not isinstance(values, list) or len(values) != 3 or not all(map(_is_number, values)):
        raise DataError(f"{name} is {reprlib.repr(values)}: a list of three numbers was expected")
    return values


def _read_size(fields: Mapping[str, Any]) -> dict[str, Any]:
    """`short_side` and `max_size`; {} for the usual ones."""
    size = fields.get("size")
    if size is None:
        return {}
    if not isinstance(size, dict) or "shortest_edge" not in size or not {*size} <= {"shortest_edge", "longest_edge"}:
        raise DataError(f"size is {reprlib.repr(size)}: shortest_edge and longest_edge were expected")
    return {"short_side": size["shortest_edge"], "max_size": size.get("longest_edge")}


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < _MOST  # NaN is not; an integer may be too long for a float

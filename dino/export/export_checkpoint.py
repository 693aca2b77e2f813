"""Write a checkpoint as one file that runs elsewhere, and compare it with the network first."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dino.data.images import IMAGE_SUFFIXES
from dino.inference.cpu import fold_norms
from dino.modeling.detector import Detector
from dino.structures import SCORE_THRESH
from dino.utils.files import DataError, UserError, make_folder, write_new
from dino.weights.description import detector_from_checkpoint

from .export_formats import FORMATS, Run, write
from .export_wrapper import ExportWrapper, Fixed, Prepared, describe, prepare
from .onnx_int8 import quantised
from .onnx_types import to_float16
from .verify import Comparison, Limits, compare, pictures, read_data

MAX_AP_LOSS = {"fp16": 0.1, "bf16": 1.0, "int8": 1.0}  # points, by default
_MISSING = {"fp16": 0.05, "bf16": 0.2, "int8": 0.2}  # share of detections, where AP is unknown
_CALIBRATION = 32  # images to measure ranges on
_LOWEST_AP, _FEWEST = 0.05, 20  # with less, or on fewer images, an AP does not decide


class Narrow(NamedTuple):
    """A type of the arithmetic, and what it may cost.

    Args:
        dtype: float32, fp16, bf16 or int8.
        calibrate: for int8: annotations and folder of training images, to measure ranges on.
        max_ap_loss: points of AP that may be lost; by default those of `MAX_AP_LOSS`, or 0.1.
    """

    dtype: str = "float32"
    calibrate: tuple[Path, Path] | None = None
    max_ap_loss: float | None = None

    def issues(self, comparison: Comparison) -> list[str]:
        """Differences that are too large, in words.

        Of narrower types, AP alone counts where it says something, else the share of detections that are found too.
        Batches are printed, but don't count: the AP of four pictures is not precise enough.
        """
        if self.dtype == "float32" and self.max_ap_loss is None:
            return comparison.issues(Limits())
        if self.dtype == "float32":
            return comparison.issues(Limits(ap=self.max_ap_loss / 100))
        loss = MAX_AP_LOSS[self.dtype] if self.max_ap_loss is None else self.max_ap_loss
        precise = comparison.ap and comparison.ap[0] >= _LOWEST_AP and comparison.images >= _FEWEST
        missing = 1.0 if precise else _MISSING[self.dtype]
        limits = Limits(missing=missing, box=math.inf, score=math.inf, ap=loss / 100)
        return comparison._replace(cases=()).issues(limits)


_FLOAT32 = Narrow()


def export_checkpoint(
    checkpoint: str | Path,
    output: Path,
    *,
    form: str,
    fixed: Fixed | None = None,
    sampling: str = "grid",
    thresholds: Sequence[float] = (SCORE_THRESH,),
    copy: str = "auto",
    verify: Path | None = None,
    verify_json: Path | None = None,
    limit: int = 50,
    narrow: Narrow = _FLOAT32,
) -> None:
    """Export one file. A file that differs too much from the network is not kept.

    Args:
        checkpoint: a file, an address or the name of published weights.
        form: a key of FORMATS.
        fixed: the only size to take, or None for any.
        sampling: "grid", or "gather" for engines whose GridSample is wrong.
        thresholds: stored in the file: one for all classes, or one for each.
        copy: "model", "ema", or "auto" for the running average if the checkpoint has one.
        verify: folder of images to compare on. verify_json: their annotations, to compare AP. limit: how many.
        narrow: the type of the arithmetic; int8 needs `verify_json`.

    Raises:
        DataError: the checkpoint can't be used or exported, or the comparison fails.
        UserError: an option can't be used, or the output exists or can't be written.
        ImportError: a library of the format is not installed.
    """
    if output.exists():
        raise UserError(f"{output} exists: choose another name, or move it away")
    detector = detector_from_checkpoint(checkpoint, copy)
    thresholds = _spread(thresholds, detector.names)
    about = describe(detector.names, thresholds, detector.preprocessing, fixed, detector.category_ids)
    source = _read_images(verify, verify_json, detector, limit)
    to_int8 = narrow.calibrate and _calibration(narrow.calibrate, detector, about["resize"])
    print(f"exporting {checkpoint} as {form}; this takes minutes", flush=True)
    content = write(form, exportable(_cast(detector, narrow.dtype)), fixed, about, sampling=sampling)
    for made in _candidates(content, narrow.dtype, to_int8, fixed):
        if not (issues := _issues(detector, FORMATS[form].run(made), source, about["resize"], fixed, narrow)):
            break
        print(f"not kept: {'; '.join(issues)}", flush=True)
    if issues:
        raise DataError(f"{output} is not written, since it differs from the network: {'; '.join(issues)}")
    make_folder(output.parent)
    write_new(output, lambda part: part.write_bytes(made))
    print(f"{output}: {_summary(form, narrow.dtype, fixed, detector, made, compared=source is not None)}")


def _issues(
    detector: Detector, run: Run, source: Any, resize: dict[str, Any], fixed: Fixed | None, narrow: Narrow
) -> list[str]:
    """Compare with the network and print the result -> the differences that are too large; none without images."""
    if source is None:
        return []
    comparison = compare(detector, run, source, resize=resize, fixed=fixed)
    print(comparison, flush=True)
    return narrow.issues(comparison)


def _summary(form: str, dtype: str, fixed: Fixed | None, detector: Detector, content: bytes, *, compared: bool) -> str:
    """What was written, in words."""
    size = f"batch {fixed.batch}, {fixed.height} x {fixed.width}" if fixed else "any batch and size"
    kind = form if dtype == "float32" else f"{form} {dtype}"
    checked = "" if compared else "; not compared with the network: --verify IMAGES does that"
    return f"{kind}, {size}, {len(detector.names)} classes, {len(content) / 1e6:.1f} MB{checked}"


def _cast(detector: Detector, dtype: str) -> Detector:
    """The detector to export: in bfloat16 for programs of torch, else as it is."""
    if dtype != "bf16":
        return detector
    detector = deepcopy(detector)
    detector.network.to(torch.bfloat16)
    return detector


def _candidates(content: bytes, dtype: str, to_int8: list[Prepared] | None, fixed: Fixed | None) -> Iterator[bytes]:
    """Files of this type to try in turn; prints what is in 8 bits."""
    if dtype != "int8":
        yield to_float16(content) if dtype == "fp16" else content
        return
    for words, made in quantised(content, to_int8 or [], fixed):
        print(f"in 8 bits: {words}, {len(made) / 1e6:.1f} MB", flush=True)
        yield made


def _calibration(paths: tuple[Path, Path], detector: Detector, resize: dict[str, Any]) -> list[Prepared]:
    """Training images to measure ranges on."""
    input_range = detector.preprocessing.input_range
    data = read_data(*paths, detector.names, _CALIBRATION, input_range)
    return [prepare(picture.pixels, resize) for picture in pictures(data, input_range)]


def _read_images(folder: Path | None, annotations: Path | None, detector: Detector, limit: int) -> Any:
    """The images to compare on, with annotations if there are any; None without a folder."""
    if folder is None:
        return None
    if annotations is None:
        return _list_files(folder, limit)
    return read_data(annotations, folder, detector.names, limit, detector.preprocessing.input_range)


def _list_files(folder: Path, limit: int) -> list[Path]:
    """The first `limit` image files in a folder and those below it.

    Raises:
        DataError: the folder is missing or holds no image.
    """
    if not folder.is_dir():
        raise DataError(f"image folder not found: {folder}")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.name[0] != ".")
    if not paths:
        raise DataError(f"no image in {folder} to verify with")
    return paths[:limit]


def _spread(thresholds: Sequence[float], names: Sequence[str]) -> list[float]:
    """One threshold for each class.

    Raises:
        UserError: their number does not fit, or one is no score.
    """
    if len(thresholds) not in (1, len(names)):
        raise UserError(f"--score-thresh has {len(thresholds)} values for {len(names)} classes: {', '.join(names)}")
    if not all(0 <= threshold <= 1 for threshold in thresholds):
        raise UserError("--score-thresh must lie between 0 and 1")
    return [*thresholds] if len(thresholds) == len(names) else [*thresholds] * len(names)


def exportable(detector: Detector) -> ExportWrapper:
    """Wrap a copy with its batch norms folded into its convolutions: fewer operators, and faster in every program."""
    detector = deepcopy(detector)
    fold_norms(detector.network)
    return ExportWrapper(detector).eval()

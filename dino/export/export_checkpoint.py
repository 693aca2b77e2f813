"""Write a checkpoint as one file that runs elsewhere, and compare it with the network first."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from dino.data.images import IMAGE_SUFFIXES
from dino.inference.cpu import fold_norms
from dino.modeling.detector import Detector
from dino.structures import SCORE_THRESH
from dino.utils.files import DataError, UserError, make_folder, write_new
from dino.weights.description import detector_from_checkpoint

from .export_formats import FORMATS, write
from .export_wrapper import ExportWrapper, Fixed, describe
from .verify import Limits, compare, read_data


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
) -> None:
    """Export one file. A file that differs too much from the network is not kept.

    Args:
        checkpoint: a file, an address or the name of published weights.
        form: a key of FORMATS.
        fixed: the only size to take, or None for any.
        sampling: "grid", or "gather" for engines whose GridSample is wrong.
        thresholds: stored in the file: one for all classes, or one for each.
        copy: "model", "ema", or "auto" for the running average if the checkpoint has one.
        verify: folder of images to compare on. verify_json: their annotations, to compare AP.
        limit: number of these images.

    Raises:
        DataError: the checkpoint can't be used or exported, or the comparison fails.
        UserError: an option can't be used, or the output exists or can't be written.
        ImportError: a library of the format is not installed.
    """
    if output.exists():
        raise UserError(f"{output} exists: choose another name, or move it away")
    detector = detector_from_checkpoint(checkpoint, copy)
    spread = _spread(thresholds, detector.names)
    about = describe(detector.names, spread, detector.preprocessing, fixed, detector.category_ids)
    source = _read_images(verify, verify_json, detector, limit)
    print(f"exporting {checkpoint} as {form}; this takes a minute or two", flush=True)
    content = write(form, exportable(detector), fixed, about, sampling=sampling)
    run = FORMATS[form].run(content)
    if source is not None:
        comparison = compare(detector, run, source, resize=about["resize"], fixed=fixed)
        print(comparison)
        if issues := comparison.issues(Limits()):
            raise DataError(f"{output} is not written, since it differs from the network: {'; '.join(issues)}")
    make_folder(output.parent)
    write_new(output, lambda part: part.write_bytes(content))
    size = f"batch {fixed.batch}, {fixed.height} x {fixed.width}" if fixed else "any batch and size"
    checked = "" if verify else "; not compared with the network: --verify IMAGES does that"
    print(f"{output}: {form}, {size}, {len(detector.names)} classes, {len(content) / 1e6:.1f} MB{checked}")


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

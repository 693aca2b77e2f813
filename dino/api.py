"""The verbs of the console as functions: `dino.train`, `dino.evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dino.utils.files import UserError

ENGINES = ("auto", "detectron2", "plain")


def evaluate(
    checkpoint: str | Path,
    *,
    val: tuple[str | Path, str | Path],
    output: str | Path | None = None,
    shown: int = 24,
    engine: str = "auto",
) -> dict[str, Any]:
    """Evaluate a checkpoint as `dino eval` does, and write its report.

    Args:
        checkpoint: a file, an address, a published name, or the folder of a run.
        val: annotations in COCO format, and the folder of their images.
        output: a folder for report.html; a new one by default, output/evaluation.
        shown: number of images to draw.
        engine: one of ENGINES; "auto" is Detectron2 where it is installed.

    Returns:
        the content of metrics.json: "AP", "AP50", … in [0, 1], -1 where undefined; {} for data without annotations.

    Raises:
        UserError: `output` holds a report, or Detectron2 is wanted and missing.
        DataError: checkpoint or data can't be used.
    """
    from dino.evaluation.report.evaluate import claim_report, write_evaluation

    val_json, val_images = _pair("val", val)
    with claim_report(Path(output) if output else None) as folder:
        detected = detect(folder, str(checkpoint), val_json=val_json, val_images=val_images, engine=engine)
        return write_evaluation(folder, detected, shown)


def detect(
    folder: Path,
    weights: str | None,
    *,
    val_json: str | None = None,
    val_images: str | None = None,
    config_file: str = "",
    overrides: Sequence[str] = (),
    dataset: str | None = None,
    num_gpus: int = 1,
    engine: str = "auto",
) -> Any:
    """Run a checkpoint over data with one of the ENGINES -> `Detected`; arguments as of `dino.d2.evaluate_checkpoint`.

    Raises:
        UserError: an argument needs Detectron2, which is missing.
    """
    if choose_engine(engine) == "detectron2":
        from dino.d2.data_loading import forget_files
        from dino.d2.evaluate_checkpoint import detect as detect_with_detectron2

        forget_files()
        files = {"val_json": val_json, "val_images": val_images, "dataset": dataset}
        options = {"weights": weights, "config_file": config_file, "overrides": overrides, "num_gpus": num_gpus}
        return detect_with_detectron2(folder, **files, **options)
    given = {"--config-file": config_file, "--dataset": dataset, "--num-gpus": num_gpus > 1, "key=value": overrides}
    for flag in (flag for flag, value in given.items() if value):
        raise UserError(f"{flag} needs Detectron2{_MISSING}. Without it: dino eval CHECKPOINT --val ANNOTATIONS IMAGES")
    if not weights:
        raise UserError("give the checkpoint: dino eval CHECKPOINT --val ANNOTATIONS IMAGES")
    if not (val_json and val_images):
        raise UserError("give the data: dino eval CHECKPOINT --val ANNOTATIONS IMAGES")
    from dino.evaluation import plain_detection

    return plain_detection.detect(folder, weights, val_json, val_images)


_MISSING = " (not installed here; README.md says how to install it)"


def choose_engine(wanted: str) -> str:
    """ "detectron2" or "plain", of a word of ENGINES.

    Raises:
        UserError: the word is none of them, or Detectron2 is wanted and missing.
    """
    if wanted not in ENGINES:
        raise UserError(f"engine must be one of {', '.join(ENGINES)}, not {wanted!r}")
    installed = find_spec("detectron2") is not None
    if wanted == "detectron2" and not installed:
        raise UserError(f"engine detectron2 needs Detectron2{_MISSING}")
    return wanted if wanted != "auto" else "detectron2" if installed else "plain"


def _pair(name: str, value: Any) -> tuple[str, str]:
    """The two paths of a data set.

    Raises:
        UserError: the value is no pair.
    """
    if isinstance(value, str | Path) or not isinstance(value, Sequence) or len(value) != 2:
        raise UserError(f'{name} must be a pair such as ("{name}.json", "images"), not {value!r}')
    return str(value[0]), str(value[1])

"""Verbs of the console as functions: `dino.train`, `dino.evaluate`. They choose the road, with Detectron2 or without.

Libraries are imported inside the functions: the console chooses before it imports any.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dino.utils.files import UserError
from dino.utils.overrides import find_setting

if TYPE_CHECKING:
    from dino.evaluation.report.evaluate import Detected

ENGINES = ("auto", "detectron2", "plain")
_MISSING = "needs Detectron2, which is not installed here: README.md says how to install it"
_Path = str | Path


def train(
    recipe: _Path = "",
    *paths: _Path,
    train: tuple[_Path, _Path] | None = None,
    val: tuple[_Path, _Path] | None = None,
    output: _Path | None = None,
    weights: _Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    engine: str = "auto",
    **settings: Any,
) -> dict[str, Any]:
    """Train a recipe, as `dino train` does, in this process.

        dino.train("dino_r18_small_data", train=("train.json", "images"), val=("val.json", "images"),
                   output="output/mine", epochs=25)

    Five paths in place of a recipe call `dino.training.plain.train`, the loop without recipes, with its settings.

    Args:
        recipe: its name or file. A recipe is a program: run only recipes that you trust.
        train, val: annotations in COCO format, and the folder of their images; the recipe's data by default.
        output: folder of the run; the recipe's `train.output_dir` by default.
        weights: a file, an address or the name of published weights to start from; the recipe's by default.
        resume: continue the run in the folder. overwrite: move the run that is there aside.
        engine: one of ENGINES; "auto" is Detectron2's where it is installed.
        settings: of the recipe, by word or key: epochs=25, lr=1e-4, device="cpu", **{"train.ema.enabled": False}.

    Returns:
        the last evaluation: {"bbox": {"AP": percent, "AP50": …, "AP-<class>": …}}; averaged weights under "ema".

    Raises:
        UserError: recipe, data, weights, a setting or the folder can't be used; Detectron2 is wanted and missing.
        FloatingPointError: the loss or a gradient is not finite.
    """
    if len(paths) > 2 or "train_json" in settings:
        return _train_plainly([*([recipe] if recipe else []), *paths], output, weights, settings)
    if paths or not recipe:
        raise UserError('write dino.train("RECIPE", train=(ANNOTATIONS, IMAGES), val=(ANNOTATIONS, IMAGES))')
    named = {"train.output_dir": output, "train.init_checkpoint": weights}
    settings |= {key: value for key, value in named.items() if value is not None}
    engine = choose_engine(engine)
    overrides = _to_overrides(str(recipe), settings, engine)
    pairs = {"train": _pair("train", train), "val": _pair("val", val)}
    return run(str(recipe), overrides, **pairs, resume=resume, overwrite=overwrite, engine=engine)


def _train_plainly(paths: Sequence[_Path], output: _Path | None, weights: _Path | None, settings: Mapping) -> dict:
    """The former `train`: five paths, the last one perhaps as `output`, and settings of the loop without recipes."""
    from dino.training import plain

    named = {"output": output, "weights": weights}
    return plain.train(*paths, **{key: value for key, value in named.items() if value is not None}, **settings)


def run(
    recipe: str,
    overrides: Sequence[str] = (),
    *,
    train: Sequence[str | None] = (None, None),
    val: Sequence[str | None] = (None, None),
    eval_only: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    engine: str = "auto",
    processes: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Train or evaluate a recipe: what `dino train` and `train` call.

    Args:
        overrides: each key=value.
        train, val: annotations and images, or None for the recipe's.
        eval_only: evaluate `train.init_checkpoint`, train nothing.
        processes: fields of `dino.d2.training.parallel.Processes`; one process by default.
        recipe, resume, overwrite, engine: as of `train`.

    Returns:
        as of `train`; {} of several processes.
    """
    wishes = {"eval_only": eval_only, "resume": resume, "overwrite": overwrite}
    several = (processes or {}).get("num_gpus", 1) * (processes or {}).get("num_machines", 1) > 1
    if choose_engine(engine) == "detectron2":
        from dino.d2 import data_loading
        from dino.d2.training import launch, parallel

        data_loading.forget_files()
        job = launch.Job(recipe, list(overrides), launch.recipe.DataFiles(*train, *val), **wishes)
        return launch.run(job, parallel.Processes(**processes or {}))
    if several:
        raise UserError(f"training by several processes {_MISSING}")
    from dino.training import recipe_completion, recipe_data, recipe_run

    recipe_data.forget_files()
    files = recipe_completion.DataFiles(*train, *val)
    return recipe_run.run(recipe_run.RecipeJob(recipe, list(overrides), files, **wishes))


def evaluate(
    checkpoint: _Path,
    *,
    val: tuple[_Path, _Path],
    output: _Path | None = None,
    shown: int = 24,
    engine: str = "auto",
) -> dict[str, Any]:
    """Evaluate a checkpoint, as `dino eval` does, and write its report.

    Args:
        checkpoint: a file, an address, a published name, or the folder of a run.
        val: annotations in COCO format, and the folder of their images.
        output: a folder for report.html; a new one by default, output/evaluation.
        shown: number of images to draw.
        engine: one of ENGINES; "auto" is Detectron2's where it is installed.

    Returns:
        the content of metrics.json: "AP", "AP50", … in [0, 1], -1 where undefined; {} for data without annotations.

    Raises:
        UserError: `output` holds a report; Detectron2 is wanted and missing.
        DataError: checkpoint or data can't be used.
    """
    from dino.evaluation.report.evaluate import claim_report, write_evaluation
    from dino.training.curves import run_curves

    val_json, val_images = _pair("val", val)
    with claim_report(Path(output) if output else None) as folder:
        detected = detect(folder, str(checkpoint), val_json=val_json, val_images=val_images, engine=engine)
        return write_evaluation(folder, detected, shown, run_curves(detected.details.get("Weights")))


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
) -> Detected:
    """Run a checkpoint over data: what `dino eval` and `evaluate` call. Arguments as of `dino.d2.evaluate_checkpoint`.

    Raises:
        UserError: an argument needs Detectron2, which is missing.
    """
    if choose_engine(engine) == "detectron2":
        from dino.d2 import data_loading, evaluate_checkpoint

        data_loading.forget_files()
        files = {"val_json": val_json, "val_images": val_images, "dataset": dataset}
        options = {"weights": weights, "config_file": config_file, "overrides": overrides, "num_gpus": num_gpus}
        return evaluate_checkpoint.detect(folder, **files, **options)
    given = {"--config-file": config_file, "--dataset": dataset, "--num-gpus": num_gpus > 1, "key=value": overrides}
    wanted = next((flag for flag, value in given.items() if value), "")
    if wanted:
        raise UserError(f"{wanted} {_MISSING}. Without it: dino eval CHECKPOINT ANNOTATIONS IMAGES")
    if not (weights and val_json and val_images):
        raise UserError("give checkpoint and data: dino eval CHECKPOINT ANNOTATIONS IMAGES")
    from dino.evaluation import plain_detection

    return plain_detection.detect(folder, weights, val_json, val_images)


def choose_engine(wanted: str) -> str:
    """Choose "detectron2" or "plain" by a word of ENGINES.

    Raises:
        UserError: the word is none of them, or Detectron2 is wanted and missing.
    """
    if wanted not in ENGINES:
        raise UserError(f"engine must be one of {', '.join(ENGINES)}, not {wanted!r}")
    installed = find_spec("detectron2") is not None
    if wanted == "detectron2" and not installed:
        raise UserError(f"engine detectron2 {_MISSING}")
    return wanted if wanted != "auto" else "detectron2" if installed else "plain"


def _to_overrides(recipe: str, settings: Mapping[str, Any], engine: str) -> list[str]:
    """Overrides of a recipe, each key=value.

    Args:
        settings: key or bare word -> value.
        engine: "detectron2" or "plain", which read recipes each in their own way.

    Raises:
        UserError: there is no such recipe or setting.
    """
    if not settings:
        return []
    if engine == "detectron2":
        from dino.d2.recipe import read_recipe
    else:
        from dino.training.recipe_reading import read_recipe
    cfg = read_recipe(recipe)
    return [f"{find_setting(cfg, name)}={_to_text(value)}" for name, value in settings.items()]


def _to_text(value: Any) -> str:
    """A value of Python as an override has it."""
    if value is None:
        return "null"
    return json.dumps(list(value)) if isinstance(value, list | tuple) else str(value)


def _pair(name: str, value: Any) -> tuple[str | None, str | None]:
    """The two paths of a data set; None twice for None.

    Raises:
        UserError: the value is no pair.
    """
    if value is None:
        return None, None
    if isinstance(value, str | Path) or not isinstance(value, Sequence) or len(value) != 2:
        raise UserError(f'{name} must be a pair such as ("{name}.json", "images"), not {value!r}')
    return str(value[0]), str(value[1])

"""`dino eval`: AP, curves, best thresholds, confusions and the worst images of a checkpoint, in one report.html."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

from dino.data.coco import read_images
from dino.utils.files import DataError, free_name, make_folder, write_whole

from .error_analysis import Analysis
from .report import image_paths, write_report
from .results import read_results

EXAMPLE = """
examples:
  dino eval --weights output/mine/model_final.pth --val-json val.json --val-images images
  dino eval --weights model.pth --dataset coco_2017_val --num-gpus 2
  dino eval --weights checkpoint0011_4scale.pth --config-file dino_r50_4scale_12ep   (a file of another program)
  dino eval --results detections.json --val-json val.json --val-images images     (of any program, no model)
Data without annotations gives a page of predictions. A recipe is a program: run only recipes that you trust.
"""


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="dino eval", description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", default="", help="recipe, by name or file (default: what the checkpoint says)")
    parser.add_argument("--weights", help="checkpoint")
    parser.add_argument(
        "--results", type=Path, help="detections in COCO's results format, instead of recipe and weights"
    )
    parser.add_argument("--val-json", help="annotations in COCO format, instead of the recipe's data")
    parser.add_argument("--val-images", help="folder of their images")
    parser.add_argument("--train-json", help="not used: `dino eval` takes the data arguments of `dino train`")
    parser.add_argument("--train-images", help="not used")
    parser.add_argument("--dataset", help="name of a data set that Detectron2 knows, instead of the recipe's data")
    parser.add_argument("--output", type=Path, help="folder for the report (default: a new one, output/evaluation)")
    parser.add_argument("--shown", type=int, default=24, help="how many images to draw (default %(default)s)")
    parser.add_argument(
        "--num-gpus",
        type=int,
        default=1,
        help="processes, one per GPU or, without one, on the CPU (default %(default)s)",
    )
    parser.add_argument("opts", nargs="*", help="overrides of the recipe, key=value")
    parser.set_defaults(num_machines=1, machine_rank=0, dist_url="auto")
    args = parser.parse_intermixed_args(argv)
    if args.dataset and args.val_json:
        parser.error("--dataset and --val-json exclude each other")
    if args.results and not (args.val_json and args.val_images):
        parser.error("--results needs --val-json and --val-images")
    if not args.results and not args.config_file and not (args.val_json or args.dataset):
        parser.error("without --config-file, say which data: --val-json and --val-images, or --dataset")
    if args.shown < 0:
        parser.error("--shown can't be negative")
    return args


def choose_folder(wanted: Path | None) -> Path:
    """Where the report goes.

    Raises:
        DataError: one is there already.
    """
    folder = wanted or free_name(Path("output/evaluation"))
    if (folder / "report.html").exists():
        raise DataError(f"{folder / 'report.html'} exists: choose another --output")
    return folder


def table(analysis: Analysis) -> str:
    """The figures of the report's head and of each class, as text."""
    lines = [
        "  ".join(f"{name} {100 * value:.1f}" if value >= 0 else f"{name} –" for name, value in analysis.ap.items())
    ]
    width = max(len("class"), *(len(row.name) for row in analysis.rows))
    lines.append(f"{'class':<{width}}  objects     AP   AP50   AP75  threshold  precision  recall     F1")
    for row in analysis.rows:
        ap = "".join(f"{100 * x:7.1f}" if x >= 0 else "      –" for x in (row.ap, row.ap50, row.ap75))
        best = f"{row.threshold:11.2f}{100 * row.precision:11.1f}{100 * row.recall:8.1f}{100 * row.f1:7.1f}"
        lines.append(f"{row.name:<{width}}{row.objects:9}{ap}{best if row.objects else ''}")
    return "\n".join(lines)


def write_metrics(path: Path, analysis: Analysis) -> None:
    """The same figures as JSON, AP in [0, 1] and -1 where undefined."""
    content = {**analysis.ap, "threshold": analysis.threshold, "classes": [row._asdict() for row in analysis.rows]}
    write_whole(path, lambda part: part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8"))


def main(argv: Sequence[str] | None = None) -> None:
    """The verb."""
    args = parse_arguments(argv)
    if "LOCAL_RANK" in os.environ:
        raise DataError("`dino eval` starts its processes itself: write --num-gpus N instead of torchrun")
    folder = choose_folder(args.output)
    if args.results:
        data = read_images(args.val_json, args.val_images)
        files = image_paths(data, args.val_images)
        results, details = args.results, {"Data": args.val_json, "Detections": str(args.results)}
    else:
        from dino.d2.evaluate_checkpoint import detect  # Detectron2 is needed from here on

        data, files, results, details = detect(args, folder)
    found = read_results(results, data)
    make_folder(folder)
    page = folder / "report.html"
    print(f"comparing {len(found):,} detections on {len(data['images']):,} images", flush=True)
    analysis = write_report(page, data=data, results=found, files=files, details=details, shown=args.shown)
    if analysis:
        write_metrics(folder / "metrics.json", analysis)
        print(table(analysis))
    else:
        print(f"{details['Data']} has no annotations: the page shows {len(found)} predictions, no AP")
    print(f"report written to {page}")

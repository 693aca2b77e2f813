"""Draw the detections of a model that is built from a recipe. If the checkpoint describes its model: dino predict."""

import argparse
import sys
from pathlib import Path

from dino.cli import report_errors  # isort: skip  # silences warnings of Detectron2; must come before its import
import torch
from detectron2.config import LazyConfig, instantiate

from dino.d2.checkpoint import Checkpointer, read_names
from dino.d2.recipe_description import describe
from dino.inference.predict_files import plan, predict
from dino.inference.predictor import Predictor
from dino.modeling.detector import Detector, Preprocessing
from dino.utils.files import UserError
from dino.utils.overrides import apply

EXAMPLE = """
example:
  python tools/demo.py --config-file output/mine/config.yaml --weights output/mine/model_final.pth \\
      --input photo.jpg folder --output output/drawn
The class names come from the weights. A recipe or config.yaml is a program: run only recipes that you trust.
"""


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, help="recipe (.py), or the config.yaml of a run")
    parser.add_argument("--weights", required=True, help="checkpoint of the same model")
    parser.add_argument("--input", required=True, nargs="+", help="images, folders of images, videos")
    parser.add_argument("--output", required=True, type=Path, help="folder for the drawn images")
    parser.add_argument("--threshold", type=float, default=0.4, help="lowest score that is drawn (default %(default)s)")
    parser.add_argument("opts", nargs="*", help="overrides of the recipe, key=value")
    return parser


def make_predictor(args):
    if not Path(args.config_file).is_file():
        raise UserError(f"recipe not found: {args.config_file}")
    names = read_names(str(args.weights))
    cfg = LazyConfig.load(args.config_file)
    apply(cfg, args.opts)
    cfg.model.num_classes = len(names)
    model = instantiate(cfg.model).to("cuda" if torch.cuda.is_available() else "cpu").eval()
    content = Checkpointer(model, names=names).load_whole(str(args.weights))
    preprocessing = Preprocessing(**describe(cfg)["preprocessing"])
    detector = Detector(model.network, preprocessing, names, category_ids=content.get("category_ids", ())).eval()
    return Predictor(detector, score_thresh=args.threshold)


def main(argv=None):
    args = build_parser().parse_intermixed_args(argv)
    jobs = plan(args.input, args.output)
    predict(make_predictor(args), jobs, args.output)


if __name__ == "__main__":
    sys.exit(report_errors(main))

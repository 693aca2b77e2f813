"""Draw a model's detections, built from a recipe. For a checkpoint that carries its description: dino predict."""

import argparse
import sys
import warnings
from pathlib import Path

for message in (".*torch.jit.*is deprecated.*", ".*pkg_resources is deprecated.*"):
    warnings.filterwarnings("ignore", message=message)  # of Detectron2 itself; must come before its import

import torch  # noqa: E402
from detectron2.config import LazyConfig, instantiate  # noqa: E402

from dino.d2 import recipe  # noqa: E402
from dino.d2.checkpoint import Checkpointer, read_names  # noqa: E402
from dino.d2.recipe_description import describe  # noqa: E402
from dino.inference.predict_files import plan, predict  # noqa: E402
from dino.inference.predictor import Predictor  # noqa: E402
from dino.modeling.detector import Detector, Preprocessing  # noqa: E402
from dino.utils.files import DataError, UserError, message_of  # noqa: E402

EXAMPLE = """
example:
  python tools/demo.py --config-file output/mine/config.yaml --weights output/mine/model_final.pth \\
      --input photo.jpg folder --output output/drawn
The names of the classes come from the weights. A recipe, also a config.yaml, is a program: use those that you trust.
"""


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, help="recipe (.py), or the config.yaml of a run")
    parser.add_argument("--weights", required=True, help="checkpoint of the same model")
    parser.add_argument("--input", required=True, nargs="+", help="images, folders of images, videos")
    parser.add_argument("--output", required=True, type=Path, help="folder for the pictures")
    parser.add_argument("--threshold", type=float, default=0.4, help="lowest score that is drawn (default %(default)s)")
    parser.add_argument("opts", nargs="*", help="overrides of the recipe, key=value")
    return parser.parse_intermixed_args(argv)


def make_predictor(args):
    if not Path(args.config_file).is_file():
        raise DataError(f"recipe not found: {args.config_file}")
    names = read_names(str(args.weights))
    cfg = LazyConfig.load(args.config_file)
    recipe.check_overrides(cfg, args.opts)
    cfg = LazyConfig.apply_overrides(cfg, args.opts)
    cfg.model.num_classes = len(names)
    model = instantiate(cfg.model).to("cuda" if torch.cuda.is_available() else "cpu").eval()
    Checkpointer(model, names=names).load_whole(str(args.weights))
    preprocessing = Preprocessing(**describe(cfg)["preprocessing"])
    return Predictor(Detector(model.network, preprocessing, names).eval(), score_thresh=args.threshold)


def main(argv=None):
    args = parse_arguments(argv)
    jobs = plan(args.input, args.output)
    predict(make_predictor(args), jobs, args.output)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {message_of(error)}")

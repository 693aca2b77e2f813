"""Draw what a checkpoint predicts beside the true boxes: the picture of README.md.

    python tools/draw_predictions.py output/raccoon/model_final.pth test.json images docs/predictions.jpg \
        --image raccoon-12.jpg --image raccoon-63.jpg
"""

import argparse
import sys
from pathlib import Path

from torchvision.transforms import v2

from dino import Predictor
from dino.data.coco import CocoImages
from dino.structures import SCORE_THRESH
from dino.training.run_pictures import MOST_IMAGES, draw_val_predictions
from dino.utils.files import DataError, UserError


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a file, an address, or a name of `dino weights`")
    parser.add_argument("annotations", help="in COCO format")
    parser.add_argument("images", help="folder of the images")
    parser.add_argument("output", type=Path, help="the picture: .png or .jpg")
    parser.add_argument(
        "--image", action="append", default=[], help="file name of an image, up to 8 times (default: the first 8)"
    )
    parser.add_argument(
        "--score-thresh", type=float, default=SCORE_THRESH, help="lowest score that is drawn (default %(default)s)"
    )
    parser.add_argument("--title", default="", help="above the picture")
    return parser


def choose(data, wanted):
    """Indices of the wanted images, or of the first ones."""
    indices = {entry["file_name"]: index for index, entry in enumerate(data.images)}
    if missing := [name for name in wanted if name not in indices]:
        raise DataError(f"{missing[0]!r} is no file_name of the annotations")
    return [indices[name] for name in wanted or indices][:MOST_IMAGES]


def draw(args):
    """Predict and draw."""
    predictor = Predictor.from_checkpoint(args.checkpoint, score_thresh=args.score_thresh)
    detector = predictor.detector
    data = CocoImages.for_detector(args.annotations, args.images, detector).with_transforms(v2.Identity())
    images, found, boxes, labels = [], [], [], []
    for image, objects, _ in (data[index] for index in choose(data, args.image)):
        images.append(image)
        found.append(predictor(image.permute(1, 2, 0).numpy()).detections)
        boxes.append(objects["boxes"])
        labels.append(objects["labels"])
    draw_val_predictions(args.output, images, found, boxes, labels, detector.names, args.score_thresh, args.title)
    print(f"{len(images)} images drawn in {args.output}")


def main(argv=None):
    args = build_parser().parse_args(argv)
    try:
        draw(args)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

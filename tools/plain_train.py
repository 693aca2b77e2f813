"""Train and evaluate DINO on COCO-format data in a plain PyTorch loop: torchvision and pycocotools, no Detectron2.

    python tools/plain_train.py --train-json train.json --train-images images \\
        --val-json val.json --val-images images --output output/plain --epochs 20
    python tools/plain_train.py --val-json val.json --val-images images \\
        --eval-only --weights output/plain/model.pth

The recipes of `configs/` belong to `tools/lazyconfig_train_net.py`; here arguments choose a network for small data.
"""

import argparse
import sys
from pathlib import Path

import torch

from dino.modeling.precision import PRECISIONS
from dino.training import plain
from dino.utils.files import UserError, message_of

DEFAULTS = plain.Settings(device="cuda" if torch.cuda.is_available() else "cpu")


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for split in ("train", "val"):
        parser.add_argument(f"--{split}-json", type=Path, help="COCO-format annotations")
        parser.add_argument(f"--{split}-images", type=Path, help="folder of their images")
    parser.add_argument("--output", type=Path, default=Path("output/plain"), help="a new folder")
    parser.add_argument(
        "--weights", help="model.pth, or a backbone's file or address, to start from; model.pth to evaluate"
    )
    parser.add_argument(
        "--init-parts",
        choices=("all", "backbone"),
        help="what to take of --weights; backbone: the backbone alone, which may be any detector's (default: all)",
    )
    parser.add_argument("--eval-only", action="store_true", help="evaluate --weights, train nothing")
    parser.add_argument("--device", help="cpu, cuda, …")
    parser.add_argument("--bf16", action="store_true", help="run the network under bfloat16 autocast")
    parser.add_argument(
        "--float32-precision",
        choices=PRECISIONS,
        help="of products in float32 on a GPU; highest: no TensorFloat-32",
    )
    parser.add_argument("--compile", action="store_true", help="compile the network: a slow start, then faster")
    parser.add_argument("--cuda-graphs", type=int, metavar="N", help="evaluate so many sizes of images by CUDA graphs")
    parser.add_argument("--backbone", help="any of TorchvisionBackbone or TimmBackbone")
    parser.add_argument(
        "--norm", choices=plain.NORMS, help="of the backbone; FrozenBN fine-tunes it at a tenth of --lr"
    )
    parser.add_argument("--size", type=int, help="short side of the images in pixels")
    parser.add_argument(
        "--input-range",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="values of grey images of more than 8 bits that become black and white (default: by their type)",
    )
    parser.add_argument("--flips", choices=plain.FLIPS, help="of training images")
    parser.add_argument("--embed-dim", type=int, help="width of encoder and decoder")
    parser.add_argument("--layers", type=int, help="of the encoder, and of the decoder")
    parser.add_argument("--queries", type=int, help="candidates of an image")
    parser.add_argument("--epochs", type=float, help="length of the training")
    parser.add_argument("--batch", type=int, help="images of a step")
    parser.add_argument("--lr", type=float, help="falls to a tenth over the last fifth of the training")
    parser.add_argument("--workers", type=int, help="reading processes")
    parser.add_argument("--seed", type=int, help="of weights, order, flips and noise")
    parser.set_defaults(**DEFAULTS._asdict())
    return parser


def parse_arguments(argv=None):
    return build_parser().parse_args(argv)


def settings_of(args):
    return plain.Settings(**{name: getattr(args, name) for name in plain.Settings._fields})


def main(argv=None):
    args = parse_arguments(argv)
    if not args.val_json or not args.val_images or not (args.eval_only or (args.train_json and args.train_images)):
        raise UserError("give --val-json and --val-images, and to train also --train-json and --train-images")
    if args.eval_only and not args.weights:
        raise UserError("--eval-only needs --weights: the file to evaluate")
    val, settings = (args.val_json, args.val_images), settings_of(args)._asdict()
    if args.eval_only:
        plain.evaluate(*val, args.weights, args.output, **settings)
    else:
        start = {"weights": args.weights, **({"parts": args.init_parts} if args.init_parts else {})}
        plain.train(args.train_json, args.train_images, *val, args.output, **start, **settings)


if __name__ == "__main__":
    try:
        main()
    except (UserError, FloatingPointError) as error:
        sys.exit(f"error: {message_of(error)}")

"""Draw the pictures of docs/how_it_works.md and docs/method.md again.

    python tools/draw_pictures.py      (or, in an environment that is set up: make pictures)

Makes synthetic shapes, trains a small DINO of six layers on them for some minutes on one thread, and draws a batch with
`dino explain`. An existing model in output/pictures is used again: remove the folder to train another.
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = shlex.split("--size 128 --embed-dim 64 --layers 6 --queries 40 --lr 4e-4 --bf16 --workers 0")
SEED = 7  # of the noise: two of six negatives have an inverted side, which is the usual share
BATCH = ("00016.png", "00021.png")  # six objects, the first of the two is drawn, and seven


def call(*command):
    """Run a program and stop with its exit code if it fails."""
    print("$ " + " ".join(map(str, command)), flush=True)
    code = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=False).returncode
    if code:
        sys.exit(code)


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "output/pictures", help="folder of the data and the model")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/pictures", help="folder of the pictures")
    parser.add_argument("--images", type=int, default=600, help="number of training images (default %(default)s)")
    parser.add_argument("--epochs", type=float, default=4, help="length of the training (default %(default)s)")
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)
    shapes, run = args.work.resolve() / "shapes", args.work.resolve() / "run"
    if not shapes.exists():
        call("tools/make_shapes.py", shapes, "--train", args.images, "--val", 20)
    if not (run / "model.pth").exists():
        data = []
        for split in ("train", "val"):
            data += [f"--{split}-json", shapes / f"{split}.json", f"--{split}-images", shapes / split]
        call("tools/plain_train.py", *data, *SETTINGS, "--epochs", args.epochs, "--output", run)
    batch = [f"--image={name}" for name in BATCH]
    words = [shapes / "train.json", shapes / "train", "--weights", run / "model.pth", *batch]
    call("-m", "dino", "explain", *words, f"--seed={SEED}", "--output", args.output.resolve())


if __name__ == "__main__":
    main()

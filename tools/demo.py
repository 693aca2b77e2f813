"""Draw a model's detections on pictures with Detectron2's Visualizer."""

import argparse
import sys
import warnings
from pathlib import Path

for message in (".*torch.jit.*is deprecated.*", ".*pkg_resources is deprecated.*"):
    warnings.filterwarnings("ignore", message=message)  # of Detectron2 itself; must come before its import

import torch  # noqa: E402
from detectron2.config import LazyConfig, instantiate  # noqa: E402
from detectron2.data import Metadata  # noqa: E402
from detectron2.utils.visualizer import Visualizer  # noqa: E402
from PIL import Image  # noqa: E402
from tqdm import tqdm  # noqa: E402

from dino.d2 import recipe  # noqa: E402
from dino.d2.checkpoint import Checkpointer, read_names  # noqa: E402
from dino.files import DataError, message_of, write_whole  # noqa: E402
from dino.images import IMAGE_SUFFIXES, read_image  # noqa: E402

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
    parser.add_argument("--input", required=True, nargs="+", type=Path, help="images and folders of images")
    parser.add_argument("--output", required=True, type=Path, help="folder for the pictures")
    parser.add_argument("--threshold", type=float, default=0.4, help="lowest score that is drawn (default %(default)s)")
    parser.add_argument("opts", nargs="*", help="overrides of the recipe, key=value")
    return parser.parse_intermixed_args(argv)


def list_images(inputs):
    """Image files among the inputs and directly inside their folders."""
    files = []
    for path in inputs:
        if path.is_dir():
            found = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
            if not found:
                raise DataError(f"no images in the folder {path}; known endings: {' '.join(sorted(IMAGE_SUFFIXES))}")
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise DataError(f"input not found: {path}")
    return files


def load_model(args):
    """-> the detector with its weights, the mapper of its test data, and the names of its classes."""
    if not Path(args.config_file).is_file():
        raise DataError(f"recipe not found: {args.config_file}")
    names = read_names(str(args.weights))
    cfg = LazyConfig.load(args.config_file)
    recipe.check_overrides(cfg, args.opts)
    cfg = LazyConfig.apply_overrides(cfg, args.opts)
    cfg.model.num_classes = len(names)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = instantiate(cfg.model).to(device).eval()
    Checkpointer(model, names=names).load_whole(str(args.weights))
    return model, instantiate(cfg.dataloader.test.mapper), names


def draw(model, mapper, names, path, threshold):
    """A picture of the file's detections, as an RGB array."""
    image = read_image(path)
    height, width = image.shape[:2]
    (result,) = model([mapper({"file_name": str(path), "height": height, "width": width})])
    found = result["instances"].to("cpu")
    metadata = Metadata(name="demo", thing_classes=names)
    return Visualizer(image, metadata).draw_instance_predictions(found[found.scores >= threshold]).get_image()


def main(argv=None):
    args = parse_arguments(argv)
    files = list_images(args.input)
    targets = [args.output / f"{path.stem}.png" for path in files]
    for path, target in zip(files, targets, strict=True):
        if target.exists() or targets.count(target) > 1:
            raise DataError(f"{path}: {target} is taken. Choose another --output")
    model, mapper, names = load_model(args)
    args.output.mkdir(parents=True, exist_ok=True)
    for path, target in zip(tqdm(files, desc="draw", disable=None), targets, strict=True):
        picture = Image.fromarray(draw(model, mapper, names, path, args.threshold))
        write_whole(target, lambda part, picture=picture: picture.save(part, format="PNG"))
    print(f"{len(files)} pictures written to {args.output}")


if __name__ == "__main__":
    try:
        main()
    except DataError as error:
        sys.exit(f"error: {message_of(error)}")

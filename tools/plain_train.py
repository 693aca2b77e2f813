"""Train and evaluate DINO on COCO-format data in a plain PyTorch loop: torchvision and pycocotools, no Detectron2.

    python tools/plain_train.py --train-json train.json --train-images images \\
        --val-json val.json --val-images images --output output/plain --epochs 20
    python tools/plain_train.py --val-json val.json --val-images images \\
        --eval-only --weights output/plain/model.pth

The recipes of `configs/` belong to `tools/lazyconfig_train_net.py`; here arguments choose a network for small data.
"""

import argparse
import json
import math
import random
import sys
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from tqdm import tqdm

from dino.data.coco import CocoImages, ShortSide, collate
from dino.evaluation.average_precision import evaluate, to_results
from dino.inference.memory import keep_freed_memory
from dino.layers import HungarianMatcher, NonFiniteCostError, SetCriterion, Target, detections
from dino.modeling import CudaGraphs, compile_network, use_float32_precision
from dino.modeling.precision import PRECISIONS
from dino.utils.files import DataError, free_name, message_of, write_whole
from dino.weights.description import Preprocessing, build_network

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, RGB in [0, 1]


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for split in ("train", "val"):
        parser.add_argument(f"--{split}-json", type=Path, help="COCO-format annotations")
        parser.add_argument(f"--{split}-images", type=Path, help="folder of their images")
    parser.add_argument("--output", type=Path, default=Path("output/plain"), help="a new folder")
    parser.add_argument("--weights", type=Path, help="model.pth to start from, or to evaluate")
    parser.add_argument("--eval-only", action="store_true", help="evaluate --weights, train nothing")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, …")
    parser.add_argument("--bf16", action="store_true", help="run the network under bfloat16 autocast")
    parser.add_argument(
        "--float32-precision",
        choices=PRECISIONS,
        default="high",
        help="of products in float32 on a GPU; highest: no TensorFloat-32",
    )
    parser.add_argument("--compile", action="store_true", help="compile the network: a slow start, then faster")
    parser.add_argument(
        "--cuda-graphs", type=int, default=0, metavar="N", help="evaluate so many sizes of images by CUDA graphs"
    )
    parser.add_argument("--backbone", default="resnet18", help="any of TorchvisionBackbone")
    parser.add_argument("--size", type=int, default=240, help="short side of the images in pixels")
    parser.add_argument(
        "--flips", choices=["none", "horizontal", "both"], default="horizontal", help="of training images"
    )
    parser.add_argument("--embed-dim", type=int, default=128, help="width of encoder and decoder")
    parser.add_argument("--layers", type=int, default=3, help="of the encoder, and of the decoder")
    parser.add_argument("--queries", type=int, default=100, help="candidates of an image")
    parser.add_argument("--epochs", type=float, default=20, help="length of the training")
    parser.add_argument("--batch", type=int, default=4, help="images of a step")
    parser.add_argument("--lr", type=float, default=2e-4, help="falls to a tenth over the last fifth of the training")
    parser.add_argument("--workers", type=int, default=1, help="reading processes")
    parser.add_argument("--seed", type=int, default=42, help="of weights, order, flips and noise")
    return parser.parse_args(argv)


def transforms(args, training):
    flips = {"none": [], "horizontal": [v2.RandomHorizontalFlip()]}
    flips["both"] = [*flips["horizontal"], v2.RandomVerticalFlip()]
    clean = [v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes(min_size=1)]
    tensors = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    resize = ShortSide(args.size, 2 * args.size)
    return v2.Compose([*flips[args.flips if training else "none"], resize, *clean, *tensors])


def autocast(args):
    return torch.autocast(args.device.split(":")[0], torch.bfloat16, enabled=args.bf16)


@torch.inference_mode()
def predict(model, data, args):
    """Every image by itself, so that none is padded -> entries of COCO's results format."""
    model.eval()
    run = CudaGraphs(model, most=args.cuda_graphs) if args.cuda_graphs else model
    results = []
    for images, padding, _, (entry,) in tqdm(
        DataLoader(data, collate_fn=collate, num_workers=args.workers), desc="evaluate", disable=None
    ):
        with autocast(args):
            predictions = run(images.to(args.device), padding.to(args.device)).decoder
        size = entry["height"], entry["width"]
        found = detections(predictions.logits[-1, 0], predictions.boxes[-1, 0], size, max_detections=100)
        results += to_results(found, entry["id"], data.category_ids)
    return results


def train(model, data, args):
    model.train()
    criterion = SetCriterion(matcher=HungarianMatcher())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr, weight_decay=1e-4)
    loader = DataLoader(
        data, args.batch, shuffle=True, drop_last=len(data) > args.batch, collate_fn=collate, num_workers=args.workers
    )
    steps = max(1, round(args.epochs * len(loader)))
    drop = torch.optim.lr_scheduler.MultiStepLR(optimizer, [round(0.8 * steps)])
    batches = (batch for _ in range(math.ceil(args.epochs)) for batch in loader)
    progress = tqdm(range(steps), desc="train", disable=None)
    for step, (images, padding, targets, entries) in zip(progress, batches, strict=False):
        targets = [Target(t.labels.to(args.device), t.boxes.to(args.device)) for t in targets]
        with autocast(args):
            outputs = model(images.to(args.device), padding.to(args.device), targets)
        try:
            loss = sum(criterion(outputs, targets).values())
        except NonFiniteCostError:  # it knows the image by its place in the batch only
            loss = torch.tensor(math.nan)
        if not torch.isfinite(loss):
            names = [entry["file_name"] for entry in entries]
            raise FloatingPointError(f"the loss is {loss.item()} at step {step}, images {names}. Lower --lr")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        drop.step()
        if step % 50 == 0 or step == steps - 1:
            tqdm.write(f"step {step + 1}/{steps}  loss {loss.item():.2f}")


def describe(args, num_classes):
    """The network in the words of `dino.weights.description`, which the checkpoint carries."""
    backbone = {"_target_": "dino.modeling.TorchvisionBackbone", "name": args.backbone, "norm": "BN"}
    return {
        "network": {
            "_target_": "dino.modeling.build_dino",
            "backbone": backbone,
            "num_classes": num_classes,
            "num_queries": args.queries,
            "embed_dim": args.embed_dim,
            "hidden_dim": 4 * args.embed_dim,
            "encoder_layers": args.layers,
            "decoder_layers": args.layers,
        }
    }


def build(args, num_classes):
    try:
        return build_network(describe(args, num_classes)).to(args.device)
    except ValueError as error:
        raise DataError(f"no network can be built from these arguments: {error}") from error


def save(model, args, names):
    size = {"short_side": args.size, "max_size": 2 * args.size, "max_detections": 100}
    about = {"config": json.dumps(describe(args, len(names))), "preprocessing": Preprocessing(**size)._asdict()}
    content = {"model": model.state_dict(), "names": names, "about": about}
    write_whole(args.output / "model.pth", lambda part: torch.save(content, part))


def load(model, path, names):
    """Load weights that this program saved; plain tensors only, so that no code in the file can run."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(checkpoint["model"])
    except FileNotFoundError:
        raise DataError(f"weights not found: {path}") from None
    except Exception as error:
        raise DataError(f"can't use the weights {path}: {str(error)[:500]}") from error
    if checkpoint.get("names") != names:
        raise DataError(f"{path} was trained for the classes {checkpoint.get('names')}, the data has {names}")


def main(argv=None):
    args = parse_arguments(argv)
    keep_freed_memory()
    use_float32_precision(args.float32_precision)
    random.seed(args.seed)
    torch.manual_seed(args.seed)
    if not args.val_json or not args.val_images or not (args.eval_only or (args.train_json and args.train_images)):
        raise DataError("give --val-json and --val-images, and to train also --train-json and --train-images")
    if args.eval_only and not args.weights:
        raise DataError("--eval-only needs --weights: the file to evaluate")
    if not args.eval_only and (args.output / "model.pth").exists():
        raise DataError(f"{args.output} holds a trained model: choose another --output, or move it away")
    if args.eval_only:
        args.output = free_name(args.output / "evaluation")  # the results of the training stay as they are
    val = CocoImages(args.val_json, args.val_images, transforms(args, training=False))
    model = build(args, len(val.names))
    if args.weights:
        load(model, args.weights, val.names)
    if args.compile:
        compile_network(model)
    args.output.mkdir(parents=True, exist_ok=True)
    seconds = 0.0
    if not args.eval_only:
        data = CocoImages(args.train_json, args.train_images, transforms(args, training=True))
        if data.names != val.names:
            raise DataError(f"training and validation data differ in their classes: {data.names}, {val.names}")
        empty = sum(not objects for objects in data.objects.values())
        print(f"{len(data)} images, {empty} without objects, {data.dropped} boxes of no size dropped; {data.names}")
        start = time.perf_counter()
        train(model, data, args)
        seconds = time.perf_counter() - start
        save(model, args, val.names)
    results = predict(model, val, args)
    metrics = {**evaluate(val.data, results), "training_seconds": round(seconds, 1)}
    for name, content in (("results.json", results), ("metrics.json", metrics)):
        write_whole(args.output / name, lambda part, content=content: part.write_text(json.dumps(content)))
    print("\n".join(f"{name:>18} {value:.3f}" for name, value in metrics.items()), f"\nwritten to {args.output}")


if __name__ == "__main__":
    try:
        main()
    except (DataError, FloatingPointError) as error:
        sys.exit(f"error: {message_of(error)}")

"""Evaluate the last weights of a comparison's training on other images.

    python benchmarks/compare_test.py RUN JSON IMAGES

Writes RUN/test.json: AP and AP50 in percent, of raw and of averaged weights.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from detectron2.config import LazyConfig, instantiate
from detectron2.evaluation import inference_on_dataset

from dino.d2 import recipe
from dino.training.ema import Ema
from dino.utils.files import write_whole
from dino.weights import read_content


def evaluate(run: Path, annotations: str, images: str) -> dict[str, float]:
    """-> AP and AP50 in percent; `ema_` in front for the averaged weights."""
    cfg = LazyConfig.load(str(run / "config.yaml"))
    files = recipe.DataFiles(val_json=annotations, val_images=images)
    cfg = recipe.complete(cfg, [f"train.output_dir={run / 'test'}", "train.init_checkpoint="], files, eval_only=True)
    if "weights" in cfg.model:
        cfg.model.weights = ""
    (run / "test").mkdir(exist_ok=True)  # holds the evaluator's clock
    content = read_content(run / "model_final.pth")
    model = instantiate(cfg.model).to(cfg.train.device).eval()
    model.load_state_dict(content["model"])
    ema = Ema(model, decay=0)
    ema.load_state_dict(content["ema"])
    found = metrics(cfg, model, "")
    with ema.applied():
        return found | metrics(cfg, model, "ema_")


def metrics(cfg, model, prefix: str) -> dict[str, float]:
    """AP and AP50 of the weights that the model holds."""
    result = inference_on_dataset(model, instantiate(cfg.dataloader.test), instantiate(cfg.dataloader.evaluator))
    return {f"{prefix}{key}": result["bbox"][key] for key in ("AP", "AP50")}


def main() -> None:
    """Evaluate, write."""
    run, annotations, images = sys.argv[1:]
    found = evaluate(Path(run), annotations, images)
    write_whole(Path(run) / "test.json", lambda part: part.write_text(json.dumps(found) + "\n"))


if __name__ == "__main__":
    main()

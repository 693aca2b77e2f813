"""Fine-tune DINO on data in COCO format with transformers' Trainer.

    python projects/dino/finetune_transformers.py --train_json train.json --train_images images \\
        --val_json val.json --val_images images --model FOLDER --output_dir output/mine --num_train_epochs 12

The other flags are those of transformers' TrainingArguments: --learning_rate, --bf16, --gradient_accumulation_steps, ….
`--resume_from_checkpoint last` continues. On several GPUs: `accelerate launch --num_processes 4` in place of `python`.
Needs the extra `hf` (pip install ".[hf]"). docs/transformers.md explains.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torchvision
from torchvision.transforms import v2
from transformers import HfArgumentParser, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from dino.data.coco import CocoImages, ResizeShortSide
from dino.hf import DinoDetrConfig, DinoDetrForObjectDetection, DinoDetrImageProcessor
from dino.hf.detection_training import CocoCollator, CocoMetrics, DetectionTrainer
from dino.utils.files import UserError, message_of

SCALES = [0.6 + 0.04 * step for step in range(11)]  # of training images: short sides of 480, …, 800 pixels


@dataclass
class Start:
    """The data, and the model to begin with."""

    train_json: str = field(metadata={"help": "COCO-format annotations"})
    train_images: str = field(metadata={"help": "folder of their images"})
    val_json: str = field(metadata={"help": "annotations to evaluate"})
    val_images: str = field(metadata={"help": "folder of their images"})
    model: str = field(default="", metadata={"help": "folder of a model, or its name on the hub; none: a new model"})
    backbone: str = field(default="resnet50", metadata={"help": "of a new model: of torchvision, else of timm"})
    backbone_checkpoint: str = field(default="", metadata={"help": "file with its weights, to load without a network"})
    from_scratch: bool = field(default=False, metadata={"help": "random weights in the backbone too"})
    fields: str = field(default="{}", metadata={"help": "more fields of DinoDetrConfig, as JSON"})
    short_side: int = field(default=0, metadata={"help": "of images in pixels; 0: that of the model, or 800"})


@dataclass
class Settings(TrainingArguments):
    """Those of transformers, with the defaults of DINO."""

    output_dir: str = "output/transformers"
    learning_rate: float = 1e-4  # a tenth for the backbone
    weight_decay: float = 1e-4
    max_grad_norm: float = 0.1
    per_device_train_batch_size: int = 2
    per_device_eval_batch_size: int = 1  # padding costs AP
    num_train_epochs: float = 12
    lr_scheduler_type: str = "cosine"
    eval_strategy: str = "epoch"
    save_strategy: str = "epoch"
    save_total_limit: int = 2
    load_best_model_at_end: bool = True
    metric_for_best_model: str = "AP"
    remove_unused_columns: bool = False
    dataloader_pin_memory: bool = torch.accelerator.is_available()
    report_to: str = "none"


def make_processor(start):
    """The image processor: that of the model, or of a new one, with the mean and deviation of its backbone."""
    options = {"size": {"shortest_edge": start.short_side, "longest_edge": start.short_side * 5 // 3}}
    options = options if start.short_side else {}
    if start.model:
        return DinoDetrImageProcessor.from_pretrained(start.model, **options)
    timm = find_timm(start.backbone)
    if timm:
        pixels = timm.get_pretrained_cfg(start.backbone)
        options.update(image_mean=list(pixels.mean), image_std=list(pixels.std))
    return DinoDetrImageProcessor(**options)


def open_data(start, size):
    """Training images, flipped and resized at random, and images to evaluate."""
    short, long = size["shortest_edge"], size["longest_edge"]
    augment = [v2.RandomHorizontalFlip(), v2.RandomShortestSize([round(short * scale) for scale in SCALES], long)]
    clean = [v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes(min_size=1)]
    train = CocoImages(start.train_json, start.train_images, v2.Compose([*augment, *clean]))
    val = CocoImages(start.val_json, start.val_images, v2.Compose([ResizeShortSide(short, long), *clean]))
    if train.names != val.names:
        raise UserError(f"{start.train_json} has the classes {train.names}, {start.val_json} has {val.names}")
    if train.problem:
        raise UserError(train.problem)
    return train, val


def find_timm(backbone):
    """The library timm where the name of a backbone is its own; None where torchvision has it."""
    if hasattr(torchvision.models, backbone):
        return None
    try:
        import timm
    except ModuleNotFoundError as error:
        raise UserError(
            f"--backbone {backbone}: torchvision lacks it, and timm is missing: pip install timm"
        ) from error
    if not timm.is_model(backbone):
        raise UserError(f"--backbone {backbone}: neither torchvision nor timm has it")
    return timm


def read_fields(text):
    """The value of --fields."""
    try:
        fields = dict(json.loads(text))
    except (TypeError, ValueError) as error:
        raise UserError(f"--fields {text}: no JSON object: {error}") from error
    known = DinoDetrConfig()
    if unknown := [name for name in fields if not hasattr(known, name)]:
        raise UserError(f"--fields: DinoDetrConfig has no {unknown[0]}; docs/transformers.md lists its fields")
    return fields


def make_model(start, data):
    """The model: a whole one, a new one with a pre-trained backbone, or all random."""
    labels = {"id2label": dict(enumerate(data.names)), "label2id": {name: n for n, name in enumerate(data.names)}}
    labels["category_ids"] = data.category_ids
    if start.model:
        return DinoDetrForObjectDetection.from_pretrained(start.model, ignore_mismatched_sizes=True, **labels)
    backbone = {"backbone": start.backbone, "use_timm_backbone": find_timm(start.backbone) is not None}
    weights = {
        "use_pretrained_backbone": not start.from_scratch,
        "backbone_checkpoint": start.backbone_checkpoint or None,
    }
    return DinoDetrForObjectDetection(DinoDetrConfig(**{**backbone, **weights, **read_fields(start.fields)}, **labels))


def find_checkpoint(output, resume):
    """The checkpoint that the training continues from, or None."""
    last = get_last_checkpoint(output) if Path(output).is_dir() else None
    if resume == "last" and not last:
        raise UserError(f"--resume_from_checkpoint last: {output} holds no checkpoint")
    if last and not resume:
        raise UserError(f"{last} exists: give --resume_from_checkpoint last, or another --output_dir")
    return last if resume == "last" else resume


def main(argv=None):
    """Train, evaluate after each epoch, save the best model with its processor in `output_dir`."""
    usage = "finetune_transformers.py --train_json FILE --train_images FOLDER --val_json FILE --val_images FOLDER …"
    start, settings = HfArgumentParser((Start, Settings), usage=usage).parse_args_into_dataclasses(argv)
    resume = find_checkpoint(settings.output_dir, settings.resume_from_checkpoint)
    if start.short_side < 0:
        raise UserError(f"--short_side {start.short_side}: a number of pixels was expected")
    if start.from_scratch and (start.model or start.backbone_checkpoint):
        raise UserError("--from_scratch contradicts --model and --backbone_checkpoint")
    set_seed(settings.seed)
    processor = make_processor(start)
    train, val = open_data(start, processor.size)
    processor.category_ids = train.category_ids
    model = make_model(start, train)
    trainer = DetectionTrainer(
        model,
        settings,
        data_collator=CocoCollator(processor, do_resize=False),
        train_dataset=train,
        eval_dataset=val,
        processing_class=processor,
        compute_metrics=CocoMetrics(val),
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    trainer.save_metrics("eval", trainer.evaluate())


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FloatingPointError, OSError) as error:
        sys.exit(f"error: {' '.join(message_of(error).split())}")

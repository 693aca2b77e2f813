"""The plan of a training, for its log and the console, and all that is needed to repeat the run."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import subprocess
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from omegaconf import DictConfig
from torch import nn

import dino
from dino.layers.ops.operator_report import operator_form, operator_lines
from dino.modeling import float32_precision

from .start_summary import Plan

logger = logging.getLogger("detectron2.dino")


def summarise_plan(cfg: DictConfig, model: nn.Module, optimizer: torch.optim.Optimizer, about: dict) -> None:
    """Log the training plan: batch, length, learning rates, precision, versions."""
    train, loader = cfg.train, cfg.dataloader.train
    world, parts = _world_size(), train.grad_accum_steps
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    batch = loader.get("total_batch_size", 0)
    logger.info(
        "\n".join(
            [
                "training plan",
                f"  batch: {batch} images = {world} processes x {parts} parts x {batch // (world * parts)} images",
                f"  length: {train.max_iter} iterations; an evaluation every {train.eval_period}, a checkpoint every "
                f"{train.checkpointer.period}",
                f"  learning rates: {_learning_rates(optimizer)}",
                f"  parameters: {total / 1e6:.2f} M, {trained / 1e6:.2f} M trainable",
                f"  precision: {train.amp.dtype if train.amp.enabled else 'float32'}; float32 on a GPU: "
                f"{float32_precision()}",
                f"  compile: {_on(train.compile)}; activation checkpointing: "
                f"{', '.join(train.activation_checkpointing) or 'off'}; averaged weights: {_on(train.ema.enabled)}",
                *(f"  {line.strip()}" for line in operator_lines()),
                *(f"  {key}: {value}" for key, value in about.items()),
            ]
        )
    )


def start_plan(cfg: DictConfig, model: nn.Module, optimizer: torch.optim.Optimizer, images: int, start: int) -> Plan:
    """The training plan for the summary on the console.

    Args:
        images: number of training images.
        start: completed iterations.
    """
    train, world = cfg.train, _world_size()
    device = torch.device(train.device)
    batch = cfg.dataloader.train.get("total_batch_size", 0)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return Plan(
        batch=batch,
        iterations=train.max_iter,
        per_epoch=math.ceil(images / batch) if batch else 0,
        eval_period=train.eval_period,
        rates=_rates_by_part(model, optimizer),
        precision=train.amp.dtype if train.amp.enabled else "float32",
        device=f"{world} processes on {where}" if world > 1 else where,
        operator=operator_form(device),
        start=start,
    )


def _rates_by_part(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The highest learning rate of the backbone and that of all other parameters."""
    slow = {id(p) for name, p in model.named_parameters() if "backbone." in name}
    rates: dict[str, float] = {}
    for group in optimizer.param_groups:
        for part in {"backbone" if id(p) in slow else "the rest" for p in group["params"]}:
            rates[part] = max(group["lr"], rates.get(part, 0.0))
    return rates if len(set(rates.values())) > 1 else {"all": max(rates.values())}


def _learning_rates(optimizer: torch.optim.Optimizer) -> str:
    """Each learning rate with its number of parameters, most parameters first."""
    rates = Counter()
    for group in optimizer.param_groups:
        rates[group["lr"]] += sum(p.numel() for p in group["params"])
    return ", ".join(f"{rate:.2e} for {n / 1e6:.2f} M" for rate, n in rates.most_common())


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _on(enabled: bool) -> str:
    return "on" if enabled else "off"


def describe_run(images: list[dict], seed: int) -> dict[str, str | int]:
    """All that is needed to repeat the run, besides the recipe: versions, commit, seed, fingerprint of the data."""
    return {
        "dino": dino.__version__,
        "torch": str(torch.__version__),
        "commit": _commit(),
        "seed": seed,
        "data": _fingerprint(images),
    }


def _commit() -> str:
    """Commit of the package's checkout, with "-dirty" if files have changed since."""
    command = ["git", "-C", str(Path(dino.__file__).parents[1]), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found = subprocess.run([*command, "--exclude=*"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return found.stdout.strip() or "unknown"


def _fingerprint(images: list[dict]) -> str:
    """Fingerprint of file names, sizes, boxes and labels in their order; not of pixels or folders."""
    digest = hashlib.sha256()
    for x in images:
        objects = [(o["category_id"], list(o["bbox"])) for o in x["annotations"]]
        digest.update(repr((os.path.basename(x["file_name"]), x["height"], x["width"], objects)).encode())
    return digest.hexdigest()[:16]

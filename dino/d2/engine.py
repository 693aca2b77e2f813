"""Training and evaluation of a LazyConfig recipe with Detectron2's trainer, hooks, evaluators and writers."""

from __future__ import annotations

import datetime
import logging
import os
import time
from collections import Counter

import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import SimpleTrainer, hooks
from detectron2.engine.defaults import create_ddp_model
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.events import CommonMetricPrinter, JSONWriter, TensorboardXWriter, get_event_storage
from omegaconf import DictConfig, OmegaConf

from dino.files import DataError

from .checkpoint import Checkpointer
from .data import load_dataset
from .describe import describe
from .recipe import names_of, use_epochs

logger = logging.getLogger("detectron2.dino")
# Detectron2 logs a traceback of whatever ends a training; faults of the data are told in one line by the program.
logging.getLogger("detectron2.engine.train_loop").addFilter(
    lambda record: not (record.exc_info and isinstance(record.exc_info[1], DataError | FloatingPointError))
)


class Trainer(SimpleTrainer):
    """SimpleTrainer with autocast on any device, loss scaling for float16, and clipping of the gradient norm.

    Args:
        model, data_loader, optimizer: as of SimpleTrainer.
        dtype: float32, bfloat16 or float16, of the forward pass.
        clip_norm: largest L2 norm of all gradients together.
        output_dir: where the batch goes that made the loss infinite or NaN.
    """

    def __init__(self, model, data_loader, optimizer, *, dtype: str, clip_norm: float, output_dir: str):
        super().__init__(model, data_loader, optimizer)
        self.device_type = next(model.parameters()).device.type
        self.dtype = getattr(torch, dtype)
        self.scaler = torch.amp.GradScaler(self.device_type, enabled=self.dtype == torch.float16)
        self.clip_norm = clip_norm
        self.output_dir = output_dir

    def run_step(self) -> None:
        """One iteration."""
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        with torch.autocast(self.device_type, self.dtype, enabled=self.dtype != torch.float32):
            losses = self.forward(data)
        total = sum(losses.values())
        if not torch.isfinite(total):
            self.stop(data, f"losses {dict(Counter({k: v.item() for k, v in losses.items()}))}")
        self.optimizer.zero_grad()
        self.scaler.scale(total).backward()
        self.after_backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self._write_metrics(losses, data_time)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def forward(self, data: list[dict]) -> dict[str, torch.Tensor]:
        """The losses of a batch; predictions that are NaN or infinite end the training."""
        try:
            return self.model(data)
        except FloatingPointError as error:
            self.stop(data, str(error))

    def stop(self, data: list[dict], reason: str) -> None:
        """Save the batch as plain tensors and raise a FloatingPointError that says where and why."""
        path = os.path.join(self.output_dir, f"non_finite_batch_{self.iter}.pth")
        batch = [
            {
                "file_name": str(x.get("file_name")),
                "image": x["image"],
                "boxes": x["instances"].gt_boxes.tensor,
                "labels": x["instances"].gt_classes,
            }
            for x in data
        ]
        torch.save(batch, path)
        names = ", ".join(x["file_name"] for x in batch)
        raise FloatingPointError(
            f"iteration {self.iter}: {reason}. Images: {names}. The batch is in {path}. Lower optimizer.lr, or look at "
            "the boxes of these images"
        )

    def state_dict(self) -> dict:
        """Adds the loss scale."""
        return {**super().state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state_dict: dict) -> None:
        """Restores the loss scale too."""
        super().load_state_dict(state_dict)
        self.scaler.load_state_dict(state_dict["scaler"])


class ConsoleWriter(CommonMetricPrinter):
    """One short line: total loss and the three main terms. All 39 losses go to metrics.json and TensorBoard."""

    def write(self) -> None:
        """Print what the event storage holds."""
        storage = get_event_storage()
        latest = {name: history.median(self._window_size) for name, history in storage.histories().items()}
        if storage.iter >= self._max_iter or not latest:
            return
        parts = [f"iter {storage.iter}/{self._max_iter}"]
        parts += [f"{k} {latest[k]:.3f}" for k in ("total_loss", "loss_ce", "loss_bbox", "loss_giou") if k in latest]
        parts += [f"{k} {latest[k]:.3f} s" for k in ("time", "data_time") if k in latest]
        parts += [f"lr {latest['lr']:.2e}"] if "lr" in latest else []
        if "time" in latest:
            parts.append(f"eta {datetime.timedelta(seconds=int(latest['time'] * (self._max_iter - storage.iter - 1)))}")
        if torch.cuda.is_available():
            parts.append(f"memory {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB")
        self.logger.info("  ".join(parts))


def evaluate(cfg: DictConfig, model: torch.nn.Module) -> dict:
    """AP of the model on the recipe's test data; also printed, and written to the evaluator's folder."""
    loader = instantiate(cfg.dataloader.test)
    result = inference_on_dataset(model, loader, instantiate(cfg.dataloader.evaluator))
    if comm.is_main_process():
        print_csv_format(result)
    return result


def train(cfg: DictConfig, resume: bool) -> dict:
    """Train the recipe to its end.

    Returns:
        the metrics of the last evaluation.
    """
    images = instantiate(cfg.dataloader.train.dataset)
    summarise(cfg, images)
    use_epochs(cfg, len(images))
    del images
    LazyConfig.save(cfg, os.path.join(cfg.train.output_dir, "config.yaml"))
    names = names_of(cfg.dataloader.train.dataset)
    model = instantiate(cfg.model).to(cfg.train.device)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    loader = instantiate(cfg.dataloader.train)
    load_dataset.cache_clear()  # the loader holds its own compact copy
    on_gpu = str(cfg.train.device).startswith("cuda")
    model = create_ddp_model(model, **cfg.train.ddp, **({} if on_gpu else {"device_ids": None}))
    dtype = cfg.train.amp.dtype if cfg.train.amp.enabled else "float32"
    trainer = Trainer(
        model, loader, optimizer, dtype=dtype, clip_norm=cfg.train.clip_norm, output_dir=cfg.train.output_dir
    )
    checkpointer = Checkpointer(
        model,
        cfg.train.output_dir,
        names=names,
        about=describe(cfg),
        min_backbone=cfg.train.min_backbone,
        trainer=trainer,
    )
    results: dict = {}
    trainer.register_hooks(list_hooks(cfg, model, checkpointer, results))
    if resume and not checkpointer.has_checkpoint():
        logger.warning(f"nothing to resume in {cfg.train.output_dir}: starting at iteration 0")
        resume = False
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=resume)
    trainer.train(trainer.iter + 1 if resume else 0, cfg.train.max_iter)
    return results


def list_hooks(cfg: DictConfig, model: torch.nn.Module, checkpointer: Checkpointer, results: dict) -> list:
    """Detectron2's hooks in the order in which they must run; the last evaluation is left in `results`."""

    def run_evaluation() -> dict:
        results.clear()
        results.update(evaluate(cfg, model) or {})
        return results

    writers = [
        ConsoleWriter(cfg.train.max_iter),
        JSONWriter(os.path.join(cfg.train.output_dir, "metrics.json")),
        TensorboardXWriter(cfg.train.output_dir),
    ]
    main = comm.is_main_process()
    return [
        hooks.IterationTimer(),
        hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
        hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer) if main else None,
        hooks.EvalHook(cfg.train.eval_period, run_evaluation),
        hooks.PeriodicWriter(writers, period=cfg.train.log_period) if main else None,
    ]


def summarise(cfg: DictConfig, images: list[dict]) -> None:
    """Log what will be learned from, and warn where a limit of the recipe cuts something off."""
    names = names_of(cfg.dataloader.train.dataset)
    counts = Counter(names[o["category_id"]] for x in images for o in x["annotations"])
    empty = sum(not x["annotations"] for x in images)
    logger.info(f"{len(images)} training images, {empty} without objects (kept). Objects: {dict(counts.most_common())}")
    fullest = max(images, key=lambda x: len(x["annotations"]), default=None)
    if fullest is None:
        raise DataError("the training data has no images")
    limits = {
        "queries": OmegaConf.select(cfg, "model.network.query_selection.num_queries"),
        "denoising queries": OmegaConf.select(cfg, "model.network.denoising.num_denoising"),
        "detections of COCO's AP": OmegaConf.select(cfg, "dataloader.evaluator.max_dets_per_image") or 100,
    }
    objects = len(fullest["annotations"])
    for what, limit in limits.items():
        if limit and objects > limit:
            logger.warning(f"{fullest['file_name']} has {objects} objects, more than the {limit} {what} per image")


def evaluate_checkpoint(cfg: DictConfig) -> dict:
    """AP of `train.init_checkpoint`, every tensor of which must be there.

    Raises:
        DataError: the file does not fit the recipe.
    """
    model = instantiate(cfg.model).to(cfg.train.device).eval()
    Checkpointer(model, names=names_of(cfg.dataloader.test.dataset)).load_whole(cfg.train.init_checkpoint)
    return evaluate(cfg, model)

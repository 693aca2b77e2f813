"""Training of a complete recipe without Detectron2: the same steps and the same files as on its road."""

from __future__ import annotations

import logging
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from dino.data.coco import CocoImages
from dino.utils.files import DataError, clean_up, make_folder

from .curves import draw_curves
from .denoising_boxes import denoising_boxes
from .ema import Ema
from .evaluation_record import EvaluationRecord
from .gpu_speed import compile_if_wanted, use_deterministic_kernels, use_precision
from .image_order import seed_random
from .memory_saving import checkpoint_activations
from .metrics_file import append_metrics, forget_metrics
from .plan_summary import describe_run, start_plan, summarise_plan
from .progress import Progress
from .progress_bar import ProgressLine
from .recipe_completion import use_epochs
from .recipe_data import files_of
from .recipe_evaluation import evaluate, flatten, show_predictions
from .recipe_parts import (
    build_detector,
    build_optimizer,
    build_schedule,
    check_supported,
    describe,
    train_loader,
    train_mapper,
    val_images,
)
from .recipe_reading import save_recipe
from .recipe_step import RecipeStep, Sample, boxes_in_pixels
from .recipe_summary import as_dicts, summarise_files
from .run_checkpoints import RunCheckpoints
from .run_log import show, take_warnings
from .run_pictures import MOST_IMAGES, draw_train_batch
from .start_summary import best_line, closing_lines, evaluation_lines, start_lines
from .stop_signal import Stopped, StopSignal

logger = logging.getLogger("detectron2.dino")


def train(cfg: DictConfig, *, resume: bool = False, recipe: str = "a recipe") -> dict[str, dict]:
    """Train a recipe to its end; writes the files of a run into `train.output_dir`.

    Args:
        cfg: a complete recipe.
        resume: continue the run in `train.output_dir`.
        recipe: its name, for the console.

    Returns:
        the results of the last evaluation, see `recipe_evaluation.evaluate`.

    Raises:
        UserError: recipe, data or weights can't be used.
        FloatingPointError: a loss or gradient is not finite, and is not to be skipped.
        Stopped: Ctrl-C or SIGTERM ended the training, after a checkpoint.
    """
    check_supported(cfg)
    use_deterministic_kernels(cfg)
    use_precision(cfg)
    folder = Path(cfg.train.output_dir)
    if cfg.train.seed < 0:
        cfg.train.seed = int(torch.seed() % 2**31)
    loader, val = train_loader(cfg), val_images(cfg)
    images = as_dicts(loader.images.data)
    data = summarise_files(cfg, loader.images.data, images, val)
    use_epochs(cfg, len(images))
    loader.mapper = train_mapper(cfg)  # now the length is known
    about = describe_run(images, cfg.train.seed)
    seed_random(cfg.train.seed)
    detector = build_detector(cfg, val.names, loader.images.data.category_ids)
    checkpoints = RunCheckpoints(folder, detector, {**about, **describe(cfg)}, cfg.train.min_backbone)
    content = checkpoints.resume() if resume else {}
    if not content:
        checkpoints.load_start(cfg.train.init_checkpoint, cfg.train.get("init_parts", "all"))
    run = _Run(cfg, checkpoints, loader, val)
    start = run.restore(content)
    make_folder(folder)
    save_recipe(cfg, folder / "config.yaml")
    checkpoints.about["recipe"] = (folder / "config.yaml").read_text(encoding="utf-8")
    summarise_plan(cfg, detector, run.step.optimizer, about)
    plan = start_plan(cfg, detector, run.step.optimizer, len(images), start)
    numbers = (data.train, data.val, data.sizes, plan)
    show(start_lines(recipe, *numbers, checkpoints.summary, folder, take_warnings()))
    try:
        run.train(start, data.doubts)
    finally:
        clean_up(draw_curves, folder, detector.names)
    show(closing_lines(folder, run.results, files_of(cfg.dataloader.test.dataset)[:2], run.record.best_ap))
    return run.results


class _Run:
    """A training, from its parts.

    Args:
        cfg: a complete recipe.
        checkpoints: of the run, and its detector with the first weights.
        loader: of training batches.
        val: validation images.
    """

    def __init__(self, cfg: DictConfig, checkpoints: RunCheckpoints, loader: Any, val: CocoImages):
        settings, detector = cfg.train, checkpoints.detector
        self.cfg, self.checkpoints, self.detector, self.loader, self.val = cfg, checkpoints, detector, loader, val
        self.folder = checkpoints.folder
        self.length = settings.max_iter
        checkpoint_activations(detector, settings.activation_checkpointing)
        compile_if_wanted(cfg, detector)
        self.step = RecipeStep(
            detector,
            build_optimizer(cfg, detector),
            dtype=settings.amp.dtype if settings.amp.enabled else "float32",
            clip_norm=settings.clip_norm,
            output_dir=str(self.folder),
            seed=settings.seed,
            skip_non_finite=settings.skip_non_finite,
            log_matching=settings.get("log_matching", False),
        )
        self.rates = _Rates(self.step.optimizer, build_schedule(cfg), self.length)
        self.ema = Ema(detector, settings.ema.decay) if settings.ema.enabled else None
        self.record = EvaluationRecord(self.folder, settings.eval_period, **settings.best)
        self.progress = Progress(self.length, {}, "optimizer.lr", self.rates.highest)
        self.times: deque[float] = deque(maxlen=max(1, settings.log_period))
        self.pictures = {loader.mapper.first_combined: "train_batch_combined.png", 0: "train_batch.png"}
        self.results: dict[str, dict] = {}
        self.ended = False  # early

    def restore(self, content: Mapping) -> int:
        """Continue from the content of a checkpoint -> the first iteration.

        Raises:
            DataError: it is of another optimizer.
        """
        if "trainer" not in content:
            return 0
        state, optimizer = content["trainer"], self.step.optimizer
        try:
            optimizer.load_state_dict(self.step.optimizer_state(state["optimizer"]))
            warning = self.step.load_state(state)
            if self.ema and "ema" in content:
                self.ema.load_state_dict(content["ema"])
            start = state["iteration"] + 1
        except Exception as error:  # a foreign file can raise anything
            raise DataError(
                f"can't continue from {self.checkpoints.source}: its optimizer is not the recipe's ({error})"
            ) from error
        if warning:
            logger.warning(warning)
        return start

    def train(self, start: int, doubts: list[str]) -> None:
        """Train from iteration `start` to the end.

        Args:
            doubts: what looks wrong in the data.
        """
        losses = forget_metrics(self.folder / "metrics.json", start)
        self.progress = self.progress._replace(losses=losses, doubts=doubts)
        self.record.read(start)
        self.loader.begin(seed=self.step.seed, start=start, parts=self.cfg.train.grad_accum_steps)
        if self.record.missed(start, self.length):
            show([f"evaluating the weights of iteration {start}: the interrupted run did not"])
            self._evaluate(start, start)
        with StopSignal() as stop, ProgressLine(start, self.length) as line:
            batches = iter(self.loader) if start < self.length else iter(())
            for iteration in range(start, self.length):
                if self.ended:
                    break
                self._run_iteration(iteration, batches)
                line.step(iteration + 1, self._shown())
                if stop.requested and iteration + 1 < self.length:
                    self._save(f"model_{iteration:07d}", iteration)
                    raise Stopped(stop.exit_code, f"stopped after {iteration + 1} iterations; --resume continues")
            if not self.ended:  # a signal leaves the last evaluation whole: its weights are written
                self._evaluate(self.length, self.length)
        if self.ended:
            logger.info(f"training ended before {self.length} iterations")

    def _run_iteration(self, iteration: int, batches: Iterator[list[Sample]]) -> None:
        """A step of the optimizer and all that follows it."""
        begin = time.perf_counter()
        step, settings = self.step, self.cfg.train
        parts = list(islice(batches, settings.grad_accum_steps))
        data_time = time.perf_counter() - begin
        rate = self.rates.set(iteration)
        step.iter = iteration
        seed_random(step.seed, iteration, 0)
        step.take(parts)
        logs = (iteration + 1) % settings.log_period == 0 or iteration + 1 == self.length
        if logs or step.waits:
            step.checker.check()
        self.times.append(time.perf_counter() - begin)
        if self.ema:
            self.ema.update()
        if iteration in self.pictures:
            self._draw_batch(self.folder / self.pictures[iteration])
        if logs:
            self._log(iteration, {"data_time": data_time, "lr": rate, "time": statistics.median(self.times)})
        self._after_step(iteration)

    def _after_step(self, iteration: int) -> None:
        """Checkpoint, warning and evaluation where they are due."""
        completed = iteration + 1
        if completed % self.cfg.train.checkpointer.period == 0:
            self._save(f"model_{iteration:07d}", iteration)
        if completed == self.length:
            self._save("model_final", iteration)
        message = self.progress.rising_loss(completed)
        if message:
            logger.warning(message)
        if self.record.due(completed, self.length):
            self._evaluate(iteration, completed)

    def _log(self, iteration: int, values: dict[str, float]) -> None:
        """Add the means since the last log to metrics.json."""
        losses, norm, metrics = self.step.means()
        values |= {"iteration": iteration, "skipped_steps": self.step.checker.skipped}
        values |= {} if norm is None else {"grad_norm": norm}
        if losses:
            values |= {"total_loss": sum(losses.values()), **losses, **metrics}
            self.progress.losses[iteration] = values["total_loss"]
        append_metrics(self.folder / "metrics.json", values)

    def _shown(self) -> dict[str, float]:
        """What the console shows of the last log."""
        losses = self.progress.losses
        return {"loss": losses[next(reversed(losses))]} if losses else {}

    def _save(self, name: str, iteration: int) -> None:
        """Write a checkpoint, then remove old ones."""
        step = self.step
        trainer = {"iteration": iteration, "optimizer": step.optimizer.state_dict(), **step.state()}
        parts = {"ema": self.ema.state_dict()} if self.ema else {}
        self.checkpoints.save(name, trainer=trainer, **parts, iteration=iteration)
        self.checkpoints.drop_old(self.cfg.train.checkpointer.max_to_keep)

    def _evaluate(self, iteration: int, completed: int) -> None:
        """Evaluate, record, save the best weights, draw.

        Args:
            iteration: under which metrics.json has the results.
            completed: iterations.
        """
        self.results = evaluate(self.cfg, self.detector, self.val, self.ema)
        show(evaluation_lines(self.results))
        values = flatten(self.results)
        append_metrics(self.folder / "metrics.json", {"iteration": iteration, **values})
        self._watch_ap(completed)
        improved, stop = self.record.note(completed, values)
        if improved:
            self._save_best()
        picture = self.folder / "val_predictions.png"
        if not picture.exists():
            show_predictions(self.detector, self.val, picture)
        draw_curves(self.folder, self.detector.names)
        self.detector.train()
        if stop and completed < self.length:
            self.ended = True
            show([self.record.reason_to_stop])

    def _watch_ap(self, completed: int) -> None:
        """Warn of an AP of 0, of raw and averaged weights."""
        measured = [values["bbox"] for values in (self.results, self.results.get("ema", {})) if "bbox" in values]
        ap, ap50 = (max(values[key] for values in measured) / 100 for key in ("AP", "AP50"))
        message = self.progress.zero_ap(completed, ap, ap50)
        if message:
            logger.warning(message)

    def _save_best(self) -> None:
        """Write the better weights of the last evaluation alone: for prediction, not for resuming."""
        about = self.record.describe_best()
        with self.ema.applied() if self.ema and about["weights"] == "averaged" else nullcontext():
            self.checkpoints.save_weights("model_best", **about)
        show([best_line(about["metric"], about["value"], about["weights"])])

    def _draw_batch(self, path: Path) -> None:
        """Draw the batch of this step."""
        batch = self.step.batch[:MOST_IMAGES]
        images, targets, _ = zip(*batch, strict=True)
        on_device = [type(target)(*(x.to(self.detector.device) for x in target)) for target in targets]
        queries = denoising_boxes(self.detector.network, on_device, [image.shape[1:] for image in images])
        boxes, labels = [boxes_in_pixels(x) for x in batch], [target.labels for target in targets]
        draw_train_batch(path, images, boxes, labels, self.detector.names, queries)


class _Rates:
    """The learning rates of an optimizer over a training.

    Args:
        optimizer: its groups state the rates where the factor is 1.
        schedule: share of the training in [0, 1] -> factor.
        length: of the training in iterations.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, schedule: Callable[[float], float], length: int):
        self.optimizer, self.schedule, self.length = optimizer, schedule, length
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        self.highest = max(group["lr"] for group in optimizer.param_groups)

    def set(self, iteration: int) -> float:
        """Set the rates of an iteration -> that of most parameters."""
        factor = self.schedule(iteration / self.length)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        return max(self.optimizer.param_groups, key=lambda group: len(group["params"]))["lr"]


def evaluate_checkpoint(cfg: DictConfig) -> dict[str, dict]:
    """Evaluate `train.init_checkpoint`, and its averaged weights if it has any.

    Returns:
        as of `train`.

    Raises:
        DataError: the file lacks a tensor of the recipe's model.
    """
    check_supported(cfg)
    use_precision(cfg)
    show(f"warning: {text}" for text in take_warnings())
    val = val_images(cfg)
    detector = build_detector(cfg, val.names, val.category_ids)
    checkpoints = RunCheckpoints(cfg.train.output_dir, detector, {})
    content = checkpoints.load_whole(cfg.train.init_checkpoint)
    compile_if_wanted(cfg, detector)
    if content.get("weights"):
        logger.info(f"{cfg.train.init_checkpoint} holds {content['weights']} weights")
    ema = None
    if "ema" in content:
        ema = Ema(detector, decay=0)
        checkpoints.load_average(content)
        ema.swap()
    results = evaluate(cfg, detector, val, ema)
    show(evaluation_lines(results))
    return results

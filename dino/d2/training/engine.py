"""Training and evaluation of a LazyConfig recipe with Detectron2's trainer, hooks, evaluators and writers."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from contextlib import nullcontext
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from detectron2.config import instantiate
from detectron2.data import MetadataCatalog
from detectron2.engine import hooks
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.events import EventWriter, TensorboardXWriter
from omegaconf import DictConfig, OmegaConf
from torch import nn

from dino.d2.checkpoint import Checkpointer
from dino.d2.combining_mapper import CombiningMapper
from dino.d2.data_loading import load_dataset
from dino.d2.meta_arch import unclipped
from dino.d2.recipe import names_of, use_epochs
from dino.d2.recipe_description import describe
from dino.layers.cpu_feed_forward import use_cpu_feed_forward
from dino.training.ema import Ema
from dino.training.gpu_speed import compile_if_wanted, replayed, use_deterministic_kernels, use_precision
from dino.training.memory_saving import checkpoint_activations
from dino.training.plan_summary import describe_run, start_plan, summarise_plan
from dino.training.progress import Progress
from dino.training.recipe_reading import save_recipe
from dino.training.run_checkpoints import refuse_other_engine
from dino.training.run_log import Watched, prints_to_log, show, take_warnings
from dino.training.shards import unwrapped
from dino.training.start_summary import closing_lines, evaluation_lines, start_lines
from dino.utils.files import DataError, clean_up, make_folder
from dino.weights import load_weights

from .batch_pictures import MOST_IMAGES, BatchPictures, draw_predictions
from .evaluation_hook import Evaluation
from .hooks import AverageWeights, Checkpoints, ProgressBar, StopOnSignal
from .parallel import drop_shards, from_main, gather_shards, wrap_ddp_or_fsdp
from .run_summary import summarise_data
from .sampler import seed_random
from .trainer import EndOfTraining, Trainer
from .writers import ConsoleWriter, MetricsWriter, WandbWriter, draw_curves, forget_metrics

logger = logging.getLogger("detectron2.dino")


def train(cfg: DictConfig, resume: bool, recipe: str = "a recipe") -> dict:
    """Train a recipe to its end.

    Args:
        cfg: a complete recipe.
        resume: continue the run in `train.output_dir`.
        recipe: its file, for the console.

    Returns:
        the metrics of the last evaluation; those of averaged weights under "ema".

    Raises:
        DataError: recipe, data or weights can't be used.
    """
    _use_determinism(cfg)
    use_precision(cfg)
    folder = cfg.train.output_dir
    images = instantiate(cfg.dataloader.train.dataset)
    data = summarise_data(cfg, images, instantiate(cfg.dataloader.test.dataset))
    use_epochs(cfg, len(images))
    about = describe_run(images, cfg.train.seed)
    del images
    seed_random(cfg.train.seed)  # the same weights on all processes
    model = _build_model(cfg)
    checkpointer = _make_checkpointer(cfg, model, about)
    content = _start_weights(cfg, checkpointer, resume)
    trainer, ema = _build_trainer(cfg, model, about)
    start = _restore(checkpointer, trainer, ema, content)
    progress = _start_progress(cfg, trainer, start, data.doubts)
    if comm.is_main_process():
        checkpointer.add_about(recipe=_start_folder(cfg))
        plan = start_plan(cfg, model, trainer.optimizer, data.train.images, start)._replace(tensorboard=True)
        weights = _describe_weights(checkpointer)
        show(start_lines(Path(recipe).stem, data.train, data.val, data.sizes, plan, weights, folder, take_warnings()))
    results, best = _run(cfg, trainer, checkpointer, ema, progress, start)
    show(closing_lines(folder, results, _data_words(cfg.dataloader.test.dataset, recipe), best))
    return results


def _use_determinism(cfg: DictConfig) -> None:
    """Set the seed, the same for all processes, and deterministic kernels if the recipe enables them."""
    if cfg.train.seed < 0:
        cfg.train.seed = comm.shared_random_seed()
    use_deterministic_kernels(cfg)


def _restore(checkpointer: Checkpointer, trainer: Trainer, ema: Ema | None, content: dict) -> int:
    """Continue from the content of a checkpoint, if it has a training -> the completed iterations."""
    if "trainer" in content:
        trainer.load_state_dict(content["trainer"])
        if ema and "ema" in content:
            ema.load_state_dict(content["ema"])
    for key, part in (("trainer", trainer), ("ema", ema)):
        if part:
            checkpointer.add_checkpointable(key, part)
    return trainer.iter + 1 if "trainer" in content else 0


def _run(
    cfg: DictConfig, trainer: Trainer, checkpointer: Checkpointer, ema: Ema | None, progress: Progress, start: int
) -> tuple[dict, float | None]:
    """Train from iteration `start` on -> the metrics of the last evaluation, and the AP of the best weights."""
    folder, results = cfg.train.output_dir, {}
    trainer.register_hooks(_list_hooks(cfg, trainer, checkpointer, ema, results, progress))
    try:
        trainer.train(start, cfg.train.max_iter)
    except EndOfTraining:
        logger.info(f"training ended after {trainer.iter + 1} of {cfg.train.max_iter} iterations")
    finally:
        if comm.is_main_process():
            clean_up(draw_curves, folder, checkpointer.names)
    return results, next(hook.record.best_ap for hook in trainer._hooks if isinstance(hook, Evaluation))


def _describe_weights(checkpointer: Checkpointer) -> str:
    """One line on the weights at the start."""
    if checkpointer.report is None:
        return "random: train.init_checkpoint is empty"
    return f"{checkpointer.source}: {checkpointer.report.summary}"


def _data_words(node: DictConfig, recipe: str) -> tuple[str, ...]:
    """The words of `dino eval` for the data set in a recipe's `L(dataset)(…)`; `recipe`, a file, registers it."""
    metadata = MetadataCatalog.get(node.name)
    files = metadata.get("json_file"), metadata.get("image_root")
    return files if all(files) else ("--dataset", node.name, "--config-file", recipe)


def _category_ids_of(node: DictConfig) -> list[int]:
    """Category ids of the data set in a recipe's `L(dataset)(…)`, by label; 1, 2, … where it knows none."""
    names = names_of(node)
    labels = MetadataCatalog.get(node.name).get("thing_dataset_id_to_contiguous_id", {})
    ids = {label: number for number, label in labels.items()}
    known = sorted(ids) == list(range(len(names)))
    return [ids[label] for label in range(len(names))] if known else list(range(1, len(names) + 1))


def _start_progress(cfg: DictConfig, trainer: Trainer, start: int, doubts: list[str]) -> Progress:
    """The progress of a run that starts at iteration `start`; only the main process knows the losses."""
    path = Path(cfg.train.output_dir) / "metrics.json"
    losses = forget_metrics(path, start) if comm.is_main_process() else {}
    rate = max(group["lr"] for group in trainer.optimizer.param_groups)
    return Progress(cfg.train.max_iter, losses, "optimizer.lr", rate, doubts)


def _watch_loss(progress: Progress, trainer: Trainer) -> None:
    """Note the loss of a logged iteration; warn after the first third of the training if it has risen."""
    loss, iteration = trainer.storage.latest().get("total_loss", (0.0, -1))
    if iteration == trainer.iter:
        progress.losses[iteration] = loss
    message = progress.rising_loss(trainer.iter + 1)
    if message:
        logger.warning(message)


def _watch_ap(progress: Progress, completed: int, results: dict) -> None:
    """Warn of an AP of 0, of raw and averaged weights, where boxes were evaluated by COCO's AP."""
    measured = [values["bbox"] for values in (results, results.get("ema", {})) if "AP50" in values.get("bbox", {})]
    if measured:
        message = progress.zero_ap(completed, *(max(values[k] for values in measured) / 100 for k in ("AP", "AP50")))
        if message:
            logger.warning(message)


def _start_folder(cfg: DictConfig) -> str:
    """Prepare the folder of a run -> the text of its recipe."""
    folder = Path(cfg.train.output_dir)
    make_folder(folder)
    save_recipe(cfg, folder / "config.yaml")
    text = (folder / "config.yaml").read_text()
    logger.info(f"complete recipe:\n{text}")
    return text


def _build_model(cfg: DictConfig) -> nn.Module:
    """Build the recipe's model on its device.

    Raises:
        DataError: a part refuses its arguments, or needs a library that is not installed.
    """
    try:
        model = instantiate(cfg.model).to(cfg.train.device)
    except (ValueError, TypeError, ImportError) as error:
        raise DataError(f"the recipe's model can't be built: {error}") from error
    if torch.device(cfg.train.device).type == "cpu":
        use_cpu_feed_forward(model)
    return model


def _start_weights(cfg: DictConfig, checkpointer: Checkpointer, resume: bool) -> dict:
    """Load the first weights into the model -> the other contents of the checkpoint if the run resumes, else {}."""
    last = checkpointer.last_whole() if resume else ""
    if resume and not last:
        logger.warning(f"nothing to resume in {cfg.train.output_dir}: starting at iteration 0")
    if last:
        content = checkpointer.load(last, checkpointables=[])
        refuse_other_engine(checkpointer.state, checkpointer.model, last)
        return content
    checkpointer.load_start(cfg.train.init_checkpoint, cfg.train.get("init_parts", "all"))
    return {}


def _build_trainer(cfg: DictConfig, model: nn.Module, about: dict) -> tuple[Trainer, Ema | None]:
    """Make the trainer of a model with loaded weights, and the average of the weights if the recipe enables it."""
    checkpoint_activations(model, cfg.train.activation_checkpointing)
    compile_if_wanted(cfg, model)
    shared = wrap_ddp_or_fsdp(model, cfg)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    cfg.optimizer.params.pop("model")
    summarise_plan(cfg, model, optimizer, about)
    loader = instantiate(cfg.dataloader.train)
    load_dataset.cache_clear()  # the loader holds its own compact copy
    trainer = Trainer(
        shared,
        loader,
        optimizer,
        dtype=cfg.train.amp.dtype if cfg.train.amp.enabled else "float32",
        clip_norm=cfg.train.clip_norm,
        output_dir=cfg.train.output_dir,
        seed=cfg.train.seed,
        grad_accum_steps=cfg.train.grad_accum_steps,
        log_period=cfg.train.log_period,
        skip_non_finite=cfg.train.skip_non_finite,
        log_matching=cfg.train.get("log_matching", False),
    )
    return trainer, Ema(model, cfg.train.ema.decay) if cfg.train.ema.enabled else None


def _make_checkpointer(cfg: DictConfig, model: nn.Module, about: dict) -> Checkpointer:
    """The checkpointer of a training; `about`: what repeating the run needs."""
    return Checkpointer(
        model,
        cfg.train.output_dir,
        names=names_of(cfg.dataloader.train.dataset),
        category_ids=_category_ids_of(cfg.dataloader.train.dataset),
        about={**about, **describe(cfg)},
        min_backbone=cfg.train.min_backbone,
    )


def _list_hooks(
    cfg: DictConfig,
    trainer: Trainer,
    checkpointer: Checkpointer,
    ema: Ema | None,
    results: dict,
    progress: Progress,
) -> list:
    """All hooks in the order in which they must run; `results` receives the last evaluation."""
    main = comm.is_main_process()
    folder, names = cfg.train.output_dir, checkpointer.names
    model = unwrapped(trainer.model)

    def run_evaluation() -> dict:
        results.clear()
        results.update(_evaluate(cfg, model, ema))
        _watch_ap(progress, min(trainer.iter + 1, cfg.train.max_iter), results)
        picture = os.path.join(folder, "val_predictions.png")
        if not from_main(os.path.exists(picture)):
            _show_predictions(cfg, model, names, picture)
        if main:
            draw_curves(folder, names)
        return results

    writers = _list_writers(cfg) if main else []
    metrics = [writer for writer in writers if isinstance(writer, MetricsWriter)]
    checkpoints = Checkpoints(checkpointer, **cfg.train.checkpointer, writers=metrics)
    return [
        hooks.IterationTimer(),
        hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
        AverageWeights(ema) if ema else None,
        BatchPictures(_batch_pictures(folder, trainer.data_loader), names),
        checkpoints,
        hooks.CallbackHook(after_step=partial(_watch_loss, progress)),
        Evaluation(cfg.train.eval_period, run_evaluation, checkpointer, ema, **cfg.train.best),
        hooks.PeriodicWriter(writers, period=cfg.train.log_period) if main else None,
        ProgressBar() if main else None,
        StopOnSignal(checkpoints),
    ]


def _batch_pictures(folder: str, loader: Iterable[list[dict]]) -> dict[int, str]:
    """Paths of the pictures of batches, by iteration: the first one, and the first with combined images."""
    mapper = getattr(loader, "mapper", None)
    names = {mapper.first_iteration: "train_batch_combined.png"} if isinstance(mapper, CombiningMapper) else {}
    return {iteration: os.path.join(folder, name) for iteration, name in {**names, 0: "train_batch.png"}.items()}


def _list_writers(cfg: DictConfig) -> list[EventWriter]:
    """Console, metrics.json, TensorBoard, and Weights & Biases if the recipe enables it."""
    folder, window = cfg.train.output_dir, max(1, cfg.train.log_period)
    writers = [
        ConsoleWriter(cfg.train.max_iter),
        MetricsWriter(os.path.join(folder, "metrics.json"), window),
        TensorboardXWriter(folder, window),
    ]
    if cfg.train.wandb.enabled:
        options = {key: value for key, value in cfg.train.wandb.items() if key != "enabled"}
        writers.append(WandbWriter(folder, OmegaConf.to_container(cfg.train), **options))
    return writers


def _evaluate(cfg: DictConfig, model: nn.Module, ema: Ema | None = None) -> dict:
    """Evaluate the model on the recipe's test data -> metrics on the main process; prints and writes them too.

    With `ema`, the metrics of the averaged weights follow under the key "ema".
    """
    _same_statistics(model)
    gather_shards(model)
    result = _evaluate_weights(cfg, model, "raw weights")
    drop_shards(model)
    if ema:
        with ema.applied():
            gather_shards(model)
            averaged = _evaluate_weights(cfg, model, "averaged weights", folder="averaged")
            drop_shards(model)
        result = {**result, **({"ema": averaged} if averaged else {})}
    show(evaluation_lines(result))
    return result


def _evaluate_weights(cfg: DictConfig, model: nn.Module, kind: str, folder: str = "") -> dict:
    """Evaluate the current weights of the model -> metrics, {} on other processes than the main one.

    The evaluator writes into the subfolder `folder` of its own.
    """
    logger.info(f"evaluating: {kind}")
    evaluator = cfg.dataloader.evaluator.copy()
    if evaluator.get("output_dir"):
        evaluator.output_dir = os.path.join(cfg.dataloader.evaluator.output_dir, folder)
    amp = cfg.train.amp
    low = amp.enabled and amp.evaluation
    autocast = torch.autocast(torch.device(cfg.train.device).type, getattr(torch, amp.dtype)) if low else nullcontext()
    loader = Watched(instantiate(cfg.dataloader.test), f"evaluation, {kind}: batch")
    with autocast, replayed(model, cfg.train.cuda_graphs), unclipped(model), prints_to_log():
        result = inference_on_dataset(model, loader, instantiate(evaluator))
    if comm.is_main_process():
        print_csv_format(result)
    return result or {}


def _same_statistics(model: nn.Module) -> None:
    """Copy the main process's buffers to all processes: running statistics depend on each process's images."""
    if comm.get_world_size() > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, 0)


def _show_predictions(cfg: DictConfig, model: nn.Module, names: list[str], path: str) -> None:
    """Draw the detections in the first evaluation images."""
    mapper = instantiate(cfg.dataloader.test.mapper)
    batch = [{**x, **mapper(x)} for x in islice(instantiate(cfg.dataloader.test.dataset), MOST_IMAGES)]
    training = model.training
    gather_shards(model)
    draw_predictions(model.eval(), batch, names, path)
    drop_shards(model)
    model.train(training)


def evaluate_checkpoint(cfg: DictConfig) -> dict:
    """Evaluate `train.init_checkpoint`, and its averaged weights if it has any -> metrics.

    Raises:
        DataError: the file lacks a tensor of the recipe's model.
    """
    use_precision(cfg)
    for text in take_warnings():
        show([f"warning: {text}"])
    model = _build_model(cfg).eval()
    compile_if_wanted(cfg, model)
    names = names_of(cfg.dataloader.test.dataset)
    content = Checkpointer(model, names=names).load_whole(cfg.train.init_checkpoint)
    if content.get("weights"):
        logger.info(f"{cfg.train.init_checkpoint} holds {content['weights']} weights")
    ema = None
    if "ema" in content:
        ema = Ema(model, decay=0)
        load_weights(model, {**content, "model": content["ema"]["model"]}, copy="model", classes=names)
        ema.swap()
    return _evaluate(cfg, model, ema)

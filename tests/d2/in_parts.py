"""One step of a recipe's losses, with the batch in one piece, in parts, or on several processes."""

import json
from functools import cache
from itertools import pairwise

import torch
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, instantiate
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from omegaconf import OmegaConf
from torch import nn

from dino.d2.training.parallel import wrap_ddp_or_fsdp
from dino.d2.training.trainer import Trainer
from dino.layers import LossScaling, xyxy_to_cxcywh
from dino.structures import DenoisingQueries, Target
from dino.training.shards import whole

from ..tiny import TinyBackbone
from .recipes import ABLATIONS, RECIPES, ROOT
from .tiny import random_input, stirred

BASE = ROOT / "projects/dino/configs/ablation/base.py"
TINY = [
    "model.num_classes=3",
    "model.network.neck.out_channels=32",
    "model.network.encoder.num_heads=4",
    "model.network.encoder.num_points=2",
    "model.network.encoder.hidden_dim=16",
    "model.network.query_selection.num_queries=12",
]


class Own(nn.Module):
    """A person's wrapper of a criterion: it passes options through."""

    def __init__(self, criterion):
        super().__init__()
        self.criterion = criterion

    def forward(self, outputs, targets, **options):
        return {f"own_{name}": loss for name, loss in self.criterion(outputs, targets, **options).items()}


WRAPPERS = {
    "plain": lambda criterion: criterion,
    "scaled": lambda criterion: LossScaling(criterion=criterion, factors={"loss_bbox": 0.5, "loss_ce": 3.0}),
    "own": lambda criterion: Own(LossScaling(criterion=criterion, factors={"loss_giou": 2.0})),
}


def losses_of(model):
    """What the losses of a recipe depend on, as text: the criterion and the parts whose outputs it gets."""
    model = OmegaConf.to_container(model, resolve=True)
    network, criterion = model["network"], model["criterion"]
    selection, denoising = network["query_selection"], network["denoising"]
    kinds = [selection["_target_"], denoising["_target_"]]
    kinds += [branch["_target_"] for name, branch in network.get("branches", {}).items() if name != "_target_"]
    sizes = [selection["num_classes"] == model["num_classes"], denoising["num_denoising"] > 0]
    return json.dumps([criterion, kinds, sizes], default=str, sort_keys=True)


@cache
def groups():
    """{a recipe: all recipes with the same losses}, of every recipe of a DINO."""
    found = {}
    for path in [*RECIPES, BASE, *ABLATIONS]:
        found.setdefault(losses_of(LazyConfig.load(str(path)).model), []).append(path)
    return {str(paths[0].relative_to(ROOT)): paths for paths in found.values()}


@cache
def tiny_recipe(recipe):
    """The model of a recipe, with its criterion and kinds of parts, but tiny; denoising adds no noise."""
    cfg = LazyConfig.apply_overrides(LazyConfig.load(str(ROOT / recipe)), TINY)
    network = cfg.model.network
    network.neck.norm_groups = 8
    network.encoder.num_layers = min(1, network.encoder.num_layers)
    network.decoder.num_layers = min(2, network.decoder.num_layers)
    network.denoising.num_denoising = min(8, network.denoising.num_denoising)
    network.denoising.label_noise = network.denoising.box_noise = 0.0
    network.neck.backbone = L(TinyBackbone)()
    network.neck.in_features = ["res3", "res4", "res5"]
    return cfg.model


class PartOfWhole(nn.Module):
    """Denoising queries of the whole batch, with noise, of which each part gets those of its own images.

    So parts with other numbers of objects than the whole have its groups and padding queries, and can be compared.

    Args:
        denoising: makes the queries.
        batch: all images.
        first: number of the first image of this process.
    """

    def __init__(self, denoising, batch, first):
        super().__init__()
        denoising.label_noise, denoising.box_noise = 0.5, 1.0
        self.denoising, self.whole, self.next = denoising, [target_of(x) for x in batch], first

    def num_denoised(self, counts):
        return self.denoising.num_denoised(counts)

    def forward(self, targets, num_queries):
        torch.manual_seed(6)
        queries, whole, num_groups = self.denoising(self.whole, num_queries)
        part = slice(self.next, self.next + len(targets))
        self.next += len(targets)
        assert [len(t.labels) for t in targets] == [len(t.labels) for t in self.whole[part]]
        queries = queries._replace(content=queries.content[part], box_logits=queries.box_logits[part])
        return DenoisingQueries(queries, whole[part], num_groups)


def target_of(x):
    """As the detector makes it of `Instances`."""
    height, width = x["instances"].image_size
    boxes = xyxy_to_cxcywh(x["instances"].gt_boxes.tensor) / torch.tensor([width, height, width, height])
    return Target(x["instances"].gt_classes, boxes)


def images(counts):
    """A batch of images of one size with so many objects."""
    torch.manual_seed(5)
    return [random_input(f"{number}.png", count, height=48, width=64) for number, count in enumerate(counts)]


def tiny_model(recipe, wrapper="plain"):
    """The detector of `tiny_recipe`, its criterion in a wrapper."""
    torch.manual_seed(7)
    node = tiny_recipe(recipe)
    model = stirred(instantiate(node))
    model.criterion = WRAPPERS[wrapper](model.criterion)
    return model.train()


def in_float64(model):
    """Change of `step`: some processors round a float32 gradient of the relations by more than the tolerance."""
    model.double()


def make_trainer(model, folder=".", *, batches=(), parallel="ddp", **options):
    """A trainer of `model` on all processes, whose data are `batches`."""
    train = {"parallel": parallel, "device": "cpu", "ddp": {"find_unused_parameters": False}}
    shared = wrap_ddp_or_fsdp(model, OmegaConf.create({"train": train}))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    return Trainer(shared, batches, optimizer, output_dir=str(folder), log_period=1000, **options)


def step(
    recipe,
    counts,
    stops,
    *,
    wrapper="plain",
    own_denoising=True,
    parallel="ddp",
    change=lambda model: None,
    log_matching=False,
):
    """Losses and gradients of a batch of images with `counts` objects, averaged over the processes; this one's metrics.

    Args:
        recipe, wrapper: as of `tiny_model`.
        counts: objects of all images of all processes together.
        stops: each process divides its images before these numbers.
        own_denoising: each part denoises by itself, without noise; else as `PartOfWhole`.
        parallel: ddp or fsdp.
        change: is called with the model.
        log_matching: as of the trainer.
    """
    rank, world = comm.get_rank(), comm.get_world_size()
    batch = images(counts)
    share = len(batch) // world
    model = tiny_model(recipe, wrapper)
    if not own_denoising:
        model.network.denoising = PartOfWhole(model.network.denoising, batch, rank * share)
    change(model)
    own = batch[rank * share : (rank + 1) * share]
    parts = [own[start:stop] for start, stop in pairwise([0, *stops])]
    trainer = make_trainer(model, parallel=parallel, grad_accum_steps=len(parts), log_matching=log_matching)
    losses = trainer.accumulate(parts)
    for loss in losses.values() if world > 1 else ():
        torch.distributed.all_reduce(loss)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {
        "losses": {name: loss / world for name, loss in losses.items()},
        "gradients": {name: whole(gradient) for name, gradient in gradients.items()},
        "metrics": trainer.metrics,
    }


def skip_a_step(recipe, wrapper, folder, *, parts=1, parallel="ddp"):
    """A step with a bad image, on the last process and in the last part, then one without it.

    Returns:
        how many were skipped, whether the first one left the weights alone, whether the second one moved them.
    """
    rank, world = comm.get_rank(), comm.get_world_size()
    model = tiny_model(recipe, wrapper)
    good = images((2, 0, 1, 1, 1, 2, 2, 1)[rank * 4 : rank * 4 + 4])
    bad = [*good[:3], {**good[3], "image": torch.full((3, 48, 64), float("nan"))}] if rank == world - 1 else good
    size = 4 // parts
    batches = [batch[i * size : (i + 1) * size] for batch in (bad, good) for i in range(parts)]
    options = {"batches": batches, "grad_accum_steps": parts, "skip_non_finite": True}
    trainer = make_trainer(model, folder, parallel=parallel, **options)
    states = [copy_of(model)]
    with EventStorage() as trainer.storage:
        for trainer.iter in range(2):
            trainer.run_step()
            states.append(copy_of(model))
    same = [all(torch.equal(a[name], b[name]) for name in a) for a, b in pairwise(states)]
    return trainer.checker.skipped, same[0], not same[1] and all(x.isfinite().all() for x in states[-1].values())


def copy_of(model):
    return {name: whole(value.clone()) for name, value in model.state_dict().items()}


def assert_equal_steps(ours, theirs, rtol=1e-5):
    """To `rtol`, of each loss and of the largest number of each gradient."""
    assert ours["losses"].keys() == theirs["losses"].keys()
    for part in ("losses", "gradients"):
        for name, value in theirs[part].items():
            scale = max(1e-3, value.abs().max().item())
            torch.testing.assert_close(ours[part][name], value, rtol=rtol, atol=rtol * scale, msg=f"{part} {name}")

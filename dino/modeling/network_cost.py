"""The cost of a network: parameters, multiply-adds, activations for the backward pass, and time.

All but the time comes from torch's fake tensors, without computing anything: in seconds, for images of any size.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import dino.layers.relation  # noqa: F401 - registers its operator
from dino.layers.ops.operator import use_compiled
from dino.structures import Target

_PARTS = ("neck.backbone", "neck", "encoder", "query_selection", "denoising", "decoder", "branches")
_SAMPLE = 5  # multiply-adds per channel of a sample: four for the bilinear interpolation, one for its weight


def count_parameters(network: nn.Module) -> dict[str, tuple[int, int]]:
    """Count the (all, trainable) parameters of each part of a `DINO`, and of the whole under `total`.

    `neck` does not include the backbone. Only training uses the `branches`. Parameters outside the parts (the level
    embeddings) are in the total only.
    """
    inside = set(network.neck.backbone.parameters())
    counts = {}
    for name in (*_PARTS, "total"):
        part = network if name == "total" else network.get_submodule(name)
        own = [p for p in part.parameters() if name != "neck" or p not in inside]
        counts[name] = (sum(p.numel() for p in own), sum(p.numel() for p in own if p.requires_grad))
    return counts


def count_multiply_adds(
    network: nn.Module, batch: int, height: int, width: int, targets: list[Target] | None = None
) -> dict[str, int]:
    """Count the multiply-adds of each part of a `DINO`, and of the whole under `total`: of an inference.

    With targets: of the forward pass of a training step, denoising included. What other parts compute for `branches`
    counts as work of the branches.

    Counts convolutions, matrix products, attention and the deformable attention operator. Does not count norms,
    activations and other element-wise work (a few per cent), as in the figures of papers.

    Args:
        batch, height, width: of the images, in pixels.
        targets: the objects of each image, or None.
    """
    use_compiled(_device_of(network))  # loads the operator, which a formula names
    counter = FlopCounterMode(display=False, custom_mapping=_operator_formulas())
    within: Counter[str] = Counter()  # branches

    def found() -> dict[str, int]:
        flops = {name: sum(parts.values()) // 2 for name, parts in counter.get_flop_counts().items()}
        parts = {name: flops.get(f"{type(network).__name__}.{name}", 0) for name in _PARTS}
        return {**parts, "total": counter.get_total_flops() // 2}

    def enter() -> None:
        within.subtract(found())

    def leave() -> None:
        within.update(found())

    with nothing_computed(network, training=targets is not None), counter, _around(network.branches, enter, leave):
        network(*empty_images(network, batch, height, width), targets)
    counts = found()
    counts["neck"] -= counts["neck.backbone"]
    own = {name: counts[name] - within[name] for name in _PARTS}
    return {**own, "branches": within["total"], "total": counts["total"]}


@contextlib.contextmanager
def _around(modules: nn.ModuleDict, enter: Callable[[], None], leave: Callable[[], None]) -> Iterator[None]:
    """Within the block, call `enter` before each of these modules runs, and `leave` after it."""
    handles = [part.register_forward_pre_hook(lambda *_: enter()) for part in modules.values()]
    handles += [part.register_forward_hook(lambda *_: leave()) for part in modules.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def nothing_computed(network: nn.Module, training: bool) -> Iterator[FakeTensorMode]:
    """Run `network` for the shapes alone within the block, in training or evaluation mode."""
    before = network.training
    network.train(training)
    use_compiled(_device_of(network))  # loads the operator, which fake tensors can not
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            yield fake
    finally:
        network.train(before)


def _device_of(network: nn.Module) -> torch.device:
    """Device of the parameters."""
    return next(network.parameters()).device


def empty_images(network: nn.Module, batch: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Images (B, 3, H, W) of zeros and their padding mask (B, H, W), all False, on the device of `network`."""
    images = torch.zeros(batch, 3, height, width, device=_device_of(network))
    return images, torch.zeros(batch, height, width, dtype=torch.bool, device=images.device)


def _operator_formulas() -> dict:
    """Formulas for `FlopCounterMode`, which knows neither these operators nor the fused attention of CPUs.

    The reference samples each level with `grid_sample`, then multiplies the samples by their weights. The counter
    ignores these products, so they are counted with the samples.
    """

    def of_reference(image: tuple, grid: tuple, *_, out_shape=None, **__) -> int:
        return 2 * _SAMPLE * math.prod(grid[:-1]) * image[1]  # image (B*M, D, H, W), grid (B*M, Q, P, 2)

    def of_operator(value: tuple, shapes: list[int], locations: tuple, *_, out_shape=None, **__) -> int:
        return 2 * _SAMPLE * math.prod(locations[:-1]) * value[-1]  # value (B, S, M, D), locations (B, Q, M, L, P, 2)

    def of_relation(q: tuple, k: tuple, v, mask, source, target, weight: tuple, rows: tuple, *_, **__) -> int:
        pairs = math.prod(q[:3]) * k[2]  # q (B, M, Q, D), k (B, M, K, D), weight (2, M, 16), rows (B, M, Q, 33)
        return 2 * pairs * (2 * q[-1] + 2 * weight[-1] + rows[-1])

    def of_attention(q: tuple, k: tuple, v: tuple, *_, out_shape=None, **__) -> int:
        return sdpa_flop_count(q, k, v)

    compiled = [getattr(torch.ops.dino, form, None) for form in ("deform_attn_forward", "deform_attn_fused_forward")]
    formulas = {torch.ops.aten.grid_sampler_2d: of_reference, torch.ops.aten.grid_sampler: of_reference}
    formulas[torch.ops.dino.relation_attention] = of_relation
    formulas[torch.ops.aten._scaled_dot_product_flash_attention_for_cpu] = of_attention
    return {**formulas, **{operator: of_operator for operator in compiled if operator is not None}}


def count_activations(
    network: nn.Module, batch: int, height: int, width: int, targets: list[Target] | None = None
) -> int:
    """Count the bytes of activations that a training step keeps for the backward pass, in float32.

    Each block of memory counts once, however many operations keep it. With activation checkpointing, the inputs of
    blocks count; recomputed activations do not.

    Args:
        batch, height, width: of the images, in pixels.
        targets: the objects of each image; None leaves the denoising out.
    """
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[_storage_of(tensor)] = tensor  # held, so that the address is not used again
        return tensor

    with nothing_computed(network, training=True) as fake, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        real = [*network.parameters(), *network.buffers()]
        own = [*real, *map(fake.from_tensor, real)]  # some operations keep real tensors, others fake ones
        outputs = network(*empty_images(network, batch, height, width), targets)
    del outputs
    for tensor in own:
        kept.pop(_storage_of(tensor), None)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _storage_of(tensor: Tensor) -> int:
    """Identifies a block of memory."""
    return tensor.untyped_storage()._cdata


def inference(network: nn.Module, batch: int, height: int, width: int) -> Callable[[], object]:
    """A function that runs `network` on black images, without reading, resizing and post-processing."""
    images, padding = empty_images(network, batch, height, width)
    network.eval()
    return torch.inference_mode()(lambda: network(images, padding))


def training_step(
    network: nn.Module, criterion: nn.Module, batch: int, height: int, width: int, objects: int = 10
) -> Callable[[], object]:
    """A function that computes losses and gradients for noise images with `objects` boxes each; weights stay the same.

    Args:
        criterion: (Outputs, targets) -> dict of losses.
        batch, height, width: of the images, in pixels.
    """
    images, padding = empty_images(network, batch, height, width)
    images.normal_()
    targets = some_targets(batch, objects, images.device)
    network.train()

    def step() -> None:
        network.zero_grad()
        sum(criterion(network(images, padding, targets), targets).values()).backward()

    return step


def some_targets(batch: int, objects: int, device: torch.device) -> list[Target]:
    """`objects` boxes (cx, cy, w, h) of class 0 for each of `batch` images, the same for all."""
    boxes = torch.rand(objects, 4, device=device) * 0.25 + 0.25
    return [Target(torch.zeros(objects, dtype=torch.int64, device=device), boxes)] * batch


def measure_seconds(run: Callable[[], object], device: torch.device, runs: int = 5) -> list[float]:
    """Seconds of each of `runs` calls, after two calls to warm up; on a GPU, until it has finished."""
    seconds = []
    for _ in range(runs + 2):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return seconds[2:]

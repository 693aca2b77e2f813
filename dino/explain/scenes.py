"""Functions that draw a scene: each returns a figure."""

from __future__ import annotations

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from torchvision.ops import box_iou

from dino.layers import ContrastiveDenoising, Target, cxcywh_to_xyxy
from dino.utils.files import counted

from .canvas import (
    BLOCKED,
    EMPTY,
    INK,
    LEVELS,
    LOSSES,
    MATCHING,
    NEGATIVE,
    POSITIVE,
    SOFT,
    Scene,
    add_boxes,
    add_label,
    add_legend,
    add_names,
    escaped,
    frame,
    new_figure,
    object_colours,
    show_image,
)

_SHOWN_ANCHORS = 12  # the best ones; more would overlap
_MOST_NAMED = 12  # objects with a name; more names would hide the image
_TITLE_COLUMNS = 14  # of a class name in a title
_DRAWS = 400  # of noise around one box
_EXAMPLE = (0.5, 0.5, 0.3, 0.24)  # a box (cx, cy, w, h) from which no noise reaches the border of the image
_STEPS = (("step to the predicted box", MATCHING), ("step to the box where the next layer starts", POSITIVE))
_STEP_PLACES = (0.0, 0.36)  # in their column
_KINDS = {"positive": POSITIVE, "negative": NEGATIVE, "slot without object": EMPTY, "matching query": MATCHING}


def _anchors(scene: Scene) -> Figure:
    """Draw the selected tokens, the anchors of the best of them, and the initial boxes of the decoder."""
    record, b = scene.record, scene.image
    height, width = scene.pixels.shape[:2]
    levels = _level_of(record.tokens[b], record.memory.shapes)
    centers = record.anchors[b, :, :2].numpy() * [width, height]
    shown = min(_SHOWN_ANCHORS, len(centers))
    figure, ((points, boxes, starts),) = new_figure(10.5, 3.6, 1, 3)
    show_image(points, scene.pixels, f"the {len(centers)} selected of {record.count_tokens(b)} tokens")
    for level, colour in zip(range(len(record.memory.shapes)), LEVELS, strict=False):
        x, y = centers[levels == level].T
        points.scatter(x, y, s=14 * 1.7**level, color=colour, edgecolor="white", linewidth=0.6)
    colours = [LEVELS[level % len(LEVELS)] for level in levels[:shown]]
    for axes, values, title in (
        (boxes, record.anchors, f"anchors of the best {shown}"),
        (starts, record.queries.box_logits.sigmoid(), "the same after the encoder's box head"),
    ):
        corners = scene.corners(values[b, :shown])
        show_image(axes, scene.pixels, title)
        add_boxes(axes, corners, colours)
        for rank, ((x0, y0, _, _), colour) in enumerate(zip(corners, colours, strict=True), 1):
            add_label(axes, x0, y0, str(rank), colour)
    shapes = record.memory.shapes
    counts = [f"level {i}: {h} x {w} cells, {(levels == i).sum()} selected" for i, (h, w) in enumerate(shapes)]
    add_legend(figure, dict(zip(counts, LEVELS, strict=False)))
    return figure


def _level_of(tokens: torch.Tensor, shapes: list[tuple[int, int]]) -> np.ndarray:
    """Indices of tokens -> the level of each."""
    ends = np.cumsum([h * w for h, w in shapes])
    return np.searchsorted(ends, tokens.numpy(), side="right")


def _denoising(scene: Scene) -> Figure:
    """Draw the objects, and their positives and negatives in one group."""
    record, b = scene.record, scene.image
    target = record.denoising.targets[b]
    count, half = len(target.labels), record.denoising.queries.content.shape[1] // (2 * record.denoising.num_groups)
    boxes = record.denoising.queries.box_logits[b].sigmoid()
    truth = scene.corners(target.boxes)
    figure, ((left, middle, right),) = new_figure(10.5, 3.5, 1, 3)
    show_image(left, scene.pixels, counted(count, "object"))
    add_boxes(left, truth, INK)
    for (x0, y0, x1, y1), label in zip(truth, target.labels.tolist() if count <= _MOST_NAMED else (), strict=False):
        add_label(left, (x0 + x1) / 2, (y0 + y1) / 2, scene.names[label])
    for axes, first, colour, kind in ((middle, 0, POSITIVE, "positives"), (right, half, NEGATIVE, "negatives")):
        chosen = slice(first, first + count)
        show_image(axes, scene.pixels, f"{kind} of the first of {record.denoising.num_groups} groups")
        add_boxes(axes, truth, INK, linewidth=0.8, linestyle=(0, (3, 2)))
        dn_boxes = scene.corners(boxes[chosen])
        add_boxes(axes, dn_boxes, colour)
        labels = zip(dn_boxes, record.denoising_labels[b, chosen].tolist(), target.labels.tolist(), strict=True)
        for (x0, y0, x1, y1), carried, true in labels:
            if carried != true:
                add_label(axes, (x0 + x1) / 2, (y0 + y1) / 2, f"as {scene.names[carried]}", colour)
    legend = {"object (dashed: where it is)": INK, "positive: to be refined to its object": POSITIVE}
    add_legend(figure, legend | {"negative: to be rejected": NEGATIVE})
    return figure


def noise(denoising: ContrastiveDenoising) -> Figure:
    """Draw positives and negatives around one box: some of them, all their corners, and their overlap."""
    target = Target(torch.zeros(1, dtype=torch.int64), torch.tensor([_EXAMPLE]))
    with torch.no_grad():
        drawn = denoising.noise_boxes(target.boxes, denoising.draw(2 * _DRAWS, target.labels))[:, 0]  # (2 * DRAWS, 4)
    true = cxcywh_to_xyxy(target.boxes)
    corners = cxcywh_to_xyxy(drawn)
    figure, ((boxes, ends, overlaps),) = new_figure(10.5, 3.7, 1, 3)
    sides = (("positives", 0, POSITIVE), ("negatives", 1, NEGATIVE))
    for kind, first, colour in sides:
        xyxy = corners[first::2]
        add_boxes(boxes, xyxy[:7].numpy(), colour, linewidth=1.1, path_effects=[])
        ends.scatter(xyxy[:, 0], xyxy[:, 1], s=5, color=colour, linewidth=0)
        upright = torch.cat([torch.minimum(xyxy[:, :2], xyxy[:, 2:]), torch.maximum(xyxy[:, :2], xyxy[:, 2:])], 1)
        overlaps.hist(box_iou(upright, true)[:, 0].numpy(), np.linspace(0, 1, 26), color=colour, alpha=0.75, label=kind)
    for axes in (boxes, ends):
        add_boxes(axes, true.numpy(), INK, linewidth=2.2, zorder=3)
        axes.set(xlim=(0, 1), ylim=(1, 0), xticks=[], yticks=[], aspect="equal")
    half = np.array(_EXAMPLE[2:]) / 2 * denoising.box_noise
    for reach in (1, 2):
        x, y = true[0, :2].numpy() - reach * half
        add_boxes(
            ends,
            np.array([[x, y, x + 2 * reach * half[0], y + 2 * reach * half[1]]]),
            SOFT,
            linewidth=0.9,
            linestyle=":",
        )
        text = f"{reach * denoising.box_noise:g} half side{'s' if reach > 1 else ''}"
        add_label(ends, x + reach * half[0], y - 0.008, text, SOFT, va="bottom")
    frame(boxes, "7 positives and 7 negatives of one box")
    frame(ends, f"top left corners of {_DRAWS} each")
    frame(overlaps, "IoU with the true box")
    overlaps.set(xlim=(0, 1), yticks=[], box_aspect=1)
    overlaps.tick_params(colors=SOFT, labelsize=8)
    add_legend(figure, {"true box": INK, "positive": POSITIVE, "negative": NEGATIVE})
    return figure


def _mask(scene: Scene) -> Figure:
    """Draw the attention mask of the batch, coloured by the kind of the seen query in this image."""
    dn, b = scene.record.denoising, scene.image
    attn_mask = dn.queries.attn_mask.cpu().numpy()
    slots = dn.queries.content.shape[1]
    half = slots // (2 * dn.num_groups)
    kinds = _kinds_of(len(attn_mask), slots, half, len(dn.targets[b].labels))
    colours = np.array([to_rgb(colour) for colour in _KINDS.values()])
    seen = np.where(attn_mask[..., None], to_rgb(BLOCKED), colours[kinds][None])  # (T+Q, T+Q, 3)
    figure, ((whole, part),) = new_figure(10.5, 6.0, 1, 2)
    whole.imshow(seen, interpolation="nearest")
    groups = f"{dn.num_groups} group{'s' if dn.num_groups > 1 else ''} of {2 * half}"
    middles = [slots / 2, (slots + len(attn_mask)) / 2]
    names = [f"{slots} denoising queries:\n{groups}", f"{len(attn_mask) - slots} matching\nqueries"]
    whole.set_xticks(middles, names, fontsize=8, color=INK)
    whole.set_yticks(middles, names, fontsize=8, color=INK, rotation=90, va="center")
    whole.axhline(slots - 0.5, color=INK, linewidth=0.8)
    whole.axvline(slots - 0.5, color=INK, linewidth=0.8)
    shown = min(2, dn.num_groups) * 2 * half
    first = np.r_[0:shown, slots : min(slots + half, len(attn_mask))]
    part.imshow(seen[np.ix_(first, first)], interpolation="nearest")
    for edge in [*range(half, shown + 1, half)]:
        for line in (part.axhline, part.axvline):
            line(edge - 0.5, color=INK, linewidth=0.8 if edge % (2 * half) == 0 else 0.3)
    middles = [*(np.arange(shown // (2 * half)) * 2 * half + half - 0.5), shown + half / 2 - 0.5]
    names = [*(f"group {k + 1}" for k in range(shown // (2 * half))), "some matching\nqueries"]
    part.set_xticks(middles, names, fontsize=8, color=INK)
    part.set_yticks(middles, names, fontsize=8, color=INK, rotation=90, va="center")
    for axes, title in ((whole, "the whole mask: rows attend to columns"), (part, "its first groups, enlarged")):
        axes.tick_params(length=0)
        frame(axes, title)
    add_legend(figure, {f"sees a {kind}": colour for kind, colour in _KINDS.items()} | {"blocked": BLOCKED})
    return figure


def _kinds_of(total: int, slots: int, half: int, objects: int) -> np.ndarray:
    """(total,) indices into `_KINDS` of the decoder's queries, for an image with `objects` objects."""
    place = np.arange(total)
    kinds = np.where(place // half % 2 == 0, 0, 1)
    kinds[place % half >= objects] = 2
    kinds[slots:] = 3
    return kinds


def _layers(scene: Scene) -> Figure:
    """Draw the queries matched in the last layer, from their initial boxes through all layers."""
    record, b = scene.record, scene.image
    queries, objects = record.matches[b]
    found, start = record.outputs.decoder, record.queries.box_logits[b, queries].sigmoid()
    return _course(scene, objects, start, found.boxes[:, b, queries], found.logits[-1, b, queries].sigmoid())


def _denoised(scene: Scene) -> Figure:
    """Draw the positives of the first group, from their noised boxes through all layers."""
    record, b = scene.record, scene.image
    objects = torch.arange(len(record.denoising.targets[b].labels))
    if len(objects) < len(scene.target.labels):  # a random choice of the objects
        scene = scene._replace(targets=record.denoising.targets)
    found, start = record.outputs.denoising.predictions, record.denoising.queries.box_logits[b, objects].sigmoid()
    return _course(scene, objects, start, found.boxes[:, b, objects], found.logits[-1, b, objects].sigmoid())


def _course(
    scene: Scene, objects: torch.Tensor, start: torch.Tensor, boxes: torch.Tensor, scores: torch.Tensor
) -> Figure:
    """Draw K queries layer by layer, and their objects (K,); boxes (K, 4) and (N, K, 4), scores (K, C)."""
    truth = scene.target.boxes[objects]
    colours = np.array(object_colours(len(scene.target.labels)))[objects.numpy()]
    steps = [start, *boxes]
    columns = 4
    rows = -(-(len(steps) + 1) // columns)
    figure, grid = new_figure(10.5, rows * (0.3 + 2.55 * _aspect(scene)), rows, columns)
    for number, (axes, step) in enumerate(zip(grid.flat, steps, strict=False)):
        overlap = box_iou(cxcywh_to_xyxy(step), cxcywh_to_xyxy(truth)).diagonal().mean().item()
        name = f"layer {number}" if number else "initial boxes"
        show_image(axes, scene.pixels, f"{name}, mean IoU {overlap:.2f}")
        add_boxes(axes, scene.corners(step), colours)
    texts = [f"{scene.names[score.argmax()]} {score.max():.2f}" for score in scores]
    add_names(grid.flat[len(steps) - 1], scene.corners(steps[-1]), colours, texts, 10.5 / columns - 0.1)
    show_image(grid.flat[len(steps)], scene.pixels, "the objects")
    add_boxes(grid.flat[len(steps)], scene.corners(truth), colours)
    for axes in grid.flat[len(steps) + 1 :]:
        axes.set_axis_off()
    return figure


def _aspect(scene: Scene) -> float:
    """Height of the image over its width."""
    return scene.pixels.shape[0] / scene.pixels.shape[1]


def _sampling(scene: Scene) -> Figure:
    """Draw sampling points in the first and the last layer, for queries of a large, a middling and a small object."""
    record, b = scene.record, scene.image
    queries, objects = record.matches[b]
    order = scene.target.boxes[objects, 2:].prod(1).argsort(descending=True)
    chosen = queries[order[torch.linspace(0, len(order) - 1, min(3, len(order))).round().long()]]
    slots = record.denoising.queries.content.shape[1]  # they stand in front
    figure, grid = new_figure(max(4.2, 3.2 * len(chosen)), 6.5, 2, len(chosen))
    for row, layer in zip(grid, (0, len(record.samples) - 1), strict=True):
        for axes, query in zip(row, chosen.tolist(), strict=True):
            score, label = record.outputs.decoder.logits[-1, b, query].sigmoid().max(-1)
            name = f"{escaped(scene.names[label], _TITLE_COLUMNS)} {score:.2f}"
            show_image(axes, scene.pixels, f"layer {layer + 1}, query {query} ({name})")
            _add_samples(axes, scene, layer, slots + query)
    levels = {
        f"level {i} ({h} x {w})": c for (i, (h, w)), c in zip(enumerate(record.memory.shapes), LEVELS, strict=False)
    }
    add_legend(figure, {"reference box": INK} | levels)
    return figure


def _add_samples(axes: Axes, scene: Scene, layer: int, query: int) -> None:
    """Draw the sampling points of a query in a layer, sized by weight, in a window around them."""
    height, width = scene.pixels.shape[:2]
    boxes, locations, weights = (values[scene.image, query] for values in scene.record.samples[layer])
    x0, y0, x1, y1 = scene.corners(boxes)
    add_boxes(axes, np.array([[x0, y0, x1, y1]]), INK, linewidth=2)
    for level, colour in zip(range(weights.shape[1]), LEVELS, strict=False):
        x, y = (locations[:, level] * locations.new_tensor([width, height])).flatten(0, 1).T.numpy()
        size = 5 + 150 * weights[:, level].flatten().numpy()
        axes.scatter(x, y, s=size, color=colour, alpha=0.85, edgecolor="white", linewidth=0.25)
    side = min(max(0.95 * max(x1 - x0, y1 - y0), 0.22 * min(height, width)), 0.5 * min(height, width))
    x = np.clip((x0 + x1) / 2, side, width - side)  # the window stays inside the image
    y = np.clip((y0 + y1) / 2, side, height - side)
    axes.set(xlim=(x - side, x + side), ylim=(y + side, y - side))


def _gradients(scene: Scene) -> Figure:
    """Draw the measured gradients of the box losses of each layer at the box heads, looking forward once, and twice."""
    most = max(pulls.max().item() for pulls in scene.record.gradients.values())
    figure, (grid,) = new_figure(10.5, 3.9, 1, 2)
    for axes, (name, pulls) in zip(grid, scene.record.gradients.items(), strict=True):
        count = len(pulls)
        for (i, j, step), pull in np.ndenumerate(pulls.numpy()):
            if pull:
                _add_pull(axes, (i, 0), (j + _STEP_PLACES[step], 1), pull.item(), most, _STEPS[step][1])
        for j in range(count):
            for place, (_, colour) in zip(_STEP_PLACES, _STEPS, strict=True):
                axes.scatter(j + place, 1, s=46, color=colour, edgecolor="white", linewidth=0.6, zorder=3)
        axes.scatter(range(count), [0] * count, s=46, color=INK, marker="s", edgecolor="white", linewidth=0.6, zorder=3)
        axes.set_xticks(range(count), [f"layer {j + 1}" for j in range(count)], fontsize=8, color=INK)
        axes.set_yticks([0, 1], ["box losses", "box head"], fontsize=9, color=INK, rotation=90, va="center")
        axes.set(xlim=(-0.45, count - 0.35), ylim=(-0.15, 1.15))
        axes.tick_params(length=0)
        frame(axes, f"looking forward {name}")
    add_legend(figure, {"box losses of a layer": INK} | dict(_STEPS))
    return figure


def _add_pull(
    axes: Axes, loss: tuple[float, float], step: tuple[float, float], pull: float, most: float, colour: str
) -> None:
    """Draw an arrow from a loss to a step of a box head, its width the norm of the gradient, and the number."""
    look = {"arrowstyle": "-|>", "linewidth": 0.8 + 3 * pull / most, "color": colour, "shrinkA": 6, "shrinkB": 6}
    axes.annotate("", step, loss, arrowprops=look)
    x, y = (0.42 * a + 0.58 * b for a, b in zip(loss, step, strict=True))
    add_label(axes, x, y, f"{pull:.2g}", INK, fontsize=8, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5})


def _losses(scene: Scene) -> Figure:
    """Draw the weighted losses of the batch: class, L1 and GIoU of every prediction set."""
    values = scene.record.losses
    suffixes = [name.removeprefix("loss_ce") for name in values if name.startswith("loss_ce")]
    suffixes.sort(key=lambda suffix: ("_dn" in suffix, "_interm" not in suffix, suffix in ("", "_dn"), suffix))
    figure, ((axes,),) = new_figure(10.5, 3.6)
    start = np.zeros(len(suffixes))
    for key, colour in LOSSES.items():
        parts = np.array([values[f"loss_{key}{suffix}"] for suffix in suffixes])
        axes.bar(range(len(suffixes)), parts, 0.68, start, color=colour)
        start += parts
    axes.set_xticks(range(len(suffixes)), [suffix or "(none)" for suffix in suffixes], fontsize=8.5, color=INK)
    axes.tick_params(length=0, axis="x")
    axes.tick_params(colors=SOFT, labelsize=8, axis="y")
    axes.spines[["top", "right"]].set_visible(False)
    frame(axes, f"{len(values)} losses, {sum(values.values()):.1f} in sum")
    axes.set_xlabel("suffix of the name", fontsize=9, color=INK)
    names = {
        f"loss_{key}{note}": LOSSES[key]
        for key, note in (("ce", " (class)"), ("bbox", " (L1)"), ("giou", " (overlap)"))
    }
    add_legend(figure, names)
    return figure


SCENES = {  # name of the picture -> what draws it
    "anchors": _anchors,
    "denoising": _denoising,
    "mask": _mask,
    "layers": _layers,
    "denoised": _denoised,
    "sampling": _sampling,
    "gradients": _gradients,
    "losses": _losses,
}

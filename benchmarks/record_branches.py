"""Records what the public code of DINO's descendants computes with decoders, relations and groups of queries.

    python benchmarks/record_branches.py --relation-detr DIR --h-detr DIR --dac-detr DIR --stable-dino DIR --output DIR

Each checkout gives one file, branches_*.npz, with inputs, weights and results; an option that is left out leaves its
file as it is. The public code runs on the CPU in float64, at tiny size, on seeded inputs; float32 keeps the results.
Libraries that it imports but does not need here are replaced by empty ones, and its compiled operator by its own
function in plain PyTorch.

Inputs and weights are multiples of 1/1024, 1/256 or 1/32, which float16 holds exactly. `weigh` makes the scalar of a
gradient, but for criteria, where it is the weighted sum of the losses.
"""

import argparse
import importlib
import math
import sys
import types
import warnings
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import MagicMock, patch

import numpy as np
import torch
from torch import nn

OWN = {"models", "util", "engine", "main", "dino_transformer"}  # top-level names in the checkouts
CLASSES, LAYERS = 5, 3
SHAPES = ((4, 4), (2, 1))  # height and width of each level of the pyramid
VALID = (((4, 4), (2, 1)), ((2, 3), (1, 1)))  # the part of each level without padding, of two images


@contextmanager
def checkout(folder, **stubs):
    """Import from a checkout, with `stubs` in the place of modules; `cuda` does nothing meanwhile.

    Afterwards the stubs and the checkout's modules are gone; other modules that it imported stay, since some libraries
    can't be imported twice.
    """
    path = sys.path[:]
    sys.path.insert(0, str(folder))
    sys.modules.update(stubs)
    with patch.object(torch.Tensor, "cuda", lambda self: self):
        try:
            yield importlib.import_module
        finally:
            sys.path[:] = path
            for name in [name for name in sys.modules if name in stubs or name.split(".")[0] in OWN]:
                del sys.modules[name]


def empty(*names):
    return dict.fromkeys(names, MagicMock())


class Draw:
    """Seeded random numbers that float16 holds exactly."""

    def __init__(self, seed):
        self.generator = np.random.default_rng(seed)

    def normal(self, *shape, scale=1.0, mean=0.0, step=1 / 256):
        x = mean + scale * self.generator.standard_normal(shape)
        return torch.tensor(np.round(x / step) * step)

    def boxes(self, *shape):
        """(*shape, 4) cxcywh within the image."""
        sizes = self.generator.uniform(0.08, 0.4, (*shape, 2))
        centers = sizes / 2 + self.generator.random((*shape, 2)) * (1 - sizes)
        return torch.tensor(np.round(np.concatenate([centers, sizes], -1) * 1024) / 1024)

    def near(self, boxes, spread):
        """Boxes (..., 4) moved and resized by a part of their size."""
        moved = boxes + boxes[..., 2:].repeat(1, 2) * spread * self.normal(*boxes.shape)
        return ((moved * 1024).round() / 1024).clamp(32 / 1024, 992 / 1024)

    def fill(self, module):
        """Draw all parameters of `module`, in the order of their names; returns them by name."""
        for name, parameter in sorted(module.named_parameters()):
            scale = 1 / math.sqrt(parameter[0].numel()) if parameter.dim() > 1 else 0.1
            is_norm = parameter.dim() == 1 and name.endswith("weight")
            parameter.data = self.normal(*parameter.shape, scale=scale, mean=float(is_norm), step=1 / 32)
        return dict(sorted(module.named_parameters()))


def weigh(*tensors):
    """The scalar whose gradients are recorded: the sum of every tensor's numbers, number i times cos(i)."""
    return sum((x.flatten() * torch.arange(x.numel()).cos()).sum() for x in tensors)


def plain(x):
    """A NumPy array of few bytes: float16 where that holds the same numbers, else float32; int16; bool; text."""
    if isinstance(x, torch.Tensor):
        x = x.detach().numpy()
    x = np.asarray(x)
    if x.dtype.kind == "f":
        exact = np.array_equal(x.astype(np.float16), x)
        return x.astype(np.float16 if exact else np.float32)
    return x.astype(np.int16) if x.dtype.kind == "i" else x


def save(path, tree):
    """Write nested dictionaries; the names of an array's place are joined by slashes."""
    arrays = {}

    def visit(prefix, value):
        for name, part in value.items():
            if isinstance(part, dict):
                visit(f"{prefix}{name}/", part)
            else:
                arrays[prefix + name] = plain(part)

    visit("", tree)
    np.savez_compressed(path, **arrays)


def leaf(x):
    return x.clone().requires_grad_()


def pyramid():
    """Padding mask (2, S), valid ratios (2, L, 2) as (x, y), shapes (L, 2) and first token (L,) of each level."""
    masks = []
    for valid in VALID:
        levels = [torch.ones(shape, dtype=torch.bool) for shape in SHAPES]
        for level, (height, width) in zip(levels, valid, strict=True):
            level[:height, :width] = False
        masks.append(torch.cat([level.flatten() for level in levels]))
    shapes = torch.tensor(SHAPES)
    ratios = torch.tensor(VALID) / shapes
    return torch.stack(masks), ratios.flip(-1), shapes, torch.tensor([0, SHAPES[0][0] * SHAPES[0][1]])


class Fixed(nn.Module):
    """A module that returns one thing whatever it is given."""

    def __init__(self, result):
        super().__init__()
        self.result = result

    def forward(self, *args, **kwargs):
        return self.result


# Relation-DETR


def record_bias(public, draw):
    """Relation embedding of Q1 = 6 source and Q2 = 7 target boxes; one pair of boxes is the same."""
    source, target = draw.boxes(2, 6), draw.boxes(2, 7)
    target[0, 0] = source[0, 0]
    module = public.PositionRelationEmbedding(16, num_heads=8)
    weights = draw.fill(module)
    bias = module(source, target)
    weigh(bias).backward()
    return {
        "source": source,
        "target": target,
        "encoding": public.box_rel_encoding(source, target),
        "weights": weights,
        "bias": bias,
        "gradients": {name: weight.grad for name, weight in weights.items()},
    }


def decoder_mask(queries):
    """(Q, Q) bool: two groups of two denoising queries, then the others, which see no denoising query."""
    mask = torch.zeros(queries, queries, dtype=torch.bool)
    mask[4:, :4] = mask[:2, 2:4] = mask[2:4, :2] = True
    return mask


def run_relation_decoder(decoder, inputs, **kwargs):
    """Predictions of all layers, and gradients for queries, memory and the relation's weights."""
    padding, ratios, shapes, starts = pyramid()
    query, value = leaf(inputs["query"]), leaf(inputs["value"])
    decoder.zero_grad()
    logits, boxes = decoder(query, inputs["references"], value, shapes, starts, ratios, padding, **kwargs)
    weigh(logits, boxes).backward()
    grads = {"query": query.grad, "value": value.grad}
    relation = decoder.position_relation_embedding.named_parameters()
    grads |= {f"relation.{name}": weight.grad for name, weight in relation if weight.grad is not None}
    return {"logits": logits, "boxes": boxes, "gradients": grads}


def record_relation_decoder(public, draw):
    queries, embed_dim = 8, 32
    padding, ratios, shapes, _ = pyramid()
    layer = public.RelationTransformerDecoderLayer(embed_dim, 64, 4, 0.0, n_levels=len(SHAPES), n_points=2)
    decoder = public.RelationTransformerDecoder(layer, LAYERS, CLASSES)
    weights = draw.fill(decoder)
    inputs = {
        "query": draw.normal(2, queries, embed_dim),
        "references": draw.boxes(2, queries),
        "value": draw.normal(2, padding.shape[1], embed_dim),
    }
    mask = decoder_mask(queries)
    return {
        **inputs,
        "padding": padding,
        "valid_ratios": ratios,
        "shapes": shapes,
        "mask": mask,
        "weights": weights,
        "plain": run_relation_decoder(decoder, inputs),
        "masked": run_relation_decoder(decoder, inputs, attn_mask=mask),
        "skipped": run_relation_decoder(decoder, inputs, skip_relation=True),
    }


def record_fusion(encoder, fusion, draw, layers, embed_dim):
    """Run the public encoder with layers whose states are given; states (N+1, B, S, E), the encoder's input first."""
    states = leaf(draw.normal(layers + 1, 2, 5, embed_dim))
    encoder.layers = nn.ModuleList(Fixed(state) for state in states[1:])
    weights = draw.fill(fusion)
    output = encoder(states[0], None, None, None)
    weigh(output).backward()
    grads = {"states": states.grad, "weights": {name: weight.grad for name, weight in weights.items()}}
    return {"states": states, "weights": weights, "output": output, "gradients": grads}


def record_relation(folder):
    missing = "accelerate", "accelerate.logging", "util.utils", "util.collect_env", "util.logger"
    with checkout(folder, **empty(*missing)) as find:
        public = find("models.bricks.relation_transformer")
        layer = public.RelationTransformerEncoderLayer(16, 32, 0.0, 4, n_levels=2, n_points=2)
        encoder = public.RelationTransformerEncoder(layer, LAYERS)
        return {
            "bias": record_bias(public, Draw(1)),
            "decoder": record_relation_decoder(public, Draw(2)),
            "fusion": record_fusion(encoder, encoder.memory_fusion, Draw(3), LAYERS, 16),
        }


# Stable-DINO


class Sequence(nn.Module):
    """What the encoder takes from detrex' class of the same place: a list of layers, here set afterwards."""

    def __init__(self, transformer_layers, num_layers):
        super().__init__()
        self.num_layers = num_layers


def record_stable_dino(folder):
    layers = MagicMock(TransformerLayerSequence=Sequence)
    stubs = {**empty("detrex", "detrex.utils"), "detrex.layers": layers}
    with checkout(Path(folder) / "projects/stabledino/modeling", **stubs) as find:
        public = find("dino_transformer")  # as a file of its own: the package around it needs all of detrex
        fusion = {"embed_dim": 16, "num_layers": LAYERS, "multi_level_fusion": "dense-fusion"}
        encoder = public.StableDINOTransformerEncoder(**fusion)
        return {"fusion": record_fusion(encoder, encoder.fusion_layer, Draw(4), LAYERS, 16)}


# What H-Deformable-DETR and DAC-DETR share: files of Deformable DETR

DETR_LACKS = (
    *("datasets", "datasets.samplers", "datasets.coco_eval", "datasets.panoptic_eval", "datasets.data_prefetcher"),
    *("wandb", "models.swin_transformer", "MultiScaleDeformableAttention"),
)


def without_kernels(find):
    """A context where the checkout's module of attention calls its own function in plain PyTorch."""
    core = find("models.ops.functions.ms_deform_attn_func").ms_deform_attn_core_pytorch

    def apply(value, shapes, starts, locations, weights, step):
        return core(value, shapes, locations, weights)

    attention = find("models.ops.modules.ms_deform_attn")
    return patch.object(attention, "MSDeformAttnFunction", types.SimpleNamespace(apply=apply))


def build_criterion(find, public):
    """The published criterion with the default settings of main.py, for CLASSES classes and LAYERS layers."""
    options = ["--two_stage", "--with_box_refine", f"--dec_layers={LAYERS}", "--device=cpu"]
    settings = find("main").get_args_parser().parse_args(options)
    unused = ("build_backbone", "build_deforamble_transformer", "DeformableDETR")
    with patch.multiple(public, **dict.fromkeys(unused, MagicMock())):
        built = public.build(settings)[1]
    return public.SetCriterion(CLASSES, built.matcher, built.weight_dict, built.losses, built.focal_alpha)


def draw_targets(draw, counts):
    labels = [torch.tensor(draw.generator.integers(0, CLASSES, count)) for count in counts]
    return [{"labels": label, "boxes": draw.boxes(len(label))} for label in labels]


def draw_predictions(draw, targets, layers, queries):
    """Logits (N, B, Q, C) and boxes (N, B, Q, 4), half of them near a target, as leaves."""
    boxes = draw.boxes(layers, len(targets), queries)
    for image, target in enumerate(targets):
        for i in range(queries // 2 if len(target["boxes"]) else 0):
            near = target["boxes"][i % len(target["boxes"])].expand(layers, 4)
            boxes[:, image, i] = draw.near(near, 0.1)
    logits = draw.normal(layers, len(targets), queries, CLASSES, mean=-1.0)
    return {"logits": leaf(logits), "boxes": leaf(boxes)}


def of_images(targets):
    return {f"image_{i}": target for i, target in enumerate(targets)}


def repeat(targets, times):
    """Every target `times` times: all of them, and again, as engine.py of both programs does."""
    return [{"labels": t["labels"].repeat(times), "boxes": t["boxes"].repeat(times, 1)} for t in targets]


def rows(indices):
    """Pairs of each image -> (K, 3) image, query, target."""
    images = [torch.full_like(queries, image) for image, (queries, _) in enumerate(indices)]
    return torch.cat([torch.stack(parts, 1) for parts in zip(images, *zip(*indices, strict=True), strict=True)])


def by_layer(calls):
    """What the criterion asks for, in its order: last layer, then the others from the first one, then the encoder."""
    names = [f"layer_{LAYERS - 1}", *(f"layer_{i}" for i in range(LAYERS - 1)), "encoder"]
    return dict(zip(names, calls, strict=False))


def watch(module):
    """A list that collects the results of `module` from now on."""
    calls = []
    module.register_forward_hook(lambda module, inputs, result: calls.append(result))
    return calls


def weighted(losses, weight_dict):
    """Names, values and weights of the losses with a weight; backward of their weighted sum."""
    names = [name for name in losses if name in weight_dict]
    total = sum(losses[name] * weight_dict[name] for name in names)
    total.backward()
    values = torch.stack([losses[name].detach() for name in names])
    return {"names": names, "values": values, "weights": [float(weight_dict[name]) for name in names], "total": total}


def gradients(leaves):
    return {name: {kind: x.grad for kind, x in parts.items()} for name, parts in leaves.items()}


# H-Deformable-DETR

ONE, MANY, COPIES = 8, 14, 6  # queries of both groups; copies of each target for the second


class Spy(nn.Module):
    """A module that keeps its arguments and returns one thing."""

    def __init__(self, result, **attributes):
        super().__init__()
        self.result = result
        self.__dict__.update(attributes)

    def forward(self, *args, **kwargs):
        self.seen = args
        return self.result


def record_hybrid_mask(find, public):
    """(Q, Q) bool for 3 + 5 queries, True where one must not see the other."""
    one, many, embed_dim = 3, 5, 32
    nested = find("util.misc").NestedTensor(torch.zeros(1, embed_dim, 2, 2), torch.zeros(1, 2, 2, dtype=torch.bool))
    states = torch.zeros(LAYERS, 1, one + many, embed_dim)
    boxes = torch.full((LAYERS, 1, one + many, 4), 0.5)
    transformer = Spy((states, boxes[0], boxes, None, boxes[0]), d_model=embed_dim)
    transformer.decoder = Spy(None, num_layers=LAYERS)
    backbone = Spy(([nested], [None]), strides=[8], num_channels=[embed_dim])
    model = public.DeformableDETR(backbone, transformer, CLASSES, 1, True, True, True, one, many, True)
    model(nested)
    return transformer.seen[4]


def record_hybrid_selection(public, draw):
    """The boxes of the queries of both groups, given the encoder's predictions of every token."""
    embed_dim, queries = 256, 6  # the width stands in the public code
    padding, ratios, shapes, _ = pyramid()
    options = {"num_feature_levels": len(SHAPES), "two_stage_num_proposals": queries}
    model = public.DeformableTransformer(embed_dim, 8, 1, 1, 8, two_stage=True, mixed_selection=True, **options)
    memory = torch.zeros(*padding.shape, embed_dim)
    logits, deltas = draw.normal(*padding.shape, CLASSES), draw.normal(*padding.shape, 4)
    logits[padding] -= 4  # they compete in the public code; here they must not win
    model.encoder = Fixed(memory)
    model.decoder = Spy((None, None), num_layers=0, class_embed=[Fixed(logits)], bbox_embed=[Fixed(deltas)])
    sizes = shapes.prod(1).tolist()
    masks = [part.reshape(-1, *shape) for part, shape in zip(padding.split(sizes, 1), SHAPES, strict=True)]
    features = [torch.zeros(2, embed_dim, *shape) for shape in SHAPES]
    model(features, masks, features, torch.zeros(queries, embed_dim))
    inputs = {"padding": padding, "shapes": shapes, "valid_ratios": ratios, "logits": logits, "deltas": deltas}
    return {**inputs, "references": model.decoder.seen[1]}


def aux(logits, boxes):
    return [{"pred_logits": x, "pred_boxes": y} for x, y in zip(logits[:-1], boxes[:-1], strict=True)]


def record_hybrid_losses(find, public, draw):
    targets = draw_targets(draw, (2, 0, 1))
    one, many = (draw_predictions(draw, targets, LAYERS, count) for count in (ONE, MANY))
    encoder = draw_predictions(draw, targets, 1, 10)
    outputs = {
        "pred_logits": one["logits"][-1],
        "pred_boxes": one["boxes"][-1],
        "pred_logits_one2many": many["logits"][-1],
        "pred_boxes_one2many": many["boxes"][-1],
        "aux_outputs": aux(**one),
        "aux_outputs_one2many": aux(**many),
        "enc_outputs": {"pred_logits": encoder["logits"][0], "pred_boxes": encoder["boxes"][0]},
    }
    criterion = build_criterion(find, public)
    calls = watch(criterion.matcher)
    losses = find("engine").train_hybrid(outputs, targets, COPIES, criterion, 1.0)
    losses = weighted(losses, criterion.weight_dict)
    found = [rows(call) for call in calls]
    leaves = {"one_to_one": one, "one_to_many": many, "encoder": encoder}
    return {
        "targets": of_images(targets),
        "predictions": leaves,
        "assignments": {"one_to_one": by_layer(found[: LAYERS + 1]), "one_to_many": by_layer(found[LAYERS + 1 :])},
        "losses": losses,
        "gradients": gradients(leaves),
    }


def record_hybrid(folder):
    with checkout(folder, **empty(*DETR_LACKS)) as find:
        public = find("models.deformable_detr")
        return {
            "mask": record_hybrid_mask(find, public),
            "selection": record_hybrid_selection(find("models.deformable_transformer"), Draw(5)),
            "criterion": record_hybrid_losses(find, public, Draw(6)),
        }


# DAC-DETR


def draw_crowd(draw):
    """Targets and predictions (B, Q) of four images: many and few positives; two targets that overlap; none; one that
    no prediction is near."""
    targets = draw_targets(draw, (2, 2, 0, 1))
    targets[1]["labels"] = torch.tensor([1, 3])
    targets[1]["boxes"][1] = draw.near(targets[1]["boxes"][0], 0.05)
    boxes = draw.boxes(4, 30)
    boxes[0, :12] = draw.near(targets[0]["boxes"][0].expand(12, 4), 0.05)
    boxes[0, 12:15] = draw.near(targets[0]["boxes"][1].expand(3, 4), 0.05)
    boxes[1, :10] = draw.near(targets[1]["boxes"][0].expand(10, 4), 0.05)
    targets[3]["boxes"][0] = torch.tensor([0.125, 0.125, 0.0625, 0.0625])
    boxes[3] = draw.near(torch.tensor([0.75, 0.75, 0.25, 0.25]).expand(30, 4), 0.1)
    return targets, draw.normal(4, 30, CLASSES, mean=-1.0), boxes


def record_assigner(public, draw):
    """Scores, IoU (T, Q) and assignments; no image has more than 75 positives, so that sampling changes nothing."""
    targets, logits, boxes = draw_crowd(draw)
    assigner = public.Stage2Assigner(300)
    outputs, found = {"pred_logits_cdecoder": logits, "pred_boxes": boxes}, []
    for seed in range(2):
        torch.manual_seed(seed)
        found.append(rows(assigner(outputs, targets)[0]))
    if not torch.equal(*found):
        raise RuntimeError("the assignment depends on the sampling")
    images = of_images(targets)
    for name, x, y in zip(images, logits, boxes, strict=True):
        scores, iou = assigner.get_cost_matrix(x, y, images[name]["labels"], images[name]["boxes"])
        images[name] = {**images[name], "scores": scores, "iou": iou}
    return {"logits": logits, "boxes": boxes, "targets": images, "assignments": found[0]}


def record_ranks(public, draw):
    """Ranks among the matches of one target, by quality, of two images."""
    targets = torch.tensor([0, 0, 0, 2, 2, 1]), torch.tensor([1, 1, 0, 0, 0, 0])
    quality = torch.tensor(np.round(draw.generator.random(12) * 1024) / 1024)
    ranks = public.get_local_rank_o2m(quality, [(torch.arange(6), target) for target in targets])
    return {"quality": quality.view(2, 6), "targets": torch.stack(targets), "ranks": ranks.view(2, 6)}


def dac_outputs(public, leaves, groups, padded):
    """The outputs as DeformableDETR.forward of DAC-DETR returns them: denoising queries stand first."""
    model, metas, parts = public.DeformableDETR, [], []
    for name, is_c, split in (("o", False, model._set_aux_loss_dn), ("c", True, model._set_aux_loss_dn_cdecoder)):
        meta = {"pad_size": padded, "num_dn_group": groups}
        x, y, known = public.dn_post_process(
            *leaves[name].values(), meta, True, lambda x, y, split=split: split(None, x, y), is_c
        )
        metas.append({**meta, "output_known_lbs_bboxes": known})
        parts += [x, y]
    names = "pred_logits", "pred_boxes", "pred_logits_cdecoder", "pred_boxes_cdecoder"
    encoder = [x[0] for x in leaves["encoder"].values()] * 2
    return {
        **dict(zip(names, [x[-1] for x in parts], strict=True)),
        "aux_outputs": model._set_aux_loss(None, *parts),
        "enc_outputs": dict(zip(names, encoder, strict=True)),
        "dn_meta": metas[0],
        "dn_meta_cdecoder": metas[1],
    }


def record_dac_losses(find, public, draw):
    """Losses of both decoders; 2 groups of 2 positive and 2 negative denoising queries stand before the 16 others."""
    targets = draw_targets(draw, (2, 0, 1))
    leaves = {name: draw_predictions(draw, targets, LAYERS, 8 + 16) for name in ("o", "c")}
    leaves["encoder"] = draw_predictions(draw, targets, 1, 10)
    outputs = dac_outputs(public, leaves, groups=2, padded=8)
    criterion = build_criterion(find, public)
    matched, assigned, weights = watch(criterion.matcher), watch(criterion.one2many), []

    def keep_weights(*args, **kwargs):
        loss, weight = original(*args, **kwargs)
        weights.extend([] if kwargs["cdn"] or kwargs["one2one"] else [weight])
        return loss, weight

    original = public.IA_BCE_loss
    with patch.object(public, "IA_BCE_loss", keep_weights):
        losses = criterion(outputs, targets, repeat(targets, 3))  # 3 is engine.py's balance_num
    losses = weighted(losses, criterion.weight_dict)
    return {
        "targets": of_images(targets),
        "predictions": leaves,
        "assignments": {
            "one_to_one": by_layer([rows(call) for call in matched]),
            "one_to_many": by_layer([rows(indices) for indices, _ in assigned]),
        },
        "rank_weights": by_layer(weights),
        "losses": losses,
        "gradients": gradients(leaves),
    }


def record_dac_decoder(find, draw):
    """States and boxes of both decoders; the layers' states come without a norm after them."""
    queries, embed_dim = 8, 16
    public, mlp = find("models.deformable_transformer"), find("models.deformable_detr").MLP
    padding, ratios, shapes, starts = pyramid()
    layer = public.DeformableTransformerDecoderLayer(embed_dim, 32, 0.0, "relu", len(SHAPES), 4, 2)
    decoder = public.DeformableTransformerDecoder(layer, LAYERS, True, True)
    decoder.bbox_embed = nn.ModuleList(mlp(embed_dim, embed_dim, 4, 3) for _ in range(LAYERS))
    weights = draw.fill(decoder)
    inputs = {
        "query": leaf(draw.normal(2, queries, embed_dim)),
        "position": leaf(draw.normal(2, queries, embed_dim)),
        "value": leaf(draw.normal(2, padding.shape[1], embed_dim)),
    }
    references, mask = draw.boxes(2, queries), decoder_mask(queries)
    query, position, value = inputs.values()
    with without_kernels(find):
        results = decoder(query, references, value, shapes, starts, ratios, position, padding, mask)
    weigh(*results).backward()
    geometry = {"references": references, "padding": padding, "valid_ratios": ratios, "shapes": shapes, "mask": mask}
    names = "o_states", "o_boxes", "c_states", "c_boxes"
    shared = ("layers.0.norm1.weight", "layers.1.cross_attn.value_proj.bias", "layers.2.linear2.weight")
    grads = {name: x.grad for name, x in inputs.items()} | {name: weights[name].grad for name in shared}
    return {**inputs, **geometry, "weights": weights, **dict(zip(names, results, strict=True)), "gradients": grads}


def record_dac(folder):
    with checkout(folder, **empty(*DETR_LACKS)) as find:
        public = find("models.deformable_detr")
        return {
            "assigner": record_assigner(find("models.onetomany"), Draw(7)),
            "ranks": record_ranks(find("models.segmentation"), Draw(8)),
            "criterion": record_dac_losses(find, public, Draw(9)),
            "decoder": record_dac_decoder(find, Draw(10)),
        }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in RECORDERS:
        parser.add_argument(f"--{name}", metavar="DIR", help="folder of the checkout")
    parser.add_argument("--output", default="tests/descendants", type=Path, metavar="DIR")
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # of old calls in the public code
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    args.output.mkdir(parents=True, exist_ok=True)
    for name, (group, record) in RECORDERS.items():
        folder = getattr(args, name.replace("-", "_"))
        if folder:
            save(args.output / f"branches_{group}.npz", {group: record(folder)})


RECORDERS = {
    "relation-detr": ("relation", record_relation),
    "stable-dino": ("stable_dino", record_stable_dino),
    "h-detr": ("hybrid", record_hybrid),
    "dac-detr": ("dac", record_dac),
}


if __name__ == "__main__":
    main()

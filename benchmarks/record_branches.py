"""Records what the public code of DINO's descendants computes with decoders, relations and groups of queries.

    python benchmarks/record_branches.py --relation-detr DIR --h-detr DIR --dac-detr DIR --stable-dino DIR --output DIR

Each checkout gives one file, branches_*.npz, with inputs, weights and results; an option that is left out leaves its
file as it is. The public code runs on the CPU in float32, at tiny size, on seeded inputs. Libraries that it imports but
does not need here are replaced by empty ones, and its compiled operator by its own function in plain PyTorch.

Inputs and weights are multiples of 1/64 or 1/1024, exact in float16. `weigh` makes the scalar of every gradient.
"""

import argparse
import copy
import importlib
import importlib.util
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

OWN = {"models", "util", "engine", "main", "datasets", "mmcv_custom"}  # top-level names that the checkouts share
IMAGES, CLASSES, LAYERS = 3, 5, 3
SHAPES = ((4, 5), (2, 3))  # height and width of each level of the pyramid
VALID = (((4, 5), (2, 3)), ((3, 4), (2, 2)))  # the part of each level without padding, of two images


@contextmanager
def checkout(folder, *missing):
    """Import from a checkout; the names in `missing` are empty modules meanwhile, and `cuda` does nothing."""
    path, missing = sys.path[:], dict.fromkeys(missing, MagicMock())
    sys.path.insert(0, str(folder))
    with patch.dict(sys.modules, missing), patch.object(torch.Tensor, "cuda", lambda self: self):
        try:
            yield importlib.import_module
        finally:
            sys.path[:] = path
            for name in [name for name in sys.modules if name.split(".")[0] in OWN]:
                del sys.modules[name]


class Draw:
    """Seeded random numbers that float16 holds exactly."""

    def __init__(self, seed):
        self.generator = np.random.default_rng(seed)

    def normal(self, *shape, scale=1.0, mean=0.0):
        x = mean + scale * self.generator.standard_normal(shape)
        return torch.tensor(np.round(x * 64) / 64, dtype=torch.float32)

    def boxes(self, *shape):
        """(*shape, 4) cxcywh within the image."""
        sizes = self.generator.uniform(0.08, 0.4, (*shape, 2))
        centers = sizes / 2 + self.generator.random((*shape, 2)) * (1 - sizes)
        return torch.tensor(np.round(np.concatenate([centers, sizes], -1) * 1024) / 1024, dtype=torch.float32)

    def near(self, boxes, spread):
        """Boxes (..., 4) moved and resized by a part of their size."""
        moved = boxes + boxes[..., 2:].repeat(1, 2) * spread * self.normal(*boxes.shape)
        return ((moved * 1024).round() / 1024).clamp(32 / 1024, 992 / 1024)

    def fill(self, module):
        """Draw all parameters of `module`, in the order of their names; returns them by name."""
        for name, parameter in sorted(module.named_parameters()):
            scale = 1 / math.sqrt(parameter[0].numel()) if parameter.dim() > 1 else 0.1
            is_norm = parameter.dim() == 1 and name.endswith("weight")
            parameter.data = self.normal(*parameter.shape, scale=scale, mean=float(is_norm))
        return dict(sorted(module.named_parameters()))


def weigh(*tensors):
    """The scalar whose gradients are recorded: the sum of every tensor's numbers, number i times cos(i)."""
    return sum((x.flatten() * torch.arange(x.numel()).cos()).sum() for x in tensors)


def plain(x):
    """A NumPy array; float16 where that holds the same numbers."""
    if isinstance(x, torch.Tensor):
        x = x.detach().numpy()
    x = np.asarray(x)
    if x.dtype == np.float32 and np.array_equal(x.astype(np.float16), x):
        return x.astype(np.float16)
    return x.astype(np.int16) if x.dtype == np.int64 else x


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
    with checkout(folder, *missing) as find:
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
    layers = types.SimpleNamespace(**dict.fromkeys(("FFN", "MLP", "BaseTransformerLayer"), MagicMock()))
    for name in ("MultiheadAttention", "MultiScaleDeformableAttention", "get_sine_pos_embed"):
        setattr(layers, name, MagicMock())
    layers.TransformerLayerSequence = Sequence
    path = Path(folder) / "projects/stabledino/modeling/dino_transformer.py"
    spec = importlib.util.spec_from_file_location("stable_dino_transformer", path)
    public = importlib.util.module_from_spec(spec)
    with patch.dict(sys.modules, {"detrex": MagicMock(), "detrex.layers": layers, "detrex.utils": MagicMock()}):
        spec.loader.exec_module(public)
    encoder = public.StableDINOTransformerEncoder(embed_dim=16, num_layers=LAYERS, multi_level_fusion="dense-fusion")
    return {"fusion": record_fusion(encoder, encoder.fusion_layer, Draw(4), LAYERS, 16)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in RECORDERS:
        parser.add_argument(f"--{name}", metavar="DIR", help="folder of the checkout")
    parser.add_argument("--output", default="tests/descendants", type=Path, metavar="DIR")
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # of old calls in the public code
    torch.manual_seed(0)
    args.output.mkdir(parents=True, exist_ok=True)
    for name, (group, record) in RECORDERS.items():
        folder = getattr(args, name.replace("-", "_"))
        if folder:
            save(args.output / f"branches_{group}.npz", {group: record(folder)})


RECORDERS = {
    "relation-detr": ("relation", record_relation),
    "stable-dino": ("stable_dino", record_stable_dino),
}


if __name__ == "__main__":
    main()

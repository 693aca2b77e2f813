"""Time and memory of decoders with the position relation: `python benchmarks/relation.py --output FOLDER`.

Three decoders of 6 layers, in rounds: DINO's; with the relation, as `RelationDecoder` computes it; and with the
relation as the published program does (Relation-DETR): codes and biases of all pairs, kept for the backward pass.
Training has 1100 queries (200 for denoising, with a mask) and 2 images, inference 900 queries and one image; the memory
of the pyramid belongs to 640x640 pixels. Times are medians of processor time; memory is what a run needs at most beyond
what was in use.
"""

import argparse
import json
import statistics
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from measure import MIB, clock, origin, peak_memory  # noqa: E402

from dino.modeling import Decoder  # noqa: E402
from dino.modeling.transformer import full_attention  # noqa: E402
from dino.modeling.variants import RelationDecoder  # noqa: E402
from dino.structures import Queries, Tokens  # noqa: E402

SHAPES = [(80, 80), (40, 40), (20, 20), (10, 10)]


class PublishedRelation(RelationDecoder):
    """The same numbers from codes (B, 64, Q, Q) and biases (B, M, Q, Q) of all pairs, by common operators."""

    def interaction(self, mask, boxes):
        if len(boxes) == 1:
            return full_attention(mask, boxes)
        with torch.no_grad():
            codes = pair_codes(boxes[-2], boxes[-1])
        weight, bias = self.relation.weight[..., None, None], self.relation.bias
        bias = F.conv2d(codes, weight, bias).relu()
        if mask is not None:
            bias = bias.masked_fill(mask < 0, -torch.inf)
        return partial(F.scaled_dot_product_attention, attn_mask=bias)


def pair_codes(source, target):
    """Boxes (B, Q, 4) each -> (B, 64, Q, Q)."""
    source, target = source[:, :, None], target[:, None]
    distances = ((source - target)[..., :2].abs() / (source[..., 2:] + 1e-5) + 1).log()
    ratios = ((source[..., 2:] + 1e-5) / (target[..., 2:] + 1e-5)).log()
    periods = 10000 ** (torch.arange(8, device=source.device) / 8)
    angles = 100 * torch.cat([distances, ratios], -1)[..., None] / periods
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(3).permute(0, 3, 1, 2)


def inputs(queries, denoising, images, device):
    """Random queries, of which the first ones are for denoising, and the memory."""
    torch.manual_seed(1)
    count = denoising + queries
    mask = torch.zeros(count, count, dtype=torch.bool, device=device)
    mask[denoising:, :denoising] = True
    tokens = sum(h * w for h, w in SHAPES)
    features = torch.randn(images, tokens, 256, device=device)
    sizes = torch.tensor([[(w, h) for h, w in SHAPES]] * images, dtype=torch.float32, device=device)
    content, boxes = torch.randn(images, count, 256, device=device), torch.randn(images, count, 4, device=device)
    queries = Queries(content, boxes, mask if denoising else None)
    return queries, Tokens(features, features, None, SHAPES, sizes)


def training(decoder, device):
    """A forward and a backward pass."""
    queries, memory = inputs(900, 200, 2, device)

    def run():
        decoder.zero_grad()
        outputs = decoder(queries, memory)
        (outputs.logits.square().mean() + outputs.boxes.square().mean()).backward()

    return run


def inference(decoder, device):
    queries, memory = inputs(900, 0, 1, device)
    return torch.no_grad()(lambda: decoder(queries, memory))


def measure(runs, device, rounds):
    """{decoder: function} -> {decoder: median seconds and bytes}; each round runs all decoders."""
    needed = {}
    for name, run in runs.items():
        run()
        before, most, _ = peak_memory(run, device)
        needed[name] = None if before is None else most - before
    seconds = {name: [] for name in runs}
    part = 0 if device.type == "cuda" else 1  # other programs of the machine do not count
    for _ in range(rounds):
        for name, run in runs.items():
            start = clock(device)[part]
            run()
            seconds[name].append(clock(device)[part] - start)
    return {name: {"seconds": statistics.median(seconds[name]), "bytes": needed[name]} for name in runs}


def table(results):
    """The results as Markdown, with ratios to DINO's decoder."""
    lines = ["| work | decoder | seconds | ratio | MiB | ratio |", "|---|---|---|---|---|---|"]
    for work, found in results.items():
        plain = found["Decoder"]
        for name, one in found.items():
            time, memory = one["seconds"] / plain["seconds"], one["bytes"] / plain["bytes"]
            cells = [f"{one['seconds']:.2f}", f"{time:.2f}", f"{one['bytes'] / MIB:.0f}", f"{memory:.2f}"]
            lines.append(f"| {' | '.join([work, name, *cells])} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--rounds", default=5, type=int)
    parser.add_argument("--output", type=Path, help="folder for relation_DEVICE.md")
    args = parser.parse_args()
    torch.manual_seed(0)
    kinds = {"Decoder": Decoder, "RelationDecoder": RelationDecoder, "as published": PublishedRelation}
    decoders = {name: kind(num_classes=80).to(args.device) for name, kind in kinds.items()}
    for name in ("RelationDecoder", "as published"):
        nn.init.normal_(decoders[name].relation.weight, std=0.1)
        decoders[name].load_state_dict(decoders["RelationDecoder"].state_dict())
    results = {
        work.__name__: measure({n: work(d, args.device) for n, d in decoders.items()}, args.device, args.rounds)
        for work in (training, inference)
    }
    text = table(results)
    print(text)
    if args.output:
        facts = json.dumps(origin(args.device), indent=1)
        about = __doc__.partition("\n\n")[2]
        path = args.output / f"relation_{args.device.type}.md"
        path.write_text(f"# Decoders with the position relation\n\n{about}\n{text}\n\n```json\n{facts}\n```\n")


if __name__ == "__main__":
    main()

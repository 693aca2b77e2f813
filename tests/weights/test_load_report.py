"""The numbers of a report against a count of the tensors whose values changed, and against numbers found by hand."""

import functools
from typing import NamedTuple

import pytest
import torch
import torchvision
from torch import nn

from dino.modeling import TorchvisionBackbone, build_dino, share_heads
from dino.modeling.variants import HybridBranch, LearnedPositionEncoding, RelationDecoder
from dino.weights import Report, load_weights, resnet_to_detectron2

from ..tiny import tiny_network
from .states import detrex_state, official_state, randomise

# Tensors of `tiny_network()`, counted in its description: 6 backbone, 16 neck, 1 level embedding, 16 encoder,
# 13 query selection, 1 label embedding, 66 decoder (2 x 22 layers, 2 x 8 heads, 2 norm, 4 position).
TINY = 119
LAYER, HEADS = 22, 8
CLASSES = 7  # heads of two decoder layers and of the encoder, weight and bias each; label embedding
RESNET18 = 100  # 20 convolutions, and 20 frozen norms of 4 tensors


class Numbers(NamedTuple):
    """Tensors by outcome."""

    loaded: int = TINY
    partly: int = 0
    afresh: int = 0
    unexpected: int = 0


class Pair(NamedTuple):
    """A file, a model and the arguments of loading."""

    content: dict
    model: nn.Module
    wishes: dict = {}  # noqa: RUF012 (of a tuple)


def mark(model):
    """Numbers that no file has."""
    for tensor in model.state_dict().values():
        tensor.fill_(7)
    return model


def own(names=None, **options):
    """The content of a file of this project."""
    return {"model": randomise(tiny_network(**options)).state_dict(), **({"names": names} if names else {})}


def shared(**options):
    model = tiny_network(**options)
    share_heads(model.decoder)
    return randomise(model)


def coco_file(classes=91):
    return official_state(shared(num_classes=classes))


def for_classes(content, *names, **wishes):
    return Pair(content, tiny_network(num_classes=len(names)), {"classes": names, **wishes})


def hybrid(num_classes=3):
    return {"many": HybridBranch(num_queries=20, num_classes=num_classes, embed_dim=32)}


def learned():
    network = tiny_network()
    network.position_encoding = LearnedPositionEncoding(32)
    return network


def relation():
    network = tiny_network()
    sizes = {"embed_dim": 32, "num_heads": 4, "num_levels": 4, "num_points": 2, "hidden_dim": 16}
    network.decoder = RelationDecoder(num_classes=3, num_layers=2, **sizes)
    return network


def resnet18(norm="FrozenBN"):
    sizes = {"embed_dim": 32, "num_heads": 4, "hidden_dim": 16, "encoder_layers": 1, "decoder_layers": 1}
    with torch.device("meta"):  # without the time for initial values
        network = build_dino(backbone=TorchvisionBackbone("resnet18", norm=norm), num_classes=3, **sizes)
    return mark(network.to_empty(device="cpu"))


@functools.cache
def classifier():
    return randomise(torchvision.models.resnet18()).state_dict()


def faster_rcnn(front, names=dict):
    """A few tensors of a detector around a ResNet-18."""
    rest = {f"{part}.weight": torch.rand(3) for part in ("rpn.head.conv", "proposal_generator.rpn_head.conv")}
    state = {key: value for key, value in names(classifier()).items() if not key.startswith("fc.")}
    return {f"{front}{key}": value for key, value in state.items()} | rest


REST = 83  # tensors of `resnet18()` outside of its backbone, see `test_the_numbers_of_the_networks`
PAIRS = {
    "own": (lambda: Pair(own(), tiny_network()), Numbers()),
    "wrapped": (lambda: Pair({f"module.{k}": v for k, v in own()["model"].items()}, tiny_network()), Numbers()),
    "half": (lambda: Pair({k: v.half() for k, v in own()["model"].items()}, tiny_network()), Numbers()),
    "official": (lambda: Pair(official_state(shared()), tiny_network()), Numbers()),
    "official, shared model": (lambda: Pair(official_state(shared()), shared()), Numbers()),
    "detrex": (lambda: Pair(detrex_state(randomise(tiny_network())), tiny_network()), Numbers()),
    "own, shared file": (lambda: Pair(shared().state_dict(), tiny_network()), Numbers()),
    "own, both shared": (lambda: Pair(shared().state_dict(), shared()), Numbers()),
    "average": (lambda: Pair({**own(), "ema": own()["model"]}, tiny_network()), Numbers()),
    "3 -> 1 classes": (lambda: Pair(own(), tiny_network(num_classes=1)), Numbers(TINY - CLASSES, 0, CLASSES)),
    "3 -> 80 classes, shared": (
        lambda: Pair(official_state(shared()), shared(num_classes=80)),
        Numbers(TINY - CLASSES, 0, CLASSES),
    ),
    "91 -> 80 classes": (lambda: Pair(coco_file(), tiny_network(num_classes=80)), Numbers()),
    "91 -> 80 other classes": (
        lambda: for_classes(coco_file(), *(f"part {n}" for n in range(80)), class_rows="name"),
        Numbers(TINY - CLASSES, 0, CLASSES),
    ),
    "91 -> 3 classes": (lambda: for_classes(coco_file(), "car", "x", "dog"), Numbers(TINY - CLASSES, CLASSES)),
    "91 -> a subset": (lambda: for_classes(coco_file(), "dog", "Person"), Numbers()),
    "80 -> a subset": (lambda: for_classes(coco_file(80), "stop-sign"), Numbers()),
    "80 -> none of these": (lambda: for_classes(coco_file(80), "x"), Numbers(TINY - CLASSES, 0, CLASSES)),
    "another order": (lambda: for_classes(own(["a", "b", "c"]), "c", "a", "b"), Numbers()),
    "as many others": (
        lambda: for_classes(own(["a", "b", "c"]), "d", "a", "e", class_rows="name"),
        Numbers(TINY - CLASSES, CLASSES),
    ),
    "as many others, in place": (lambda: for_classes(own(["a", "b", "c"]), "d", "a", "e"), Numbers()),
    "more queries": (lambda: Pair(own(), tiny_network(num_queries=20)), Numbers(TINY - 1, 0, 1)),
    "3 -> 4 levels": (
        lambda: Pair(own(num_levels=3), tiny_network()),
        Numbers(TINY - 4 - 12 - 1, 1, 4 + 12),
    ),
    "4 -> 3 levels": (lambda: Pair(own(), tiny_network(num_levels=3)), Numbers(TINY - 4 - 12, 0, 12, 4)),
    "deeper decoder": (
        lambda: Pair(own(), tiny_network(num_layers=3)),
        Numbers(TINY, 0, LAYER + HEADS),
    ),
    "shallower decoder": (lambda: Pair(own(num_layers=3), tiny_network()), Numbers(TINY, 0, 0, LAYER + HEADS)),
    "branch of the model": (lambda: Pair(own(), tiny_network(branches=hybrid())), Numbers(TINY, 0, 9)),
    "branch of the file": (lambda: Pair(own(branches=hybrid()), tiny_network()), Numbers(TINY, 0, 0, 9)),
    "branches of other classes": (
        lambda: Pair(own(num_classes=5, branches=hybrid(5)), tiny_network(branches=hybrid())),
        Numbers(TINY - CLASSES + 7, 0, CLASSES + 2),
    ),
    "relation": (lambda: Pair(own(), relation()), Numbers(TINY, 0, 6)),
    "learned position": (lambda: Pair(own(), learned()), Numbers(TINY, 0, 2)),
    "torchvision's backbone": (lambda: Pair(classifier(), resnet18()), Numbers(RESNET18, 0, REST, 2)),
    "trainable norms": (lambda: Pair(classifier(), resnet18("BN")), Numbers(RESNET18, 0, REST, 2)),
    "Detectron2's backbone": (
        lambda: Pair(resnet_to_detectron2(classifier()), resnet18()),
        Numbers(RESNET18, 0, REST, 2),
    ),
    "Detectron2's detector": (
        lambda: Pair(faster_rcnn("backbone.bottom_up.", resnet_to_detectron2), resnet18(), {"parts": "backbone"}),
        Numbers(RESNET18, 0, REST, 2),
    ),
    "DETR's detector": (
        lambda: Pair(faster_rcnn("backbone.0.body."), resnet18(), {"parts": "backbone"}),
        Numbers(RESNET18, 0, REST, 2),
    ),
    "a DINO's backbone": (
        lambda: Pair(own(num_classes=5), tiny_network(), {"parts": "backbone"}),
        Numbers(6, 0, TINY - 6, TINY - 6),
    ),
    "another backbone": (
        lambda: Pair({k: v for k, v in own()["model"].items() if "res4" not in k}, tiny_network(), {"min_backbone": 0}),
        Numbers(TINY - 2, 0, 2),
    ),
}


def tensors_of(model):
    """The tensors of a model by name, without counters."""
    return [value for value in model.state_dict().values() if value.is_floating_point()]


def rows(tensor):
    return tensor.reshape(len(tensor), -1) if tensor.dim() else tensor.reshape(1, 1)


def count_by_values(before, after):
    """Tensors by how many of their rows have other values than before: all, some, none."""
    changed = [(rows(a) != rows(b)).any(1) for a, b in zip(before, after, strict=True)]
    loaded, afresh = (sum(bool(all_.all()) for all_ in (c if new else ~c for c in changed)) for new in (True, False))
    return loaded, len(changed) - loaded - afresh, afresh


@pytest.mark.parametrize("name", PAIRS)
def test_counts(name):
    torch.manual_seed(0)
    make, expected = PAIRS[name]
    content, model, wishes = make()
    mark(model)
    before = [value.clone() for value in tensors_of(model)]
    report = load_weights(model, content, **wishes)
    assert count_by_values(before, tensors_of(model)) == expected[:3]
    partly = sum(why.startswith("the rows of") for why in report.fresh.values())
    found = Numbers(len(report.loaded), partly, len(report.fresh) - partly, len(report.unexpected))
    assert found == expected
    assert report.total == len(before)
    assert f"\n  {len(report.loaded)} of {len(before)} tensors loaded; afresh: " in str(report)
    assert (str(report).count("afresh: none") == 1) == (found.loaded == report.total)


def test_the_numbers_of_the_networks():
    assert len(tensors_of(tiny_network())) == TINY
    assert len(tensors_of(resnet18())) == RESNET18 + REST


def test_the_report_of_a_backbone_names_the_parts():
    report = load_weights(resnet18(), classifier())
    assert report.summary == (
        "100 of 183 tensors loaded; afresh: neck 16, level_embed 1, encoder 16, query_selection 13, denoising 1, "
        "decoder 36 (no detector in the file); not used: 2 tensors of the file"
    )
    table = {line.split()[0]: line.split()[1:] for line in str(report).splitlines()}
    assert table["encoder"] == ["0", "0", "16", "0"]
    assert table["all"] == ["100", "0", "83", "2"]


def test_reasons():
    model = tiny_network(num_classes=2, num_queries=20, num_layers=3, num_levels=4, branches=hybrid(2))
    content = own(["cat", "dog", "cow"], num_levels=3)
    del content["model"]["encoder.layers.0.norm.bias"]
    reasons = set(load_weights(model, content, classes=["cow", "hen"]).fresh.values())
    assert reasons == {
        "the rows of 'hen' only",
        "the rows of stride 8 only",
        "20 queries instead of 12",
        "4 levels instead of 3",
        "3 decoder layers instead of 2",
        "a level that the file lacks",
        "new part of the model",
        "missing from the file",
    }


def test_many_classes_are_shortened():
    report = load_weights(tiny_network(num_classes=6), coco_file(), classes=["person", *"abcde"])
    assert "(the rows of 'a', 'b', 'c' and 2 more only)" in report.summary


def test_shared_tensors_count_by_name():
    """And one name in the file is enough, as in a file of safetensors, which stores each tensor once."""
    state = shared().state_dict()
    for name in [name for name in state if name.startswith(("decoder.class_heads.1", "decoder.box_heads.0"))]:
        del state[name]
    report = load_weights(shared(), state)
    assert report.summary == f"{TINY} of {TINY} tensors loaded; afresh: none"
    assert "layers of the model share tensors: the 119 are names, of 111 different tensors" in report.notes


def test_an_empty_report_has_its_fields():
    report = Report("a.pth", "own")
    assert (report.form, report.problems, report.total) == ("own", [], 0)

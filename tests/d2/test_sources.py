import socket
from pathlib import Path

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import torch
from detectron2.modeling import MViT, SimpleFeaturePyramid, SwinTransformer, ViT
from detectron2.modeling.backbone.resnet import BasicStem, ResNet
from detectron2.utils.file_io import PathHandler, PathManager

from dino.d2 import sources
from dino.d2.checkpoint import Checkpointer
from dino.d2.sources import local_file
from dino.modeling import TimmBackbone, build_dino
from dino.utils.files import UserError
from dino.weights import load_weights

from ..file_server import Reply
from ..weights.states import efficientnet_pytorch_state, randomise
from .tiny import tiny_detector

SMALL = {"embed_dim": 32, "num_heads": 4, "hidden_dim": 16, "encoder_layers": 1, "decoder_layers": 1, "num_classes": 3}
SWIN = {"embed_dim": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2), "window_size": 4}
VIT = {"img_size": 64, "embed_dim": 16, "depth": 2, "num_heads": 2, "use_rel_pos": True, "out_feature": "last_feat"}


def resnet():
    return ResNet(
        BasicStem(norm="FrozenBN"), ResNet.make_default_stages(18, norm="FrozenBN"), out_features=["res4", "res5"]
    )


def vitdet():
    return SimpleFeaturePyramid(ViT(**VIT), "last_feat", 16, (2.0, 1.0, 0.5), square_pad=64)


def file_of(backbone):
    """What the classifier's file has: no parts that a detector adds, but a head."""
    state = randomise(backbone).state_dict()
    added = ("rel_pos_h", "rel_pos_w")
    plain = {
        k.removeprefix("net."): v
        for k, v in state.items()
        if not k.startswith(("simfp", "norm")) and not k.endswith(added)
    }
    return plain | {"norm.weight": torch.zeros(3), "head.weight": torch.zeros(10, 3)}


@pytest.mark.parametrize(
    ("backbone", "features", "added"),
    [
        (resnet, ["res4", "res5"], 0),
        (lambda: SwinTransformer(out_indices=(1, 2, 3), **SWIN), ["p1", "p2", "p3"], 6),
        (
            lambda: MViT(embed_dim=12, depth=4, num_heads=1, last_block_indexes=(0, 1, 2, 3)),
            ["scale3", "scale4", "scale5"],
            8,
        ),
        (vitdet, ["p3", "p4", "p5"], None),
    ],
)
def test_imagenet_files_of_detectron2s_backbones(backbone, features, added):
    network = build_dino(backbone=backbone(), in_features=features, **SMALL)
    file = file_of(backbone())
    report = load_weights(network, {"model": file})
    names = [name.removeprefix("neck.backbone.").removeprefix("net.") for name in report.loaded]
    assert set(names) == set(file) - {"norm.weight", "head.weight"}
    assert added is None or len(report.missing) == added
    assert len(report.unexpected) == 2


def offline(*_, **__):
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


@pytest.mark.usefixtures("server")
def test_without_a_network_the_file_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(socket, "getaddrinfo", offline)
    place = rf"{tmp_path}/cache/dl\.fbaipublicfiles\.com/detectron2/ImageNetPretrained/torchvision/R-50\.pkl"
    checkpointer = Checkpointer(tiny_detector(), names=["a"])
    with pytest.raises(
        UserError, match=rf"can't fetch https.*/R-50\.pkl \(Name or service not known\)\..* into {place}"
    ):
        checkpointer.load("detectron2://ImageNetPretrained/torchvision/R-50.pkl")


def test_what_was_put_into_the_cache_is_used(monkeypatch, tmp_path):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    file = tmp_path / "detectron2/ImageNetPretrained/somewhere/R.pkl"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"x")
    assert local_file("detectron2://ImageNetPretrained/somewhere/R.pkl?matching_heuristics=True") == str(file)


def test_addresses_of_detectron2(server, monkeypatch, tmp_path):
    monkeypatch.setenv("DINO_MIRROR", server.url)
    folder = "/dl.fbaipublicfiles.com/detectron"
    server.files |= {f"{folder}2/a/R.pkl": Reply(b"x"), f"{folder}/ImageNetPretrained/MSRA/R-50.pkl": Reply(b"y")}
    server.files["/a.com/b.pth?c=d"] = Reply(b"z")
    assert Path(local_file("detectron2://a/R.pkl?matching_heuristics=True")).read_bytes() == b"x"
    assert Path(local_file("catalog://ImageNetPretrained/MSRA/R-50")).read_bytes() == b"y"
    assert Path(local_file("https://a.com/b.pth?c=d?matching_heuristics=True")).read_bytes() == b"z"
    for address in ("catalog://absent", "catalog://ImageNetPretrained/absent"):
        with pytest.raises(UserError, match=f"can't fetch {address}"):
            local_file(address)


class Handler(PathHandler):
    """What somebody registered for addresses of their own."""

    def _get_supported_prefixes(self):
        return ["mine://"]

    def _get_local_path(self, path, force=False, **_):
        if "absent" in path:
            raise RuntimeError("no bucket")
        return path.replace("mine://", "/somewhere/")


def test_registered_handlers_are_asked(monkeypatch):
    with pytest.raises(UserError, match="can't use the address mine://a/b: give a file"):
        local_file("mine://a/b")
    manager = PathManager.__class__()
    manager.register_handler(Handler())
    monkeypatch.setattr(sources, "PathManager", manager)
    assert local_file("mine://a/b") == "/somewhere/a/b"
    with pytest.raises(UserError, match="can't fetch mine://absent: no bucket"):
        local_file("mine://absent")


@pytest.mark.parametrize("address", ["ftp://a.com/b.pth", "http://a.com/b.pth", "s3://a/b.pth"])
def test_other_addresses_are_refused(address):
    with pytest.raises(UserError, match=rf"can't use the address {address}"):
        local_file(address)


def test_pixel_statistics_must_be_those_of_timms_weights(tmp_path):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    file, name = tmp_path / "lite0.pth", "tf_efficientnet_lite0"
    torch.save(efficientnet_pytorch_state(timm.create_model(name).state_dict()), file)
    detector = tiny_detector()
    detector.network = build_dino(backbone=TimmBackbone(name), **SMALL)
    with pytest.raises(
        UserError, match=rf"{file}: .*write 'model\.pixel_mean=\[127\.5,127\.5,127\.5\]' 'model\.pixel_std=\[127\.5,"
    ):
        Checkpointer(detector, names=["a"]).load(str(file))
    detector.pixel_mean.fill_(127.5)
    detector.pixel_std.fill_(127.5)
    Checkpointer(detector, names=["a"]).load(str(file))
    assert torch.equal(detector.network.neck.backbone.body.conv_stem.weight, torch.load(file)["_conv_stem.weight"])

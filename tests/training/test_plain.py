import importlib.util
import json
import math
import os
import sys

import pytest

pytest.importorskip("tqdm", reason="tqdm is not installed")

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import nn

from dino.data.coco import CocoImages
from dino.modeling import TimmBackbone, TorchvisionBackbone, build_dino
from dino.training import plain
from dino.utils.files import DataError, UserError
from dino.weights.description import PARTS, model_from_checkpoint

from ..coco_files import write_coco
from ..tiny import TinyBackbone
from ..tools.programs import contents
from ..weights.states import efficientnet_pytorch_state, randomise

TINY = {"device": "cpu", "workers": 0, "size": 48, "embed_dim": 64, "layers": 1, "queries": 20, "flips": "both"}
TINY |= {"epochs": 1, "batch": 2}


@pytest.fixture
def sets(tmp_path):
    """Training and validation data."""
    return write_coco(tmp_path / "train"), write_coco(tmp_path / "val", seed=1)


@pytest.fixture
def small_backbone(monkeypatch):
    """Three convolutions instead of a ResNet, to save time."""
    monkeypatch.setitem(PARTS, "dino.modeling.TorchvisionBackbone", lambda **_: TinyBackbone())


def run(sets, folder, **changes):
    metrics = plain.train(*sets[0], *sets[1], folder, **{**TINY, **changes})
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    return metrics


def read_plain(path):
    return torch.load(path, weights_only=True)


def test_training_and_evaluation(sets, tmp_path, capsys, small_backbone):
    run_folder = tmp_path / "run"
    metrics = run(sets, run_folder)
    assert {"AP", "AP50", "AP-red", "training_seconds"} <= set(metrics)
    assert metrics["training_seconds"] > 0
    assert set(map(str, contents(run_folder))) == {"model.pth", "metrics.json", "results.json"}  # and no .part
    checkpoint = read_plain(run_folder / "model.pth")
    assert checkpoint["names"] == ["red", "green", "blue"]
    results = json.loads((run_folder / "results.json").read_text())
    assert {r["image_id"] for r in results} == {1, 2, 3, 4}
    assert {r["category_id"] for r in results} <= {1, 2, 3}
    said = capsys.readouterr().out
    assert "4 images, 1 without objects, 0 boxes of no size dropped; ['red', 'green', 'blue']" in said
    assert str(run_folder) in said

    # The same weights with the validation data alone; nothing that exists is written over.
    before = contents(run_folder)
    for folder in ("evaluation", "evaluation.1"):
        assert plain.evaluate(*sets[1], run_folder / "model.pth", run_folder, **TINY) is not None
        again = json.loads((run_folder / folder / "metrics.json").read_text())
        assert {**again, "training_seconds": 0} == {**metrics, "training_seconds": 0}
    after = contents(run_folder)
    assert {path: after[path] for path in before} == before
    before = after
    with pytest.raises(UserError, match="holds a trained model: choose another --output"):
        run(sets, run_folder)
    assert contents(run_folder) == before

    # Other data does not fit these weights.
    sets[1].change(lambda content: content["categories"][0].update(name="crimson"))
    with pytest.raises(DataError, match=r"was trained for the classes \['red', .* the data has \['crimson'"):
        plain.evaluate(*sets[1], run_folder / "model.pth", run_folder, **TINY)


def test_training_with_a_resnet_in_bfloat16(sets, tmp_path):
    metrics = run(sets, tmp_path / "run", bf16=True, epochs=0.5, flips="none")
    assert 0 <= metrics["AP"] <= 1
    assert "neck.backbone.body.layer4.1.bn2.weight" in read_plain(tmp_path / "run/model.pth")["model"]
    rebuilt = model_from_checkpoint(tmp_path / "run/model.pth")
    assert rebuilt.names == ["red", "green", "blue"]
    assert read_plain(tmp_path / "run/model.pth")["category_ids"] == [1, 2, 3]
    assert (rebuilt.preprocessing.short_side, rebuilt.preprocessing.max_size) == (48, 96)


def test_weights_to_start_from(sets, tmp_path, small_backbone):
    run(sets, tmp_path / "first")
    run(sets, tmp_path / "second", weights=tmp_path / "first/model.pth", lr=0)
    first, second = (read_plain(tmp_path / name / "model.pth")["model"] for name in ("first", "second"))
    assert all(torch.equal(first[key], second[key]) for key in first)


def backbone_of(path):
    state = read_plain(path)["model"]
    return {k.removeprefix("neck.backbone.body."): v for k, v in state.items() if k.startswith("neck.backbone.")}


def test_deep_images(tmp_path, small_backbone):
    """The range is stored, and holds for an evaluation and a training from the file."""
    sets = write_coco(tmp_path / "train"), write_coco(tmp_path / "val", seed=1)
    for path in tmp_path.rglob("*.png"):
        with Image.open(path) as image:
            grey = np.asarray(image.convert("L")).astype(np.uint16) * 4
        Image.fromarray(grey).save(path)
    run(sets, tmp_path / "run", input_range=[0, 1020])
    weights = tmp_path / "run/model.pth"
    assert model_from_checkpoint(weights).preprocessing.input_range == (0, 1020)
    expected = read_results(tmp_path / "run")
    plain.evaluate(*sets[1], weights, tmp_path / "again", **TINY)
    assert read_results(tmp_path / "again/evaluation") == expected
    plain.evaluate(*sets[1], weights, tmp_path / "other", **TINY, input_range=(0, 65535))
    assert read_results(tmp_path / "other/evaluation") != expected
    run(sets, tmp_path / "more", weights=weights, epochs=0.5)
    assert model_from_checkpoint(tmp_path / "more/model.pth").preprocessing.input_range == (0, 1020)
    with pytest.raises(UserError, match="input_range must be"):
        run(sets, tmp_path / "none", input_range=(2, 1))


def read_results(folder):
    return json.loads((folder / "results.json").read_text())


def test_weights_of_a_backbone_are_fine_tuned(sets, tmp_path, capsys):
    file = randomise(torchvision.models.resnet18()).state_dict()
    torch.save(file, tmp_path / "resnet18.pth")
    run(sets, tmp_path / "run", weights=tmp_path / "resnet18.pth", flips="none")
    assert "resnet18.pth (format: backbone)" in capsys.readouterr().out
    trained = backbone_of(tmp_path / "run/model.pth")
    stay = [k for k in trained if "bn" in k or "downsample.1" in k or k == "conv1.weight"]
    assert all(torch.equal(trained[key], file[key]) for key in stay)
    learned = trained.keys() - set(stay)
    assert "layer1.0.conv1.weight" in learned
    steps, lr = 2, plain.Settings().lr  # Adam's step is `lr` at most
    assert all(0 < (trained[key] - file[key]).abs().max() < 1.1 * steps * 0.1 * lr for key in learned)

    # Evaluation, prediction and further training find the same norms in the file.
    assert not plain.evaluate(*sets[1], tmp_path / "run/model.pth", tmp_path / "run", **TINY)["training_seconds"]
    rebuilt = model_from_checkpoint(tmp_path / "run/model.pth").network.neck.backbone
    assert not any(isinstance(module, nn.BatchNorm2d) for module in rebuilt.modules())
    run(sets, tmp_path / "further", weights=tmp_path / "run/model.pth", epochs=0.5)
    further = backbone_of(tmp_path / "further/model.pth")
    assert all(torch.equal(further[key], file[key]) for key in stay)

    # Only if someone asks for it, everything learns.
    run(sets, tmp_path / "whole", weights=tmp_path / "run/model.pth", epochs=0.5, norm="BN")
    whole = backbone_of(tmp_path / "whole/model.pth")
    assert not any(torch.equal(whole[key], file[key]) for key in stay)


def test_a_timm_backbone_gets_the_pixels_of_its_weights(sets, tmp_path):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    file = efficientnet_pytorch_state(timm.create_model("tf_efficientnet_lite0").state_dict())
    torch.save(file, tmp_path / "lite0.pth")
    settings = {"backbone": "tf_efficientnet_lite0", "epochs": 0.5, "flips": "none"}
    metrics = run(sets, tmp_path / "run", weights=tmp_path / "lite0.pth", **settings)
    assert 0 <= metrics["AP"] <= 1
    rebuilt = model_from_checkpoint(tmp_path / "run/model.pth")
    assert rebuilt.preprocessing[:2] == ((127.5,) * 3, (127.5,) * 3)
    body = rebuilt.network.neck.backbone.body
    assert torch.equal(body.conv_stem.weight, file["_conv_stem.weight"])
    assert torch.equal(body.blocks[6][0].bn3.running_var, file["_blocks.15._bn2.running_var"])
    plain.evaluate(*sets[1], tmp_path / "run/model.pth", tmp_path / "run", **{**TINY, **settings})
    with pytest.raises(DataError, match=r"lite0\.pth: the file is an EfficientNet-Lite with TensorFlow's padding"):
        run(sets, tmp_path / "other", weights=tmp_path / "lite0.pth", **{**settings, "backbone": "efficientnet_lite0"})
    assert not (tmp_path / "other").exists()


def test_a_backbone_alone_is_not_evaluated(sets, tmp_path, small_backbone):
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "backbone.pth")
    with pytest.raises(DataError, match=r"backbone\.pth has the weights of a backbone at most: train a detector from"):
        plain.evaluate(*sets[1], tmp_path / "backbone.pth", tmp_path, **TINY)


def test_backbones_of_two_libraries(monkeypatch):
    """torchvision's if both have the name; random weights are trained with norms that learn."""
    kinds = {"efficientnet_b0": TorchvisionBackbone, "tf_efficientnet_lite0": TimmBackbone}
    for name in kinds if importlib.util.find_spec("timm") else ["efficientnet_b0"]:
        backbone = plain.build(plain.Settings(**{**TINY, "backbone": name}), ["a"]).network.neck.backbone
        assert type(backbone) is kinds[name]
        assert any(isinstance(module, nn.BatchNorm2d) for module in backbone.modules())
    if importlib.util.find_spec("timm"):
        with pytest.raises(
            UserError, match=r"timm has no model 'resnet19'; .*; torchvision's backbones are .*resnet18"
        ):
            plain.build(plain.Settings(**{**TINY, "backbone": "resnet19"}), ["a"])
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"'resnet19' needs timm: pip install timm; torchvision's .*resnet18"):
        plain.build(plain.Settings(**{**TINY, "backbone": "resnet19"}), ["a"])


def test_seeds_decide(sets, tmp_path, small_backbone):
    """Twice the same run is twice the same model."""
    states = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(sets, tmp_path / name, seed=seed)
        states.append(read_plain(tmp_path / name / "model.pth")["model"]["decoder.norm.weight"])
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_other_classes_in_training_are_refused(sets, tmp_path, small_backbone):
    sets[0].change(lambda content: content["categories"].pop(0))
    sets[0].change(lambda content: content.update(annotations=[]))
    with pytest.raises(DataError, match=r"differ in their classes: \['green', 'blue'\]"):
        run(sets, tmp_path / "run")


class Malicious:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


def test_bad_weights_are_named(sets, tmp_path, small_backbone):
    trace = tmp_path / "trace"
    bad = {
        "text.pth": lambda path: path.write_text("no checkpoint"),
        "evil.pth": lambda path: torch.save({"model": Malicious(trace)}, path),
        "other.pth": lambda path: torch.save({"model": nn.Linear(1, 1).state_dict()}, path),
        "list.pth": lambda path: torch.save([1], path),
        "empty.pth": lambda path: torch.save({}, path),
    }
    for name, write in bad.items():
        write(tmp_path / name)
        verb = "read" if name in ("text.pth", "evil.pth") else "use"
        with pytest.raises(DataError, match=f"can't {verb} the weights .*{name}"):
            run(sets, tmp_path / "run", weights=tmp_path / name)
    with pytest.raises(DataError, match="weights not found"):
        run(sets, tmp_path / "run", weights=tmp_path / "absent.pth")
    assert not trace.exists()
    assert not (tmp_path / "run").exists()


def test_non_finite_losses_name_the_images(sets, tmp_path, small_backbone, monkeypatch):
    class Endless(nn.Module):
        def forward(self, outputs, _):
            return {"loss_ce": outputs.decoder.logits.sum() * float("inf")}

    monkeypatch.setattr(plain, "_criterion", Endless)
    with pytest.raises(
        FloatingPointError, match=r"at step 0, images \['image_\d\.png', 'image_\d\.png'\]\. Lower --lr"
    ):
        run(sets, tmp_path / "run")


def test_gradients_that_are_not_finite_name_the_images(sets, tmp_path, small_backbone, monkeypatch):
    class Steep(nn.Module):
        def forward(self, outputs, _):
            return {"loss_ce": (outputs.decoder.logits.sum() * 0).sqrt()}  # 0, with an infinite slope

    monkeypatch.setattr(plain, "_criterion", Steep)
    with pytest.raises(FloatingPointError, match=r"the loss is 0\.0, the norm of its gradients nan at step 0, images"):
        run(sets, tmp_path / "run")


def make_crowd(content):
    for annotation in content["annotations"]:
        annotation["iscrowd"] = 1


def test_training_data_without_objects_are_refused(sets, tmp_path):
    sets[0].change(make_crowd)
    with pytest.raises(
        DataError, match=r"nothing to learn: .*annotations\.json has no objects: 4 images, 6 annotations, 6 "
    ):
        run(sets, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_validation_data_without_objects_are_warned_of(sets, tmp_path, capsys, small_backbone):
    sets[1].change(make_crowd)
    assert run(sets, tmp_path / "run")["AP"] == -1
    said = capsys.readouterr().out
    assert f"warning: AP will be undefined: {sets[1].annotations} has no objects: 4 images, 6 annotations, 6 of" in said
    assert "AP and AP50 are 0" not in said


def test_a_loss_that_rises_and_no_ap_are_warned_of(sets, tmp_path, capsys, small_backbone, monkeypatch):
    class Rising(nn.Module):
        def __init__(self):
            super().__init__()
            self.calls = 0

        def forward(self, outputs, _):
            self.calls += 1
            return {"loss_ce": outputs.decoder.logits.sum() * 0 + 3 * self.calls}

    monkeypatch.setattr(plain, "_criterion", Rising)
    monkeypatch.setattr(plain.average_precision, "evaluate", lambda *_: {"AP": 0.0, "AP50": 0.0})
    run(sets, tmp_path / "run", epochs=4)
    said = capsys.readouterr().out
    start = "the total loss rises: 3 at the start, 6 after 2 of 8 iterations. The learning rate --lr=0.0002 is"
    assert said.count(f"warning: {start} probably too high\n") == 1
    change = (
        "8 iterations are few; the total loss has not fallen (3 at the start, 24 now), so --lr=0.0002 may be too high"
    )
    assert f"warning: AP and AP50 are 0 after 8 of 8 iterations. Likely causes: {change}; " in said


def test_sizes_of_objects(sets):
    images = plain.CocoImages(*sets[0], None)
    sizes, shares = plain._sizes(images, plain.Settings(size=32))
    (first, *_) = images.objects[1]
    x0, y0, x1, y1 = first[1]
    assert shares[0] == pytest.approx((x1 - x0) * (y1 - y0) / (72 * 64))
    assert sizes[0] == pytest.approx((shares[0] * 32 * 36) ** 0.5)
    assert len(sizes) == len(shares) == 6 == plain._count_classes(images).total()


def test_non_finite_predictions_name_the_images(sets, tmp_path, small_backbone, monkeypatch):
    def broken(**parts):
        network = build_dino(**parts)
        nn.init.constant_(network.decoder.norm.weight, float("nan"))
        return network

    monkeypatch.setitem(PARTS, "dino.modeling.build_dino", broken)
    with pytest.raises(FloatingPointError, match=r"non-finite predictions for image_\d\.png \(batch: image_"):
        run(sets, tmp_path / "run")


def test_an_unknown_setting_is_named(sets, tmp_path):
    with pytest.raises(TypeError, match="learning_rate"):
        run(sets, tmp_path / "run", learning_rate=1e-4)


def test_transforms_keep_boxes_and_labels_together(sets):
    settings = plain.Settings(**TINY)
    for flips in plain.FLIPS:
        data = CocoImages(*sets[0], plain._transforms(settings, flips))
        for index in range(len(data)):
            image, objects, _ = data[index]
            assert min(image.shape[1:]) == 48
            assert len(objects["boxes"]) == len(objects["labels"]) == (2, 0, 3, 1)[index]


def test_a_training_for_other_classes_starts_from_the_rows_of_known_ones(sets, tmp_path, capsys, small_backbone):
    run(sets, tmp_path / "run", epochs=0.5)
    theirs = read_plain(tmp_path / "run/model.pth")["model"]["decoder.class_heads.0.bias"]
    for data in sets:
        data.change(lambda content: content["categories"][0].update(name="crimson"))
        data.change(lambda content: content["categories"].append({"id": 9, "name": "grey"}))
    run(sets, tmp_path / "more", weights=tmp_path / "run/model.pth", epochs=0.5, lr=1e-9)
    assert "class rows kept by name: green, blue" in capsys.readouterr().out
    found = read_plain(tmp_path / "more/model.pth")["model"]["decoder.class_heads.0.bias"]
    torch.testing.assert_close(found[1:3], theirs[1:3], rtol=0, atol=1e-7)
    prior = -math.log(99)
    torch.testing.assert_close(found[[0, 3]], torch.full((2,), prior), rtol=0, atol=1e-6)


def test_the_backbone_of_another_detector_must_be_asked_for(sets, tmp_path, small_backbone):
    state = {f"backbone.0.body.{key}": value for key, value in randomise(TinyBackbone()).state_dict().items()}
    torch.save({"model": {**state, "bbox_embed.layers.0.weight": torch.zeros(3)}}, tmp_path / "detr.pth")
    with pytest.raises(DataError, match=r"detr\.pth: the file is another detector.* ask for it"):
        run(sets, tmp_path / "run", weights=tmp_path / "detr.pth", epochs=0.5)
    run(sets, tmp_path / "run", weights=tmp_path / "detr.pth", epochs=0.5, parts="backbone", lr=1e-9)
    found = read_plain(tmp_path / "run/model.pth")["model"]["neck.backbone.res4.weight"]
    torch.testing.assert_close(found, state["backbone.0.body.res4.weight"], rtol=0, atol=1e-7)

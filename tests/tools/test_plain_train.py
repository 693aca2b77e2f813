import json
import os

import pytest

pytest.importorskip("tqdm", reason="tqdm is not installed")

import torch
from torch import nn
from torchvision import tv_tensors

from dino.data.coco import CocoImages
from dino.layers import Target
from dino.modeling import build_dino
from dino.utils.files import DataError
from dino.weights.description import PARTS, model_from_checkpoint

from ..coco_files import write_coco
from ..tiny import TinyBackbone
from .programs import assert_one_error, contents, load_program, run_program

plain_train = load_program("plain_train")

TINY = ["--device=cpu", "--workers=0", "--size=48", "--embed-dim=64", "--layers=1", "--queries=20", "--flips=both"]
TINY += ["--epochs=1", "--batch=2"]


@pytest.fixture
def sets(tmp_path):
    """Training and validation data, and the arguments that name them."""
    train, val = write_coco(tmp_path / "train"), write_coco(tmp_path / "val", seed=1)
    return train, val, [*data_arguments("train", train), *data_arguments("val", val)]


def data_arguments(split, files):
    return [f"--{split}-json", files.annotations, f"--{split}-images", files.images]


@pytest.fixture
def small_backbone(monkeypatch):
    """Three convolutions instead of a ResNet, to save time."""
    monkeypatch.setitem(PARTS, "dino.modeling.TorchvisionBackbone", lambda **_: TinyBackbone())


def run(sets, folder, *more):
    plain_train.main([*sets[2], *TINY, "--output", str(folder), *more])
    return json.loads((folder / "metrics.json").read_text())


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
    words = ["--eval-only", "--weights", str(run_folder / "model.pth"), "--output", str(run_folder)]
    for folder in ("evaluation", "evaluation.1"):
        plain_train.main([*data_arguments("val", sets[1]), *TINY, *words])
        again = json.loads((run_folder / folder / "metrics.json").read_text())
        assert {**again, "training_seconds": 0} == {**metrics, "training_seconds": 0}
    after = contents(run_folder)
    assert {path: after[path] for path in before} == before
    before = after
    with pytest.raises(DataError, match="holds a trained model: choose another --output"):
        run(sets, run_folder)
    assert contents(run_folder) == before

    # Other data does not fit these weights.
    sets[1].change(lambda content: content["categories"][0].update(name="crimson"))
    with pytest.raises(DataError, match=r"was trained for the classes \['red', .* the data has \['crimson'"):
        plain_train.main([*data_arguments("val", sets[1]), *TINY, *words])


def test_training_with_a_resnet_in_bfloat16(sets, tmp_path):
    metrics = run(sets, tmp_path / "run", "--bf16", "--epochs", "0.5", "--flips", "none")
    assert 0 <= metrics["AP"] <= 1
    assert "neck.backbone.body.layer4.1.bn2.weight" in read_plain(tmp_path / "run/model.pth")["model"]
    rebuilt = model_from_checkpoint(tmp_path / "run/model.pth")
    assert rebuilt.names == ["red", "green", "blue"]
    assert (rebuilt.preprocessing.short_side, rebuilt.preprocessing.max_size) == (48, 96)


def test_weights_to_start_from(sets, tmp_path, small_backbone):
    run(sets, tmp_path / "first")
    words = ["--weights", str(tmp_path / "first/model.pth"), "--lr", "0"]
    run(sets, tmp_path / "second", *words)
    first, second = (read_plain(tmp_path / name / "model.pth")["model"] for name in ("first", "second"))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_seeds_decide(sets, tmp_path, small_backbone):
    """Twice the same run is twice the same model."""
    states = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(sets, tmp_path / name, "--seed", str(seed))
        states.append(read_plain(tmp_path / name / "model.pth")["model"]["decoder.norm.weight"])
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_missing_arguments_are_named(sets, tmp_path):
    with pytest.raises(DataError, match="give --val-json and --val-images, and to train also"):
        plain_train.main([*data_arguments("val", sets[1]), *TINY])
    with pytest.raises(DataError, match="give --val-json"):
        plain_train.main([*data_arguments("train", sets[0]), *TINY])
    with pytest.raises(DataError, match="--eval-only needs --weights"):
        plain_train.main([*sets[2], *TINY, "--eval-only"])


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
        with pytest.raises(DataError, match=f"can't use the weights .*{name}"):
            run(sets, tmp_path / "run", "--weights", str(tmp_path / name))
    with pytest.raises(DataError, match="weights not found"):
        run(sets, tmp_path / "run", "--weights", str(tmp_path / "absent.pth"))
    assert not trace.exists()
    assert not (tmp_path / "run").exists()


def test_non_finite_losses_name_the_images(sets, tmp_path, small_backbone, monkeypatch):
    class Endless(nn.Module):
        def __init__(self, **_):
            super().__init__()

        def forward(self, outputs, _):
            return {"loss_ce": outputs.decoder.logits.sum() * float("inf")}

    monkeypatch.setattr(plain_train, "SetCriterion", Endless)
    with pytest.raises(
        FloatingPointError, match=r"at step 0, images \['image_\d\.png', 'image_\d\.png'\]\. Lower --lr"
    ):
        run(sets, tmp_path / "run")


def test_non_finite_predictions_name_the_images(sets, tmp_path, small_backbone, monkeypatch):
    def broken(**parts):
        network = build_dino(**parts)
        nn.init.constant_(network.decoder.norm.weight, float("nan"))
        return network

    monkeypatch.setitem(PARTS, "dino.modeling.build_dino", broken)
    with pytest.raises(FloatingPointError, match=r"the loss is nan at step 0, images \['image_\d\.png', "):
        run(sets, tmp_path / "run")


def test_batches_are_padded_and_masked():
    def sample(height, width, boxes):
        boxes = tv_tensors.BoundingBoxes(torch.tensor(boxes).reshape(-1, 4), format="XYXY", canvas_size=(height, width))
        objects = {"boxes": boxes, "labels": torch.zeros(len(boxes), dtype=torch.int64)}
        return torch.ones(3, height, width), objects, {"id": height}

    images, padding, targets, entries = plain_train.collate([sample(8, 20, [[2.0, 2, 12, 6]]), sample(10, 16, [])])
    assert images.shape == (2, 3, 10, 20)
    assert torch.equal(images[:, 0] == 0, padding)
    assert padding.sum((1, 2)).tolist() == [2 * 20, 4 * 10]
    assert isinstance(targets[0], Target)
    torch.testing.assert_close(targets[0].boxes, torch.tensor([[7 / 20, 0.5, 0.5, 0.5]]))
    assert type(targets[0].boxes) is torch.Tensor
    assert targets[1].boxes.shape == (0, 4)
    assert [entry["id"] for entry in entries] == [8, 10]


def test_transforms_keep_boxes_and_labels_together(sets):
    args = plain_train.parse_arguments(TINY)
    for training in (True, False):
        data = CocoImages(*sets[0], plain_train.transforms(args, training))
        for index in range(len(data)):
            image, objects, _ = data[index]
            assert min(image.shape[1:]) == 48
            assert len(objects["boxes"]) == len(objects["labels"]) == (2, 0, 3, 1)[index]


def test_a_bad_image_ends_the_program_with_one_line(sets, tmp_path):
    """It is found in a worker of the data loader, whose traceback is of no use to anybody."""
    for number in range(1, 5):
        (tmp_path / f"train/image_{number}.png").write_text("no image")
    words = [*sets[2], *TINY, "--workers", "1", "--output", tmp_path / "run"]
    result = run_program("plain_train", *words, folder=tmp_path)
    assert_one_error(result, "can't read image ")
    assert not (tmp_path / "run/model.pth").exists()


def test_help_shows_an_example(capsys):
    with pytest.raises(SystemExit) as caught:
        plain_train.main(["--help"])
    assert caught.value.code == 0
    assert "python tools/plain_train.py --train-json train.json" in capsys.readouterr().out

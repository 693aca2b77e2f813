"""The demonstration's two engines train the same network, and its results are never overwritten."""

import json

import pytest
import torch
from PIL import Image

from dino.data.images import read_image
from dino.inference.palette import colour_of as _colour_of
from dino.weights import resnet_to_detectron2

from .programs import ROOT, load_program


def test_both_roads_build_the_same_network():
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    from detectron2.config import LazyConfig, instantiate

    from dino.training import plain

    demo, program = load_program("run_demo"), load_program("plain_train")
    cfg = LazyConfig.load(str(ROOT / demo.RECIPE))
    cfg.model.num_classes = 3
    arguments = program.settings_of(program.parse_arguments([*demo.PLAIN_SETTINGS, "--device=cpu"]))
    network = plain.build(arguments, ["a", "b", "c"]).network
    ours = {name: x.shape for name, x in instantiate(cfg.model).network.state_dict().items()}
    theirs = {name: x.shape for name, x in resnet_to_detectron2(network.state_dict()).items()}
    assert ours == theirs
    assert (arguments.epochs, arguments.batch, arguments.lr) == (
        cfg.train.epochs,
        cfg.dataloader.train.total_batch_size,
        cfg.optimizer.lr,
    )
    assert [arguments.size] == cfg.dataloader.train.mapper.augmentations[-1].sizes


def test_earlier_results_are_moved_aside(tmp_path, capsys):
    demo = load_program("run_demo")
    folder = tmp_path / "demo"
    for content in ("first", "second"):
        folder.mkdir()
        (folder / "result.json").write_text(content)
        demo.move_aside(folder)
    assert not folder.exists()
    assert [(tmp_path / f"demo.{i}/result.json").read_text() for i in (1, 2)] == ["first", "second"]
    assert f"the earlier {folder} is now {folder}.2" in capsys.readouterr().out


def test_picture_shows_predictions_beside_the_truth(tmp_path):
    Image.new("RGB", (60, 40), "gray").save(tmp_path / "1.png")
    boxes = [[5, 5, 20, 20]] * 5
    truth = {
        "images": [{"id": 1, "file_name": "1.png", "width": 60, "height": 40}],
        "annotations": [{"id": i, "image_id": 1, "category_id": 7, "bbox": b} for i, b in enumerate(boxes)],
        "categories": [{"id": 7, "name": "thing"}],
    }
    (tmp_path / "val.json").write_text(json.dumps(truth))
    (tmp_path / "results.json").write_text(
        json.dumps([{"image_id": 1, "category_id": 7, "bbox": [30, 10, 20, 20], "score": 0.9}])
    )
    demo = load_program("run_demo")
    demo.draw_pairs(tmp_path / "val.json", tmp_path, tmp_path / "results.json", tmp_path / "page.png")
    page = torch.from_numpy(read_image(tmp_path / "page.png"))[:-40]  # without the legend
    drawn = (page == torch.tensor(_colour_of(0))).all(-1)  # (height, width)
    columns = [side.any(0).nonzero().flatten() for side in drawn.tensor_split(2, dim=1)]
    # Four times as large, the predicted box begins 120 columns after the left edge of its image, the true one 20.
    gap = columns[0].min().item() - columns[1].min().item()
    assert abs(gap - 100) <= 4
    assert abs((columns[0].max() - columns[0].min()).item() - 80) <= 4

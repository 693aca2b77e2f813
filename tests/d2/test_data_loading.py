import json
import logging
from pathlib import Path

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import numpy as np
import torch
from detectron2.data import (
    DatasetCatalog,
    MetadataCatalog,
    build_detection_test_loader,
    get_detection_dataset_dicts,
)
from detectron2.data import transforms as T
from detectron2.evaluation import inference_on_dataset
from detectron2.structures import Boxes, BoxMode, Instances
from PIL import Image
from torch import nn

from dino.d2.data_loading import (
    Evaluator,
    OneOf,
    ShortSide,
    TestMapper,
    TrainMapper,
    class_names,
    dataset,
    load_dataset,
    resized_size,
)
from dino.data.coco import CocoImages
from dino.evaluation.average_precision import evaluate
from dino.utils.files import DataError, UserError

from ..coco_files import COLOURS, CocoFiles, write_coco
from ..data.test_fuzzed_annotations import attempt, fuzzed
from .tiny import tiny_detector


class TruthTeller(nn.Module):
    """Detects every true box of the file with a score of 1."""

    def __init__(self, dicts):
        super().__init__()
        self.objects = {d["file_name"]: d["annotations"] for d in dicts}

    def forward(self, inputs):
        results = []
        for x in inputs:
            objects = self.objects[x["file_name"]]
            boxes = torch.tensor([o["bbox"] for o in objects], dtype=torch.float32).reshape(-1, 4)
            labels = torch.tensor([o["category_id"] for o in objects], dtype=torch.int64)
            found = Instances((x["height"], x["width"]), pred_boxes=Boxes(boxes), pred_classes=labels)
            found.scores = torch.ones(len(labels))
            results.append({"instances": found})
        return results


def run_evaluation(model, name, output, augmentations=()):
    loader = build_detection_test_loader(DatasetCatalog.get(name), mapper=TestMapper(list(augmentations)))
    return inference_on_dataset(model, loader, Evaluator(name, output_dir=str(output), max_dets_per_image=100))["bbox"]


def test_category_ids_do_not_matter(tmp_path):
    losses, results = [], []
    for ids in ([0, 1, 2], [1, 2, 3], [7, 40, 900]):
        name = "ids_" + "_".join(map(str, ids))
        dicts = dataset(name, *write_coco(tmp_path / name, category_ids=ids))
        mapper = TrainMapper([ShortSide([48])])
        torch.manual_seed(0)
        model = tiny_detector()
        losses.append(model([mapper(d) for d in dicts]))
        run_evaluation(model, name, tmp_path / name / "results")
        found = json.loads((tmp_path / name / "results/coco_instances_results.json").read_text())
        assert {r["category_id"] for r in found} == set(ids)
        results.append((ids, found))
    assert losses[0]
    for others in losses[1:]:
        assert {k: v.item() for k, v in others.items()} == {k: v.item() for k, v in losses[0].items()}
    for (ids, found), (_, first) in zip(results, results[:1] * 3, strict=True):
        assert [ids.index(r["category_id"]) for r in found] == [r["category_id"] for r in first]


def test_class_names_follow_the_ids_not_the_file(tmp_path):
    files = write_coco(tmp_path, category_ids=(7, 40, 900))
    files.change(lambda content: content["categories"].reverse())
    assert class_names("reversed", *files) == ["red", "green", "blue"]


def test_class_names_of_a_registered_data_set():
    DatasetCatalog.register("mine", list)
    with pytest.raises(DataError, match=r"'mine' has no class names: set MetadataCatalog.get\('mine'\).thing_classes"):
        class_names("mine")
    MetadataCatalog.get("mine").thing_classes = ["one", "two"]
    assert class_names("mine") == ["one", "two"]


def test_coco_is_known_without_its_files():
    assert len(class_names("coco_2017_train")) == 80


def test_missing_coco_names_the_variable(tmp_path, monkeypatch):
    DatasetCatalog.register("absent", lambda: open(tmp_path / "absent.json"))  # noqa: SIM115
    with pytest.raises(DataError, match=r"'absent'.*absent\.json.*DETECTRON2_DATASETS"):
        dataset("absent")


def test_unknown_names_are_refused():
    with pytest.raises(DataError, match="no data set is registered as 'unheard_of'"):
        dataset("unheard_of")


def test_one_name_for_two_data_sets_is_refused(tmp_path):
    dataset("mine", *write_coco(tmp_path / "a"))
    load_dataset.cache_clear()
    assert len(dataset("mine", str(tmp_path / "a/annotations.json"), str(tmp_path / "a"))) == 4
    with pytest.raises(DataError, match="'mine' is registered for other files"):
        dataset("mine", *write_coco(tmp_path / "b"))


def write_as_tools_do(content):
    """Numbers as text, null fields, a polygon without a box, no size."""
    for image in content["images"]:
        image.update(id=str(image["id"]), width=None, height=0)
    for a in content["annotations"]:
        x, y, w, h = a.pop("bbox")
        outline = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        a.update(image_id=f"{a['image_id']}.0", iscrowd="0", area=None, segmentation=outline)


def test_values_as_tools_write_them_are_learned_and_evaluated(tmp_path):
    files = write_coco(tmp_path)
    clean = dataset("clean_values", *files)
    files.change(write_as_tools_do)
    load_dataset.cache_clear()
    dicts = dataset("values_of_tools", *files)
    assert dicts == clean
    result = run_evaluation(TruthTeller(dicts), "values_of_tools", tmp_path / "results")
    assert result["AP"] == pytest.approx(100)


def test_crowd_regions_as_objects(tmp_path):
    """As CVAT writes masks: one setting makes them objects of training and evaluation."""
    files = write_coco(tmp_path)
    files.change(lambda content: [a.update(iscrowd=1) for a in content["annotations"]])
    assert sum(len(d["annotations"]) for d in dataset("crowds_ignored", *files)) == 0
    dicts = dataset("crowds_learned", *files, crowd="objects")
    assert sum(len(d["annotations"]) for d in dicts) == 6
    result = run_evaluation(TruthTeller(dicts), "crowds_learned", tmp_path / "results")
    assert result["AP"] == pytest.approx(100)
    load_dataset.cache_clear()
    with pytest.raises(DataError, match="'crowds_learned' is registered with crowd=objects, not ignore"):
        dataset("crowds_learned", *files)
    with pytest.raises(UserError, match="crowd='all': write ignore or objects"):
        dataset("crowds_of_another_kind", *files, crowd="all")


def test_images_without_objects_are_dropped_on_request(tmp_path):
    """As Detectron2's own reader drops them: crowd regions and boxes without area are no objects."""
    files = write_coco(tmp_path, (2, 0, 3, 1))
    files.change(lambda content: content["annotations"][-1].update(iscrowd=1))
    assert [len(d["annotations"]) for d in dataset("all_images", *files)] == [2, 0, 3, 0]
    assert [len(d["annotations"]) for d in dataset("with_objects", *files, filter_empty=True)] == [2, 3]
    theirs = get_detection_dataset_dicts("with_objects", filter_empty=True)
    assert [d["file_name"] for d in theirs] == [d["file_name"] for d in dataset("with_objects", filter_empty=True)]
    empty = write_coco(tmp_path / "empty", (0, 0))
    assert len(dataset("no_objects", *empty, filter_empty=True)) == 2  # the summary of a training refuses them


def test_what_the_reader_accepts_is_evaluated(tmp_path):
    """Files changed at random, see tests/data/test_fuzzed_annotations.py."""
    clean, accepted = write_coco(tmp_path, counts=(4, 3, 0, 3)).read(), 0
    files = CocoFiles(str(tmp_path / "annotations.json"), str(tmp_path))
    for seed in range(60):
        files.write(fuzzed(clean, seed))
        dicts, refusal = attempt(lambda seed=seed: dataset(f"fuzzed_{seed}", *files))
        if refusal is None:
            accepted += 1
            evaluator = Evaluator(f"fuzzed_{seed}", output_dir=str(tmp_path / "results"), max_dets_per_image=100)
            evaluator.reset()
            evaluator.process(dicts, TruthTeller(dicts)(dicts))
            evaluator.evaluate()
    assert accepted > 5


def test_faulty_annotations_are_refused(tmp_path):
    files = write_coco(tmp_path)
    files.change(lambda content: content["annotations"][1].update(id=1))
    with pytest.raises(DataError, match=r"annotations\.json: the annotation id 1 occurs twice"):
        dataset("twice", *files)


def test_labels_outside_the_classes_name_the_file():
    box = {"bbox": [0, 0, 9, 9], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 2}
    entry = {"file_name": "far.png", "height": 10, "width": 10, "annotations": [box]}
    DatasetCatalog.register("far", lambda: [entry])
    MetadataCatalog.get("far").thing_classes = ["one", "two"]
    with pytest.raises(DataError, match=r"far\.png: label 2 is not in \[0, 2\)"):
        dataset("far")


DEGENERATE = {
    "no width": [10, 10, 0, 10],
    "negative height": [10, 30, 10, -10],
    "right of the image": [72, 10, 10, 10],
    "above the image": [10, -20, 10, 20],
    "no number": [float("nan"), 10, 10, 10],
    "endless": [10, 10, float("inf"), 10],
}


def add_degenerate_boxes(content):
    for box in DEGENERATE.values():
        number = len(content["annotations"]) + 1
        annotation = {"id": number, "image_id": 2, "category_id": 1, "bbox": box, "area": 1, "iscrowd": 0}
        content["annotations"].append(annotation)


def test_degenerate_boxes_are_dropped_with_one_warning(tmp_path, caplog):
    files = write_coco(tmp_path)
    files.change(add_degenerate_boxes)
    with caplog.at_level(logging.WARNING):
        dicts = dataset("degenerate", *files)
        assert class_names("degenerate", *files)
        dataset(images=files.images, name="degenerate", annotations=files.annotations)  # as a recipe calls it
    assert [len(d["annotations"]) for d in dicts] == [2, 0, 3, 1]
    warnings = [r.getMessage() for r in caplog.records if "dropped" in r.getMessage()]
    assert len(warnings) == 1
    assert "degenerate: 6 boxes" in warnings[0]
    assert "image_2.png" in warnings[0]


def test_corners_written_as_sizes_are_clipped_and_train(tmp_path):
    """[x0, y0, x1, y1] in the place of [x, y, width, height]: boxes become too large, never invalid."""
    files = write_coco(tmp_path)

    def to_corners(content):
        for annotation in content["annotations"]:
            x, y, w, h = annotation["bbox"]
            annotation["bbox"] = [x, y, x + w, y + h]

    files.change(to_corners)
    files.change(add_degenerate_boxes)
    dicts = dataset("corners", *files)
    for entry in dicts:
        for x0, y0, x1, y1 in (o["bbox"] for o in entry["annotations"]):
            assert 0 <= x0 < x1 <= 72
            assert 0 <= y0 < y1 <= 64
    mapper = TrainMapper([T.RandomFlip()])
    losses = tiny_detector()([mapper(d) for d in dicts])
    assert all(torch.isfinite(loss) for loss in losses.values())


def test_images_without_objects_are_kept(tmp_path):
    dicts = dataset("empty", *write_coco(tmp_path, counts=(0, 1, 0)))
    assert [len(d["annotations"]) for d in dicts] == [0, 1, 0]
    mapped = TrainMapper([ShortSide([48])])(dicts[0])
    assert len(mapped["instances"]) == 0
    assert mapped["instances"].gt_boxes.tensor.shape == (0, 4)
    assert mapped["instances"].gt_classes.dtype == torch.int64


def test_crowd_regions_are_no_targets(tmp_path):
    files = write_coco(tmp_path)
    files.change(lambda content: content["annotations"][0].update(iscrowd=1))
    assert [len(d["annotations"]) for d in dataset("crowd", *files)] == [1, 0, 3, 1]


def test_what_is_registered_stays_as_it_is(tmp_path):
    """`dataset` hands out copies, and mapping an image does not change them."""
    files = write_coco(tmp_path)
    dicts = dataset("kept", *files)
    before = json.dumps(dicts)
    for entry in dicts:
        TrainMapper([T.RandomFlip(prob=1.0)])(entry)
        TestMapper([ShortSide([48])])(entry)
    assert json.dumps(dicts) == before


# Sizes of a picture, the short side that is asked for, the bound of the long side, and what the official program makes
# of it: the long side is truncated, the bound rounds the short side (halves to even), and a short side that fits stays.
OFFICIAL_SIZES = [
    ((480, 640), 800, 1333, (800, 1066)),  # 1066.7
    ((640, 480), 800, 1333, (1066, 800)),
    ((427, 640), 800, 1333, (800, 1199)),  # 1199.06
    ((333, 500), 800, 1333, (800, 1201)),
    ((500, 375), 512, 1333, (682, 512)),  # 682.7
    ((300, 600), 800, 1333, (666, 1332)),  # 666.5 rounds to even; the long side stays below its bound
    ((600, 300), 800, 1333, (1332, 666)),
    ((100, 1000), 800, 1333, (133, 1330)),
    ((480, 640), 480, 1333, (480, 640)),
    ((600, 1400), 600, 1333, (571, 1332)),
    ((600, 1400), 600, None, (600, 1400)),
    ((426, 640), 400, None, (400, 600)),  # 600.9
    ((1, 1000), 800, 1333, (1, 1000)),
    ((37, 37), 800, 1333, (800, 800)),
]


@pytest.mark.parametrize(("size", "short", "longest", "expected"), OFFICIAL_SIZES)
def test_sizes_are_rounded_as_in_the_official_program(size, short, longest, expected):
    assert resized_size(*size, short, longest) == expected
    transform = ShortSide([short], longest).get_transform(np.zeros((*size, 3), np.uint8))
    assert (transform.new_h, transform.new_w) == expected


def test_short_side_draws_all_sizes():
    np.random.seed(0)
    augmentation = ShortSide([20, 30, 40])
    drawn = {augmentation.get_transform(np.zeros((50, 100, 3), np.uint8)).new_h for _ in range(30)}
    assert drawn == {20, 30, 40}


def test_one_of_draws_every_branch_and_tells_what_it_did():
    np.random.seed(0)
    augmentation = OneOf([[ShortSide([20])], [ShortSide([40]), T.CropTransform(0, 0, 30, 30)]])
    seen = []
    for _ in range(40):
        aug_input = T.AugInput(np.zeros((50, 100, 3), np.uint8))
        transform = augmentation(aug_input)
        seen.append(aug_input.image.shape[:2])
        box = transform.apply_box(np.array([[0.0, 0.0, 100.0, 50.0]]))[0]
        assert box.tolist() == ([0, 0, 40, 20] if seen[-1] == (20, 40) else [0, 0, 80, 40])
    assert {(20, 40), (30, 30)} == set(seen)
    assert 10 < seen.count((20, 40)) < 30


def painted_box(image, colour):
    """xyxy around all pixels of (3, H, W) that are closer to `colour` than to the others or to black."""
    pixels = image.permute(1, 2, 0).numpy().astype(int)
    others = [c for c in ((0, 0, 0), *COLOURS) if c != colour]
    distances = np.stack([np.abs(pixels - c).sum(-1) for c in (colour, *others)])
    rows, columns = np.nonzero(distances.argmin(0) == 0)
    return (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) if len(rows) else None


@pytest.fixture
def painting(tmp_path):
    """A black image with a red and a green rectangle far apart, as an entry of a data set."""
    boxes = [(8, 10, 38, 40), (80, 50, 112, 84)]
    pixels = np.zeros((90, 120, 3), np.uint8)
    for (x0, y0, x1, y1), colour in zip(boxes, COLOURS, strict=False):
        pixels[y0:y1, x0:x1] = colour
    Image.fromarray(pixels).save(tmp_path / "painting.png")
    objects = [
        {"bbox": list(map(float, box)), "category_id": label, "bbox_mode": BoxMode.XYXY_ABS}
        for label, box in enumerate(boxes)
    ]
    return {"file_name": str(tmp_path / "painting.png"), "height": 90, "width": 120, "annotations": objects}


def test_boxes_follow_the_pixels(painting):
    """Through flips, resizing and a crop, each box still encloses its rectangle, or left with it."""
    np.random.seed(1)
    crop = [ShortSide([80, 100]), T.RandomCrop("absolute_range", (40, 60)), ShortSide([64, 96], 160)]
    flips = [T.RandomFlip(), T.RandomFlip(horizontal=False, vertical=True)]
    mapper = TrainMapper([*flips, OneOf([[ShortSide([64, 96], 160)], crop])])
    numbers = set()
    for _ in range(60):
        mapped = mapper(painting)
        instances = mapped["instances"]
        assert instances.image_size == tuple(mapped["image"].shape[1:])
        found = dict(zip(instances.gt_classes.tolist(), instances.gt_boxes.tensor.tolist(), strict=True))
        numbers.add(len(found))
        for label, colour in enumerate(COLOURS[:2]):
            visible = painted_box(mapped["image"], colour)
            if visible is None:
                # Less than two pixels of a box may be left where its colour can't be seen any more.
                assert label not in found or min(np.subtract(found[label][2:], found[label][:2])) < 2
            else:
                np.testing.assert_allclose(found[label], visible, atol=2)
    assert numbers == {0, 1, 2}


def test_a_flip_mirrors(painting):
    flipped = TrainMapper([T.RandomFlip(prob=1.0)])(painting)
    assert flipped["instances"].gt_boxes.tensor.tolist() == [[82, 10, 112, 40], [8, 50, 40, 84]]
    assert flipped["image"].dtype == torch.uint8
    assert painted_box(flipped["image"], COLOURS[0]) == (82, 10, 112, 40)


def test_images_are_rgb(painting):
    mapped = TestMapper([])(painting)
    assert mapped["image"][:, 20, 20].tolist() == list(COLOURS[0])
    assert "annotations" not in mapped
    assert mapped["height"] == 90


@pytest.mark.parametrize("mapper", [TrainMapper, TestMapper])
def test_another_size_than_annotated_names_the_file(painting, mapper):
    painting["width"] = 60
    with pytest.raises(DataError, match=r"painting\.png: .*120.*60"):
        mapper([])(painting)


@pytest.mark.parametrize("mapper", [TrainMapper, TestMapper])
def test_missing_images_are_named(painting, mapper):
    Path(painting["file_name"]).unlink()
    with pytest.raises(DataError, match=r"image not found: .*painting\.png"):
        mapper([])(painting)


def drop_extras(content):
    del content["info"]
    for annotation in content["annotations"]:
        del annotation["area"], annotation["iscrowd"]


def number_from_zero(content):
    for number, annotation in enumerate(content["annotations"]):
        annotation["id"] = number


@pytest.mark.parametrize(
    "change", [drop_extras, number_from_zero, lambda content: None], ids=["bare", "from zero", "full"]
)
def test_true_boxes_reach_the_highest_precision(tmp_path, change):
    files = write_coco(tmp_path, category_ids=(7, 40, 900))
    files.change(change)
    dicts = dataset("truth", *files)
    metrics = run_evaluation(TruthTeller(dicts), "truth", tmp_path / "results")
    assert metrics["AP"] == metrics["AP50"] == pytest.approx(100)
    assert metrics["AP-red"] == pytest.approx(100)


def test_data_without_an_annotation_file_can_be_evaluated(tmp_path):
    dicts = dataset("source", *write_coco(tmp_path))
    DatasetCatalog.register("mine", lambda: dicts)
    MetadataCatalog.get("mine").thing_classes = ["red", "green", "blue"]
    metrics = run_evaluation(TruthTeller(dicts), "mine", tmp_path / "results")
    assert metrics["AP"] == pytest.approx(100)


def test_evaluation_equals_that_of_the_plain_road(tmp_path):
    files = write_coco(tmp_path, counts=(3, 2, 0, 4))
    dicts = dataset("both", *files)
    for objects in (d["annotations"] for d in dicts):
        for number, annotation in enumerate(objects):
            annotation["bbox"][2] += 4 * number  # worse and worse
            if number == 3:
                annotation["category_id"] = 0
    theirs = run_evaluation(TruthTeller(dicts), "both", tmp_path / "results")
    results = json.loads((tmp_path / "results/coco_instances_results.json").read_text())
    plain = CocoImages(*files, lambda image, objects: (image, objects))
    ours = evaluate(plain.data, results)
    assert 0.1 < ours["AP"] < 0.99
    for name, value in ours.items():
        assert theirs[name] == pytest.approx(100 * value, nan_ok=True) or value == -1


@pytest.mark.parametrize("extra", [{"segmentation": [[]]}, {"segmentation": [[1, 1, 2, 2]]}, {"ignore": 1}])
def test_boxes_count_whatever_stands_beside_them(tmp_path, extra):
    """Detectron2's own reader drops such objects, or fails."""
    files = write_coco(tmp_path, counts=(2, 3))
    files.change(lambda content: [a.update(extra) for a in content["annotations"]])
    dicts = dataset(f"extra_{next(iter(extra.values()))}", *files)
    assert [len(entry["annotations"]) for entry in dicts] == [2, 3]


def test_names_from_files_do_no_harm_to_a_terminal(tmp_path, caplog):
    files = write_coco(tmp_path, counts=(2, 3))
    files.change(lambda content: content["categories"][0].update(name="\x1b[2Jred"))
    dicts = dataset("escaped", *files)
    caplog.set_level("INFO")
    metrics = run_evaluation(TruthTeller(dicts), "escaped", tmp_path / "results")
    logging.getLogger("detectron2.dino").warning("%s is broken", "\x1b[2Jred")
    assert r"AP-\x1b[2Jred" in metrics
    assert r"\x1b[2Jred is broken" in caplog.text
    assert "\x1b[2J" not in caplog.text


def test_predictions_are_recognised(tmp_path):
    files = write_coco(tmp_path, counts=(2, 3))
    files.change(lambda content: content["annotations"][0].update(score=0.5))
    dataset("scored", *files)
    assert MetadataCatalog.get("scored").scores == 1

"""Batches of COCO data, learning rates and AP for transformers' Trainer."""

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from dino.data.coco import CocoImages, ResizeShortSide
from tests.coco_files import write_coco

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("timm")

from dino.hf import DinoDetrImageProcessor  # noqa: E402
from dino.hf.detection_training import CocoCollator, CocoMetrics, DetectionTrainer  # noqa: E402

from .tiny_model import tiny_model  # noqa: E402

IDS = (7, 40, 900)


@pytest.fixture
def files(tmp_path):
    return write_coco(tmp_path / "images", counts=(2, 0, 3), category_ids=IDS)


@pytest.fixture
def data(files):
    return CocoImages(*files, v2.Identity())


@pytest.fixture
def processor():
    return DinoDetrImageProcessor(size={"shortest_edge": 96, "longest_edge": 160}, category_ids=list(IDS))


def make_trainer(folder, data, processor, model=None, **settings):
    defaults = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "per_device_eval_batch_size": 2}
    arguments = transformers.TrainingArguments(folder, **{**defaults, **settings})
    return DetectionTrainer(
        model or tiny_model(),
        arguments,
        data_collator=CocoCollator(processor),
        train_dataset=data,
        eval_dataset=data,
        processing_class=processor,
        compute_metrics=CocoMetrics(data),
    )


def test_metrics_need_the_image_processor_before_training(tmp_path, data):
    arguments = transformers.TrainingArguments(tmp_path, use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match="DetectionTrainer needs processing_class, the image processor"):
        DetectionTrainer(tiny_model(), arguments, eval_dataset=data, compute_metrics=CocoMetrics(data))


def test_batches_are_those_of_the_image_processor(files, data, processor):
    """Pictures and labels, from the annotations of the file."""
    content = files.read()
    annotations = [
        {"image_id": image["id"], "annotations": [a for a in content["annotations"] if a["image_id"] == image["id"]]}
        for image in content["images"]
    ]
    paths = [f"{files.images}/{image['file_name']}" for image in content["images"]]
    expected = processor(images=paths, annotations=annotations, return_tensors="pt")
    batch = CocoCollator(processor)([data[n] for n in range(3)])
    assert batch.keys() == expected.keys()
    for key in ("pixel_values", "pixel_mask"):
        torch.testing.assert_close(batch[key], expected[key], rtol=0, atol=0)
    assert [len(labels["boxes"]) for labels in batch["labels"]] == [2, 0, 3]
    for labels, others in zip(batch["labels"], expected["labels"], strict=True):
        for key in labels:
            torch.testing.assert_close(labels[key], others[key], msg=lambda text, key=key: f"{key}: {text}")


def test_a_data_set_may_resize(files, data, processor):
    resized = data.with_transforms(ResizeShortSide(96, 160))
    batch = CocoCollator(processor, do_resize=False)([resized[0]])
    expected = CocoCollator(processor)([data[0]])
    for key in ("pixel_values", "pixel_mask"):
        torch.testing.assert_close(batch[key], expected[key], rtol=0, atol=0)
    torch.testing.assert_close(batch["labels"][0]["boxes"], expected["labels"][0]["boxes"])
    assert batch["labels"][0]["orig_size"].tolist() == [64, 72]


def test_learning_rates(tmp_path, data, processor):
    """A tenth for the backbone, of any optimizer of the arguments; what is frozen is left out."""
    trainer = make_trainer(tmp_path, data, processor, learning_rate=1e-3, weight_decay=0.25, optim="adagrad")
    optimizer = trainer.create_optimizer()
    assert isinstance(optimizer, torch.optim.Adagrad)
    rates = {p: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    named = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert rates.keys() == set(named.values())
    assert {rates[p] for name, p in named.items() if ".backbone." in name} == {(1e-4, 0.25)}
    assert {rates[p] for name, p in named.items() if ".backbone." not in name} == {(1e-3, 0.25)}
    assert trainer.create_optimizer() is optimizer


def test_predictions_are_those_of_the_image_processor(tmp_path, data, processor):
    """Two batches of unequal size; a short list is filled."""
    processor = DinoDetrImageProcessor(size={"shortest_edge": 96, "longest_edge": 160}, max_detections=7)
    trainer = make_trainer(tmp_path, data, processor)
    found = trainer.predict(data)
    assert found.predictions.shape == (3, 7, 6)
    assert found.label_ids.tolist() == [1, 2, 3]
    model = trainer.model.eval()
    batch = CocoCollator(processor)([data[2]])
    with torch.no_grad():
        outputs = model(batch["pixel_values"], batch["pixel_mask"])
    (expected,) = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=[(64, 72)])
    np.testing.assert_allclose(found.predictions[2, :, 0], expected["scores"], rtol=1e-5)
    np.testing.assert_array_equal(found.predictions[2, :, 1], expected["labels"])
    np.testing.assert_allclose(found.predictions[2, :, 2:], expected["boxes"], rtol=1e-4, atol=1e-3)
    assert set(found.metrics) >= {"test_loss", "test_AP", "test_AP50", "test_AP-red"}


def test_the_loss_alone(tmp_path, data, processor):
    trainer = make_trainer(tmp_path, data, processor, prediction_loss_only=True)
    metrics = trainer.evaluate()
    assert np.isfinite(metrics["eval_loss"])
    assert "eval_AP" not in metrics


def table_of(data, shift=0.0):
    """The objects as detections, rows of -100 where an image has fewer."""
    table = np.full((len(data), 4, 6), -100, dtype=np.float32)
    for image, entry in zip(table, data.images, strict=True):
        for row, (label, box) in zip(image, data.objects[entry["id"]], strict=False):
            row[:] = [0.9, label, *(x + shift for x in box)]
    return transformers.EvalPrediction(predictions=table, label_ids=np.array([e["id"] for e in data.images]))


def test_average_precision(data):
    """Of the objects themselves, and of boxes that miss them."""
    metrics = CocoMetrics(data)
    assert metrics(table_of(data))["AP"] == pytest.approx(1)
    assert metrics(table_of(data, shift=200.0))["AP"] == 0

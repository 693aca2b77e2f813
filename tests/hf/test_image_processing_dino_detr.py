"""The image processor: pictures as `Detector` reads them, labels from COCO annotations, detections as of `Detector`."""

import json
import pickle
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

pytest.importorskip("transformers")

from transformers.image_transforms import get_size_with_aspect_ratio

from dino.data.images import read_image, resize_image
from dino.hf.image_processing_dino_detr import DinoDetrImageProcessor
from dino.modeling.detector import Detector, Preprocessing, resized_size, to_target
from dino.structures import LayerOutputs, Outputs
from tests.tiny import random_boxes, tiny_network

SIZE = {"shortest_edge": 60, "longest_edge": 100}
PANOPTIC = {"image_id": 7, "file_name": "masks.png", "segments_info": []}


def processor(**options):
    return DinoDetrImageProcessor(**{"size": SIZE} | options)


@pytest.fixture(scope="module")
def detector():
    return Detector(tiny_network(), Preprocessing(short_side=60, max_size=100), ["a", "b", "c"]).eval()


def pixels(height=70, width=90, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def read_as_detector(detector, *pictures):
    """Images and padding that the `Detector` gives to its network for pictures (H, W, 3)."""
    resized = [resize_image(picture, detector.size(*picture.shape[:2])) for picture in pictures]
    return detector.batch([torch.from_numpy(picture).permute(2, 0, 1) for picture in resized])


def annotate(*objects, image_id=7):
    return {"image_id": image_id, "annotations": list(objects)}


def one_object(bbox=(10, 20, 30, 25), category_id=1, **more):
    return {"bbox": list(bbox), "category_id": category_id, "area": 750, "iscrowd": 0, **more}


def test_defaults_are_those_of_the_official_program():
    ours = DinoDetrImageProcessor()
    assert (ours.size["shortest_edge"], ours.size["longest_edge"], ours.max_detections) == (800, 1333, 300)
    assert ours(pixels(30, 20))["pixel_values"].shape == (1, 3, 1200, 800)


def test_pixels_and_mask_of_a_padded_batch_are_those_of_the_detector(detector):
    pictures = [pixels(70, 90), pixels(90, 40, 1), pixels(30, 200, 2)]
    found = processor()([Image.fromarray(picture) for picture in pictures], return_tensors="pt")
    images, padding = read_as_detector(detector, *pictures)
    assert torch.equal(found["pixel_values"], images)
    assert torch.equal(found["pixel_mask"], (~padding).long())
    assert not found["pixel_values"].masked_select(padding[:, None]).any()


def test_sizes_are_rounded_as_by_the_official_program():
    ours, differ = processor(), 0
    for height, width in np.random.default_rng(0).integers(8, 300, (60, 2)).tolist():
        wanted = resized_size(height, width, 60, 100)
        differ += wanted != get_size_with_aspect_ratio((height, width), 60, 100)
        assert ours(np.zeros((height, width, 3), np.uint8))["pixel_values"].shape[-2:] == wanted
    assert differ > 10  # of transformers' own rounding


@pytest.mark.parametrize(
    ("size", "wanted"),
    [({"shortest_edge": 20}, (20, 60)), ({"height": 24, "width": 18}, (24, 18)), (30, (30, 90))],
    ids=["short side alone", "fixed", "number"],
)
def test_other_sizes(size, wanted):
    assert processor(size=size)(pixels(40, 120))["pixel_values"].shape[-2:] == wanted


def test_another_filter_is_that_of_transformers():
    nearest = processor(resample=Image.Resampling.NEAREST, do_normalize=False, do_rescale=False)
    values = nearest(pixels() // 128 * 255)["pixel_values"]
    assert set(values.unique().tolist()) == {0, 255}
    assert len(processor(do_normalize=False, do_rescale=False)(pixels() // 128 * 255)["pixel_values"].unique()) > 2


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_modes_of_pillow_are_read_as_by_the_detector(detector, mode):
    image = Image.fromarray(pixels()).convert(mode)
    images, _ = read_as_detector(detector, read_image(image.copy()))
    assert torch.equal(processor()(image)["pixel_values"], images)


def test_deep_grey_files_are_scaled_by_their_type_or_the_given_range(detector, tmp_path):
    path = tmp_path / "deep.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 4096, (70, 90)).astype(np.uint16)).save(path)
    for input_range in (None, [0, 4095]):
        images, _ = read_as_detector(detector, read_image(path, input_range))
        ours = processor(input_range=input_range)
        for source in (str(path), path, Image.open(path)):
            assert torch.equal(ours(source)["pixel_values"], images)


def test_arrays_and_tensors(detector):
    picture = pixels()
    images, _ = read_as_detector(detector, picture)
    tensor = torch.from_numpy(picture).permute(2, 0, 1)
    for source in (picture, tensor, [tensor], picture.transpose(2, 0, 1)):
        assert torch.equal(processor()(source)["pixel_values"], images)
    grey = picture[:, :, 0]
    images, _ = read_as_detector(detector, np.repeat(grey[:, :, None], 3, 2))
    assert torch.equal(processor()(grey)["pixel_values"], images)
    with pytest.raises(ValueError, match=r"channels"):
        processor()(np.zeros((5, 40, 40), np.uint8), input_data_format="channels_first")


def test_floats_that_are_rescaled_already():
    image = torch.rand(3, 70, 90)
    with pytest.warns(UserWarning, match="do_rescale=False"):
        processor()(image)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = processor()(image, do_rescale=False)["pixel_values"]
        assert torch.allclose(processor()(255 * image)["pixel_values"], found, atol=1e-5)


def test_a_broken_file_is_named(tmp_path):
    path = tmp_path / "broken.png"
    Image.fromarray(pixels()).save(path)
    path.write_bytes(path.read_bytes()[:5000])
    for source in (str(path), Image.open(path)):
        with pytest.raises(ValueError, match=r"can't read image .*broken\.png"):
            processor()(source)


def test_an_opened_picture_that_is_stored_turned_is_used_as_it_is_with_a_warning(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(pixels(70, 90)).save(tmp_path / "turned.jpg", exif=exif)
    with pytest.warns(UserWarning, match="stored turned.*exif_transpose"):
        stored = processor()(Image.open(tmp_path / "turned.jpg"))["pixel_values"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        upright = processor()(str(tmp_path / "turned.jpg"))["pixel_values"]
    assert (stored.shape[-2:], upright.shape[-2:]) == ((60, 77), (77, 60))


def test_labels_of_a_padded_batch_refer_to_the_pictures_without_padding():
    annotations = [annotate(one_object(), one_object([0, 0, 90, 70], 2)), annotate(one_object(), image_id=8)]
    found = processor()([pixels(70, 90), pixels(90, 40)], annotations=annotations, return_tensors="pt")
    assert found["pixel_values"].shape[-2:] == (99, 77)
    for labels, annotation, size in zip(found["labels"], annotations, [(70, 90), (90, 40)], strict=True):
        boxes = torch.tensor([entry["bbox"] for entry in annotation["annotations"]]).float()
        boxes[:, 2:] += boxes[:, :2]
        wanted = to_target(labels["class_labels"], boxes, size)
        assert torch.allclose(labels["boxes"], wanted.boxes, atol=1e-6)
        assert labels["orig_size"].tolist() == list(size)
        assert labels["size"].tolist() == list(resized_size(*size, 60, 100))
        assert labels["image_id"].tolist() == [annotation["image_id"]]
    assert found["labels"][0]["class_labels"].tolist() == [1, 2]
    assert found["labels"][0]["area"].tolist() == pytest.approx([750 * 60 / 70 * 77 / 90] * 2)


def test_category_ids_become_labels_and_crowds_and_boxes_without_area_are_left_out():
    annotation = annotate(
        one_object(category_id=9),
        one_object(category_id=4),
        one_object(category_id=77, iscrowd=1),
        one_object([10, 20, 0, 5], category_id=4),
        one_object([95, 20, 10, 5], category_id=4),  # outside of the picture
    )
    (labels,) = processor(category_ids=[4, 9])(pixels(), annotations=annotation, return_tensors="pt")["labels"]
    assert labels["class_labels"].tolist() == [1, 0]
    assert (labels["boxes"].shape, labels["iscrowd"].tolist()) == ((2, 4), [0, 0])


def test_area_and_iscrowd_may_be_absent():
    annotation = annotate({"bbox": [10, 20, 30, 25], "category_id": 1})
    (labels,) = processor(do_resize=False)(pixels(), annotations=annotation)["labels"]
    assert (labels["area"].tolist(), labels["size"].tolist()) == ([750], [70, 90])


def test_a_picture_without_objects_has_empty_labels():
    for annotation in (annotate(), annotate(one_object(iscrowd=1))):
        (labels,) = processor(category_ids=[1])(pixels(), annotations=annotation, return_tensors="pt")["labels"]
        assert (labels["class_labels"].shape, labels["class_labels"].dtype) == ((0,), torch.int64)
        assert (labels["boxes"].shape, labels["boxes"].dtype) == ((0, 4), torch.float32)


@pytest.mark.parametrize(
    ("annotation", "message"),
    [
        (annotate(one_object(category_id=5)), r"image 7: category_id 5 is none of the 2 classes: \[4, 9\]"),
        (annotate({"category_id": 4}), r"image 7: an object needs bbox"),
        (annotate(one_object([1, 2, 3], 4)), r"image 7: an object needs bbox"),
        (annotate(one_object("abcd", 4)), r"image 7: an object needs bbox"),
        (annotate(image_id="seven"), r"image_id must be a whole number, not 'seven'"),
        ([annotate(), annotate()], r"number of images \(1\) and annotations \(2\)"),
    ],
)
def test_a_wrong_annotation_is_named(annotation, message):
    with pytest.raises(ValueError, match=message):
        processor(category_ids=[4, 9])(pixels(), annotations=annotation)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"return_segmentation_masks": True}, "masks are not supported"),
        ({"masks_path": "masks"}, "masks are not supported"),
        ({"annotations": PANOPTIC, "format": "coco_panoptic"}, "format .coco_panoptic. is not supported"),
        ({"category_ids": [1]}, "category_ids belongs to the image processor"),
    ],
)
def test_what_dino_has_not_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        processor()(pixels(), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_detections": 0}, "max_detections must be a whole number"),
        ({"category_ids": [1, 1]}, "category_ids must be whole numbers"),
        ({"category_ids": "ab"}, "category_ids must be whole numbers"),
        ({"category_ids": 3}, "category_ids must be whole numbers, one a label, each once, not 3"),
        (
            {"size": {"shortest_edge": -1, "longest_edge": 9}},
            "size must be whole numbers of pixels .*_edge': -1",
        ),
        ({"size": {"shortest_edge": 10**9}}, "size must be whole numbers of pixels from 1 to 20,000, not .*10{9}"),
        ({"size": {"height": 0.5, "width": 4}}, "size must be whole numbers"),
        ({"pad_size": {"height": 10**6, "width": 4}}, "pad_size must be whole numbers"),
        ({"image_mean": [1, 2]}, r"image_mean must be three numbers, not [\[(]1, 2[\])]"),
        ({"image_mean": [0.5, 0.5, float("nan")]}, "image_mean must be three numbers"),
        ({"image_std": [0, 0, 0]}, "image_std must be three positive numbers"),
        ({"rescale_factor": 0}, "rescale_factor must be a number such as 1/255, not 0"),
        ({"preprocess": 3}, "'preprocess' is no setting of an image processor, but a method"),
        ({"input_range": [2, 1]}, "input_range must be"),
    ],
)
def test_a_wrong_setting_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        processor(**options)


def predictions(dtype=torch.float32):
    return SimpleNamespace(logits=torch.randn(2, 12, 3).to(dtype), pred_boxes=random_boxes(2, 12).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_detections_are_those_of_the_detector(detector, dtype):
    found, sizes = predictions(dtype), [(480, 640), (333, 217)]
    outputs = Outputs(LayerOutputs(found.logits[None], found.pred_boxes[None]), None)
    wanted = detector.postprocess(outputs, sizes)
    for given in (sizes, torch.tensor(sizes), [torch.tensor(size) for size in sizes]):
        results = processor().post_process_object_detection(found, 0.0, given)
        assert torch.equal(torch.stack([one["boxes"] for one in results]), wanted.boxes)
        assert torch.equal(torch.stack([one["scores"] for one in results]), wanted.scores)
        assert torch.equal(torch.stack([one["labels"] for one in results]), wanted.labels)


def test_threshold_number_and_fractions():
    found = predictions()
    (every, _) = processor().post_process_object_detection(found, threshold=0)
    assert len(every["scores"]) == 36
    assert len(processor(max_detections=5).post_process_object_detection(found, 0)[0]["scores"]) == 5
    (best, _) = processor().post_process_object_detection(found, 0, top_k=5)
    assert torch.equal(best["scores"], every["scores"][:5])
    (above, _) = processor().post_process_object_detection(found, every["scores"][3].item())
    assert torch.equal(above["scores"], every["scores"][:3])
    (default, _) = processor().post_process_object_detection(found)
    kept = every["scores"] > 0.5
    assert 0 < kept.sum() < 36
    assert all(torch.equal(default[name], every[name][kept]) for name in every)
    sized = processor().post_process_object_detection(found, 0, [(100, 200)] * 2)[0]["boxes"]
    assert torch.equal(sized, every["boxes"] * torch.tensor([200.0, 100, 200, 100]))


@pytest.mark.parametrize("sizes", [[(4, 4)], [4, 4], torch.ones(2, 3), [(4, 4), (4,)], "ab"])
def test_wrong_target_sizes_are_refused(sizes):
    with pytest.raises(ValueError, match="target_sizes must be"):
        processor().post_process_object_detection(predictions(), 0.5, sizes)


def test_a_saved_processor_comes_back(tmp_path):
    processor(category_ids=[4, 9], max_detections=17, input_range=[0, 9], do_pad=False).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    wanted = ("DinoDetrImageProcessor", [4, 9], 17, SIZE)
    assert tuple(saved[key] for key in ("image_processor_type", "category_ids", "max_detections", "size")) == wanted
    ours = DinoDetrImageProcessor.from_pretrained(tmp_path)
    assert (ours.category_ids, ours.max_detections, ours.input_range, ours.do_pad) == ([4, 9], 17, [0, 9], False)
    assert torch.equal(ours(pixels())["pixel_values"], processor()(pixels())["pixel_values"])
    assert DinoDetrImageProcessor.from_pretrained(tmp_path, category_ids=[3], max_detections=2).category_ids == [3]


def test_samples_of_single_pictures_are_collated_to_the_batch_of_the_processor():
    pictures, ours = [pixels(70, 90), pixels(90, 40)], processor()
    annotations = [annotate(one_object()), annotate(image_id=8)]
    batch = ours(pictures, annotations=annotations, return_tensors="pt")
    samples = [ours(*pair, return_tensors="pt") for pair in zip(pictures, annotations, strict=True)]
    single = [{key: value[0] for key, value in sample.items()} for sample in samples]
    lists = [{**one, "pixel_values": one["pixel_values"].tolist()} for one in single]  # as of a data set's file
    bare = [{"pixel_values": one["pixel_values"], "labels": one["labels"]} for one in single]
    for given in (samples, single, lists, bare, [batch]):
        found = ours.collate(given)
        assert set(found) == {"pixel_values", "pixel_mask", "labels"}
        assert all(torch.equal(found[key], batch[key]) for key in ("pixel_values", "pixel_mask"))
        for one, other in zip(found["labels"], batch["labels"], strict=True):
            assert set(one) == set(other)
            assert all(torch.equal(one[key], other[key]) for key in one)
    again = pickle.loads(pickle.dumps(ours.collate))(single)  # as in the workers of a loader
    assert torch.equal(again["pixel_values"], batch["pixel_values"])
    assert set(ours.collate([ours(pictures[0])])) == {"pixel_values", "pixel_mask"}

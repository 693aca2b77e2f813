"""Images that are nearly the same are found, and stay on one side of a split."""

import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from dino.data.coco import take_images
from dino.data.near_duplicates import choose_validation, group_near_duplicates
from dino.utils.files import DataError

from ..coco_files import write_coco


def smooth_picture(seed, size=(120, 90)):
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def test_copies_in_other_sizes_and_light_are_one_group(tmp_path):
    names = []
    for seed in range(6):
        picture = smooth_picture(seed)
        variants = [picture, picture.resize((60, 45)), picture.point(lambda value: 20 + 0.8 * value)]
        for number, variant in enumerate(variants[: 1 + seed % 3]):
            names.append(f"{seed}_{number}.jpg")
            variant.save(tmp_path / names[-1], quality=80)
    groups = group_near_duplicates([{"file_name": name} for name in names], tmp_path)
    assert len(set(groups)) == 6
    for seed in range(6):
        assert len({g for g, name in zip(groups, names, strict=True) if name.startswith(f"{seed}_")}) == 1


def test_unreadable_files_are_named(tmp_path):
    (tmp_path / "a.jpg").write_text("no picture")
    with pytest.raises(DataError, match=r"can't read image .*a\.jpg"):
        group_near_duplicates([{"file_name": "a.jpg"}], tmp_path)


@pytest.mark.parametrize("seed", range(5))
def test_groups_stay_together_and_classes_come_to_both_sides(tmp_path, seed):
    data = write_coco(tmp_path, counts=(1,) * 30, seed=seed).read()
    for a in data["annotations"]:
        a["category_id"] = 3 if a["image_id"] in (5, 17) else 2 if a["image_id"] == 9 else 1  # two, one, the rest
    groups = [n // 3 for n in range(30)]
    chosen = choose_validation(data, groups, 0.3, seed)
    assert {Counter(groups[i - 1] for i in chosen)[g] for g in range(10)} == {0, 3}
    assert len(chosen) == 9
    assert len(chosen & {5, 17}) == 1  # a class of two groups
    assert 9 not in chosen  # a class of one group is trained on
    part = take_images(data, chosen)
    assert {a["image_id"] for a in part["annotations"]} == {i["id"] for i in part["images"]} == chosen
    assert choose_validation(data, groups, 0.3, seed) == chosen


def thumbnails_of(monkeypatch, pixels):
    """Let files called 0, 1, 2, … have these thumbnails."""
    pixels = pixels.reshape(len(pixels), 16, 16)
    monkeypatch.setattr("dino.data.near_duplicates._thumbnail", lambda path: pixels[int(Path(path).name)])
    return [{"file_name": str(number)} for number in range(len(pixels))]


def test_many_images_are_compared_in_seconds(tmp_path, monkeypatch):
    """20,000 of them, without their files."""
    pixels = np.random.default_rng(0).integers(0, 256, (20_000, 256), dtype=np.uint8)
    pixels[19_000] = pixels[7] // 2 + 20
    groups = group_near_duplicates(thumbnails_of(monkeypatch, pixels), tmp_path)
    assert groups[7] == groups[19_000]
    assert len(set(groups)) == 19_999


def test_many_images_that_are_alike_take_no_longer(tmp_path, monkeypatch):
    random = np.random.default_rng(0)
    pixels = random.integers(60, 190, 256) + random.integers(-3, 4, (5000, 256))
    start = time.process_time()
    groups = group_near_duplicates(thumbnails_of(monkeypatch, pixels.astype(np.uint8)), tmp_path)
    assert set(groups) == {0}
    assert time.process_time() - start < 5


CHANGES = {
    "blur": lambda image: image.filter(ImageFilter.GaussianBlur(1)),
    "crop": lambda image: image.crop((1, 1, 118, 89)).resize((120, 90)),
    "grey": lambda image: image.convert("L"),
    "16 bits": lambda image: Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 200),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_copies_are_one_group(tmp_path, change):
    for seed in range(4):
        smooth_picture(seed).save(tmp_path / f"{seed}.png")
    CHANGES[change](smooth_picture(1)).save(tmp_path / "copy.png")
    names = ["0.png", "1.png", "2.png", "copy.png", "3.png"]
    assert group_near_duplicates([{"file_name": name} for name in names], tmp_path) == [0, 1, 2, 1, 4]


def test_frames_of_a_video_are_one_group(tmp_path):
    """Its first and last frames differ."""
    wide = smooth_picture(3, (960, 64))
    names = [f"{frame:03}.png" for frame in range(60)]
    for frame, name in enumerate(names):
        wide.crop((4 * frame, 0, 4 * frame + 200, 64)).save(tmp_path / name)
    entries = [{"file_name": name} for name in names]
    assert set(group_near_duplicates(entries, tmp_path)) == {0}
    assert group_near_duplicates([entries[0], entries[-1]], tmp_path) == [0, 1]


def test_small_objects_on_white_do_not_make_images_alike(tmp_path):
    random = np.random.default_rng(0)
    entries = []
    for number in range(40):
        pixels = np.full((120, 160, 3), 255, np.uint8)
        for _ in range(3):
            x, y = random.integers(0, 140), random.integers(0, 100)
            pixels[y : y + 20, x : x + 20] = random.integers(0, 200, 3)
        entries.append({"file_name": f"{number}.png"})
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    assert group_near_duplicates(entries, tmp_path) == list(range(40))


def test_images_without_contrast_are_compared_as_they_are(tmp_path):
    for name, level in (("a.png", 0), ("b.png", 0), ("c.png", 200)):
        Image.new("L", (40, 30), level).save(tmp_path / name)
    smooth_picture(0).save(tmp_path / "d.png")
    assert group_near_duplicates([{"file_name": f"{name}.png"} for name in "abcd"], tmp_path) == [0, 0, 2, 3]


def test_copies_of_roboflow_are_known_by_their_names(tmp_path):
    names = [f"cat_jpg.rf.{letter * 32}.png" for letter in "ab"] + ["dog_jpg.rf." + "c" * 32 + ".png", "cat_jpg.png"]
    for number, name in enumerate(names):
        smooth_picture(number).save(tmp_path / name)
    assert group_near_duplicates([{"file_name": name} for name in names], tmp_path) == [0, 0, 2, 3]
    assert group_near_duplicates([], tmp_path) == []

"""Images that are nearly the same are found, and stay on one side of a split."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dino.data.near_duplicates import choose_validation, group_near_duplicates, take_images
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


def test_many_images_are_compared_in_seconds(tmp_path, monkeypatch):
    """20,000 of them, without their files."""
    hashes = np.random.default_rng(0).integers(0, 2**63, 20_000).tolist()
    hashes[7] = hashes[19_000] ^ 1
    monkeypatch.setattr("dino.data.near_duplicates._difference_hash", lambda path: hashes[int(Path(path).name)])
    groups = group_near_duplicates([{"file_name": str(n)} for n in range(20_000)], tmp_path)
    assert groups[7] == groups[19_000]
    assert len(set(groups)) == 19_999

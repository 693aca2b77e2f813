"""The halves of a data set."""

import pytest

from dino.data.halves import split_halves


def content(count):
    images = [{"id": 100 - n, "file_name": f"frame_{n:04d}.png"} for n in range(count)]
    return {"images": images, "annotations": [{"id": n, "image_id": 100 - n // 2} for n in range(2 * count)], "info": 3}


@pytest.mark.parametrize("count", [2, 3, 7, 40, 99])
def test_every_image_and_its_objects_are_in_one_half(count):
    data = content(count)
    halves = split_halves(data)
    for part in ("images", "annotations"):
        assert sorted(e["id"] for half in halves for e in half[part]) == sorted(e["id"] for e in data[part])
    for half in halves:
        assert half["info"] == 3
        assert half["images"]
        assert {a["image_id"] for a in half["annotations"]} == {image["id"] for image in half["images"]}
    assert abs(len(halves[0]["images"]) - len(halves[1]["images"])) <= max(1, count // 10)


def test_neighbours_stay_together_and_the_order_of_the_file_does_not_matter():
    data = content(80)
    names = [{image["file_name"] for image in half["images"]} for half in split_halves(data)]
    assert {"frame_0000.png", "frame_0001.png", "frame_0002.png", "frame_0003.png"} <= names[0]
    data["images"].reverse()
    assert [{image["file_name"] for image in half["images"]} for half in split_halves(data)] == names

import weakref

import numpy as np
import pytest
import torch
from torchvision import tv_tensors
from torchvision.transforms.v2 import InterpolationMode, functional

from dino.data.mixing import MixUp, Mosaic, Picture
from dino.utils.files import UserError

COLOURS = np.array([(230, 20, 20), (20, 230, 20), (20, 20, 230), (230, 230, 20)])
SIZES = [(40, 60), (60, 40), (50, 50), (20, 40)]  # h, w of four pictures


class Fixed:
    """A generator whose every uniform number lies at a fixed share of its range."""

    def __init__(self, share):
        self.share = share

    def uniform(self, low, high, size=None):
        value = low + self.share * (high - low)
        return value if size is None else np.full(size, value)


def picture(size, boxes=(), labels=(), colours=(), name="a.png"):
    """Grey, with a rectangle of a colour at each box."""
    image = np.full((*size, 3), 120, np.uint8)
    for (x0, y0, x1, y1), colour in zip(boxes, colours, strict=True):
        image[y0:y1, x0:x1] = colour
    boxes = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    return Picture(image, boxes, np.array(labels, dtype=np.int64), (name,))


def four_pictures():
    """One rectangle in each, of a colour and label of its own."""
    return [
        picture(size, [(8, 6, 26, 18)], [n], COLOURS[n : n + 1], f"{n}.png") for n, size in enumerate(SIZES)
    ]  # fmt: skip


def painted_boxes(image):
    """xyxy around all pixels nearest to each of COLOURS, not to grey or black; None where there is none."""
    known = np.array([*COLOURS, (0, 0, 0), (120, 120, 120)])
    nearest = np.abs(image[:, :, None].astype(int) - known).sum(-1).argmin(-1)  # (H, W)
    places = [np.nonzero(nearest == n) for n in range(len(COLOURS))]
    return [np.array([x.min(), y.min(), x.max() + 1, y.max() + 1]) if len(x) else None for y, x in places]


def test_a_canvas_has_four_cells_of_the_largest_size():
    """DEIM's places: short sides of 20 pixels make sizes (h, w) of 20x30, 30x20, 20x20, 20x40; cells are 30 x 40."""
    joined = Mosaic(side=20, max_size=40).join(four_pictures())
    assert joined.image.shape == (60, 80, 3)
    covered = np.zeros((60, 80), bool)
    for (y, x), (height, width) in zip(
        [(0, 0), (0, 40), (30, 0), (30, 40)], [(20, 30), (30, 20), (20, 20), (20, 40)], strict=True
    ):
        covered[y : y + height, x : x + width] = True
    assert np.array_equal(joined.image.any(-1), covered)
    expected = [(4, 3, 13, 9), (44, 3, 53, 9), (3.2, 32.4, 10.4, 37.2), (48, 36, 66, 48)]
    np.testing.assert_allclose(joined.boxes, expected)
    assert joined.labels.tolist() == [0, 1, 2, 3]
    assert joined.files == ("0.png", "1.png", "2.png", "3.png")


def test_long_sides_are_bounded():
    joined = Mosaic(side=20, max_size=40).join([picture((10, 400))] * 4)
    assert joined.image.shape == (2, 80, 3)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
def test_the_canvas_moves_as_by_torchvision(share):
    """Which DEIM calls: boxes to rounding, pixels but for the interpolation at the edges."""
    mosaic = Mosaic(side=40, max_size=80, rotation=10, translation=0.1, scale=(0.5, 1.5))
    joined = mosaic.join(four_pictures())
    moved = mosaic(four_pictures(), Fixed(share))
    height, width = joined.image.shape[:2]
    motion = {
        "angle": -10 + 20 * share,
        "translate": [(2 * share - 1) * 0.1 * width, (2 * share - 1) * 0.1 * height],
        "scale": 0.5 + share,
        "shear": [0.0, 0.0],
    }
    boxes = tv_tensors.BoundingBoxes(torch.from_numpy(joined.boxes), format="XYXY", canvas_size=(height, width))
    np.testing.assert_allclose(moved.boxes, functional.affine(boxes, **motion).numpy(), atol=1e-4)
    assert moved.labels.tolist() == [0, 1, 2, 3]
    image = torch.from_numpy(joined.image).permute(2, 0, 1)
    theirs = functional.affine(image, interpolation=InterpolationMode.BILINEAR, **motion).permute(1, 2, 0).numpy()
    assert moved.image.shape == theirs.shape
    differences = np.abs(moved.image.astype(int) - theirs)
    assert differences.mean() < 0.5
    assert (differences > 2).mean() < 0.02


def test_boxes_follow_the_pixels():
    """Each box encloses its rectangle; where both lie inside the canvas, tightly. What left it has no box."""
    mosaic = Mosaic(side=60, max_size=120, rotation=10, translation=0.3, scale=(0.5, 1.5))
    whole = gone = 0
    for seed in range(30):
        result = mosaic(four_pictures(), np.random.default_rng(seed))
        height, width = result.image.shape[:2]
        found = dict(zip(result.labels.tolist(), result.boxes, strict=True))
        for label, visible in enumerate(painted_boxes(result.image)):
            if visible is None:
                gone += label not in found
                assert (
                    label not in found or (found[label][2:] - found[label][:2]).min() < 12
                )  # only a corner of the box
                continue
            box = found[label]
            assert (box[:2] <= visible[:2] + 2).all()
            assert (box[2:] >= visible[2:] - 2).all()
            if (box[:2] > 0).all() and (box[2:] < [width, height]).all():
                np.testing.assert_allclose(box, visible, atol=2.5)
                whole += 1
    assert whole > 40
    assert gone > 5


def test_boxes_stay_inside_the_canvas_with_their_labels():
    result = Mosaic(side=40, rotation=0, translation=0, scale=(2, 2))(four_pictures(), Fixed(0.5))
    height, width = result.image.shape[:2]
    assert (result.boxes >= 0).all()
    assert (result.boxes <= [width, height, width, height]).all()
    assert len(result.boxes) == len(result.labels) < 4


def test_pictures_without_objects_make_a_mosaic_without():
    result = Mosaic(side=40)([picture((40, 60))] * 4, np.random.default_rng(0))
    assert result.boxes.shape == (0, 4)
    assert result.labels.shape == (0,)
    assert result.labels.dtype == np.int64


def test_pictures_are_read_one_by_one():
    """While one is read, those before the last are gone."""
    read = []

    def pictures():
        for number in range(4):
            assert all(image() is None for image in read[: max(0, number - 1)])
            found = picture((200, 200))
            read.append(weakref.ref(found.image))
            yield found

    assert Mosaic(side=20).join(pictures()).image.shape == (40, 40, 3)
    assert len(read) == 4


def test_mixup_of_equal_sizes():
    draw = np.random.default_rng(0)
    first, second = (
        picture((30, 40), [(1, 2, 9, 8)], [n], [(9, 9, 9)], f"{n}.png")._replace(
            image=draw.integers(0, 256, (30, 40, 3), dtype=np.uint8)
        )
        for n in range(2)
    )
    before = first.image.copy()
    mixed = MixUp(ratio=(0.3, 0.5))(first, second, Fixed(0.5))
    expected = 0.4 * first.image.astype(float) + 0.6 * second.image
    assert np.abs(mixed.image - expected).max() <= 1
    assert np.array_equal(first.image, before)
    assert mixed.boxes.tolist() == [[1, 2, 9, 8]] * 2
    assert mixed.labels.tolist() == [0, 1]
    assert mixed.files == ("0.png", "1.png")


def test_mixup_fits_the_second_into_the_first():
    """A portrait of 80 x 60 into 40 x 60: it becomes 40 x 30, and what lies beside it stays as it is."""
    first = picture((40, 60), [(2, 2, 12, 12)], [0], COLOURS[:1])
    second = picture((80, 60), [(40, 20, 60, 60)], [1], COLOURS[1:2])
    mixed = MixUp(ratio=(0.5, 0.5))(first, second, Fixed(0))
    assert mixed.image.shape == first.image.shape
    assert mixed.boxes.tolist() == [[2, 2, 12, 12], [20, 10, 30, 30]]
    assert np.array_equal(mixed.image[:, 30:], first.image[:, 30:])
    blend = (COLOURS[0] + 120) / 2, (COLOURS[1] + 120) / 2
    np.testing.assert_allclose(mixed.image[4, 4], blend[0], atol=1)
    np.testing.assert_allclose(mixed.image[20, 25], blend[1], atol=1)


@pytest.mark.parametrize("sizes", [((1, 100), (100, 1)), ((100, 1), (1, 100)), ((7, 5), (700, 500))])
def test_mixup_of_extreme_sizes(sizes):
    first, second = (picture(size, [(0, 0, *size[::-1])], [0], COLOURS[:1]) for size in sizes)
    mixed = MixUp()(first, second, np.random.default_rng(0))
    assert mixed.image.shape == first.image.shape
    height, width = sizes[0]
    assert (mixed.boxes[1, 2:] > 0).all()
    assert (mixed.boxes[1, 2:] <= [width, height]).all()


def test_mixup_without_objects():
    mixed = MixUp()(picture((8, 8)), picture((8, 8)), np.random.default_rng(0))
    assert mixed.boxes.shape == (0, 4)
    assert mixed.labels.dtype == np.int64


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mosaic(probability=1.5), r"probability of mosaic must be in \[0, 1\], not 1.5"),
        (lambda: MixUp(probability=-1), r"probability of mixup must be in \[0, 1\], not -1"),
        (lambda: Mosaic(scale=(0, 1)), "scale of the mosaic must be two positive numbers"),
        (lambda: Mosaic(scale=(1.5, 0.5)), "scale of the mosaic must be two positive numbers"),
        (lambda: MixUp(ratio=(0.5, 1.5)), r"ratio of mixup must be two numbers in \[0, 1\]"),
        (lambda: MixUp(ratio=(0.5,)), r"ratio of mixup must be two numbers in \[0, 1\]"),
    ],
)
def test_impossible_settings_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_strips_do_not_make_a_long_canvas():
    """The short side of a strip is at least a pixel, so that its long side would be thousands."""
    mosaic = Mosaic(side=20, max_size=40)
    strips = [picture(size) for size in ((1, 800), (800, 1), (5, 5), (5, 5))]
    assert max(mosaic.join(strips).image.shape) <= 80

import pytest
import torch
from torchvision.ops import box_iou

from dino.inference.tta import Augmentation, _mirror, join, make_view, views
from dino.layers import Detections

PLAIN, MIRRORED = Augmentation((9, 9), False), Augmentation((9, 9), True)


def found(boxes, scores, labels):
    return Detections(torch.tensor(boxes).reshape(-1, 4), torch.tensor(scores), torch.tensor(labels, dtype=torch.int64))


def test_views_are_sizes_times_flips():
    assert views(100, 200, [50, 80], 120, [False, True]) == [
        Augmentation((50, 100), False),
        Augmentation((50, 100), True),
        Augmentation((60, 120), False),
        Augmentation((60, 120), True),
    ]


def test_making_views():
    image = torch.zeros(3, 20, 40, dtype=torch.uint8)
    image[:, :, :20] = 200
    assert torch.equal(make_view(image, Augmentation((20, 40), False)), image)
    assert torch.equal(make_view(image, Augmentation((20, 40), True)), image.flip(-1))
    small = make_view(image, Augmentation((10, 20), True))
    assert small.shape == (3, 10, 20)
    assert small[:, :, 12:].unique().tolist() == [200]
    assert small[:, :, :8].unique().tolist() == [0]
    assert torch.equal(small, small.round())


def test_boxes_of_mirrored_views_come_back():
    plain = found([[10.0, 5, 30, 20]], [0.9], [1])
    assert _mirror(plain, 100).boxes.tolist() == [[70, 5, 90, 20]]
    assert torch.equal(_mirror(_mirror(plain, 100), 100).boxes, plain.boxes)


def joined(*views, weights=None, overlap=0.5):
    """Views of the same size, none of them mirrored."""
    return join(views, [PLAIN] * len(views), weights or [1.0] * len(views), 100, overlap)


def crowd(seed, count, overlap_all=False):
    """Detections of 3 classes on a picture of 100 pixels, best first; so many that they contest each other."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * (10 if overlap_all else 70)
    size = torch.rand(count, 2, generator=generator) * 10 + 20
    scores = torch.rand(count, generator=generator).sort(descending=True).values
    return Detections(torch.cat([corner, corner + size], 1), scores, torch.randint(3, (count,), generator=generator))


def assert_equal(one, other):
    for values, expected in zip(one, other, strict=True):
        assert torch.equal(values, expected)


def test_one_view_stays_as_it_is():
    assert_equal(joined(crowd(0, 40, True), overlap=0.0), crowd(0, 40, True))


def test_equal_views_give_the_same_detections():
    assert_equal(joined(crowd(0, 40, True), crowd(0, 40, True), crowd(0, 40, True)), crowd(0, 40, True))


def test_mirrored_views_of_what_is_symmetric():
    boxes = [[20.0, 10, 80, 40], [10, 50, 30, 70], [70, 50, 90, 70]]  # symmetric about x = 50
    view = found(boxes, [0.9, 0.5, 0.5], [0, 1, 1])
    assert_equal(join([view, view], [PLAIN, MIRRORED], [1.0, 1.0], 100, 0.5), view)


def test_mirrored_views_come_back_before_boxes_are_averaged():
    main, mirrored = found([[10.0, 10, 30, 30]], [0.5], [0]), found([[68.0, 10, 88, 30]], [0.5], [0])
    assert join([main, mirrored], [PLAIN, MIRRORED], [1.0, 1.0], 100, 0.5).boxes.tolist() == [[11, 10, 31, 30]]
    assert join([main, mirrored], [MIRRORED, PLAIN], [1.0, 1.0], 100, 0.5).boxes.tolist() == [[69, 10, 89, 30]]


def test_boxes_are_averaged_by_view_weight_times_score():
    views = [
        found([[10.0, 10, 30, 30]], [0.8], [0]),
        found([[12.0, 10, 32, 30]], [0.4], [0]),
        found([[10.0, 14, 30, 34]], [0.2], [0]),
    ]
    result = joined(*views, weights=[1.0, 2.0, 4.0])  # products 0.8, 0.8, 0.8
    expected = [10 + 2 / 3, 10 + 4 / 3, 30 + 2 / 3, 30 + 4 / 3]
    torch.testing.assert_close(result.boxes, torch.tensor([expected]))
    torch.testing.assert_close(joined(*views, weights=[3.0, 6.0, 12.0]).boxes, result.boxes)  # ratios matter
    result = joined(*views[:2], weights=[1.0, 1.0])  # products 0.8, 0.4
    torch.testing.assert_close(result.boxes, torch.tensor([[10 + 2 / 3, 10, 30 + 2 / 3, 30]]))


def test_scores_labels_and_order_are_those_of_the_main_view():
    main = found([[50.0, 50, 60, 60], [10, 10, 30, 30]], [0.7, 0.2], [2, 1])
    other = found([[70.0, 70, 90, 90], [11, 10, 31, 30], [52, 50, 62, 60]], [0.99, 0.95, 0.1], [0, 1, 2])
    result = joined(main, other)
    assert result.scores.tolist() == main.scores.tolist()
    assert result.labels.tolist() == [2, 1]
    torch.testing.assert_close(result.boxes[:, 0], torch.tensor([50 + 2 * 0.1 / 0.8, 10 + 0.95 / 1.15]))


def test_only_an_iou_above_the_threshold_is_a_match():
    main, half = found([[0.0, 0, 10, 10]], [0.5], [0]), found([[0.0, 0, 10, 5]], [0.5], [0])
    assert joined(main, half, overlap=0.5).boxes.tolist() == [[0, 0, 10, 10]]
    assert joined(main, half, overlap=0.49).boxes.tolist() == [[0, 0, 10, 7.5]]
    apart = found([[20.0, 20, 30, 30]], [0.5], [0])
    assert joined(main, apart, overlap=0.0).boxes.tolist() == [[0, 0, 10, 10]]
    assert joined(main, main, overlap=1.0).boxes.tolist() == [[0, 0, 10, 10]]


def test_matches_are_of_one_class():
    main = found([[10.0, 10, 30, 30], [10, 10, 30, 30]], [0.5, 0.4], [0, 1])  # a query with two labels
    other = found([[10.0, 10, 30, 30], [12, 10, 32, 30]], [0.4, 0.4], [2, 1])
    assert joined(main, other).boxes.tolist() == [[10, 10, 30, 30], [11, 10, 31, 30]]


def test_a_detection_is_matched_once_and_the_closest_gets_it():
    main = found([[13.0, 10, 33, 30], [11, 10, 31, 30]], [0.9, 0.5], [0, 0])
    other = found([[10.0, 10, 30, 30], [8, 10, 28, 30]], [0.5, 0.5], [0, 0])  # the second is in reach of both
    assert joined(main, other).boxes[:, 0].tolist() == [13, 10.5]
    twins = found([[11.0, 10, 31, 30], [11, 10, 31, 30]], [0.5, 0.4], [0, 0])
    assert joined(twins, other).boxes[:, 0].tolist() == [10.5, 11]  # of equal IoUs the better
    sides = found([[9.0, 10, 29, 30], [13, 10, 33, 30]], [0.5, 0.5], [0, 0])  # as close to the main one
    assert joined(found([[11.0, 10, 31, 30]], [0.5], [0]), sides).boxes[:, 0].tolist() == [10]


def test_empty_views():
    nothing, main = found([], [], []), crowd(1, 5)
    assert_equal(joined(main, nothing, nothing), main)
    assert_equal(joined(nothing, main), nothing)
    assert_equal(joined(nothing, nothing), nothing)
    moved = main._replace(boxes=main.boxes + 1)
    assert_equal(joined(main, nothing, moved), joined(main, moved))
    assert not torch.equal(joined(main, nothing, moved).boxes, main.boxes)


def test_scores_and_boxes_of_zero_stay_finite():
    main = found([[5.0, 5, 5, 5], [10, 10, 30, 30]], [0.5, 0.0], [0, 0])
    assert_equal(joined(main, main, overlap=0.0), main)


def slow_join(views, weights, overlap):
    """Boxes of `joined`, one detection after another."""
    main, *others = views
    totals = [weights[0] * score for score in main.scores.tolist()]
    sums = [[total * value for value in box] for total, box in zip(totals, main.boxes.tolist(), strict=True)]
    matches = 0
    for other, weight in zip(others, weights[1:], strict=True):
        iou = box_iou(main.boxes, other.boxes).tolist()
        taken = {}  # index in the other view -> IoU and index in the main view
        for i, label in enumerate(main.labels):
            allowed = [j for j, theirs in enumerate(other.labels) if theirs == label and iou[i][j] > overlap]
            if allowed:
                j = max(allowed, key=iou[i].__getitem__)
                if j not in taken or iou[i][j] > taken[j][0]:
                    taken[j] = (iou[i][j], i)
        for j, (_, i) in taken.items():
            share = weight * other.scores[j].item()
            sums[i] = [a + share * b for a, b in zip(sums[i], other.boxes[j].tolist(), strict=True)]
            totals[i] += share
        matches += len(taken)
    return torch.tensor(sums) / torch.tensor(totals)[:, None], matches


@pytest.mark.parametrize("overlap", [0.0, 0.3, 0.7])
@pytest.mark.parametrize("overlap_all", [False, True])
def test_joining_equals_a_loop_over_detections(overlap, overlap_all):
    for seed in range(5):
        views = [crowd(10 * seed + i, count, overlap_all) for i, count in enumerate((40, 25, 60))]
        weights = [1.0, 0.5, 2.0]
        expected, matches = slow_join(views, weights, overlap)
        assert matches > 0
        result = joined(*views, weights=weights, overlap=overlap)
        torch.testing.assert_close(result.boxes, expected, rtol=0, atol=1e-3)
        assert_equal(result[1:], views[0][1:])


def test_flips_with_true_among_them_add_mirrored_views():
    for flips in ((False, True), (True,)):
        assert [view.mirrored for view in views(50, 100, (50,), 1000, flips)] == [False, True]


def test_a_box_without_a_match_changes_nothing_even_if_it_is_nan():
    main = Detections(torch.tensor([[1.0, 1.0, 5.0, 5.0]]), torch.tensor([0.9]), torch.tensor([0]))
    other = main._replace(boxes=torch.full((1, 4), float("nan")))
    view = Augmentation((10, 10), False)
    assert torch.equal(join([main, other], [view, view], [1.0, 1.0], 10, 0.5).boxes, main.boxes)

import math

import pytest
import torch

from dino.layers import ContrastiveDenoising, denoising_mask

from ..tiny import random_targets


def make(num_classes=3, embed_dim=4, **changes):
    return ContrastiveDenoising(num_classes=num_classes, embed_dim=embed_dim, **changes)


def noise_box_by_hand(box, signs, parts, negative, scale):
    """One (cx, cy, w, h) as floats -> its box logits with noise."""
    cx, cy, w, h = box
    corners = [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]
    for i, half_side in enumerate((w / 2, h / 2, w / 2, h / 2)):
        part = parts[i] + 1 if negative else parts[i]
        corners[i] += (1 if signs[i] else -1) * part * half_side * scale
        corners[i] = min(max(corners[i], 0.0), 1.0)
    x0, y0, x1, y1 = corners
    numbers = [(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0]
    clamped = [min(max(number, 0.0), 1.0) for number in numbers]
    return [math.log(max(c, 1e-3) / max(1 - c, 1e-3)) for c in clamped]


@pytest.mark.parametrize("box_noise", [0.4, 1.0])
@pytest.mark.parametrize("counts", [(3, 0, 2), (1,), (0, 4)])
def test_against_loops(counts, box_noise):
    denoising, targets, num_groups = make(box_noise=box_noise), random_targets(*counts), 3
    longest = max(counts)
    noise = denoising.draw(2 * num_groups, torch.cat([t.labels for t in targets]))
    queries = denoising.build(targets, 5, num_groups, noise).queries
    content = torch.zeros(len(counts), 2 * num_groups * longest, 4)
    box_logits = torch.zeros(len(counts), 2 * num_groups * longest, 4)
    for repeat in range(2 * num_groups):
        entry = 0  # counts the objects of all images
        for image, target in enumerate(targets):
            for index in range(len(target.labels)):
                slot, draws = repeat * longest + index, [x[repeat, entry] for x in noise]
                chance, new_label, signs, parts = draws
                label = new_label if chance < 0.25 else target.labels[index]
                content[image, slot] = denoising.label_embed.weight[label].detach()
                box = target.boxes[index].tolist()
                noisy = noise_box_by_hand(box, signs.tolist(), parts.tolist(), repeat % 2 == 1, box_noise)
                box_logits[image, slot] = torch.tensor(noisy)
                entry += 1
    torch.testing.assert_close(queries.content, content)
    torch.testing.assert_close(queries.box_logits, box_logits, rtol=1e-3, atol=1e-4)


def test_slots_without_an_object_hold_a_centred_box():
    queries = make()(random_targets(1, 3), 5).queries
    slots = queries.box_logits[0].view(-1, 3, 4)
    assert torch.equal(slots[:, 1:].sigmoid(), torch.full_like(slots[:, 1:], 0.5))
    assert not queries.content[0].view(-1, 3, 4)[:, 1:].any()


@pytest.mark.parametrize(
    ("fullest", "num_groups", "slots"),
    [(3, 33, 198), (7, 14, 196), (50, 2, 200), (51, 1, 102), (100, 1, 200), (101, 1, 200), (150, 1, 200)],
)
def test_groups_of_a_budget_of_100(fullest, num_groups, slots):
    """As published up to 100 objects; beyond, the published programs grow without bound."""
    dn = make()(random_targets(fullest, 1), 5)
    assert dn.num_groups == num_groups
    assert dn.queries.content.shape[1] == slots
    assert dn.queries.box_logits.shape[1] == slots


@pytest.mark.parametrize("budget", [1, 2, 5, 10, 49])
@pytest.mark.parametrize("fullest", [1, 2, 7, 60])
def test_a_small_budget_is_never_exceeded(budget, fullest):
    dn = make(num_denoising=budget)(random_targets(fullest, 0), 5)
    assert 0 < dn.queries.content.shape[1] <= 2 * budget
    assert dn.num_groups == max(1, budget // fullest)


def test_a_crowd_is_sampled():
    """The denoised objects are a subset in the same order, and are the targets of the denoising losses."""
    crowd, few = random_targets(50, 2)
    dn = make(num_denoising=10)([crowd, few], 5)
    chosen = dn.targets[0]
    indices = [crowd.boxes.tolist().index(box) for box in chosen.boxes.tolist()]
    assert len(indices) == 10
    assert indices == sorted(set(indices))
    assert torch.equal(chosen.labels, crowd.labels[indices])
    assert torch.equal(dn.targets[1].boxes, few.boxes)
    again = make(num_denoising=10)([crowd, few], 5).targets[0]
    assert not torch.equal(again.boxes, chosen.boxes), "each step must draw anew"


@pytest.mark.parametrize("budget", [0, 1, 10])
@pytest.mark.parametrize("counts", [(50, 2), (0, 0), (3, 0)])
def test_the_number_of_denoised_objects_is_known_beforehand(budget, counts):
    denoising = make(num_denoising=budget)
    done = denoising(random_targets(*counts), 5)
    assert denoising.num_denoised(list(counts)) == sum(len(t.labels) for t in done.targets)


def mask_by_hand(num_groups, group_size, num_queries):
    slots = num_groups * group_size
    total = slots + num_queries
    attn_mask = torch.zeros(total, total, dtype=torch.bool)
    for row in range(total):
        for column in range(slots):
            same_group = row < slots and row // group_size == column // group_size
            attn_mask[row, column] = not same_group
    return attn_mask


@pytest.mark.parametrize("sizes", [(3, 4, 5), (1, 1, 2), (2, 6, 0), (1, 2, 3)])
def test_mask_against_loops(sizes):
    assert torch.equal(denoising_mask(*sizes, torch.device("cpu")), mask_by_hand(*sizes))


def test_mask_published_counts():
    """Seven objects: a denoising query sees its group and all matching queries, a matching query its like only."""
    seen = (~denoising_mask(14, 14, 900, torch.device("cpu"))).sum(1)
    assert set(seen[:196].tolist()) == {914}
    assert set(seen[196:].tolist()) == {900}


@pytest.mark.parametrize(("budget", "counts"), [(100, (0, 0)), (0, (3, 2)), (0, (0, 0))])
def test_nothing_to_noise(budget, counts):
    """One slot per image keeps the label embedding in the graph, and no matching query sees it."""
    denoising = make(num_denoising=budget)
    dn = denoising(random_targets(*counts), 5)
    assert dn.num_groups == 0
    assert dn.queries.content.shape == (2, 1, 4)
    assert dn.queries.attn_mask[1:, 0].all()
    assert not dn.queries.attn_mask[:, 1:].any()
    assert [len(t.labels) for t in dn.targets] == [0, 0]
    dn.queries.content.sum().backward()
    assert denoising.label_embed.weight.grad is not None


def test_statistics_of_noise():
    """A quarter of the labels is drawn anew, positives stay within their noise, negatives go beyond it."""
    objects = 4000
    labels, boxes = torch.zeros(objects, dtype=torch.int64), torch.tensor([[0.5, 0.5, 0.2, 0.2]]).expand(objects, -1)
    denoising = make(num_classes=4)
    noise = denoising.draw(4, labels)
    changed = (denoising.noise_labels(labels, noise) != 0).float().mean().item()
    assert changed == pytest.approx(0.25 * 3 / 4, abs=0.015)  # one of the four classes is the old one
    noisy = denoising.noise_boxes(boxes, noise)
    assert noisy.shape == (4, objects, 4)
    positive, negative = noisy[0::2], noisy[1::2]
    # A corner of a positive moves by up to 0.1, so no side inverts.
    assert (positive[..., :2] - 0.5).abs().max() <= 0.1 + 1e-6
    assert positive[..., 2:].min() > 0
    assert positive[..., 2:].max() <= 0.4 + 1e-6
    # Both corners of a negative move by 0.1 to 0.2: outwards (up to 0.6), inwards (past each other), or one and one.
    assert negative[..., 2:].max() <= 0.6 + 1e-6
    inverted = (negative[..., 2:] < 0).float().mean().item()
    assert inverted == pytest.approx(0.25, abs=0.015)
    either_side = (negative[..., 2:] < 0).any(-1).float().mean().item()
    assert either_side == pytest.approx(0.44, abs=0.02)


def test_no_noise():
    target = random_targets(3)[0]
    queries = make(label_noise=0, box_noise=0, num_denoising=6)([target], 1).queries
    boxes = queries.box_logits.sigmoid().view(4, 3, 4)
    torch.testing.assert_close(boxes, target.boxes.expand(4, 3, 4), rtol=0, atol=1e-5)


def test_one_class():
    denoising = make(num_classes=1)
    queries = denoising(random_targets(2, 1, num_classes=1), 3).queries
    assert torch.equal(queries.content[0], denoising.label_embed.weight.expand(len(queries.content[0]), -1))


def test_negative_budget():
    with pytest.raises(ValueError, match="num_denoising must be 0"):
        make(num_denoising=-1)

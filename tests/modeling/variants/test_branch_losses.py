import numpy as np
import pytest
import torch
from torch import nn

from dino.layers import HungarianMatcher, LossScaling, NonFiniteCostError, SetCriterion
from dino.layers import criterion as criterion_module
from dino.layers import matcher as matcher_module
from dino.layers.boxes import box_iou
from dino.layers.class_loss import FocalLoss, IoUAwareLoss
from dino.layers.criterion import call_criterion
from dino.modeling.detector import Detector
from dino.modeling.variants import (
    CombinedCriterion,
    FinalCriterion,
    ObjectnessCriterion,
    OneToManyCriterion,
    RankedCriterion,
    ThresholdMatcher,
)
from dino.modeling.variants.criteria import check_criterion
from dino.structures import DenoisingOutputs, LayerOutputs, Outputs, Target
from dino.utils.files import UserError

from ...descendants.branches import load, losses_of, pairs_of, predictions_of, targets_of
from ...tiny import random_boxes, random_targets, tiny_network

LAYERS = ["layer_0", "layer_1", "layer_2"]
QUALITY = {"class_loss": IoUAwareLoss()}


class Noting(nn.Module):
    """A matcher that keeps its pairs."""

    def __init__(self, matcher):
        super().__init__()
        self.matcher, self.seen = matcher, []

    def forward(self, predictions, targets, **options):
        self.seen.append(self.matcher(predictions, targets, **options))
        return self.seen[-1]


@pytest.fixture
def exact_giou(monkeypatch):
    """Generalized IoU without the official program's 1e-6 in both denominators, which the public programs lack."""

    def exact(a, b):
        low, high = torch.min(a[..., :2], b[..., :2]), torch.max(a[..., 2:], b[..., 2:])
        hull = (high - low).prod(-1)
        areas = [(x[..., 2:] - x[..., :2]).prod(-1) for x in (a, b)]
        iou = box_iou(a, b)
        union = (areas[0] + areas[1]) / (1 + iou)
        return iou - (hull - union) / hull

    for module in (criterion_module, matcher_module):
        monkeypatch.setattr(module, "generalized_iou", exact)


def assert_recorded(losses, expected):
    """Each loss has a counterpart, equal to 1e-5."""
    assert losses.keys() == expected.keys()
    for name, loss in losses.items():
        torch.testing.assert_close(loss.float(), expected[name], rtol=1e-5, atol=1e-6, msg=name)


def assert_gradients(values, **predictions):
    """To 1e-5 of the largest number of each."""
    for name, both in predictions.items():
        for part, x in both._asdict().items():
            expected = values[f"gradients/{name}/{part}"]
            torch.testing.assert_close(x.grad, expected, rtol=0, atol=1e-5 * expected.abs().max().item(), msg=name)


def ours_of(pairs, objects=None):
    """Pairs of one layer -> for each image, sorted (query, object)."""
    return [sorted(zip(*map(np.ndarray.tolist, image), strict=True)) for image in pairs]


def renamed(expected, main, branch, public):
    """Public names -> ours: `public` is the ending that becomes `branch`, all others get `main`."""

    def own(name):
        stem, is_public = name.removesuffix(public), name.endswith(public)
        return stem.replace("_enc", "_interm") + (branch if is_public else main)

    return {own(name): loss for name, loss in expected.items()}


# Hybrid branch


def test_hybrid_losses_of_the_public_program(exact_giou):
    """Losses, pairs and gradients of `train_hybrid` of H-DETR with 6 copies."""
    values = load("hybrid/criterion")
    targets, names = targets_of(values), ("one_to_one", "one_to_many", "encoder")
    one, many, encoder = (predictions_of(values, name) for name in names)
    matchers = [Noting(HungarianMatcher()), Noting(HungarianMatcher(copies_share=1.0))]
    criterion = CombinedCriterion(
        criterion=ObjectnessCriterion(matcher=matchers[0], class_weight=2.0),  # its encoder does not tell classes apart
        branches={"hybrid": OneToManyCriterion(matcher=matchers[1], class_weight=2.0, copies=6)},
    )
    outputs = Outputs(one, encoder, extra={"hybrid": Outputs(many, many.without_layers())})
    losses = criterion(outputs, targets)
    assert_recorded(losses, renamed(losses_of("hybrid/criterion"), "", "_hybrid", "_one2many"))
    sum(losses.values()).backward()
    assert_gradients(values, one_to_one=one, one_to_many=many, encoder=encoder)
    for group, noting in zip(names, matchers, strict=False):
        for number, layer in enumerate(LAYERS):
            expected = pairs_of(values[f"assignments/{group}/{layer}"], 3)
            wrapped = [
                sorted((q, t % max(len(objects.labels), 1)) for q, t in image)  # they number the copies of an object
                for image, objects in zip(expected, targets, strict=True)
            ]
            assert ours_of(noting.seen[0][number]) == wrapped
    assert all(len(layer[0][0]) == 12 for layer in matchers[1].seen[0])


def test_copies_follow_their_share():
    """14 queries and 2 objects: 6 copies need 12 of them, and 3 half of them."""
    targets, predictions = random_targets(2), LayerOutputs(torch.randn(1, 1, 14, 3), random_boxes(1, 1, 14))
    for share, expected in ((1.0, 12), (0.5, 6), (0.3, 4), (0.1, 2)):
        ((query, target),) = HungarianMatcher(copies_share=share)(predictions, targets, copies=[6])[0]
        assert len(query) == expected
        assert np.bincount(target).tolist() == [expected / 2] * 2


# Second pass


class Mixed(ThresholdMatcher):
    """The scores of the predictions, but other boxes, as the public program of DAC-DETR."""

    def __init__(self, boxes):
        super().__init__()
        self.boxes = boxes

    def score(self, predictions, targets):
        return super().score(predictions._replace(boxes=self.boxes), targets)


def dac_outputs(values, targets):
    """Outputs with the recorded predictions, and these."""
    leaves = {name: predictions_of(values, name) for name in ("o", "c", "encoder")}

    def with_denoising(name):
        denoised, others = leaves[name].split(8)
        return others, DenoisingOutputs(denoised, targets, 2)

    (main, main_dn), (second, second_dn) = with_denoising("o"), with_denoising("c")
    extra = {"pass": Outputs(second, second.without_layers(), second_dn)}
    return Outputs(main, main.without_layers(), main_dn, extra), leaves


def test_two_passes_of_the_public_program(exact_giou):
    """Losses, pairs and gradients of both decoders of DAC-DETR, with its boxes for the assignment."""
    values = load("dac/criterion")
    targets = targets_of(values)
    outputs, leaves = dac_outputs(values, targets)
    matcher = Noting(Mixed(outputs.decoder.boxes.detach()))
    criterion = CombinedCriterion(
        criterion=SetCriterion(matcher=HungarianMatcher(), **QUALITY),
        branches={"pass": RankedCriterion(matcher=matcher, objects_factor=3.0, **QUALITY)},
    )
    losses = criterion(outputs, targets)
    public = losses_of("dac/criterion")
    expected = {name: loss for name, loss in public.items() if "_enc" not in name}
    assert_recorded(losses, renamed(expected, "_pass", "", "_one2one"))
    # The encoder of the public program does not tell classes apart, and has a focal loss of weight 2.
    blind = [Target(torch.zeros_like(t.labels), t.boxes) for t in targets]
    encoder = SetCriterion(matcher=HungarianMatcher(), class_weight=2.0)
    proposed = encoder(Outputs(leaves["encoder"], leaves["encoder"].without_layers()), blind)
    assert_recorded(
        {f"{name}_enc": loss for name, loss in proposed.items()},
        {name: loss for name, loss in public.items() if "_enc" in name},
    )
    (sum(losses.values()) + sum(proposed.values())).backward()
    assert_gradients(values, **leaves)
    for layer, pairs in zip(LAYERS, matcher.seen[0], strict=True):
        assert ours_of(pairs) == pairs_of(values[f"assignments/one_to_many/{layer}"], 3)
    # With the boxes whose losses are computed, other predictions belong to the objects.
    own = ThresholdMatcher()(outputs.extra["pass"].decoder, targets)
    assert any(ours_of(a) != ours_of(b) for a, b in zip(own, matcher.seen[0], strict=True))


def test_rank_weights_of_the_public_program():
    values = load("dac/ranks")
    for quality, targets, ranks in zip(*(values[name] for name in ("quality", "targets", "ranks")), strict=True):
        pairs = criterion_module.Positives(*[quality] * 3, torch.arange(6), targets, (1, 1, 6), 3)
        weights = RankedCriterion(matcher=ThresholdMatcher(), **QUALITY).pair_weights(quality, pairs)
        torch.testing.assert_close(weights, torch.exp(-ranks / 1.5))


def test_ranks_need_a_quality():
    with pytest.raises(UserError, match=r"FocalLoss has no quality .* RankedCriterion needs"):
        RankedCriterion(matcher=ThresholdMatcher(), class_loss=FocalLoss())


# Both together


def random_predictions(images=2, queries=12, layers=2):
    return LayerOutputs(torch.randn(layers, images, queries, 3), random_boxes(layers, images, queries))


def random_outputs(targets, *names, images=2, queries=12):
    """Random predictions of a network with branches of these names."""

    def one():
        main, denoised, proposals = random_predictions(), random_predictions(queries=12), random_predictions(layers=1)
        return Outputs(main, proposals, DenoisingOutputs(denoised, targets, 2))

    return one()._replace(extra={name: one() for name in names})


def combined(**branches):
    return CombinedCriterion(criterion=SetCriterion(matcher=HungarianMatcher()), branches=branches)


def one_to_many(**options):
    return OneToManyCriterion(matcher=HungarianMatcher(), copies=2, **options)


def test_names_and_values():
    """The losses of each part under its own ending, times its weight."""
    targets = random_targets(2, 3)
    outputs = random_outputs(targets, "a", "b")
    parts = {"a": one_to_many(), "b": RankedCriterion(matcher=ThresholdMatcher(), **QUALITY)}
    main = SetCriterion(matcher=HungarianMatcher())
    losses = CombinedCriterion(criterion=main, branches=parts, weights={"b": 0.5})(outputs, targets)
    expected = main(outputs, targets)
    for name, part in parts.items():
        factor = {"a": 1.0, "b": 0.5}[name]
        expected |= {f"{key}_{name}": factor * loss for key, loss in part(outputs.extra[name], targets).items()}
    assert losses == expected
    assert {"loss_ce_0_a", "loss_giou_dn_0_b", "loss_bbox_interm_a", "loss_ce_b"} < losses.keys()
    assert len(losses) == 3 * 15


def test_a_branch_without_predictions():
    """Both criteria of branches take no queries: the losses are 0, with gradients."""
    targets = random_targets(2, 0)
    empty = LayerOutputs(*(x.requires_grad_() for x in random_predictions(queries=0)))
    for criterion in (one_to_many(), RankedCriterion(matcher=ThresholdMatcher(), **QUALITY)):
        losses = criterion(Outputs(empty, empty.without_layers()), targets)
        assert all(loss == 0 and loss.requires_grad for loss in losses.values())


@pytest.mark.parametrize("name", ["dn", "interm", "0", "dn_3"])
def test_names_of_the_main_losses_are_refused(name):
    with pytest.raises(UserError, match=f"can't be called '{name}'"):
        combined(**{name: one_to_many()})


def test_weights_of_unknown_branches_are_refused():
    with pytest.raises(UserError, match="weights has 'hybird', but the branches are \\['hybrid'\\]"):
        CombinedCriterion(criterion=one_to_many(), branches={"hybrid": one_to_many()}, weights={"hybird": 1.0})


@pytest.mark.parametrize("extra", [(), ("other",), ("hybrid", "other")])
def test_predictions_of_other_branches_are_refused(extra):
    targets = random_targets(2, 3)
    with pytest.raises(UserError, match="but the criterion losses for \\['hybrid'\\]"):
        combined(hybrid=one_to_many())(random_outputs(targets, *extra), targets)


class TwoArguments(nn.Module):
    """A criterion that knows no options."""

    def forward(self, outputs, targets):
        return {"loss_own": outputs.decoder.boxes.sum()}


def test_options_reach_every_part():
    """`normalizer` divides all; `non_finite` lets all match; a part of two arguments gets none, or is refused."""
    targets = random_targets(2, 3)
    outputs = random_outputs(targets, "a", "b")
    criterion = combined(
        a=LossScaling(criterion=one_to_many(), factors={"loss_ce": 2.0}),
        b=RankedCriterion(matcher=ThresholdMatcher(), **QUALITY),
    )
    once, twice = (criterion(outputs, targets, normalizer=torch.tensor([n, 3 * n])) for n in (5.0, 10.0))
    for name, loss in once.items():
        torch.testing.assert_close(loss, 2 * twice[name])
    outputs.extra["b"].decoder.logits[0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteCostError):
        criterion(outputs, targets)
    losses = call_criterion(criterion, outputs, targets, non_finite="match")
    assert losses["loss_ce_0_b"].isnan()
    assert losses["loss_ce_a"].isfinite()
    own = combined(own=TwoArguments())
    outputs = random_outputs(targets, "own")
    assert own(outputs, targets)["loss_own_own"] == outputs.extra["own"].decoder.boxes.sum()
    with pytest.raises(UserError, match="TwoArguments takes no `normalizer`"):
        own(outputs, targets, normalizer=torch.tensor([1.0, 1.0]))


def part_of(outputs, image):
    """The outputs of one image."""

    def cut(x):
        if isinstance(x, LayerOutputs):
            return LayerOutputs(*(y[:, image : image + 1] for y in x))
        if isinstance(x, DenoisingOutputs):
            return DenoisingOutputs(cut(x.predictions), x.targets[image : image + 1], x.num_groups)
        if isinstance(x, Outputs):
            return Outputs(*(cut(y) for y in x))
        return x and {name: cut(y) for name, y in x.items()}

    return cut(outputs)


def test_parts_of_a_batch_add_up():
    """To the losses of the whole batch, with its numbers of objects."""
    targets = random_targets(2, 4)
    outputs = random_outputs(targets, "a", "b")
    criterion = combined(a=one_to_many(), b=RankedCriterion(matcher=ThresholdMatcher(), objects_factor=3, **QUALITY))
    whole = criterion(outputs, targets)
    normalizer = torch.tensor([6.0, 6.0])
    parts = [criterion(part_of(outputs, i), targets[i : i + 1], normalizer=normalizer) for i in range(2)]
    for name, loss in whole.items():
        torch.testing.assert_close(sum(part[name] for part in parts), loss, rtol=1e-5, atol=1e-6, msg=name)


def test_losses_of_branches_are_scaled_by_name():
    targets = random_targets(2, 3)
    outputs = random_outputs(targets, "a")
    plain = combined(a=one_to_many())(outputs, targets)
    for factors in ({"loss_ce_a": 3.0}, {"loss_ce_dn_0_a": 3.0, "loss_giou_interm_a": 0.5}):
        scaled = LossScaling(criterion=combined(a=one_to_many()), factors=factors)(outputs, targets)
        assert scaled == {name: factors.get(name, 1.0) * loss for name, loss in plain.items()}


def test_auxiliary_losses_of_main_and_branch_are_left_out_separately():
    targets = random_targets(2, 3)
    outputs = random_outputs(targets, "a")

    def zeros(main, branch):
        criterion = CombinedCriterion(criterion=main(matcher=HungarianMatcher()), branches={"a": branch()})
        return {name for name, loss in criterion(outputs, targets).items() if loss == 0}

    early = {f"loss_{kind}{dn}_0" for kind in ("ce", "bbox", "giou") for dn in ("", "_dn")}
    assert zeros(FinalCriterion, one_to_many) == early
    assert zeros(SetCriterion, lambda: FinalCriterion(matcher=HungarianMatcher())) == {f"{name}_a" for name in early}


# Network and criterion


class Wrapper(nn.Module):
    """A person's wrapper, which says nothing about branches."""

    def __init__(self, criterion):
        super().__init__()
        self.criterion = criterion

    def forward(self, outputs, targets, **options):
        return self.criterion(outputs, targets, **options)


class Own(TwoArguments):
    """A person's criterion, which uses `Outputs.extra` by itself."""

    branches = ("a",)


def network(*names):
    return tiny_network(branches={name: nn.Identity() for name in names})


def test_network_and_criterion_of_different_branches_are_refused():
    """Also inside wrappers; an own criterion that names its branches fits; inference asks for no criterion."""
    plain, with_a = SetCriterion(matcher=HungarianMatcher()), combined(a=one_to_many())
    for wrap in (lambda x: x, Wrapper, lambda x: LossScaling(criterion=Wrapper(x), factors={})):
        Detector(network(), criterion=wrap(plain))
        Detector(network("a"), criterion=wrap(with_a))
        for names, criterion in ((["a"], plain), ([], with_a), (["a", "b"], with_a), (["b"], with_a)):
            with pytest.raises(UserError, match="the network has the branches \\["):
                Detector(network(*names), criterion=wrap(criterion))
    Detector(network("a"), criterion=Own())
    with pytest.raises(UserError, match="names them in its attribute `branches`"):
        Detector(network("a"), criterion=TwoArguments())
    Detector(network("a"))
    check_criterion(lambda outputs, targets: {}, tiny_network())


@pytest.mark.parametrize("name", ["0_h", "dn_h", "interm_h", "dn_0_h", "dn", "interm", "3"])
def test_names_that_would_take_losses_of_others_are_refused(name):
    """`loss_ce_0` of the branch `h` and `loss_ce` of the branch `0_h` would be one loss."""
    criterion = SetCriterion(matcher=HungarianMatcher())
    with pytest.raises(UserError, match=f"can't be called '{name}'"):
        CombinedCriterion(criterion=criterion, branches={"h": criterion, name: criterion})
    CombinedCriterion(criterion=criterion, branches={"second_0": criterion})


@pytest.mark.parametrize("copies", [0, -1, 2.5])
def test_copies_are_positive_integers(copies):
    with pytest.raises(UserError, match="a positive number was expected"):
        OneToManyCriterion(matcher=HungarianMatcher(), copies=copies)


@pytest.mark.parametrize("options", [{"objects_factor": 0}, {"temperature": 0}, {"temperature": float("nan")}])
def test_numbers_that_make_losses_infinite_are_refused(options):
    with pytest.raises(UserError, match="a positive number was expected"):
        RankedCriterion(matcher=ThresholdMatcher(), **QUALITY, **options)

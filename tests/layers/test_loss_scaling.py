import pytest
import torch

from dino.layers import LossScaling

from ..tiny import default_criterion, random_batch, random_targets, tiny_network


def test_chosen_losses_are_multiplied():
    outputs, targets = tiny_network()(*random_batch(2), random_targets(2, 1)), random_targets(2, 1)
    plain = default_criterion()(outputs, targets)
    weighted = LossScaling(criterion=default_criterion(), factors={"loss_ce_dn": 0.5})(outputs, targets)
    assert list(weighted) == list(plain)
    for name, value in weighted.items():
        torch.testing.assert_close(value, plain[name] * (0.5 if name.startswith("loss_ce_dn") else 1))
    assert sum(name.startswith("loss_ce_dn") for name in weighted) == 2


def test_options_reach_the_criterion():
    """As through any wrapper that passes them on."""
    outputs, targets = tiny_network()(*random_batch(2), random_targets(2, 1)), random_targets(2, 1)
    options = {"normalizer": torch.tensor([6.0, 3.0]), "non_finite": "match"}
    outputs.decoder.boxes.data[0, 0, 0] = float("nan")
    plain = default_criterion()(outputs, targets, **options)
    scaled = LossScaling(criterion=default_criterion(), factors={"loss_bbox": 3.0})(outputs, targets, **options)
    for name, value in scaled.items():
        torch.testing.assert_close(value, plain[name] * (3 if "bbox" in name else 1), equal_nan=True)
    assert scaled["loss_bbox_0"].isnan()


def test_factors_for_nothing_are_refused():
    outputs, targets = tiny_network()(*random_batch(1), random_targets(1)), random_targets(1)
    with pytest.raises(ValueError, match="no loss begins with 'loss_class'; there are loss_ce"):
        LossScaling(criterion=default_criterion(), factors={"loss_class": 2.0})(outputs, targets)

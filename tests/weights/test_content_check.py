import argparse
from collections import OrderedDict

import numpy as np
import pytest
import torch

from dino.utils.files import DataError
from dino.weights.content_check import check_content
from dino.weights.stand_ins import Skipped


def test_ordinary_content_passes():
    tensor = torch.arange(12.0)
    views = {"part": tensor[3:5], "turned": tensor.view(3, 4).T, "empty": torch.empty(0), "whole": tensor[0]}
    content = {"model": views, "args": argparse.Namespace(a=1), "rest": [1, ("x", None), {2: np.ones(3)}, Skipped()]}
    content["again"] = content
    check_content(content, 1000)


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        (torch.eye(2).to_sparse(), "sparse"),
        (torch.ones(2, device="meta"), "without numbers"),
        (torch.ones(2, dtype=torch.complex64), "complex"),
        (torch.ones(2, 1).expand(2, 3), r"expanded: of shape \(2, 3\), but with only 2 numbers"),
        (torch.ones(5).as_strided((3, 3), (1, 1)), r"expanded: of shape \(3, 3\), but with only 5 numbers"),
    ],
)
@pytest.mark.parametrize(
    "wrap", [lambda x: {"a": {"b": x}}, lambda x: {"a": [{"b": x}]}, lambda x: {"a": argparse.Namespace(b=x)}]
)
def test_odd_tensors_are_named(tensor, kind, wrap):
    with pytest.raises(DataError, match=rf"the tensor a\.b is {kind}"):
        check_content(wrap(tensor), 10**6)


def test_claims_are_bounded():
    tensor = torch.ones(1000)
    check_content([tensor] * 10_000, 10**4)
    with pytest.raises(DataError, match="the file of 10,000 bytes claims tensors of 120,000,000 bytes"):
        check_content([tensor] * 30_000, 10**4)
    with pytest.raises(DataError, match="the file of 100 bytes claims tensors of 4,000 bytes"):
        check_content([tensor], 100)


def test_attributes_are_removed():
    content = OrderedDict(a=torch.ones(1))
    content.keys, content["a"].clone = 1, 2
    check_content({"model": content}, 10**4)
    assert vars(content) == vars(content["a"]) == {}


def test_deep_content():
    content = []
    for _ in range(100_000):
        content = [content]
    check_content({"a": content}, 10**6)


@pytest.mark.parametrize("key", ["a.weight", "layers.0.bias"])
def test_a_placeholder_among_weights(key):
    with pytest.raises(DataError, match=rf"'{key}' is an object of another program where weights were expected"):
        check_content({"model": {"b.weight": torch.ones(1), key: Skipped()}}, 10**4)
    check_content({"model": {"b.weight": torch.ones(1), "settings": Skipped()}}, 10**4)

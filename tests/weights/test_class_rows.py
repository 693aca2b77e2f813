"""Rows of class heads and label embeddings by the names of the classes."""

import copy

import pytest
import torch

from dino.modeling.transformer import _FOCAL_PRIOR
from dino.modeling.variants import HybridBranch
from dino.weights import load_weights
from dino.weights.class_rows import match_classes
from dino.weights.coco_classes import COCO_IDS, coco_names

from ..tiny import tiny_network
from .states import detrex_state, equal, official_state, randomise
from .test_checkpoint_formats import shared_network

HEADS = ("decoder.class_heads.0", "decoder.class_heads.1", "query_selection.class_head")
ROWS = [f"{head}.{leaf}" for head in HEADS for leaf in ("weight", "bias")] + ["denoising.label_embed.weight"]


def with_branch(num_classes):
    branch = HybridBranch(num_queries=20, num_classes=num_classes, embed_dim=32)
    return tiny_network(num_classes=num_classes, branches={"many": branch})


def check_rows(target, before, source, rows, names=ROWS):
    """`rows`: label in the model -> label in the source; all others keep their values. All other tensors are equal."""
    found, theirs = target.state_dict(), source.state_dict()
    for name in names:
        for label, row in enumerate(found[name]):
            expected = theirs[name][rows[label]] if label in rows else before[name][label]
            assert torch.equal(row, expected), (name, label)
    assert all(torch.equal(value, theirs[name]) for name, value in found.items() if name not in names)


def test_known_classes_keep_their_rows():
    source, target = randomise(with_branch(4)), with_branch(3)
    before = copy.deepcopy(target.state_dict())
    content = {"model": source.state_dict(), "names": ["car", "cow", "person", "bus"]}
    report = load_weights(target, content, classes=["person", "raccoon", "car"])
    names = [*ROWS, "branches.many.class_head.weight", "branches.many.class_head.bias"]
    check_rows(target, before, source, {0: 2, 2: 0}, names)
    assert target.decoder.class_heads[1].bias[1] == _FOCAL_PRIOR
    assert report.reinitialised == dict.fromkeys(names, "the rows of 'raccoon' only")
    assert "class rows kept by name: person, car; not used: those of 2 other classes" in report.notes


@pytest.mark.parametrize("write", [official_state, detrex_state])
@pytest.mark.parametrize("classes", [80, 91])
def test_files_of_other_programs_have_cocos_names(write, classes):
    source, target = shared_network(num_classes=classes), tiny_network(num_classes=4)
    before = copy.deepcopy(target.state_dict())
    report = load_weights(target, write(source), classes=["Toothbrush", "traffic_light", "N/A", "background"])
    last, light = (COCO_IDS[label] if classes == 91 else label for label in (79, 9))
    check_rows(target, before, source, {0: last, 1: light})
    assert "taken for COCO's" in str(report)


def test_a_file_of_another_program_with_other_numbers_has_no_names():
    source, target = shared_network(num_classes=79), tiny_network(num_classes=2)
    report = load_weights(target, official_state(source), classes=["person", "car"])
    assert set(report.reinitialised.values()) == {"2 classes instead of 79"}


@pytest.mark.parametrize("meta", [{"CLASSES": ("a", "b", "c")}, {"dataset_meta": {"classes": ["a", "b", "c"]}}])
def test_mmdetections_names_are_read(meta):
    source, target = randomise(tiny_network()), tiny_network(num_classes=1)
    load_weights(target, {"state_dict": source.state_dict(), "meta": meta}, classes=["b"])
    check_rows(target, {}, source, {0: 1})


def test_a_subset_needs_no_training():
    """All is loaded, so the file can be evaluated."""
    source, target = randomise(tiny_network(num_classes=80)), tiny_network(num_classes=2)
    content = {"model": source.state_dict(), "names": coco_names(80)}
    report = load_weights(target, content, classes=["car", "person"])
    assert (report.fresh, report.unexpected) == ({}, [])
    check_rows(target, {}, source, {0: 2, 1: 0})


def test_as_many_other_classes():
    """A training starts their rows afresh; an evaluation leaves all in place, as names may differ in language alone."""
    source = randomise(tiny_network())
    content, ours = {"model": source.state_dict(), "names": ["cat", "dog", "cow"]}, ["dog", "hen", "fox"]
    target = tiny_network()
    before = copy.deepcopy(target.state_dict())
    report = load_weights(target, content, classes=ours, class_rows="name")
    check_rows(target, before, source, {0: 1})
    assert set(report.reinitialised.values()) == {"the rows of 'hen', 'fox' only"}
    target = tiny_network()
    assert "other names than the model's; their rows stay in place" in str(load_weights(target, content, classes=ours))
    assert equal(target.state_dict(), source.state_dict())


def test_no_common_name_is_said():
    source, target = randomise(tiny_network()), tiny_network()
    before = copy.deepcopy(target.state_dict())
    content = {"model": source.state_dict(), "names": ["cat", "dog", "cow"]}
    report = load_weights(target, content, classes=["hen", "fox", "pig"], class_rows="name")
    check_rows(target, before, source, {})
    assert report.reinitialised == dict.fromkeys(report.reinitialised, "other classes")
    assert set(report.reinitialised) == set(ROWS)
    assert "no class of the file (cat, dog, cow) has the name of a class of the model" in report.notes


@pytest.mark.parametrize("class_rows", ["auto", "name"])
@pytest.mark.parametrize("names", [["cat", "dog", "cow"], ["Cat", " dog", "COW"], None, ["cat"], "cat", [1, 2, 3], {}])
def test_equal_or_unknown_names_change_nothing(names, class_rows):
    source, target = randomise(tiny_network()), tiny_network()
    content = {"model": source.state_dict(), "names": names}
    report = load_weights(target, content, classes=["cat", "dog", "cow"], class_rows=class_rows)
    assert equal(target.state_dict(), source.state_dict())
    assert (report.fresh, report.notes) == ({}, [])


def test_91_classes_with_other_names_are_not_cocos():
    source, target = randomise(tiny_network(num_classes=91)), tiny_network(num_classes=80)
    names = [f"part {n}" for n in range(91)]
    before = copy.deepcopy(target.state_dict())
    content = {"model": source.state_dict(), "names": names}
    load_weights(target, content, classes=[*names[40:91], *(f"new {n}" for n in range(29))])
    check_rows(target, before, source, {label: label + 40 for label in range(51)})


def test_a_head_of_one_class_for_all_stays():
    """`QuerySelection(num_classes=1)` scores whether a token holds any object."""
    source, target = tiny_network(num_classes=4), tiny_network(num_classes=2)
    for network in (source, target):
        network.query_selection = tiny_network(num_classes=1).query_selection
    randomise(source)
    before = copy.deepcopy(target.state_dict())
    content = {"model": source.state_dict(), "names": list("abcd")}
    load_weights(target, content, classes=["c", "x"])
    check_rows(target, before, source, {0: 2}, [name for name in ROWS if "query_selection" not in name])


@pytest.mark.parametrize(
    ("theirs", "ours", "found"),
    [
        (["cat", "dog"], ["dog", "cat"], {0: 1, 1: 0}),
        (["Cat", "cat"], ["cat"], {0: 1}),  # equal before similar
        (["Cat", "CAT"], ["cat"], {}),  # ambiguous
        (["cat"], ["Cat", "CAT"], {}),
        (["cat", "cat"], ["cat"], {}),
        (["cat"], ["cat", "cat"], {}),
        (["cat"], ["cat", "Cat"], {0: 0}),  # used once
        (["hot dog", "hot-dog"], ["hot_dog"], {}),
        (["traffic light"], ["Traffic_Light "], {0: 0}),
        (["hotdog"], ["hot dog"], {}),
        (["", "N/A", "__background__"], ["", "N/A", "__background__"], {}),
        (["Straße"], ["STRASSE"], {0: 0}),
        ([], ["cat"], {}),
    ],
)
def test_names_are_matched(theirs, ours, found):
    assert match_classes(theirs, ours) == found

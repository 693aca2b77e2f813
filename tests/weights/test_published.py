"""The table of published weights, and files of each entry's names and shapes in the network of its recipe."""

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dino
from dino.utils.files import UserError
from dino.utils.recipes import find_recipe
from dino.weights import load_weights
from dino.weights.addresses import locate, published_path
from dino.weights.downloads import cached_path
from dino.weights.published import NOT_READ, PUBLISHED, find, find_file

from . import published_keys

INTEGERS = ("relative_position_index", "num_batches_tracked")
QUICK = ("dino_r50_4scale_12ep", "dino_r50_4scale_12ep_official")


def test_entries_say_what_is_needed():
    assert len(PUBLISHED) == 50
    for name, entry in PUBLISHED.items():
        assert name == entry.name
        assert find_recipe(entry.recipe).stem == entry.recipe
        assert entry.name.startswith(entry.recipe)
        assert entry.format in published_keys.FILES
        assert (entry.shared_heads, entry.num_classes) == ((True, 91) if entry.format == "official" else (False, 80))
        assert (entry.temperature, entry.offset) in ((20.0, 0.0), (10000.0, -0.5))
        assert entry.page.startswith("https://")
        assert not entry.address or re.fullmatch(r"https://\S+/", entry.address.removesuffix(entry.file))
        assert re.fullmatch(r"[0-9a-f]{8}|", entry.sha256)
        assert entry.sha256 in entry.file
        assert 45 < entry.ap < 60


def test_every_download_of_detrex_is_known():
    """Each row of its README has an entry with its AP and address, or the file is one that is not read."""
    lines = (Path(__file__).parent / "detrex_downloads.txt").read_text().splitlines()
    rows = [line.split() for line in lines if not line.startswith("#")]
    storage = "https://github.com/IDEA-Research/detrex-storage/releases/download/"
    theirs = {(float(ap), file if "//" in file else storage + file) for ap, file in rows if file != "-"}
    assert (len(rows), len(theirs)) == (41, 40)
    read = {(entry.ap, entry.address) for entry in PUBLISHED.values() if entry.owner == "detrex"}
    not_read = {(entry.ap, entry.address) for entry in NOT_READ.values()}
    assert (len(read), len(not_read)) == (35, 5)
    assert read | not_read == theirs


def test_files_that_are_not_read():
    page = (Path(__file__).parents[2] / "docs/checkpoints.md").read_text()
    for name, entry in NOT_READ.items():
        assert (name, name in PUBLISHED) == (entry.name, False)
        assert f"[{entry.backbone}]({entry.address}) {entry.ap}" in page
        with pytest.raises(UserError, match=f"{name} can't be used: this project has no {entry.backbone} backbone"):
            locate(name)


def test_files_to_fetch_by_hand_say_so_in_their_names():
    by_hand = [name for name, entry in PUBLISHED.items() if not entry.address]
    assert by_hand == [name for name in PUBLISHED if name.endswith("_official")]
    assert len(by_hand) == 11


def test_position_encodings():
    """Only the configuration of 24 epochs replaces the constants of detrex' model, and one those of mmdetection's."""
    for format_, usual, others in (
        ("official", 20, []),
        ("detrex", 10000, ["dino_r50_4scale_24ep"]),
        ("mmdetection", 20, ["dino_r50_4scale_12ep_tuned_300dn_mmdetection"]),
    ):
        entries = [entry for entry in PUBLISHED.values() if entry.format == format_]
        assert [entry.name for entry in entries if entry.temperature != usual] == others


def test_find():
    assert find("dino_r50_4scale_12ep").ap == 49.2
    assert find("dino_r50_4scale_12ep_official").ap == 49.0
    assert find("dino_r50_4scale_36ep").name == "dino_r50_4scale_36ep_official"  # the only file of this recipe
    assert find("dino_r18_shapes") is None
    assert find("") is None


def test_find_file(tmp_path):
    assert find_file("checkpoint0011_4scale.pth").recipe == "dino_r50_4scale_12ep"
    assert find_file(tmp_path / "dino_vitdet_4scale_12ep.pth").name == "dino_vitdet_b_4scale_12ep"
    assert find_file(tmp_path / "model_final.pth") is None
    files = [entry.file for entry in PUBLISHED.values()]
    assert len(set(files)) == len(files)


def test_the_table_alone_imports_nothing_heavy():
    code = """
import sys
from dino.weights.published import PUBLISHED
print(len(PUBLISHED), "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == [str(len(PUBLISHED)), "False"], done.stderr


def build(entry):
    """The network of an entry's recipe, with detrex' heads where the file has them."""
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    pytest.importorskip("timm", reason="timm is not installed")
    from detectron2.config import LazyConfig, instantiate

    from dino.modeling import Decoder

    model = LazyConfig.load(str(find_recipe(entry.recipe))).model
    if not entry.shared_heads:
        model.network.decoder._target_ = Decoder
    position = model.network.position_encoding
    position.temperatures, position.offset = [entry.temperature] * 2, entry.offset
    return instantiate(model).network


def shapes_of(entry):
    return published_keys.FILES[entry.format](entry.recipe)


def first_name(name, entry):
    """The name of a tensor that has several."""
    first = name.removeprefix("transformer.decoder.") if "_embed." in name else name
    return re.sub(r"^((?:class|bbox)_embed)\.\d", r"\1.0", first) if entry.shared_heads else first


def file_of(entry):
    """The state dict: each different tensor is filled with a number of its own."""
    numbers, state = {}, {}
    for name, shape in shapes_of(entry).items():
        number = numbers.setdefault(first_name(name, entry), len(numbers) + 1)
        state[name] = torch.full(shape, number, dtype=torch.int64 if name.endswith(INTEGERS) else torch.float32)
    return state


@pytest.mark.parametrize(
    "entry",
    [e if e.name in QUICK else pytest.param(e, marks=pytest.mark.slow) for e in PUBLISHED.values()],
    ids=lambda entry: entry.name,
)
def test_a_file_of_its_names_and_shapes_loads_whole(entry):
    """Every tensor of the file reaches the network, and every tensor of the network comes from the file."""
    network, state = build(entry), file_of(entry)
    report = load_weights(network, {"model": state})
    assert report.format == entry.format
    assert report.problems == []
    assert (report.missing, report.unexpected, report.reinitialised) == ([], [], {})
    tensors = network.state_dict()
    assert {tensors[name].data_ptr() for name in report.loaded} == {tensor.data_ptr() for tensor in tensors.values()}
    expected = {float(value.flatten()[0]) for name, value in state.items() if not name.endswith("batches_tracked")}
    no_biases = {0.0} if entry.format == "mmdetection" else set()  # of the neck
    assert {float(tensor.flatten()[0]) for tensor in tensors.values()} == expected | no_biases


@pytest.mark.parametrize(
    ("name", "tensors"),
    [
        ("dino_r50_4scale_12ep", 634),
        ("dino_r50_5scale_12ep", 638),
        ("dino_r101_4scale_12ep", 889),
        ("dino_swin_t_224_4scale_12ep", 556),
        ("dino_swin_l_384_5scale_36ep", 730),
        ("dino_convnext_t_4scale_12ep", 553),
        ("dino_convnext_l_4scale_12ep_in22k", 715),
        ("dino_focalnet_l_fl3_4scale_36ep", 847),
        ("dino_focalnet_l_fl4_5scale_12ep", 877),
        ("dino_vitdet_b_4scale_50ep", 560),
        ("dino_vitdet_l_4scale_12ep", 728),
        ("dino_r50_4scale_12ep_official", 626),
        ("dino_r50_5scale_36ep_official", 630),
        ("dino_swin_l_384_4scale_12ep_official", 716),
        ("dino_swin_l_384_5scale_36ep_official", 722),
        ("dino_r50_4scale_12ep_align_detr_official", 634),
    ],
)
def test_numbers_of_tensors(name, tensors):
    """Counted in state dicts of the programs' own models, whose names and shapes are these."""
    assert len(shapes_of(PUBLISHED[name])) == tensors


def test_megabytes_are_those_of_the_tensors():
    for entry in PUBLISHED.values():
        tensors = {first_name(name, entry): (name, shape) for name, shape in shapes_of(entry).items()}
        total = sum((8 if name.endswith(INTEGERS) else 4) * math.prod(shape) for name, shape in tensors.values())
        assert abs(entry.megabytes - total / 1e6) < 0.6, entry.name


def test_the_projects_table_links_every_file():
    """Its last column has the names that people write, the addresses and the AP of all files of a recipe."""
    page = (Path(__file__).parents[2] / "projects/dino/README.md").read_text()
    rows = {match[1]: match[0] for match in re.finditer(r"^\| \[(\w+)\]\(\S+\.py\) .*$", page, re.MULTILINE)}
    for recipe in {entry.recipe for entry in PUBLISHED.values()}:
        entries = [entry for entry in PUBLISHED.values() if entry.recipe == recipe]
        links = ", ".join(f"[`{e.name}`]({e.address or e.page}) {e.ap}" for e in entries)
        assert rows[recipe].rstrip("| ").endswith(f"| {links}"), links
    known = {entry.address for entry in (*PUBLISHED.values(), *NOT_READ.values())}
    linked = re.findall(r"https://[^\s)]*detrex-storage[^\s)]*", page)
    assert known.issuperset(linked)
    assert len(set(linked)) == len(linked) >= sum("detrex-storage" in entry.address for entry in PUBLISHED.values())


@pytest.mark.parametrize(
    "name",
    [
        "dino_r50_4scale_12ep",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                "dino_r50_4scale_24ep",
                "dino_r101_4scale_12ep",
                "dino_r50_5scale_36ep_official",
                "dino_swin_t_224_4scale_12ep",
                "dino_convnext_t_4scale_12ep",
                "dino_vitdet_b_4scale_12ep",
            )
        ),
    ],
)
def test_a_name_is_enough(name, tmp_path, monkeypatch):
    """The file in the cache becomes a detector of COCO's classes, with the position encoding of the table."""
    if not name.startswith("dino_r"):
        pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    monkeypatch.setenv("DINO_CACHE", str(tmp_path))
    entry = PUBLISHED[name]
    place = cached_path(entry.address) if entry.address else published_path(entry)
    place.parent.mkdir(parents=True)
    torch.save({"model": file_of(entry)}, place)
    detector = dino.load(name)
    encoding = detector.network.position_encoding
    assert (list(encoding.temperatures), encoding.offset) == ([entry.temperature] * 2, entry.offset)
    person = 1 if entry.num_classes == 91 else 0
    assert (detector.names[person], detector.names[-1], detector.category_ids[-1]) == ("person", "toothbrush", 90)
    assert len(detector.names) == entry.num_classes

import pytest
from torch import nn

from dino.modeling import TimmBackbone, TorchvisionBackbone
from dino.modeling.blocks import depths, find_blocks

from ..tiny import TinyBackbone


def small_backbones():
    yield "resnet18", TorchvisionBackbone("resnet18"), 8
    yield "efficientnet", TorchvisionBackbone("efficientnet_b0"), 16
    if pytest.importorskip("timm", reason="timm is not installed"):
        yield "vit", TimmBackbone("vit_tiny_patch16_224", out_features=["res4"], options={"depth": 3}), 3
        yield "convnext", TimmBackbone("convnext_atto"), 12
        yield "mobilenet", TimmBackbone("tf_mobilenetv3_small_075"), 12


def test_blocks_are_found_and_depths_grow():
    for name, backbone, count in small_backbones():
        blocks = find_blocks(backbone)
        assert len(blocks) == count, name
        found = depths(backbone)
        assert set(found) == {n for n, _ in backbone.named_parameters()}
        assert min(found.values()) == 0, name
        for depth, block in enumerate(blocks, 1):
            inside = {d for n, d in found.items() if n.startswith(f"{block}.")}
            assert inside == {depth}, (name, block)
        stem = [n for n, d in found.items() if d == 0]
        assert stem
        assert not [n for n in stem if any(n.startswith(f"{block}.") for block in blocks)]


def test_what_lies_between_stages_and_behind_them():
    class Pyramid(nn.Module):
        def __init__(self):
            super().__init__()
            self.top = nn.Linear(1, 1)
            self.patch_embed = nn.Linear(1, 1)
            self.layers = nn.ModuleList(nn.ModuleDict() for _ in range(2))
            for stage in self.layers:
                stage["blocks"] = nn.ModuleList(nn.Sequential(nn.Linear(1, 1)) for _ in range(2))
                stage["downsample"] = nn.Linear(1, 1)

    found = depths(Pyramid())
    assert found["patch_embed.weight"] == 0
    assert found["layers.0.blocks.0.0.weight"] == 1
    assert found["layers.0.downsample.weight"] == 2  # together with the last block of its stage
    assert found["layers.1.downsample.weight"] == 4
    assert found["top.weight"] == 5


def test_backbones_of_unknown_build_are_refused():
    with pytest.raises(ValueError, match="no blocks found in TinyBackbone"):
        find_blocks(TinyBackbone())

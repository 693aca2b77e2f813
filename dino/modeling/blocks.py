"""The residual or transformer blocks of any library's backbone, for checkpointing, sharding and layer-wise rates.

Blocks are recognised by the names of their modules: `layers.2.blocks.5` (Swin), `blocks.11` (ViT), `res4.3` and `s3.b7`
(Detectron2's ResNet and RegNet), `layer3.3`, `features.5.2` (torchvision), `stages_2.blocks.5` (timm), and so on.
"""

from __future__ import annotations

import bisect
import math
import re

from torch import nn

_STAGE = re.compile(r"(?:^|\.)(?:layers?|stages?|features|blocks|res|s)[._]?(\d+)(?:\.blocks)?(?:\.b?(\d+))?(?=\.|$)")
_STEM = re.compile(r"patch_embed|pos_embed|[a-z]+_token|absolute_pos|stem|(?:^|\.)(?:features\.0|conv1|bn1)(?=\.)")


def _position(name: str) -> tuple[float, ...]:
    """Position of a module or parameter, as a tuple that sorts by depth; blocks have two finite numbers or one."""
    stem, found = _STEM.search(name), _STAGE.search(name)
    if stem and (found is None or stem.start() <= found.start()):
        return (-1.0,)
    if found is None:
        return (math.inf,)
    stage, block = found.groups()
    return (float(stage), float(block if block is not None else math.inf))


def find_blocks(backbone: nn.Module) -> dict[str, nn.Module]:
    """The blocks of a backbone by name, in the order in which they run.

    Raises:
        ValueError: no module has a known name.
    """
    stages = {name: m for name, m in backbone.named_modules() if _is_numbered(name) and any(True for _ in m.children())}
    inner = {name: m for name, m in stages.items() if _position(name)[1] < math.inf}
    blocks = inner or stages  # a ViT's blocks are its stages
    if not blocks:
        raise ValueError(f"no blocks found in {type(backbone).__name__}: no module is named as blocks are")
    return dict(sorted(blocks.items(), key=lambda item: _position(item[0])))


def _is_numbered(name: str) -> bool:
    """Whether `name` is that of a stage or a block, not of a part of one."""
    found = _STAGE.search(name)
    return found is not None and found.end() == len(name) and _position(f"{name}.") > (-1.0,)


def depths(backbone: nn.Module) -> dict[str, int]:
    """Name of each parameter -> 0 for the stem, i + 1 for block i, the number of blocks + 1 for later layers."""
    blocks = sorted(_position(name) for name in find_blocks(backbone))
    single = blocks[0][1] == math.inf

    def depth(name: str) -> int:
        place = _position(name)
        return bisect.bisect_right(blocks, (place[0], math.inf) if single else place) + (place == (math.inf,))

    return {name: depth(name) for name, _ in backbone.named_parameters()}

"""The residual or transformer blocks of a backbone of any library: to checkpoint them, to learn at a rate for each.

They are recognised by the names of their modules: `layers.2.blocks.5` (Swin), `blocks.11` (ViT), `res4.3` and `s3.b7`
(Detectron2's ResNet and RegNet), `layer3.3`, `features.5.2` (torchvision), `stages_2.blocks.5` (timm), and so on.
"""

from __future__ import annotations

import bisect
import functools
import math
import re

from torch import nn
from torch.utils.checkpoint import checkpoint

STAGE = re.compile(r"(?:^|\.)(?:layers?|stages?|features|blocks|res|s)[._]?(\d+)(?:\.blocks)?(?:\.b?(\d+))?(?=\.|$)")
STEM = re.compile(r"patch_embed|pos_embed|[a-z]+_token|absolute_pos|stem|(?:^|\.)(?:features\.0|conv1|bn1)(?=\.)")


def position(name: str) -> tuple[float, ...]:
    """Where a module or parameter stands, as a tuple that sorts by depth; blocks have two finite numbers or one."""
    stem, found = STEM.search(name), STAGE.search(name)
    if stem and (found is None or stem.start() <= found.start()):
        return (-1.0,)
    if found is None:
        return (math.inf,)
    stage, block = found.groups()
    return (float(stage), float(block if block is not None else math.inf))


def find_blocks(backbone: nn.Module) -> dict[str, nn.Module]:
    """The blocks of a backbone by name, in the order in which they run.

    Raises:
        ValueError: the names of its modules are of no known kind.
    """
    stages = {name: m for name, m in backbone.named_modules() if is_numbered(name) and any(True for _ in m.children())}
    inner = {name: m for name, m in stages.items() if position(name)[1] < math.inf}
    blocks = inner or stages  # a ViT's blocks are its stages
    if not blocks:
        raise ValueError(f"no blocks found in {type(backbone).__name__}: the names of its modules are of no known kind")
    return dict(sorted(blocks.items(), key=lambda item: position(item[0])))


def is_numbered(name: str) -> bool:
    """Whether a module's own name is what `STAGE` ends with, so that it is a stage or a block, not a part of one."""
    found = STAGE.search(name)
    return found is not None and found.end() == len(name) and position(f"{name}.") > (-1.0,)


def checkpoint_blocks(backbone: nn.Module) -> nn.Module:
    """Keep only the inputs of each block for the backward pass, which computes the rest again.

    Gradients stay the same and names of parameters too. BatchNorm that is trained counts every batch twice.

    Returns:
        `backbone` itself, changed in place, so that a recipe can say `L(checkpoint_blocks)(backbone=…)`.

    Raises:
        ValueError: as of `find_blocks`.
    """
    for block in find_blocks(backbone).values():
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    return backbone


def depths(backbone: nn.Module) -> dict[str, int]:
    """Name of each parameter -> 0 for the stem, i + 1 for block i, the number of blocks + 1 for what follows them."""
    blocks = sorted(position(name) for name in find_blocks(backbone))
    single = blocks[0][1] == math.inf

    def depth(name: str) -> int:
        place = position(name)
        return bisect.bisect_right(blocks, (place[0], math.inf) if single else place) + (place == (math.inf,))

    return {name: depth(name) for name, _ in backbone.named_parameters()}

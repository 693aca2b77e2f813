"""Variants of `Decoder`."""

from __future__ import annotations

from torch import Tensor

from ..transformer import Decoder


class LookForwardOnce(Decoder):
    """Look forward once: layer i refines the boxes that it read, without their gradient (Deformable DETR).

    The loss of layer i then trains the box head of layer i alone, as with `use_detached_boxes_dec_out=True` of the
    official program. Arguments are those of `Decoder`.
    """

    def look_forward(self, boxes: Tensor) -> Tensor:
        """The boxes without gradient."""
        return boxes.detach()

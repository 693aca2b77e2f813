"""`Detections`: what a `Predictor` finds in one picture, and its ways into other programs."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from torch import Tensor

from dino import structures
from dino.data.coco import to_results
from dino.data.images import read_image
from dino.utils.files import UserError
from dino.utils.printable import printable

from .drawing import draw_detections
from .picture_inputs import to_pixels
from .strips import Strips
from .tiling import clip, nonempty, scale, take

if TYPE_CHECKING:
    import supervision

_DRAWN_SIDE = 8192  # pixels, of a drawing of a picture in strips
_SHOWN = 5  # objects in the text of an object
_DETECTRON2 = "dino.d2.instances_predictor"  # imported when it is needed


@dataclass(frozen=True, eq=False, repr=False)
class Detections:
    """The objects of one picture, on the CPU, together with the picture.

    `found[mask]` keeps some of them, as in `found[found.scores > 0.7]`; a slice or indices choose, too.

    Attributes:
        detections: the tensors of K objects, boxes in pixels of the picture, best first.
        names: K class names.
        image_size: height and width of the picture in pixels.
        source: the given picture; a `Path` where it was read from a file, or from an address: then of a temporary file,
            which is removed with this object.
        channels: order of `source` if that is an array or a tensor.
        read: reads `source` if that is a file or a Pillow image.
        strips: the file, where it is too large to be decoded whole.
        category_ids: of the classes in the data set of the training, by label.
        clipped: whether the boxes are clipped to the picture; a `Predictor` returns them as predicted, see `clip`.
    """

    detections: structures.Detections
    names: list[str]
    image_size: tuple[int, int]
    source: Any
    channels: str = "RGB"
    read: Callable[[Any], np.ndarray] = read_image
    strips: Strips | None = None
    category_ids: Sequence[int] = range(1, 2**31)
    clipped: bool = False

    @property
    def boxes(self) -> Tensor:
        """(K, 4) float32, xyxy in pixels of the picture."""
        return self.detections.boxes

    @property
    def scores(self) -> Tensor:
        """(K,) float32 in [0, 1]."""
        return self.detections.scores

    @property
    def labels(self) -> Tensor:
        """(K,) int64."""
        return self.detections.labels

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, chosen: Tensor | np.ndarray | slice | Sequence[int]) -> Detections:
        """Some of the objects: those of a mask (K,) bool, of indices or of a slice."""
        places = np.atleast_1d(np.arange(len(self))[np.asarray(chosen) if isinstance(chosen, Tensor) else chosen])
        names = [self.names[place] for place in places]
        return replace(self, detections=take(self.detections, places), names=names)

    def __repr__(self) -> str:
        pairs = zip(self.names[:_SHOWN], self.scores.tolist(), strict=False)
        listed = ", ".join(f"{printable(name, 30)} {score:.2f}" for name, score in pairs)
        picture = f" in {printable(self.source.name, 60)}" if isinstance(self.source, Path) else ""
        more = ", …" if len(self) > _SHOWN else ""
        return f"<Detections{picture}: {len(self)}{': ' if listed else ''}{listed}{more}>"

    def draw(self) -> Image.Image:
        """Draw the detections on the picture; a file is read again, in `strips` at a size of at most 8,192 pixels.

        Raises:
            DataError: the file is gone.
        """
        texts = [f"{name} {score:.2f}" for name, score in zip(self.names, self.scores.tolist(), strict=True)]
        size = self.image_size
        if self.strips is None:
            pixels = to_pixels(self.source, self.channels, self.read)
        else:
            size = tuple(max(1, round(side * _DRAWN_SIDE / max(size))) for side in size)
            pixels = self.strips.shrink(size)
        boxes = scale(self.detections, self.image_size, size).boxes
        return draw_detections(Image.fromarray(pixels), boxes.tolist(), self.labels.tolist(), texts)

    def clip(self) -> Detections:
        """Clip the boxes to the picture, and drop those that are empty then: for crops, masks, and Detectron2's habit.

        AP is computed without, as by the official program.
        """
        inside = clip(self.detections, self.image_size)
        return replace(self, detections=inside, clipped=True)[nonempty(inside)]

    def to_coco(self, *, image_id: int) -> list[dict]:
        """Entries of COCO's results format: `image_id`, `category_id`, `bbox` (xywh in pixels) and `score`.

        Boxes are as predicted unless the detections are `clipped`.

        Args:
            image_id: of the picture in the annotations.
        """
        return to_results(self.detections, image_id, self.category_ids)

    def to_supervision(self) -> supervision.Detections:
        """`supervision.Detections`, with the names under `data["class_name"]`; as predicted unless `clipped`.

        Raises:
            UserError: supervision is not installed.
        """
        try:
            library = importlib.import_module("supervision")
        except ImportError as error:
            raise UserError(
                f"to_supervision needs supervision ({error}): pip install 'dino-detectron2[supervision]'"
            ) from error
        return library.Detections(
            xyxy=self.boxes.numpy().copy(),
            confidence=self.scores.numpy().copy(),
            class_id=self.labels.numpy().copy(),
            data={"class_name": np.array(self.names, dtype=str)},
        )

    def to_instances(self) -> Any:
        """Detectron2's `Instances`: `pred_boxes` (xyxy in pixels), `scores` and `pred_classes`, clipped as its own.

        Raises:
            UserError: Detectron2 is not installed.
        """
        try:
            module = importlib.import_module(_DETECTRON2)
        except ImportError as error:
            raise UserError("to_instances needs Detectron2: README.md says how to install it") from error
        return module.to_instances(self)

"""`DinoDetrImageProcessor`: pictures and COCO annotations in, detections out, for DINO in transformers."""

from __future__ import annotations

import reprlib
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from transformers import DeformableDetrImageProcessor as _TorchvisionProcessor
from transformers.utils import IMAGE_PROCESSOR_NAME

from dino.data.images import check_input_range, read_image, resize_tensor
from dino.layers.postprocess import detections
from dino.modeling.detector import resized_size
from dino.utils.files import DataError, UserError

from .remote_code_saving import SavesRemoteCode

if not hasattr(_TorchvisionProcessor, "_preprocess"):  # 4.57 to 5.3 have a slower one of this name
    from transformers import DeformableDetrImageProcessorFast as _TorchvisionProcessor

_DEEP = ("I", "F")  # how the names of Pillow's modes of more than 8 bits begin
_PER_CALL = set(_TorchvisionProcessor.valid_kwargs.__annotations__)  # settings that a call can replace
_LONGEST = 20_000  # pixels of a side
_BILINEAR = (None, Image.Resampling.BILINEAR, InterpolationMode.BILINEAR)  # names of the filter; None: the default


class _Settings(_TorchvisionProcessor.valid_kwargs, total=False):
    """What a processor is saved with."""

    max_detections: int
    category_ids: list[int] | None
    input_range: list[float] | None


class DinoDetrImageProcessor(SavesRemoteCode, _TorchvisionProcessor):
    """The image processor of Deformable DETR (the one of torchvision), with what differs for DINO.

    Sizes are rounded as by the official program, and 8-bit pictures on a CPU are resized by Pillow, so that
    `pixel_values` are those of this project's `Detector`. Boxes of the labels refer to the picture without its padding,
    as DINO's predictions do. Pictures of any mode of Pillow are read as 8-bit RGB; see `dino.data.images.read_image`.
    A picture that Pillow opened is used as it is stored: `PIL.ImageOps.exif_transpose` turns it upright, as do
    `pipeline` and the library datasets.

    Args:
        max_detections: most detections of a picture in `post_process_object_detection`.
        category_ids: ids of the classes in the annotations, by label; None where the annotations hold labels.
        input_range: values (low, high) of deep grey pictures that become 0 and 255; by their type where None.
        kwargs: settings of transformers' `DeformableDetrImageProcessor`, such as `size`, `image_mean`, `do_pad`.

    Raises:
        UserError: a setting has a value that makes no images, or no detections; the message names it.
    """

    valid_kwargs = _Settings
    _saved_as = IMAGE_PROCESSOR_NAME

    def __init__(
        self,
        *,
        max_detections: int = 300,
        category_ids: Sequence[int] | None = None,
        input_range: Sequence[float] | None = None,
        **kwargs: Any,
    ):
        _check_names(type(self), kwargs)
        super().__init__(**kwargs)
        if not isinstance(max_detections, int) or max_detections < 1:
            raise UserError(f"max_detections must be a whole number from 1 on, not {max_detections!r}")
        _check_settings(self)
        scale = check_input_range(input_range)
        self.max_detections = max_detections
        self.category_ids = None if category_ids is None else _check_ids(category_ids)
        self.input_range = None if scale is None else list(scale)

    def preprocess(
        self,
        images: Any,
        annotations: Mapping | Sequence[Mapping] | None = None,
        return_segmentation_masks: bool | None = None,
        masks_path: str | Path | None = None,
        **kwargs: Any,
    ) -> Any:
        """Make the inputs of the model from pictures, and the labels from COCO annotations.

        Args:
            images: a picture or a list: files, PIL images, arrays and tensors (3, H, W) or (H, W, 3), uint8.
            annotations: for each picture `{"image_id": int, "annotations": [object, ...]}` of objects with `bbox`
                (x, y, width, height in pixels), `category_id`, and where known `area` and `iscrowd`.
            return_segmentation_masks: must not be True: DINO detects boxes alone.
            masks_path: must be None.
            kwargs: other settings for this call, and `return_tensors="pt"`.

        Returns:
            a dict: `pixel_values` (B, 3, H, W) float32, normalised; `pixel_mask` (B, H, W) int64, 1 where there is
            picture and 0 where padding; with annotations `labels`, for each picture `class_labels` (G,) int64, `boxes`
            (G, 4) cxcywh in [0, 1], `area`, `iscrowd`, `image_id`, `orig_size` (height, width) of the picture and
            `size` after resizing, without padding. Crowds and boxes without area in the picture are left out.

        Raises:
            DataError: a picture can't be read; an annotation lacks a field, or has an id that is no class.
            UserError: masks are asked for.
        """
        if return_segmentation_masks or masks_path is not None:
            raise UserError("masks are not supported: DINO detects boxes. Leave out return_segmentation_masks")
        if wrong := sorted((_Settings.__annotations__.keys() & kwargs.keys()) - _PER_CALL):
            raise UserError(f"{wrong[0]} belongs to the image processor, not to a call of it")
        return super().preprocess(self._read(images), annotations=annotations, **kwargs)

    def _read(self, source: Any) -> Any:
        """The input of `preprocess` with arrays (H, W, 3) uint8 for files, PIL images and grey arrays."""
        if isinstance(source, list | tuple):
            return [self._read(one) for one in source]
        if isinstance(source, Image.Image):
            return _read_opened(source, self.input_range)
        if isinstance(source, str | Path):
            return read_image(source, self.input_range) if Path(source).is_file() else source
        grey = isinstance(source, np.ndarray | Tensor) and source.ndim == 2
        return np.repeat(np.asarray(source)[:, :, None], 3, 2) if grey else source

    def _preprocess(self, images: Sequence[Tensor], *args: Any, **kwargs: Any) -> Any:
        """As the parent, for pictures of three channels."""
        if kwargs["do_rescale"] and any(image.is_floating_point() and image.max() <= 1 for image in images):
            warnings.warn(
                "a picture of floats up to 1 is divided by 255 once more: set do_rescale=False, or give uint8",
                stacklevel=2,
            )
        return super()._preprocess([_to_three_channels(image) for image in images], *args, **kwargs)

    def resize(self, image: Tensor, size: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Resize pictures (..., 3, H, W) to the official program's size for `shortest_edge` and `longest_edge`.

        Args:
            image: uint8 on a CPU is resized by Pillow unless another filter is asked for; all else by torchvision.
            size: transformers' `SizeDict`.
            args, kwargs: of the parent's method.
        """
        if size.shortest_edge:
            height, width = resized_size(*image.shape[-2:], size.shortest_edge, size.longest_edge)
            size = type(size)(height=height, width=width)
        chosen = args[0] if args else kwargs.get("resample", kwargs.get("interpolation"))
        if not (chosen in _BILINEAR and size.height and image.dtype == torch.uint8 and image.device.type == "cpu"):
            return super().resize(image, size, *args, **kwargs)
        parts = [resize_tensor(part, (size.height, size.width)) for part in image.reshape(-1, *image.shape[-3:])]
        return torch.stack(parts).reshape(*image.shape[:-2], size.height, size.width)

    def rescale_and_normalize(
        self,
        images: Tensor,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: float | Sequence[float],
        image_std: float | Sequence[float],
    ) -> Tensor:
        """As the parent; mean and deviation of values up to 255 are not rounded before, so that they are `Detector`'s.

        Args:
            images: (..., 3, H, W).
            do_rescale, rescale_factor, do_normalize, image_mean, image_std: see transformers.
        """
        if do_rescale and do_normalize:
            image_mean, image_std = (
                tuple(np.divide(np.atleast_1d(values), rescale_factor).tolist()) for values in (image_mean, image_std)
            )
            do_rescale = False
        return super().rescale_and_normalize(images, do_rescale, rescale_factor, do_normalize, image_mean, image_std)

    def prepare_annotation(
        self, image: Tensor, target: Mapping, format: str | None = None, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """The labels of one picture, boxes as xyxy in pixels; see `preprocess`."""
        format = getattr(format or self.format, "value", format)
        if format != "coco_detection":
            raise UserError(f"format {format!r} is not supported: DINO detects boxes. Use coco_detection")
        if not isinstance(target["image_id"], Integral):
            raise DataError(f"image_id must be a whole number, not {target['image_id']!r}")
        objects = [self._to_object(entry, target) for entry in target["annotations"]]
        labels = super().prepare_annotation(image, {**target, "annotations": objects})
        return {**labels, "size": labels["orig_size"]}

    def _to_object(self, entry: Mapping, target: Mapping) -> dict[str, Any]:
        """An object of an annotation with its label as `category_id`, and all that transformers needs."""
        where = f"image {target.get('image_id')!r}"
        try:
            x, y, width, height = map(float, entry["bbox"])
            category = entry["category_id"]
        except (KeyError, TypeError, ValueError):
            raise DataError(
                f"{where}: an object needs bbox (x, y, width, height) and category_id, not {entry}"
            ) from None
        crowd = int(entry.get("iscrowd") or 0)
        if self.category_ids is not None and not crowd:
            if category not in self.category_ids:
                raise DataError(
                    f"{where}: category_id {category!r} is none of the {len(self.category_ids)} classes: "
                    f"{self.category_ids}. Correct category_ids of the image processor or the annotations"
                )
            category = self.category_ids.index(category)
        area = entry.get("area")
        area = width * height if area is None else area
        return {"bbox": [x, y, width, height], "category_id": category, "area": area, "iscrowd": crowd}

    def _update_annotation_for_padded_image(self, annotation: dict, *args: Any, **kwargs: Any) -> dict:
        """Keep boxes relative to the picture without its padding: so are DINO's predictions."""
        return annotation

    def post_process_object_detection(
        self,
        outputs: Any,
        threshold: float = 0.5,
        target_sizes: Tensor | Sequence[tuple[int, int]] | None = None,
        top_k: int | None = None,
    ) -> list[dict[str, Tensor]]:
        """Choose the best (query, class) pairs, as `Detector` does: `dino.layers.detections`. No NMS, no clipping.

        Args:
            outputs: of `DinoDetrForObjectDetection`: `logits` (B, Q, C) and `pred_boxes` (B, Q, 4).
            threshold: only detections of a higher score are returned; 0 for everything (AP is computed so).
            target_sizes: (B, 2), height and width in pixels of the picture that the boxes refer to.
            top_k: most detections of a picture; `max_detections` by default.

        Returns:
            for each picture `scores` (K,), `labels` (K,) and `boxes` (K, 4), xyxy in pixels of `target_sizes`, or as
            fractions of the picture where that is None; float32 and int64, best first.

        Raises:
            UserError: `target_sizes` are not one (height, width) a picture.
        """
        logits, boxes = outputs.logits, outputs.pred_boxes
        sizes = _check_sizes([(1, 1)] * len(logits) if target_sizes is None else target_sizes, len(logits))
        found = detections(logits, boxes, sizes, self.max_detections if top_k is None else top_k)
        return [_above(threshold, *one) for one in zip(found.scores, found.labels, found.boxes, strict=True)]

    def collate(self, samples: Sequence[Mapping]) -> dict[str, Any]:
        """Make a batch of single samples: the `data_collator` of transformers' `Trainer`, `collate_fn` of a loader.

        Args:
            samples: results of this processor, each of one picture (or several); with their first dimension or
                without: `pixel_values` (3, h, w), `pixel_mask` (h, w) where given, and `labels` where given.

        Returns:
            `pixel_values` (B, 3, H, W), zero where padded; `pixel_mask` (B, H, W) int64; `labels`, a list of B dicts,
            if the samples have them.
        """
        images = [image for sample in samples for image in _split(sample["pixel_values"], 3)]
        masks = [mask for sample in samples for mask in _split(_mask_of(sample), 2)]
        batch: dict[str, Any] = {"pixel_values": _stack(images), "pixel_mask": _stack(masks)}
        if "labels" in samples[0]:
            batch["labels"] = [labels for sample in samples for labels in _as_list(sample["labels"])]
        return batch


def _read_opened(image: Image.Image, input_range: Sequence[float] | None) -> np.ndarray:
    """(H, W, 3) uint8 of an image that Pillow opened; 8-bit ones are not turned upright."""
    upright = read_image(image, input_range)
    if image.getexif().get(ExifTags.Base.Orientation, 1) == 1 or image.mode.startswith(_DEEP):
        return upright
    warnings.warn(
        "a picture is stored turned and is used so, but boxes of annotations mostly refer to the upright picture: "
        "turn it by PIL.ImageOps.exif_transpose(image)",
        stacklevel=2,
    )
    return np.array(image.convert("RGB"))


def _check_names(kind: type, settings: Mapping[str, Any]) -> None:
    """Raise a UserError for a method's name among the settings."""
    method = next((name for name in settings if callable(getattr(kind, name, None))), None)
    if method is not None:
        raise UserError(f"{method!r:.100} is no setting of an image processor, but a method")


def _check_settings(processor: DinoDetrImageProcessor) -> None:
    """Raise a UserError for a setting of transformers' that makes no images."""
    for name, (expected, fits) in _EXPECTED.items():
        value = getattr(processor, name, None)
        if value is not None and not fits(value):
            raise UserError(f"{name} must be {expected}, not {reprlib.repr(_sides_of(value))}")


def _is_number(value: Any, least: float, most: float) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and bool(least <= value <= most)  # NaN is none


def _are_colors(value: Any, least: float) -> bool:
    """Whether these are numbers, one or three."""
    numbers = list(value) if isinstance(value, Iterable) else [value]
    return len(numbers) in (1, 3) and all(_is_number(number, least, 1e6) for number in numbers)


def _are_sides(size: Any) -> bool:
    """Whether all sides of transformers' size are pixels of an image that fits into memory."""
    return all(isinstance(side, Integral) and 1 <= side <= _LONGEST for side in _sides_of(size).values())


def _sides_of(value: Any) -> Any:
    """The sides that a size states, as a dict; any other value as it is."""
    sides = vars(value) if hasattr(value, "shortest_edge") else value
    return {name: side for name, side in sides.items() if side is not None} if isinstance(sides, Mapping) else value


# Setting of transformers' -> what a message calls its values, and the test of a value.
_EXPECTED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "image_mean": ("three numbers", lambda value: _are_colors(value, -1e6)),
    "image_std": ("three positive numbers", lambda value: _are_colors(value, 1e-6)),
    "rescale_factor": ("a number such as 1/255", lambda value: _is_number(value, 1e-6, 1e6)),
    **dict.fromkeys(("size", "pad_size"), (f"whole numbers of pixels from 1 to {_LONGEST:,}", _are_sides)),
}


def _check_ids(category_ids: Sequence[int]) -> list[int]:
    """`category_ids` as a list, each a whole number that comes once."""
    ids = list(category_ids) if isinstance(category_ids, Iterable) else [None]
    if not all(isinstance(value, Integral) and abs(value) < 2**63 for value in ids) or len(set(ids)) < len(ids):
        raise UserError(f"category_ids must be whole numbers, one a label, each once, not {reprlib.repr(category_ids)}")
    return ids


def _to_three_channels(image: Tensor) -> Tensor:
    """(C, H, W) -> (3, H, W): grey is repeated, transparency dropped."""
    channels = image.shape[0]
    if channels not in (1, 3, 4):
        raise DataError(f"a picture must have 1, 3 or 4 channels, not {channels}: its shape is {tuple(image.shape)}")
    return image.expand(3, -1, -1).contiguous() if channels == 1 else image[:3]


def _check_sizes(sizes: Tensor | Sequence, number: int) -> Tensor:
    """`target_sizes` of `post_process_object_detection` as a tensor (number, 2)."""
    try:
        tensor = torch.stack([torch.as_tensor(size) for size in sizes])
    except (TypeError, ValueError, RuntimeError):
        tensor = torch.zeros(0)
    if tensor.shape != (number, 2):
        raise UserError(f"target_sizes must be one (height, width) for each of the {number} pictures, not {sizes}")
    return tensor


def _above(threshold: float, scores: Tensor, labels: Tensor, boxes: Tensor) -> dict[str, Tensor]:
    """The detections of one picture with a higher score than `threshold`."""
    kept = scores > threshold
    return {"scores": scores[kept], "labels": labels[kept], "boxes": boxes[kept]}


def _mask_of(sample: Mapping) -> Any:
    """`pixel_mask` of a sample for `collate`; ones where it has none."""
    if "pixel_mask" in sample:
        return sample["pixel_mask"]
    pixels = torch.as_tensor(sample["pixel_values"])
    return torch.ones(*pixels.shape[:-3], *pixels.shape[-2:], dtype=torch.int64)


def _split(values: Any, dimensions: int) -> list[Tensor]:
    """The tensors of a sample's pictures, which has a first dimension of its pictures or is one picture."""
    tensor = torch.as_tensor(values)
    return list(tensor) if tensor.ndim > dimensions else [tensor]


def _stack(images: Sequence[Tensor]) -> Tensor:
    """B tensors (..., h, w) of any sizes -> (B, ..., H, W), zero at the right and the bottom."""
    height, width = (max(image.shape[axis] for image in images) for axis in (-2, -1))
    return torch.stack([F.pad(image, (0, width - image.shape[-1], 0, height - image.shape[-2])) for image in images])


def _as_list(labels: Any) -> list:
    return list(labels) if isinstance(labels, list | tuple) else [labels]

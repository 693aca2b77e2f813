"""What a `Predictor` takes for a picture: files, addresses, PIL images, arrays and tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dino.data.images import list_images
from dino.utils.files import DataError

from .remote_images import fetch_images, is_remote

_FLOATS = "Floats in [0, 1] become uint8 by (255 * array).round().astype('uint8')"


def is_single(images: Any) -> bool:
    """Whether the input of a `Predictor` is one picture, not several."""
    if isinstance(images, str | Path):
        return Path(images).is_file() or is_remote(images)
    return isinstance(images, Image.Image) or (isinstance(images, np.ndarray | Tensor) and images.ndim != 4)


def list_sources(images: Any) -> Iterator[Any]:
    """Paths, PIL images, arrays and tensors of one picture each, of the input of a `Predictor`.

    Raises:
        DataError: a file is missing, or there is no picture in a list, a batch or a folder.
        TypeError: the input is of another type.
    """
    if isinstance(images, str | Path):
        yield from fetch_images([images]) if is_remote(images) else list_images(images)
    elif is_single(images):
        yield images
    elif isinstance(images, Iterable) and not isinstance(images, bytes | dict):
        if isinstance(images, Sized) and not len(images):
            raise DataError(f"no pictures: an empty {type(images).__name__} was given")
        for image in images:
            yield from list_sources(image)
    else:
        raise TypeError(f"a path, PIL image, array, tensor or list of them was expected, not {type(images).__name__}")


def to_pixels(source: Any, channels: str, read: Callable[[Any], np.ndarray]) -> np.ndarray:
    """(H, W, 3) uint8, RGB, of one source.

    Args:
        source: a path, PIL image, array or tensor.
        channels: the order in an array or a tensor, "RGB" or "BGR".
        read: reads files and Pillow images.

    Raises:
        DataError: it can't be read, or has another shape, type or range of values than a picture.
    """
    if isinstance(source, Path | Image.Image):
        return read(source)
    pixels = _from_tensor(source) if isinstance(source, Tensor) else _from_array(source)
    return np.ascontiguousarray(pixels if channels == "RGB" else pixels[:, :, ::-1])


def _from_array(source: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 of an array (H, W, 3) or (H, W)."""
    if source.dtype != np.uint8 or source.ndim not in (2, 3) or (source.ndim == 3 and source.shape[2] != 3):
        raise DataError(
            f"an array must be (H, W, 3) or (H, W) of uint8, not {source.shape} of {source.dtype}. {_advise(source)}"
        )
    if not source.size:
        raise DataError(f"an array of the shape {source.shape} holds no picture")
    return np.repeat(source[:, :, None], 3, 2) if source.ndim == 2 else source


def _advise(source: np.ndarray) -> str:
    """What to do with an array that is no picture."""
    if source.dtype.kind == "f":
        return _FLOATS
    if source.dtype != np.uint8:
        return "Scale its values to 0 … 255, then write array.astype('uint8')"
    if source.ndim == 3 and source.shape[0] == 3:
        return "Channels come last: array.transpose(1, 2, 0)"
    if source.ndim == 3 and source.shape[2] == 4:
        return "Leave the fourth channel out: array[:, :, :3]"
    return "A batch must be (B, H, W, 3)"


def _from_tensor(image: Tensor) -> np.ndarray:
    """(H, W, 3) uint8 of a tensor (3, H, W) of uint8, or of floats in [0, 1]."""
    if image.ndim != 3 or len(image) != 3 or not image.numel():
        last = image.ndim == 3 and image.shape[2] == 3 and image.numel()
        advice = ". Channels come first: tensor.permute(2, 0, 1)" if last else ""
        raise DataError(f"a tensor must be (3, H, W) or (B, 3, H, W), not {tuple(image.shape)}{advice}")
    if image.is_floating_point():
        image = _to_bytes(image.detach().float())
    if image.dtype != torch.uint8:
        raise DataError(f"a tensor must be uint8 or floats in [0, 1], not {image.dtype}")
    return image.permute(1, 2, 0).cpu().numpy()


def _to_bytes(image: Tensor) -> Tensor:
    """A tensor of floats in [0, 1] -> uint8."""
    low, high = (value.item() for value in image.aminmax())
    if not (low >= 0 and high <= 1):  # NaN fails, too
        raise DataError(
            f"a tensor of floats must lie in [0, 1] and not be normalised, but has values from {low:.4g} to {high:.4g}"
            ". Values from 0 to 255 must be uint8: tensor.to(torch.uint8)"
        )
    return (image * 255).round().to(torch.uint8)

"""From pictures to detections with nothing but a checkpoint.

    from dino.inference.predictor import Predictor

    predictor = Predictor.from_checkpoint("model_final.pth")
    found = predictor("photo.jpg")  # .boxes, .scores, .labels, .names
    found.draw().save("drawn.png")

Detectron2 is needed only for its own RegNet, Swin, MViT and ViT backbones.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from dino.data.images import list_images, read_image, resized_size, to_rgb
from dino.layers.postprocess import Detections, detections
from dino.modeling import DINO, CudaGraphs, compile_network, use_float32_precision
from dino.modeling.cuda_graphs import MOST
from dino.utils.files import DataError
from dino.weights.description import Preprocessing, model_from_checkpoint

from .cpu import fold_norms, prepare_for_cpu
from .drawing import draw_detections
from .tiling import View, merge, suppress, take, views

MERGE_IOU = 0.5  # of boxes from different views of one picture, where `nms` says nothing
Select = Callable[[Tensor, Tensor, tuple[int, int], int], Detections]


@dataclass(frozen=True)
class Prediction:
    """K detections of one picture, best first.

    Attributes:
        boxes: (K, 4) float32 on the CPU, xyxy in pixels of the picture, not clipped to it.
        scores: (K,) float32 in [0, 1].
        labels: (K,) int64.
        names: K class names.
        image_size: height and width of the picture in pixels.
        source: what was given, a `Path` where it was read from a file.
        channels: order of `source` if that is an array.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    names: list[str]
    image_size: tuple[int, int]
    source: Any
    channels: str = "RGB"

    def __len__(self) -> int:
        return len(self.scores)

    def draw(self) -> Image.Image:
        """The picture with its detections; a file is read again.

        Raises:
            DataError: the file is gone.
        """
        texts = [f"{name} {score:.2f}" for name, score in zip(self.names, self.scores.tolist(), strict=True)]
        picture = Image.fromarray(to_pixels(self.source, self.channels))
        return draw_detections(picture, self.boxes.tolist(), self.labels.tolist(), texts)


class Predictor:
    """Detects in pictures of any kind. Pictures that are equally large after resizing run together, none is padded.

    Args:
        network: a `DINO` in evaluation mode; runs where, and in the type in which, its parameters are.
        names: of the classes.
        preprocessing: what the network expects of its images.
        score_thresh: lowest score that is returned, in [0, 1]; 0 for everything (AP is computed so).
        max_detections: per picture; the checkpoint's number unless given.
        nms: IoU in [0, 1] above which, of two boxes of one class, the worse goes. DINO needs none, AP is without.
        select: a layer's predictions -> detections: `dino.layers.detections`, or `one_label_detections`, which
            gives no box two labels.
        tile: side in pixels of the tiles in which larger pictures are looked at, next to the whole; None for no tiles.
        overlap: of neighbouring tiles, as a fraction in [0, 1). Objects up to this size are whole in one of them.
        batch_size: how many pictures, or tiles, run together. More than 1 pays on a GPU.
        cuda_graphs: so many sizes that come again are recorded as CUDA graphs, see `dino.modeling.CudaGraphs`: faster,
            for the memory of one forward pass. 0 for none; nothing else happens on a CPU.

    Raises:
        ValueError: a number is out of its range.
    """

    def __init__(
        self,
        network: DINO,
        names: Sequence[str],
        preprocessing: Preprocessing,
        *,
        score_thresh: float = 0.4,
        max_detections: int | None = None,
        nms: float | None = None,
        select: Select = detections,
        tile: int | None = None,
        overlap: float = 0.2,
        batch_size: int = 1,
        cuda_graphs: int = MOST,
    ):
        self.network = network
        self.names = list(names)
        self.preprocessing = preprocessing
        self.score_thresh = within("score_thresh", score_thresh, 0, 1)
        number = preprocessing.max_detections if max_detections is None else max_detections
        self.max_detections = within("max_detections", number, 1)
        self.nms = None if nms is None else within("nms", nms, 0, 1)
        self.select = select
        self.tile = None if tile is None else within("tile", tile, 32)
        self.overlap = within("overlap", overlap, 0, 0.9)
        self.batch_size = within("batch_size", batch_size, 1)
        self.graphs = CudaGraphs(network, most=cuda_graphs) if within("cuda_graphs", cuda_graphs, 0) else None

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        float32_precision: str = "",
        copy: str = "auto",
        **options: Any,
    ) -> Predictor:
        """Build one from a checkpoint of this project, its batch norms folded into the convolutions.

        Args:
            device: a GPU where there is one, unless given.
            dtype: torch.bfloat16 and torch.float16 halve the memory; boxes and scores stay float32.
            float32_precision: "highest", "high" (TensorFloat-32 on a GPU: faster), or "" for what the process has; for
                the whole process, see `dino.modeling.use_float32_precision`.
            copy: "model", "ema" or "auto", see `dino.weights.load_weights`.
            options: arguments of `Predictor`.

        Raises:
            DataError: the file can't be used, see `dino.weights.description.model_from_checkpoint`.
        """
        use_float32_precision(float32_precision)
        network, names, preprocessing = model_from_checkpoint(path, copy=copy)
        fold_norms(network)
        network.to(device or ("cuda" if torch.cuda.is_available() else "cpu"), dtype)
        prepare_for_cpu(network)
        return cls(network, names, preprocessing, **options)

    def compile(self, **options: Any) -> Predictor:
        """Let PyTorch compile the network when it first runs, for any size; `options` of `torch.compile`.

        On a GPU, `cuda_graphs` record the compiled code. Returns itself.
        """
        compile_network(self.network, **options)
        return self

    def __call__(self, images: Any, channels: str = "RGB") -> Prediction | list[Prediction]:
        """Detect in one picture, or in several.

        Args:
            images: a file; a folder or a glob such as "photos/*.jpg"; a PIL image; an array (H, W, 3) or (H, W) uint8;
                a tensor (3, H, W) or (B, 3, H, W), RGB, uint8 or floats in [0, 1], which are rounded to 8 bits; or an
                iterable of these.
            channels: order in arrays, "RGB" or "BGR" (OpenCV's).

        Returns:
            a `Prediction` for a file, an image, an array and a (3, H, W) tensor; a list for all others.

        Raises:
            DataError: a file is missing or broken, or an array is no picture.
            TypeError: `images` is nothing of the above.
            FloatingPointError: predictions are NaN or infinite.
        """
        found = list(self.stream(images, channels))
        return found[0] if is_single(images) else found

    def stream(
        self, images: Any, channels: str = "RGB", on_error: Callable[[DataError], object] | None = None
    ) -> Iterator[Prediction]:
        """As a call, one picture after another, so that any number of them fits into memory.

        Args:
            images, channels: as of a call; an iterator is read as far as a batch needs.
            on_error: called with the error of a picture that can't be read, which is left out then; None raises it.
        """
        pictures = self.read(images, channels, on_error)
        while batch := list(islice(pictures, self.batch_size)):
            for (source, pixels), found in zip(batch, self.detect([p for _, p in batch]), strict=True):
                check_finite(source, found)
                names = [self.names[label] for label in found.labels.tolist()]
                yield Prediction(*found, names, pixels.shape[:2], source, channels)

    def read(
        self, images: Any, channels: str, on_error: Callable[[DataError], object] | None
    ) -> Iterator[tuple[Any, np.ndarray]]:
        """Each source with its pixels (H, W, 3), uint8, RGB."""
        if channels not in ("RGB", "BGR"):
            raise ValueError(f'channels must be "RGB" or "BGR", not {channels!r}')
        for source in list_sources(images):
            try:
                yield source, to_pixels(source, channels)
            except DataError as error:
                if on_error is None:
                    raise
                on_error(error)

    def detect(self, pictures: Sequence[np.ndarray]) -> list[Detections]:
        """Detections of pictures (H, W, 3), uint8, RGB."""
        places = [self.views(*picture.shape[:2]) for picture in pictures]
        crops = [p[v.y0 : v.y1, v.x0 : v.x1] for p, vs in zip(pictures, places, strict=True) for v in vs]
        found = iter(self.look(crops))
        return [
            self.join(list(islice(found, len(vs))), vs, p.shape[:2]) for p, vs in zip(pictures, places, strict=True)
        ]

    def views(self, height: int, width: int) -> list[View]:
        """Which parts of a picture are looked at."""
        tile = max(height, width) if self.tile is None else self.tile
        return views(height, width, tile, self.overlap)

    @torch.no_grad()
    def look(self, crops: Sequence[np.ndarray]) -> list[Detections]:
        """Detections of each crop in its own pixels; crops of equal size after resizing run together."""
        groups = defaultdict(list)
        for index, crop in enumerate(crops):
            size = resized_size(*crop.shape[:2], self.preprocessing.short_side, self.preprocessing.max_size)
            groups[size].append(index)
        found: dict[int, Detections] = {}
        network = self.graphs or self.network
        for size, group in groups.items():
            for start in range(0, len(group), self.batch_size):
                indices = group[start : start + self.batch_size]
                images = torch.stack([self.prepare(crops[i], size) for i in indices])  # (B, 3, h, w)
                predictions = network(images, torch.zeros_like(images[:, 0], dtype=torch.bool)).decoder
                for i, logits, boxes in zip(indices, predictions.logits[-1], predictions.boxes[-1], strict=True):
                    best = self.select(logits, boxes, crops[i].shape[:2], self.max_detections)
                    found[i] = Detections(*(values.cpu() for values in best))
        return [found[i] for i in range(len(crops))]

    def prepare(self, pixels: np.ndarray, size: tuple[int, int]) -> Tensor:
        """(H, W, 3) uint8, RGB -> (3, h, w), normalised, in the type of the network; size: (h, w)."""
        resized = Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BILINEAR)
        weight = self.network.level_embed
        image = torch.from_numpy(np.array(resized)).to(weight.device).permute(2, 0, 1)
        mean, std = (
            torch.tensor(values, device=weight.device).view(-1, 1, 1)
            for values in (self.preprocessing.pixel_mean, self.preprocessing.pixel_std)
        )
        return ((image - mean) / std).to(weight.dtype)

    def join(self, found: list[Detections], places: list[View], image_size: tuple[int, int]) -> Detections:
        """One picture's detections from those of its views: thresholded, merged, at most `max_detections`."""
        found = [take(d, ~(d.scores < self.score_thresh)) for d in found]  # NaN stays, to be noticed
        if len(found) > 1:
            joined = merge(found, places, image_size, MERGE_IOU if self.nms is None else self.nms)
        else:
            joined = found[0] if self.nms is None else suppress(found[0], self.nms)
        return take(joined, slice(self.max_detections))


def within(name: str, value: float, low: float, high: float = float("inf")) -> Any:
    """The value, if it lies in [low, high]."""
    if not low <= value <= high:
        raise ValueError(f"{name} must be in [{low}, {high}], not {value}")
    return value


def check_finite(source: Any, found: Detections) -> None:
    """Raise a FloatingPointError where a score or a box is no number."""
    if not (torch.isfinite(found.scores).all() and torch.isfinite(found.boxes).all()):
        where = source if isinstance(source, Path) else "an image"
        raise FloatingPointError(f"{where}: the predictions are NaN or infinite, probably so are the weights")


def is_single(images: Any) -> bool:
    """Whether `Predictor` returns one `Prediction` for this."""
    if isinstance(images, str | Path):
        return Path(images).is_file()
    return isinstance(images, Image.Image | np.ndarray) or (isinstance(images, Tensor) and images.ndim != 4)


def list_sources(images: Any) -> Iterator[Any]:
    """Paths, PIL images, arrays and (3, H, W) tensors, one by one, of all that a `Predictor` takes."""
    if isinstance(images, str | Path):
        yield from list_images(images)
    elif is_single(images):
        yield images
    elif isinstance(images, Iterable) and not isinstance(images, bytes | dict):
        for image in images:
            yield from list_sources(image)
    else:
        raise TypeError(f"a path, PIL image, array, tensor or list of them was expected, not {type(images).__name__}")


def to_pixels(source: Any, channels: str) -> np.ndarray:
    """(H, W, 3) uint8, RGB, of one source; channels: the order in an array.

    Raises:
        DataError: it can't be read, or has another shape or type than a picture.
    """
    if isinstance(source, Path):
        return read_image(source)
    if isinstance(source, Image.Image):
        return to_rgb(ImageOps.exif_transpose(source))
    if isinstance(source, Tensor):
        return from_tensor(source)
    if source.dtype != np.uint8 or source.ndim not in (2, 3) or (source.ndim == 3 and source.shape[2] != 3):
        raise DataError(
            f"an array must be (H, W, 3) or (H, W) of uint8, not {source.shape} of {source.dtype}. "
            "Tensors may be (3, H, W), and floats in [0, 1]"
        )
    if not source.size:
        raise DataError(f"an array of the shape {source.shape} holds no picture")
    if source.ndim == 2:
        return np.repeat(source[:, :, None], 3, 2)
    return np.ascontiguousarray(source if channels == "RGB" else source[:, :, ::-1])


def from_tensor(image: Tensor) -> np.ndarray:
    """(H, W, 3) uint8 of a tensor (3, H, W) of uint8, or of floats in [0, 1]."""
    if image.ndim != 3 or len(image) != 3 or not image.numel():
        raise DataError(f"a tensor must be (3, H, W) or (B, 3, H, W), not {tuple(image.shape)}")
    if image.is_floating_point():
        if not (image.min() >= 0 and image.max() <= 1):  # NaN fails, too
            raise DataError("a tensor of floats must lie in [0, 1]; it must not be normalised")
        image = (image.float() * 255).round().to(torch.uint8)
    if image.dtype != torch.uint8:
        raise DataError(f"a tensor must be uint8 or floats in [0, 1], not {image.dtype}")
    return image.permute(1, 2, 0).contiguous().cpu().numpy()

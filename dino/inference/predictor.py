"""Detection in pictures, with nothing but a checkpoint.

    from dino import Predictor

    predictor = Predictor("model_final.pth")
    found = predictor("photo.jpg")  # .boxes, .scores, .labels, .names
    found.draw().save("drawn.png")

Detectron2 is needed only for its own RegNet, Swin, MViT and ViT backbones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dino import structures
from dino.data.images import read_image, resize_image
from dino.modeling import DINO, CudaGraphs, compile_network, use_float32_precision
from dino.modeling.cuda_graphs import MOST
from dino.modeling.detector import Detector, Select
from dino.structures import SCORE_THRESH
from dino.utils.files import DataError, UserError
from dino.weights.description import detector_from_checkpoint

from .cpu import fold_norms, prepare_for_cpu
from .detections import Detections
from .picture_inputs import is_single, list_sources, to_pixels
from .strips import Strips
from .tiling import View, merge, suppress, take, views

Prediction = Detections  # the former name

_CROPS = 16  # batches of crops that are resized at a time
_MERGE_IOU = 0.5  # of boxes from different views of one picture, where `nms` says nothing


class Predictor:
    """Detects in pictures of any kind. Pictures of equal size after resizing run together, none is padded.

    Args:
        detector: in evaluation mode, see `dino.load`; runs on the device and in the dtype of its network. Or a
            checkpoint: a file, an address, a name, see `from_checkpoint`, which has further options.
        device: where to run; by default a GPU where there is one, and for a `Detector` the device of its network.
        score_thresh: lowest score that is returned, in [0, 1]; 0 for everything (AP is computed so).
        max_detections: per picture; the detector's number by default.
        nms: IoU in [0, 1] above which, of two boxes of one class, the worse is dropped. DINO needs none, AP is without.
        select: chooses the detections, see `Detector`; the detector's own by default.
        tile: side in pixels of tiles of larger pictures, which run next to the whole; None for no tiles.
        overlap: of neighbouring tiles, as a fraction in [0, 1). Objects up to this size are whole in one of them.
        batch_size: how many pictures, or tiles, run together. More than 1 pays on a GPU.
        cuda_graphs: number of sizes that are recorded as CUDA graphs when they come again, see
            `dino.modeling.CudaGraphs`: faster, for the memory of one forward pass. 0 for none. No effect on a CPU.
        max_pixels: most pixels that a file may have; None for Pillow's limit of 179 million.

    Raises:
        ValueError: a number is out of its range.
        UserError: the detector is in training mode; of a checkpoint, see `from_checkpoint`.
    """

    def __init__(
        self,
        detector: Detector | str | Path,
        *,
        device: str | torch.device | None = None,
        score_thresh: float = SCORE_THRESH,
        max_detections: int | None = None,
        nms: float | None = None,
        select: Select | None = None,
        tile: int | None = None,
        overlap: float = 0.2,
        batch_size: int = 1,
        cuda_graphs: int = MOST,
        max_pixels: int | None = None,
    ):
        detector = _to_detector(detector, device)
        number = detector.preprocessing.max_detections if max_detections is None else max_detections
        self.max_detections = _within("max_detections", number, 1)
        preprocessing = detector.preprocessing._replace(max_detections=number)
        graphs = CudaGraphs(detector.network, most=cuda_graphs) if _within("cuda_graphs", cuda_graphs, 0) else None
        select = select or detector.select
        self.detector = Detector(
            detector.network,
            preprocessing,
            detector.names,
            category_ids=detector.category_ids,
            select=select,
            graphs=graphs,
        )
        self.score_thresh = _within("score_thresh", score_thresh, 0, 1)
        self.nms = None if nms is None else _within("nms", nms, 0, 1)
        self.tile = None if tile is None else _within("tile", tile, 32)
        self.overlap = _within("overlap", overlap, 0, 0.9)
        self.batch_size = _within("batch_size", batch_size, 1)
        self.max_pixels = None if max_pixels is None else _within("max_pixels", max_pixels, 1)
        self.read = partial(read_image, input_range=preprocessing.input_range, max_pixels=self.max_pixels)

    @property
    def network(self) -> DINO:
        """The detector's network."""
        return self.detector.network

    @property
    def names(self) -> list[str]:
        """Names of the classes."""
        return self.detector.names

    @property
    def category_ids(self) -> list[int]:
        """Ids of the classes in the data set, by label."""
        return self.detector.category_ids

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
        """Build one from a checkpoint of this or another program, its batch norms folded into the convolutions.

        Args:
            path: a file, an address or the name of published weights, see `dino.weights.locate`.
            device: a GPU where there is one, by default.
            dtype: torch.bfloat16 and torch.float16 halve the memory; boxes and scores stay float32.
            float32_precision: "highest", "high" (TensorFloat-32 on a GPU: faster), or "" for the setting of the
                process; for the whole process, see `dino.modeling.use_float32_precision`.
            copy: "model", "ema" or "auto", see `dino.weights.load_weights`.
            options: arguments of `Predictor`.

        Raises:
            DataError: the file can't be used, see `dino.weights.description.detector_from_checkpoint`.
            UserError: it can't be fetched.
        """
        use_float32_precision(float32_precision)
        return cls(_open_detector(path, device, dtype, copy), **options)

    @classmethod
    def from_pretrained(cls, name: str, **options: Any) -> Predictor:
        """Build one from published weights by name, such as "dino_r50_4scale_12ep", downloaded once.

        `dino weights` lists the names. Options and errors as of `from_checkpoint`.
        """
        return cls.from_checkpoint(name, **options)

    def compile(self, **options: Any) -> Predictor:
        """Let PyTorch compile the network when it first runs, for any size; `options` of `torch.compile`.

        On a GPU, `cuda_graphs` record the compiled code. Returns itself.
        """
        compile_network(self.network, **options)
        return self

    def __call__(self, images: Any, channels: str = "RGB") -> Detections | list[Detections]:
        """Detect in one picture, or in several.

        Args:
            images: a file; an https:// address; a folder or a glob such as "photos/*.jpg"; a PIL image; an array
                (H, W, 3), (H, W) or (B, H, W, 3) uint8; a tensor (3, H, W) or (B, 3, H, W), uint8 or floats in [0, 1],
                which are rounded to 8 bits; or an iterable of these.
            channels: order in arrays and tensors, "RGB" or "BGR" (OpenCV's). Files and PIL images state theirs.

        Returns:
            `Detections` for a file, an address, an image, an array or tensor of one picture; a list for all else.

        Raises:
            DataError: a file is missing or broken, an array or tensor is no picture, or a list is empty.
            TypeError: `images` is of another type.
            FloatingPointError: predictions are NaN or infinite.
        """
        found = list(self.stream(images, channels))
        return found[0] if is_single(images) else found

    def stream(
        self, images: Any, channels: str = "RGB", on_error: Callable[[DataError], object] | None = None
    ) -> Iterator[Detections]:
        """As a call, one picture after another, so that any number of them fits into memory.

        Args:
            images, channels: as of a call; an iterator is read as far as a batch needs.
            on_error: called with the error of an unreadable picture, which is skipped; None raises it.
        """
        pictures = self._read(images, channels, on_error)
        while batch := list(islice(pictures, self.batch_size)):
            sources = [str(source) if isinstance(source, Path) else "an image" for source, _ in batch]
            results = self.detect([pixels for _, pixels in batch], sources)
            for (source, pixels), found in zip(batch, results, strict=True):
                names = [self.names[label] for label in found.labels.tolist()]
                strips = pixels if isinstance(pixels, Strips) else None
                size = pixels.shape[:2]
                yield Detections(found, names, size, source, channels, self.read, strips, self.category_ids)

    def _read(
        self, images: Any, channels: str, on_error: Callable[[DataError], object] | None
    ) -> Iterator[tuple[Any, np.ndarray | Strips]]:
        """Read each source as pixels (H, W, 3), uint8, RGB; a very large file in strips if tiles are wanted."""
        if channels not in ("RGB", "BGR"):
            raise ValueError(f'channels must be "RGB" or "BGR", not {channels!r}')
        for source in list_sources(images):
            try:
                strips = self._open_strips(source)
                yield source, to_pixels(source, channels, self.read) if strips is None else strips
            except DataError as error:
                if on_error is None:
                    raise
                on_error(error)

    def _open_strips(self, source: Any) -> Strips | None:
        """Open a very large file for tiles; None for everything else."""
        if self.tile is None or not isinstance(source, Path):
            return None
        return Strips.open(source, self.read, self.max_pixels)

    def detect(
        self, pictures: Sequence[np.ndarray | Strips], sources: Sequence[str] = (), **options: Any
    ) -> list[structures.Detections]:
        """Detect in pictures (H, W, 3), uint8, RGB; results are on the CPU.

        Args:
            sources: what an error message calls each picture.
            options: of `Detector.detect`.
        """
        cuts = [self._views(*picture.shape[:2]) for picture in pictures]
        crops = [(p, v) for p, vs in zip(pictures, cuts, strict=True) for v in vs]
        options = {"batch_size": self.batch_size, **options}
        if sources:
            options["sources"] = [*chain(*([source] * len(vs) for source, vs in zip(sources, cuts, strict=True)))]
        found = iter(self._detect_crops(crops, **options))
        return [self._join(list(islice(found, len(vs))), vs, p.shape[:2]) for p, vs in zip(pictures, cuts, strict=True)]

    def _detect_crops(
        self, crops: Sequence[tuple[np.ndarray | Strips, View]], sources: Sequence[str] = (), **options: Any
    ) -> list[structures.Detections]:
        """Detections of views of pictures, a few of which are cut and resized at a time."""
        found = []
        for start in range(0, len(crops), _CROPS * self.batch_size):
            part = slice(start, start + _CROPS * self.batch_size)
            sizes = [(view.y1 - view.y0, view.x1 - view.x0) for _, view in crops[part]]
            images = [self._prepare(picture, view) for picture, view in crops[part]]
            found += self.detector.detect(images, sizes, sources=sources[part], **options)
        return found

    def _views(self, height: int, width: int) -> list[View]:
        """Parts of a picture that run through the network."""
        tile = max(height, width) if self.tile is None else self.tile
        return views(height, width, tile, self.overlap)

    def _prepare(self, picture: np.ndarray | Strips, view: View) -> Tensor:
        """A view of a picture (H, W, 3) uint8 -> (3, h, w) uint8, resized for the network."""
        height, width = view.y1 - view.y0, view.x1 - view.x0
        size = self.detector.size(height, width)
        if isinstance(picture, Strips) and (height, width) == picture.shape[:2]:
            pixels = picture.shrink(size)
        else:
            pixels = resize_image(picture[view.y0 : view.y1, view.x0 : view.x1], size)
        return torch.from_numpy(pixels).permute(2, 0, 1)

    def _join(
        self, found: list[structures.Detections], cuts: list[View], image_size: tuple[int, int]
    ) -> structures.Detections:
        """Threshold and merge the detections of a picture's views; at most `max_detections`, on the CPU."""
        found = [structures.Detections(*(values.cpu() for values in d)) for d in found]
        found = [take(d, d.scores >= self.score_thresh) for d in found]
        if len(found) > 1:
            joined = merge(found, cuts, image_size, _MERGE_IOU if self.nms is None else self.nms)
        else:
            joined = found[0] if self.nms is None else suppress(found[0], self.nms)
        return take(joined, slice(self.max_detections))


def _within(name: str, value: float, low: float, high: float = float("inf")) -> Any:
    """The value, if it lies in [low, high]."""
    if not low <= value <= high:
        raise ValueError(f"{name} must be in [{low}, {high}], not {value}")
    return value


def _to_detector(detector: Any, device: str | torch.device | None) -> Detector:
    """The detector that is given, or that of a checkpoint, ready to predict.

    Raises:
        TypeError: it is neither.
        UserError: it is in training mode, or the checkpoint can't be fetched.
    """
    if isinstance(detector, str | Path):
        return _open_detector(detector, device)
    if not isinstance(detector, Detector):
        raise TypeError(f"a Detector, or the path or name of a checkpoint, was expected, not {type(detector).__name__}")
    if detector.network.training:
        raise UserError("the detector is in training mode: call detector.eval() first")
    return detector if device is None else detector.to(device)


def _open_detector(
    path: str | Path, device: str | torch.device | None, dtype: torch.dtype = torch.float32, copy: str = "auto"
) -> Detector:
    """The detector of a checkpoint, made fast for prediction. Arguments as of `Predictor.from_checkpoint`."""
    detector = detector_from_checkpoint(path, copy)
    fold_norms(detector.network)
    detector.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    detector.network.to(dtype)  # pixel statistics stay float32
    prepare_for_cpu(detector.network)
    return detector

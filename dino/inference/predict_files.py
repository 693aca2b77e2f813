"""Draw detections in images, folders, videos or a webcam, and write them as JSON."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from dino.data.images import IMAGE_SUFFIXES, list_images
from dino.layers import detections, one_label_detections
from dino.utils.files import DataError, UserError, clean_up, counted, make_folder, make_part, message_of, write_picture
from dino.utils.printable import printable
from dino.utils.run_folder import hold_folder

from .cpu import keep_freed_memory
from .detections import Detections
from .predictor import Predictor
from .remote_images import fetch_images, is_remote, remote_name
from .video import VIDEO_SUFFIXES, VideoReader, VideoWriter

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_LISTED = 5  # files that a message names
_NAME_BYTES = 255  # of a file, on usual file systems
_FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG"}  # of drawn pictures; others become PNG


class _Job(NamedTuple):
    """An input, and the picture or video to write."""

    source: Path | int
    target: Path
    name: str  # of the source in the JSON file


def make_predictor(
    checkpoint: str, *, dtype: str = "fp32", one_label: bool = False, compile: bool = False, **options: Any
) -> Predictor:
    """A predictor of a checkpoint.

    Args:
        checkpoint: a file, an address or the name of published weights.
        dtype: of the network, a key of `_DTYPES`.
        one_label: give no box two labels.
        compile: compile the network.
        options: of `Predictor.from_checkpoint`.

    Raises:
        UserError: an option can't be used.
        DataError: the checkpoint can't be used.
    """
    select = one_label_detections if one_label else detections
    try:
        predictor = Predictor.from_checkpoint(checkpoint, dtype=_DTYPES[dtype], select=select, **options)
    except UserError:
        raise
    except (ValueError, RuntimeError, AssertionError) as error:  # a number out of its range, a device that is not there
        raise UserError(str(error).partition("\n")[0]) from error
    if predictor.network.level_embed.device.type == "cpu":
        keep_freed_memory()
    return predictor.compile() if compile else predictor


def plan(inputs: Sequence[str], folder: Path) -> list[_Job]:
    """List all inputs, each with its own file in the output folder.

    Raises:
        DataError: an input does not exist, or its result would replace a file.
    """
    jobs = [_make_job(source, name, folder) for source, name in _names(_find_all(inputs)).items()]
    _check_free(jobs, folder)
    return jobs


def _check_free(jobs: Sequence[_Job], folder: Path) -> None:
    """Raise a DataError if a result would replace a file."""
    written = [(f"{job.source}: ", path) for job in jobs for path in _outputs(job)]
    written.append(("", folder / "predictions.json"))
    counts = Counter(path for _, path in written)
    for source, path in written:
        if path.exists() or counts[path] > 1:
            raise DataError(f"{source}{path} is taken. Choose another --output")


def _find_all(inputs: Sequence[str]) -> list[Path | int]:
    """Files and webcams of all inputs, each of them once; pictures of addresses are fetched."""
    sources = {text: [] if is_remote(text) else _find_sources(text) for text in inputs}
    remote = [text for text in sources if is_remote(text)]
    sources |= {text: [path] for text, path in zip(remote, fetch_images(remote), strict=True)}
    found: dict[str | int, Path | int] = {}
    for source in chain.from_iterable(sources.values()):
        found.setdefault(source if isinstance(source, int) else os.path.abspath(source), source)
    return list(found.values())


def _find_sources(text: str) -> list[Path | int]:
    """Files or webcam of an input of the command line."""
    if text.isdecimal() and not Path(text).exists():
        return [int(text)]
    return list(list_images(text, IMAGE_SUFFIXES | VIDEO_SUFFIXES))


def _names(sources: Sequence[Path | int]) -> dict[Path | int, str]:
    """A name of each source: its own, or its path below the common folder (or its host) where names are equal."""
    count = Counter(map(_target_name, sources))
    equal = [source for source in sources if isinstance(source, Path) and count[_target_name(source)] > 1]
    names = {source: source.name if isinstance(source, Path) else str(source) for source in sources}
    names |= {source: remote_name(source) for source in equal}
    return names | _below_common_folder([source for source in equal if not names[source]])


def _below_common_folder(paths: Sequence[Path]) -> dict[Path, str]:
    """The path of each file below the folder that all have in common."""
    base = os.path.commonpath([os.path.abspath(path.parent) for path in paths]) if paths else ""
    return {path: Path(os.path.abspath(path)).relative_to(base).as_posix() for path in paths}


def _make_job(source: Path | int, name: str, folder: Path) -> _Job:
    """The job of a source whose name may lead into a sub-folder."""
    return _Job(source, folder / Path(name).parent / _target_name(source), name)


def _is_video(source: Path | int) -> bool:
    """Whether a source is read frame by frame."""
    return isinstance(source, int) or source.suffix.lower() in VIDEO_SUFFIXES


def _target_name(source: Path | int) -> str:
    """Name of the drawn picture or video: that of the source, where the format can be kept."""
    if isinstance(source, int):
        return f"webcam_{source}.mp4"
    kept, suffix = ({".mp4"}, ".mp4") if _is_video(source) else (_FORMATS, ".png")
    if source.suffix.lower() in kept:
        return source.name
    name = f"{source.name}{suffix}"
    return name if len(os.fsencode(name)) <= _NAME_BYTES else source.with_suffix(suffix).name


def _outputs(job: _Job) -> list[Path]:
    """Files that a job writes."""
    return [job.target, job.target.with_suffix(".json")] if _is_video(job.source) else [job.target]


def predict(predictor: Predictor, jobs: Sequence[_Job], folder: Path) -> None:
    """Do the jobs. Unreadable inputs are skipped and reported at the end; finished results stay.

    Raises:
        DataError: something could not be read or written, or a result would replace a file.
        UserError: another program of this project writes into the folder.
    """
    images = [job for job in jobs if not _is_video(job.source)]
    issues: list[DataError] = []
    with hold_folder(folder):
        _check_free(jobs, folder)
        if images:
            _predict_images(predictor, images, folder, issues)
        for job in jobs:
            if _is_video(job.source):
                _predict_video(predictor, job, issues)
    if issues:
        _report(issues, len(jobs))


def _report(issues: Sequence[DataError], number: int) -> NoReturn:
    """List the unreadable ones of a number of inputs, and raise the first."""
    if len(issues) > 1:
        print("\n".join(f"not read: {message_of(issue)}" for issue in issues))
    listed = "; all are listed above" if len(issues) > 1 else ""
    more = f" ({len(issues)} of {number} inputs could not be read whole{listed})"
    raise DataError(f"{issues[0]}{more if number > 1 else ''}")


def _predict_images(predictor: Predictor, jobs: Sequence[_Job], folder: Path, issues: list[DataError]) -> None:
    """Draw pictures; `issues` receives the errors of unreadable ones."""
    by_source = {job.source: job for job in jobs}
    paged = []  # names of files of several pages
    with (
        _open_coco(folder / "predictions.json", predictor) as coco,
        tqdm(total=len(jobs), desc="predict", unit="image", disable=None) as bar,
    ):

        def skip(error: DataError) -> None:
            issues.append(error)
            bar.update()

        for found in predictor.stream(list(by_source), on_error=skip):
            job = by_source[found.source]
            _draw(found, job.target)
            coco.add(found, file_name=job.name)
            paged += [job.name] if _has_pages(found.source) else []
            bar.update()
    print(f"{counted(coco.images, 'picture')} with {counted(coco.objects, 'object')} written to {folder}")
    if paged:
        names = ", ".join(map(printable, paged[:_LISTED])) + ", …" * (len(paged) > _LISTED)
        print(f"only the first page of {counted(len(paged), 'file')} was used: {names}")


def _draw(found: Detections, target: Path) -> None:
    """Write the drawn picture."""
    make_folder(target.parent)
    write_picture(target, found.draw(), format=_FORMATS.get(target.suffix.lower()), quality=92)


def _has_pages(path: Path) -> bool:
    """Whether a file has several pages or frames. (The second picture of a camera's MPO file is no page.)"""
    try:
        with Image.open(path) as image:
            return image.format != "MPO" and getattr(image, "is_animated", False)
    except Exception:  # a broken second page
        return False


def _predict_video(predictor: Predictor, job: _Job, issues: list[DataError]) -> None:
    """Draw the frames of a video; Ctrl-C ends it early, and is the only end of a webcam."""
    try:
        video = VideoReader(job.source)
    except DataError as error:
        issues.append(error)
        return
    make_folder(job.target.parent)
    interrupted, name = False, Path(video.name).name
    writer, start = None, time.monotonic()
    with (
        _open_coco(job.target.with_suffix(".json"), predictor) as coco,
        tqdm(total=video.count, desc=printable(video.name, 40), unit="frame", disable=None) as bar,
    ):
        try:
            for found in predictor.stream(video):
                writer = writer or VideoWriter(job.target, video.fps, found.image_size)
                frame = np.asarray(found.draw())
                due = 1 if video.count else round((time.monotonic() - start) * video.fps) - writer.written
                for _ in range(max(due, 1)):  # in real time: a frame of a camera lasts as long as the network needs
                    writer.write(frame)
                coco.add(found, file_name=f"{name}#{coco.images}", video=name, frame=coco.images)
                bar.update()
        except DataError as error:
            issues.append(error)
        except KeyboardInterrupt:
            interrupted = isinstance(job.source, Path)
        finally:
            video.close()
            if writer:
                clean_up(writer.close)
    target = printable(job.target, None)
    print(f"{counted(coco.images, 'frame')} with {counted(coco.objects, 'object')} written to {target}")
    if interrupted:
        raise KeyboardInterrupt


class _CocoWriter:
    """Writes predictions in COCO's format, one by one, so that their number has no bound.

    Args:
        file: open for text. names, category_ids: of the classes, by label.
    """

    def __init__(self, file: IO[str], names: Sequence[str], category_ids: Sequence[int]):
        self.file = file
        self.category_ids = list(category_ids)
        self.objects = 0
        self.entries: list[str] = []  # of the images, which follow the annotations
        categories = [{"id": number, "name": name} for number, name in zip(category_ids, names, strict=True)]
        file.write(f'{{"categories": {json.dumps(categories)},\n"annotations": [')

    @property
    def images(self) -> int:
        """How many were added."""
        return len(self.entries)

    def add(self, found: Detections, **facts: Any) -> None:
        """Add an image, with `facts` in its entry, and its objects."""
        height, width = found.image_size
        image_id = self.images + 1
        self.entries.append(json.dumps({"id": image_id, **facts, "width": width, "height": height}))
        for box, score, label in zip(found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True):
            x0, y0, x1, y1 = (round(value, 2) for value in box)
            w, h = round(x1 - x0, 2), round(y1 - y0, 2)
            entry = {"id": self.objects + 1, "image_id": image_id, "category_id": self.category_ids[label]}
            entry |= {"bbox": [x0, y0, w, h], "area": round(w * h, 2), "iscrowd": 0, "score": round(score, 5)}
            self.file.write(f"{',' if self.objects else ''}\n{json.dumps(entry)}")
            self.objects += 1

    def finish(self) -> None:
        """Write the list of images and the end of the file."""
        images = ",\n".join(self.entries)
        self.file.write(f'],\n"images": [\n{images}]}}\n')


@contextmanager
def _open_coco(path: Path, predictor: Predictor) -> Iterator[_CocoWriter]:
    """Open a `_CocoWriter` of its classes; the file appears whole at the end of the block, also after an error.

    Raises:
        DataError: it can't be written.
    """
    part = None
    try:
        part = make_part(path)
        with open(part, "w", encoding="utf-8") as file:
            writer = _CocoWriter(file, predictor.names, predictor.category_ids)
            try:
                yield writer
            finally:
                clean_up(_finish, writer, part, path)
    except OSError as error:
        raise DataError(f"can't write {path}: {error}") from error
    finally:
        if part:
            with suppress(OSError):
                part.unlink(missing_ok=True)


def _finish(writer: _CocoWriter, part: Path, path: Path) -> None:
    """Complete the file, and give it its name."""
    writer.finish()
    writer.file.flush()
    os.fsync(writer.file.fileno())
    os.replace(part, path)

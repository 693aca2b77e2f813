"""Video: frames of a file or a webcam, and annotated files, with OpenCV."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np

from dino.utils.files import DataError, make_part

VIDEO_SUFFIXES = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv"}
_USUAL_FPS = 25.0  # where a file or a camera states none


def _load_opencv() -> ModuleType:
    """Import OpenCV with its log switched off: what matters becomes an error here.

    Raises:
        DataError: it is not installed.
    """
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")  # read when it is imported
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    try:
        import cv2
    except ImportError as error:
        raise DataError(f"video needs OpenCV: pip install opencv-python-headless ({error})") from error
    return cv2


class VideoReader:
    """The frames of a video, (H, W, 3) uint8, RGB, one after another.

    Args:
        source: a file, or the number of a webcam.

    Raises:
        DataError: it can't be opened, or OpenCV is missing.
    """

    def __init__(self, source: Path | int):
        cv2 = _load_opencv()
        self.name = f"webcam {source}" if isinstance(source, int) else str(source)
        if isinstance(source, Path) and not source.is_file():
            raise DataError(f"input not found: {source}")
        self.capture = cv2.VideoCapture(source if isinstance(source, int) else str(source))
        if not self.capture.isOpened():
            raise DataError(f"can't read {self.name}: no video, a broken one, or a camera that is missing or in use")
        fps = self.capture.get(cv2.CAP_PROP_FPS)
        self.fps = fps if 0 < fps <= 1000 else _USUAL_FPS
        count = self.capture.get(cv2.CAP_PROP_FRAME_COUNT)
        self.count = int(count) if isinstance(source, Path) and 0 < count < 1e9 else None  # as the file states it

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yield frames to the end.

        Raises:
            DataError: no frame can be read, or far fewer than the file states.
        """
        read = 0
        while True:
            there, frame = self.capture.read()
            if not there:
                break
            read += 1
            yield np.ascontiguousarray(frame[:, :, ::-1])
        if not read or (self.count and read < 0.9 * self.count):
            raise DataError(
                f"{self.name}: only {read} of {self.count or 'its'} frames could be read; the file is broken"
            )

    def close(self) -> None:
        """Release the file or the camera."""
        self.capture.release()


class VideoWriter:
    """Writes an MP4 file (MPEG-4 part 2, no sound), which appears whole when it is closed, or not at all.

    Args:
        path: of the file.
        fps: frames per second.
        image_size: height and width of the frames in pixels; an odd last row or column is left out.

    Raises:
        DataError: it can't be written.
    """

    def __init__(self, path: Path, fps: float, image_size: tuple[int, int]):
        self.cv2 = _load_opencv()
        self.path = path
        try:
            self.part = make_part(path, ".part.mp4")
        except OSError as error:
            raise DataError(f"can't write {path}: {error}") from error
        self.height, self.width = (side - side % 2 for side in image_size)
        self.written = 0
        code = self.cv2.VideoWriter_fourcc(*"mp4v")
        self.writer = self.cv2.VideoWriter(str(self.part), code, fps, (self.width, self.height))
        if not self.writer.isOpened():
            self.abandon()
            raise DataError(f"can't write {path} ({self.width}x{self.height}): is the folder writable, the disk full?")

    def write(self, frame: np.ndarray) -> None:
        """Append a frame (H, W, 3), uint8, RGB."""
        self.writer.write(np.ascontiguousarray(frame[: self.height, : self.width, ::-1]))
        self.written += 1

    def close(self) -> None:
        """Finish the file and count its frames, since OpenCV does not report a full disk.

        Raises:
            DataError: not all of them are there.
        """
        self.writer.release()
        check = self.cv2.VideoCapture(str(self.part))
        there = int(check.get(self.cv2.CAP_PROP_FRAME_COUNT)) if check.isOpened() else 0
        check.release()
        if there < self.written:
            self.abandon()
            raise DataError(f"can't write {self.path}: {there} of {self.written} frames arrived. Is the disk full?")
        try:
            os.replace(self.part, self.path)
        except OSError as error:
            self.abandon()
            raise DataError(f"can't write {self.path}: {error}") from error

    def abandon(self) -> None:
        """Remove the unfinished file."""
        self.writer.release()
        self.part.unlink(missing_ok=True)

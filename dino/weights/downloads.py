"""Files of addresses: downloaded once, whole or not at all, into one folder.

While a file `NAME` is fetched, its bytes are in `NAME.part`, and `NAME.part.json` notes of which version they are, so
that the next try fetches the rest. `NAME.lock` lets one process fetch it, and all others wait.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPResponse
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from filelock import FileLock, Timeout
from tqdm import tqdm

from dino.utils.files import UserError, make_folder
from dino.utils.printable import printable

from .http_requests import BrokenTransferError, check_address, open_address, read_chunks

_LIMIT = 8 << 30  # bytes
_TRIES = 5  # without progress
_PROGRESS = 1 << 20  # bytes
_TIMEOUT = 30.0  # seconds
_UNSAFE = re.compile(r"[^A-Za-z0-9.+=@_-]")
_OWN = re.compile(r"\.(part|lock|json)$", re.IGNORECASE)  # ends of names that have a meaning here
_DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.IGNORECASE)  # no files in Windows
_LONGEST_NAME = 80  # letters
_DEEPEST = 8  # folders and the file
_ETAG = re.compile(r'"[\x21\x23-\x7e]{1,200}"')  # a strong one: equal only for equal bytes
_RANGE = re.compile(r"bytes (\d{1,18})-\d{1,18}/(\d{1,18})")
_PAGES = ("text/html", "application/xhtml+xml")


def cache_folder() -> Path:
    """The folder of downloaded files: DINO_CACHE, else `dino-detectron2` in the platform's folder of caches.

    Raises:
        UserError: there is no home folder, and DINO_CACHE is not set.
    """
    try:
        if own := os.environ.get("DINO_CACHE"):
            return Path(own).expanduser().absolute()
        if sys.platform == "win32":
            base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local"
        elif sys.platform == "darwin":
            base = Path.home() / "Library/Caches"
        else:
            base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:
        raise UserError(f"no folder for downloads: set DINO_CACHE ({error})") from None
    return Path(base).absolute() / "dino-detectron2"


def cached_path(url: str) -> Path:
    """The place of an address in the cache: host and path, inside the cache folder whatever they are.

    A part of the address that makes no plain file name (a query, `..`, too many letters) is replaced, and the name gets
    a few digits of the address's hash.

    Raises:
        UserError: it is no allowed address.
    """
    address = check_address(url)
    split = urlsplit(address)
    parts = [part for part in split.path.split("/") if part][-_DEEPEST:] or ["index"]
    *folders, name = map(safe_name, parts)
    host = safe_name(split.netloc.replace(":", "_"))
    plain = split.netloc.replace(":", "-") == host.replace("_", "-") and "_" not in split.netloc
    if not plain or [*folders, name] != split.path.split("/")[1:] or split.query or not Path(name).suffix:
        digest = hashlib.sha256(address.encode()).hexdigest()
        name = f"{Path(name).stem}-{digest[:10]}{Path(name).suffix}"
    return cache_folder().joinpath(host if "." in host else f"{host}_", *folders, name)


def safe_name(part: str) -> str:
    """A part of an address as the name of a file or a folder on any system."""
    name = _UNSAFE.sub("_", part).strip(".")
    if len(name) > _LONGEST_NAME:
        suffix = Path(name).suffix[:20]
        name = name[: _LONGEST_NAME - len(suffix)] + suffix
    name = f"{name}_" if _OWN.search(name) else name
    return f"_{name}" if _DEVICES.match(name) or not name else name


class _Wanted(NamedTuple):
    """A file to fetch; see `fetch`."""

    url: str
    place: Path
    sha256: str
    size: int | None
    accept: tuple[str, ...]
    limit: int
    token: str
    timeout: float
    advice: str  # what to do without a network
    variable: str  # of the environment, that names another disk

    @property
    def part(self) -> Path:
        """The bytes so far."""
        return self.place.with_name(f"{self.place.name}.part")

    @property
    def note(self) -> Path:
        """Of which version they are, as JSON."""
        return self.place.with_name(f"{self.place.name}.part.json")

    def discard(self) -> None:
        """Remove both."""
        self.part.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)


def fetch(
    url: str,
    *,
    sha256: str = "",
    size: int | None = None,
    place: Path | None = None,
    keep: Path | None = None,
    accept: tuple[str, ...] = (),
    limit: int = _LIMIT,
    token: str = "",
    timeout: float = _TIMEOUT,
    pause: float = 1.0,
) -> Path:
    """Download a file, unless it is there, and return its place. Several processes fetch it once.

    Args:
        url: https://; http:// for this machine and for DINO_MIRROR, which replaces https:// of all addresses.
        sha256: of the file, or its first digits; "" if unknown. A file that is there is checked, too.
        size: of the file in bytes, None if unknown.
        place: the temporary file to write; by default that of `cached_path`.
        keep: another place in the cache than that of `cached_path`.
        accept: beginnings of the content types to accept; all but web pages by default.
        limit: most bytes.
        token: for the host of `url` and no other one.
        timeout: seconds after which a silent server is given up.
        pause: seconds before the second try; doubled for each further one.

    Raises:
        UserError: it can't be fetched or written, is too large, or is not the expected file.
    """
    address, target, variable = (
        check_address(url),
        place or keep or cached_path(url),
        "TMPDIR" if place else "DINO_CACHE",
    )
    advice = f"Fetch it on another machine and put it into {target}, or anywhere and give the path of the file (for a "
    advice = "Give a file instead" if place else f"{advice}recipe, write train.init_checkpoint=FILE)"
    most = min(limit, size or limit)
    wanted = _Wanted(address, target, sha256.lower(), size, accept, most, token, timeout, advice, variable)
    if not target.is_file():
        make_folder(target.parent)
        with _locked(wanted):
            if not target.is_file():
                _download(wanted, pause)
                return target
    check_file(target, sha256, size)
    return target


def check_file(path: Path, sha256: str = "", size: int | None = None) -> None:
    """Compare a file that is there with its hash (or the hash's first digits) and its size, where these are known.

    Raises:
        UserError: it is another file.
    """
    problem = _difference(path, [sha256.lower()], size)
    if problem:
        raise UserError(
            f"{path} is damaged, or another file: {problem}. Remove it, unless it is the hash that is wrong"
        )


def _difference(path: Path, hashes: list[str], size: int | None) -> str:
    """How a file differs from what is known of it; "" for not at all."""
    found = path.stat().st_size
    if size is not None and found != size:
        return f"it has {found:,} bytes, {size:,} were expected"
    known = [digits for digits in hashes if digits]
    if known:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        for digits in known:
            if not digest.startswith(digits):
                return f"its SHA-256 is {digest[: max(len(digits), 8)]}, {digits} was expected"
    return ""


def cannot_fetch(url: str, reason: object, advice: str) -> UserError:
    """The error where a file can't be fetched now."""
    return UserError(f"can't fetch {url} ({reason}). {advice}")


@contextmanager
def _locked(wanted: _Wanted) -> Iterator[None]:
    """Hold the lock of a file; waits for another process that fetches it.

    Raises:
        UserError: the folder can't be written.
    """
    lock = FileLock(wanted.place.with_name(f"{wanted.place.name}.lock"))
    try:
        try:
            lock.acquire(timeout=0.2)
        except Timeout:
            _say(f"waiting for another process that fetches {wanted.place.name}")
            lock.acquire()
    except (OSError, NotImplementedError) as error:
        raise UserError(f"can't write {wanted.place}: {error}. Set {wanted.variable} to another folder") from error
    try:
        yield
    finally:
        lock.release()


def _say(text: str) -> None:
    """Print a line for a person."""
    if sys.stderr:
        print(printable(text, None), file=sys.stderr)


def _download(wanted: _Wanted, pause: float) -> None:
    """Fetch a file in as many tries as make progress, and check it.

    Raises:
        UserError: see `fetch`.
    """
    first, left, stated = True, _TRIES, None
    while stated is None:
        before = _length(wanted.part)
        try:
            stated = _transfer(wanted, say=first and not _is_terminal())
        except BrokenTransferError as error:
            left = _TRIES if _length(wanted.part) - before >= _PROGRESS else left - 1
            if not left or (error.unreachable and first):
                raise cannot_fetch(wanted.url, error, wanted.advice) from error
            time.sleep(pause * 2 ** max(0, _TRIES - left - 1) if error.wait is None else error.wait)
        first = False
    problem = _difference(wanted.part, [wanted.sha256, stated], wanted.size)
    if problem:
        wanted.discard()
        raise UserError(f"{wanted.url} was damaged on its way, or is another file: {problem}. Nothing was kept")
    with _disk(wanted):
        os.replace(wanted.part, wanted.place)
    wanted.discard()


def _length(path: Path) -> int:
    """Bytes of a file, 0 for none."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _transfer(wanted: _Wanted, *, say: bool) -> str:
    """One request, for what is missing of a file. Returns the SHA-256 that the server states, "" for none."""
    start, etag = _resumable(wanted)
    headers = {"Range": f"bytes={start}-", "If-Range": etag} if start else {}
    response, stated = open_address(wanted.url, headers, token=wanted.token, timeout=wanted.timeout)
    with response:
        start, total = _extent(wanted, response, start, etag)
        _check_content(wanted, response, total)
        with _disk(wanted):
            if not start:
                _begin(wanted, response)
            _check_space(wanted, total, start)
            if say:
                _say(f"downloading {wanted.place.name} ({_megabytes(total)}) to {wanted.place}")
            _save(wanted, response, start, total)
    return stated


def _resumable(wanted: _Wanted) -> tuple[int, str]:
    """How many bytes of a file are there, and their ETag."""
    try:
        note = json.loads(wanted.note.read_text(encoding="utf-8"))
        fits = note["url"] == wanted.url and _ETAG.fullmatch(note["etag"])
        return (_length(wanted.part), note["etag"]) if fits else (0, "")
    except (OSError, ValueError, KeyError, TypeError):
        return 0, ""


def _begin(wanted: _Wanted, response: HTTPResponse) -> None:
    """Remove the bytes so far, and note of which version those to come are."""
    wanted.discard()
    etag = response.headers.get("ETag", "").strip()
    wanted.note.write_text(json.dumps({"url": wanted.url, "etag": etag}), encoding="utf-8")


def _extent(wanted: _Wanted, response: HTTPResponse, asked: int, etag: str) -> tuple[int, int | None]:
    """Where the body of a response begins in the file, and the length of the whole file, None if unknown.

    Args:
        asked, etag: the first byte that was asked for, of this version.

    Raises:
        BrokenTransferError: the server can't send the rest. The bytes so far are removed.
    """
    if response.status == 200:
        return 0, response.length
    found = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
    same = response.headers.get("ETag", etag).strip() == etag
    if response.status == 206 and same and found and asked and int(found[1]) == asked < int(found[2]):
        return asked, int(found[2])
    wanted.discard()
    raise BrokenTransferError(f"the server answers {response.status} with another part of the file")


def _check_content(wanted: _Wanted, response: HTTPResponse, total: int | None) -> None:
    """Look at the headers of a response.

    Raises:
        UserError: what follows is not the file, or too large.
    """
    kind = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    coding = response.headers.get("Content-Encoding", "identity").strip().lower()
    problem = ""
    if kind.startswith(_PAGES):
        problem = "the server sends a web page. Give the address of the file itself; perhaps the page asks for a login"
    elif wanted.accept and kind and not kind.startswith(wanted.accept):
        problem = f"the server sends {printable(kind)}, {' or '.join(wanted.accept)} was expected"
    elif coding not in ("", "identity"):
        problem = f"the server sends it compressed ({printable(coding)}), which was not asked for"
    elif total is not None:
        problem = _problem_of_size(wanted, total)
    if problem:
        raise UserError(f"can't fetch {wanted.url}: {problem}")


def _problem_of_size(wanted: _Wanted, total: int) -> str:
    """What is wrong with the stated length of a file; "" for nothing."""
    if not total:
        return "the server sends an empty file"
    if wanted.size not in (None, total):
        return f"the server has a file of {total:,} bytes, {wanted.size:,} were expected"
    return _too_large(wanted) if total > wanted.limit else ""


def _too_large(wanted: _Wanted) -> str:
    return f"it is larger than the limit of {wanted.limit:,} bytes"


def _check_space(wanted: _Wanted, total: int | None, start: int) -> None:
    """Compare what is missing of a file with the space on the disk.

    Raises:
        UserError: it is too little.
    """
    free = shutil.disk_usage(wanted.place.parent).free
    if total is not None and total - start > free:
        wanted.discard()
        raise UserError(
            f"can't write {wanted.place}: the disk has {_megabytes(free)} free, {_megabytes(total - start)} are needed"
            f". Free some, or set {wanted.variable} to another folder"
        )


@contextmanager
def _disk(wanted: _Wanted) -> Iterator[None]:
    """Turn a failure to write into an error; removes what was written.

    Raises:
        UserError: a file could not be written.
    """
    try:
        yield
    except OSError as error:
        wanted.discard()
        reason = error.strerror or type(error).__name__
        raise UserError(f"can't write {wanted.place}: {reason}. Set {wanted.variable} to another folder") from error


def _megabytes(count: int | None) -> str:
    """A number of bytes for a person."""
    if count is None:
        return "size unknown"
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count / 1e3:,.1f} kB"


def _is_terminal() -> bool:
    return bool(sys.stderr) and sys.stderr.isatty()


def _save(wanted: _Wanted, response: HTTPResponse, start: int, total: int | None) -> None:
    """Append the body of a response to the bytes so far.

    Raises:
        UserError: it is too large.
        BrokenTransferError: it is not whole.
        OSError: it could not be written.
    """
    written = start
    bar = tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=wanted.place.name[:40], disable=None)
    with bar, open(wanted.part, "ab") as file:
        try:
            for chunk in read_chunks(response, wanted.timeout):
                written += len(chunk)
                if written > wanted.limit:
                    break
                file.write(chunk)
                bar.update(len(chunk))
        finally:
            file.flush()
            os.fsync(file.fileno())
    if written > wanted.limit:
        wanted.discard()
        raise UserError(f"can't fetch {wanted.url}: {_too_large(wanted)}")
    if total is not None and written != total:
        raise BrokenTransferError(f"the connection broke after {written:,} of {total:,} bytes")

"""Requests for downloads: which addresses are allowed, redirects, and refusals in one sentence."""

from __future__ import annotations

import http
import http.client
import os
import re
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from typing import NamedTuple
from urllib.parse import SplitResult, quote, urljoin, urlsplit, urlunsplit

import dino
from dino.utils.files import UserError
from dino.utils.printable import printable

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_HOST = re.compile(r"[\w.-]+|[0-9a-f:.]+")  # the latter for IPv6
_MOST_REDIRECTS = 10
_REDIRECTS = (301, 302, 303, 307, 308)
_BUSY = (408, 425, 429, 500, 502, 503, 504)  # states of a server that can end
_LONGEST_WAIT = 30.0  # seconds, of those that a busy server asks for
_CHUNK = 1 << 18  # bytes
_SLOWEST = 1024  # bytes per second
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SAFE = "!#$%&'()*+,/:;=?@[]~"  # what stays as it is in a path or a query


class BrokenTransferError(Exception):
    """The connection broke, or the server is busy: another try can succeed.

    Args:
        reason: what happened.
        wait: seconds to wait first, as the server asks; None for no wish.
        unreachable: no connection was made.
    """

    def __init__(self, reason: str, wait: float | None = None, *, unreachable: bool = False):
        super().__init__(reason)
        self.wait = wait
        self.unreachable = unreachable


class Answer(NamedTuple):
    """The last response after all redirects, of status 200, 206 or 416, and the SHA-256 that the first host states."""

    response: http.client.HTTPResponse
    sha256: str


class NoSuchFileError(UserError):
    """A server says that it has no file of this address."""


def check_address(url: str) -> str:
    """The address with special characters quoted and without its fragment.

    Raises:
        UserError: it is no https:// address. http:// is allowed for this machine and for the host of DINO_MIRROR.
    """
    split, netloc = _split(url)
    if not (split.scheme == "https" or (split.scheme == "http" and _is_plain_allowed(split))):
        raise UserError(f"can't use the address {printable(url, 200)}: only https:// is allowed")
    path, query = (quote(part, _SAFE, errors="surrogatepass") for part in (split.path or "/", split.query))
    return urlunsplit((split.scheme, netloc, path, query, ""))


def _split(url: str) -> tuple[SplitResult, str]:
    """The parts of an address; host and port as they are to be written.

    Raises:
        UserError: it is no address of a host, or has a user name in it.
    """
    shown = printable(url, 200)
    try:
        split = urlsplit(url.strip())
        host, port = split.hostname or "", split.port
    except ValueError as error:
        raise UserError(f"can't use the address {shown}: {error}") from None
    if re.search(r"[\x00-\x1f\x7f]", url) or not _HOST.fullmatch(host) or "\\" in split.netloc:
        raise UserError(f"can't use the address {shown}: https://HOST/PATH was expected")
    if "@" in split.netloc:
        raise UserError(f"can't use an address with a user name or a password in it, of the host {host}")
    return split, (f"[{host}]" if ":" in host else host) + (f":{port}" if port else "")


def _is_plain_allowed(split: SplitResult) -> bool:
    """Whether http:// may be used for the host of an address."""
    mirror = urlsplit(_mirror())
    return split.hostname in _LOOPBACK or (mirror.scheme == "http" and split.netloc.lower() == mirror.netloc.lower())


def _mirror() -> str:
    """The beginning that replaces https:// in all addresses, of DINO_MIRROR; "" for none.

    Raises:
        UserError: it is no address.
    """
    mirror = os.environ.get("DINO_MIRROR", "").strip().rstrip("/")
    try:
        split = urlsplit(mirror)
        ok = split.scheme in ("http", "https") and _HOST.fullmatch(split.hostname or "") and split.port != 0
    except ValueError:
        ok = False
    if mirror and not (ok and "@" not in mirror and not split.query and not split.fragment):
        raise UserError(f"DINO_MIRROR must be http(s)://HOST[/path], not {printable(mirror, 200)}")
    return mirror


def _mirrored(url: str) -> str:
    """Where an address is fetched from."""
    mirror = _mirror()
    return check_address(f"{mirror}/{url.removeprefix('https://')}") if mirror and url.startswith("https://") else url


def _origin(url: str) -> tuple[str, str | None, int]:
    """Scheme, host and port."""
    split = urlsplit(url)
    return split.scheme, split.hostname, split.port or (443 if split.scheme == "https" else 80)


def open_address(url: str, headers: Mapping[str, str], *, token: str = "", timeout: float) -> Answer:
    """Request an address, or its copy at DINO_MIRROR, and follow redirects.

    Args:
        url: of `check_address`.
        token: sent to the host of `url` only.
        timeout: seconds without any answer.

    Raises:
        UserError: the server refuses, redirects to a forbidden address or in a circle.
        BrokenTransferError: another try can succeed.
    """
    here, sha256 = _mirrored(url), ""
    first = _origin(here)
    for _ in range(_MOST_REDIRECTS + 1):
        bearer = {"Authorization": f"Bearer {token}"} if token and _origin(here) == _origin(url) else {}
        response = _request(here, {**headers, **bearer}, timeout)
        if _origin(here) == first:
            sha256 = sha256 or _linked_hash(response)
        if response.status in (200, 206, 416):
            return Answer(response, sha256)
        with response:
            if response.status not in _REDIRECTS:
                raise _refusal(url, urlsplit(here).hostname, response)
            here = _redirected(here, response.headers.get("Location", ""))
    raise UserError(f"can't fetch {url}: more than {_MOST_REDIRECTS} redirects")


def _request(url: str, headers: Mapping[str, str], timeout: float) -> http.client.HTTPResponse:
    """One request, without redirects; a response of any status."""
    opener = urllib.request.OpenerDirector()  # the usual one would also read files and ftp://
    proxies = {} if urlsplit(url).hostname in _LOOPBACK else None  # None for those of the environment
    for handler in (
        urllib.request.ProxyHandler(proxies),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    request = urllib.request.Request(url, headers={"User-Agent": f"dino-detectron2/{dino.__version__}", **headers})
    try:
        return _limited(lambda: opener.open(request, timeout=timeout), 2 * timeout)
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            raise UserError(
                f"can't fetch {url}: the host's certificate is not trusted ({error.reason.verify_message}). With a "
                "proxy of a company, set SSL_CERT_FILE to its certificates"
            ) from None
        raise BrokenTransferError(_reason(error.reason, timeout), unreachable=True) from error
    except (http.client.HTTPException, OSError) as error:
        raise BrokenTransferError(_reason(error, timeout)) from error
    except ValueError as error:  # of a redirect to what is no address after all
        raise UserError(f"can't fetch {url}: {printable(error, 200)}") from None


def _limited(call: Callable[[], http.client.HTTPResponse], seconds: float) -> http.client.HTTPResponse:
    """Call a function in a thread of its own; its result.

    A socket's own limit holds for each piece of an answer, and a server can send endless ones.

    Raises:
        TimeoutError: it took more than so many seconds. The thread is left alone.
    """
    future: Future[http.client.HTTPResponse] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future.result(seconds)


def _reason(error: object, timeout: float) -> str:
    """What broke a connection, in a few words."""
    if isinstance(error, TimeoutError):
        return f"no answer for {timeout:g} seconds"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return printable((text.splitlines() or [type(error).__name__])[0], 150)


def _linked_hash(response: http.client.HTTPResponse) -> str:
    """The SHA-256 of the file, as Hugging Face's hub states it; "" for none."""
    text = response.headers.get("X-Linked-Etag", "").strip('"')
    return text if _SHA256.fullmatch(text) else ""


def _redirected(url: str, location: str) -> str:
    """The address to which a response of `url` leads.

    Raises:
        UserError: that is forbidden, or no address.
    """
    try:
        target = check_address(urljoin(url, location)) if location else ""
    except (UserError, ValueError):
        target = ""
    if not target or (url.startswith("https:") and not target.startswith("https:")):
        raise UserError(
            f"can't fetch {url}: it redirects to {printable(location, 200) or 'nowhere'}, and only https:// is allowed"
        )
    return target


def _refusal(url: str, host: str | None, response: http.client.HTTPResponse) -> UserError | BrokenTransferError:
    """The error for a status that is neither a success nor a redirect. It names `url`: where it led can be secret."""
    status = response.status
    phrase = http.HTTPStatus(status).phrase if status in {s.value for s in http.HTTPStatus} else "unknown"
    said = f"{host} answers {status} ({phrase})"
    if status in _BUSY:
        wait = response.headers.get("Retry-After", "")
        return BrokenTransferError(said, min(float(wait), _LONGEST_WAIT) if re.fullmatch(r"\d{1,6}", wait) else None)
    if status in (401, 403):
        said += ". The file needs a permission, or does not exist; for hf:// addresses, set HF_TOKEN"
    elif status in (404, 410):
        return NoSuchFileError(f"can't fetch {url}: {said}. There is no such file: check the address")
    return UserError(f"can't fetch {url}: {said}")


def read_chunks(response: http.client.HTTPResponse, timeout: float) -> Iterator[bytes]:
    """The body of a response, piece by piece.

    Args:
        timeout: seconds without any byte, or with too few of them.

    Raises:
        BrokenTransferError: the connection broke, stalled, or is too slow. (The end of a body without a stated length
            looks like a broken connection: compare the length.)
    """
    since, count = time.monotonic(), 0
    try:
        while chunk := response.read1(_CHUNK):
            yield chunk
            count += len(chunk)
            passed = time.monotonic() - since
            if passed > timeout:
                if count < _SLOWEST * passed:
                    raise BrokenTransferError(f"only {count} bytes in {passed:.0f} seconds")
                since, count = time.monotonic(), 0
    except (http.client.HTTPException, OSError) as error:
        raise BrokenTransferError(_reason(error, timeout)) from error

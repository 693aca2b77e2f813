"""A server of files on this machine, which can break off, lie and stall."""

import contextlib
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


@dataclass
class Reply:
    """What the server answers to one request: the whole file, or the part that was asked for.

    Attributes:
        status: 0 for 200, or 206 for a part.
        headers: added, or replaced; None leaves one out.
        sent: of the body, bytes after which the connection is cut; None for all.
        ranges: whether parts are sent.
        stall: seconds of silence before the body.
        write: writes the body itself.
    """

    body: bytes = b""
    status: int = 0
    headers: dict = field(default_factory=dict)
    sent: int | None = None
    ranges: bool = True
    stall: float = 0
    write: object = None

    def send(self, handler):
        start, body = self.start(handler.headers), self.body
        headers = {"Content-Length": str(len(body) - start)}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        handler.send_response(self.status or (206 if start else 200))
        for name, value in {**headers, **self.headers}.items():
            if value is not None:
                handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.flush()
        handler.server.stop.wait(self.stall)
        if self.write:
            self.write(handler.wfile)
        else:
            handler.wfile.write(body[start:] if self.sent is None else body[start : start + self.sent])

    def start(self, asked):
        found = re.fullmatch(r"bytes=(\d+)-", asked.get("Range", ""))
        same = asked.get("If-Range") == self.headers.get("ETag")
        return int(found[1]) if found and same and self.ranges else 0


class FileServer(ThreadingHTTPServer):
    """Answers with `files[path]`: a `Reply`, or a list of them for one request after another (the last one stays)."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {}
        self.requests = []  # (path, headers)
        self.stop = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def ranges(self):
        """The Range header of each request."""
        return [headers.get("Range") for _, headers in self.requests]

    def handle_error(self, request, client_address):
        """A client that gives up is no error."""


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests.append((self.path, self.headers))
        reply = self.server.files.get(self.path, Reply(status=404))
        if isinstance(reply, list):
            reply = reply.pop(0) if len(reply) > 1 else reply[0]
        reply.send(self)
        self.close_connection = True

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def running_server():
    server = FileServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stop.set()
        server.shutdown()
        server.server_close()


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server, with an empty cache that lies in `tmp_path / "cache"`, and no settings of the person who tests."""
    monkeypatch.setenv("DINO_CACHE", str(tmp_path / "cache"))
    for name in ("DINO_MIRROR", "HF_TOKEN", "HF_ENDPOINT", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "fvcore"))
    with running_server() as running:
        yield running


def drip(seconds, piece=b"x"):
    """Writes a body byte by byte."""

    def write(file):
        with contextlib.suppress(OSError):
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                file.write(piece)
                file.flush()
                time.sleep(0.01)

    return write

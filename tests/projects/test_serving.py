"""The serving example over loopback: many clients, bad pictures, a full queue, limits, the end of the server."""

import contextlib
import http.client
import io
import json
import re
import signal
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from dino import Predictor
from dino.cli import report_errors
from tests.d2.processes import environment
from tests.tools.programs import ROOT, load_program
from tests.weights.folders import NAMES, write_own

_, _, uvicorn = (
    pytest.importorskip(library, reason="the extra `serve` is not installed: pip install '.[serve]'")
    for library in ("fastapi", "python_multipart", "uvicorn")
)
FOLDER = "projects/dino/serving"
serve = load_program("serve", FOLDER)
BOUND = "----a-line-between-fields"


def picture(seed, height=48, width=64):
    """PNG bytes of noise."""
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(256, size=(height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def huge():
    """A small PNG file of 90,000 x 90,000 pixels, as its header says."""
    file = io.BytesIO()
    Image.new("1", (8, 8)).save(file, "png")
    content = file.getvalue()
    header = content[12:16] + (90_000).to_bytes(4) * 2 + content[24:29]
    return content[:12] + header + zlib.crc32(header).to_bytes(4) + content[33:]


def form(content, field="image", name="photo.png"):
    """The body of an upload."""
    head = f'--{BOUND}\r\nContent-Disposition: form-data; name="{field}"; filename="{name}"\r\n\r\n'
    return head.encode() + content + f"\r\n--{BOUND}--\r\n".encode()


def send(port, body=None, path="/predict", **headers):
    """(status, decoded JSON, headers) of a request in a connection of its own; GET where there is no body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    with contextlib.closing(connection):
        kind = {"Content-Type": f"multipart/form-data; boundary={BOUND}"}
        connection.request("GET" if body is None else "POST", path, body, {**kind, **headers})
        reply = connection.getresponse()
        return reply.status, json.loads(reply.read()), reply.headers


def post(port, content, **options):
    return send(port, form(content, **options))


class Gated:
    """A predictor that waits for `gate`, fails on black pictures, and notes how many pictures came together."""

    def __init__(self, predictor):
        self.predictor, self.gate, self.batches = predictor, threading.Event(), []
        self.read, self.names, self.batch_size = predictor.read, predictor.names, predictor.batch_size
        self.gate.set()

    def __call__(self, pictures):
        self.batches.append(len(pictures))
        assert self.gate.wait(120)
        if not all(pixels.any() for pixels in pictures):
            raise FloatingPointError("a black picture")
        return self.predictor(pictures)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("serving") / "model.pth"
    write_own(path)
    return path


@pytest.fixture(scope="module")
def predictor(checkpoint):
    return Predictor(checkpoint, score_thresh=0.05, batch_size=4, max_pixels=1_000_000)


@contextlib.contextmanager
def running(predictor, queue=16, max_bytes=100_000):
    """The port of a server in a thread, and the server."""
    app = serve.make_app(serve.Service(predictor, queue), max_bytes)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", timeout_graceful_shutdown=10))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield server.servers[0].sockets[0].getsockname()[1], server
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


@pytest.fixture
def gated(predictor):
    return Gated(predictor)


def wait_until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def assert_found(reply, expected):
    """The answer to a picture has the detections of the predictor."""
    status, content, _ = reply
    assert status == 200, content
    assert (content["height"], content["width"]) == expected.image_size
    rows = content["detections"]
    assert [row["label"] for row in rows] == expected.labels.tolist()
    assert [row["name"] for row in rows] == expected.names
    np.testing.assert_allclose([row["score"] for row in rows], expected.scores, atol=1e-5)
    np.testing.assert_allclose([row["box"] for row in rows], expected.boxes, atol=1e-3)


BAD = {
    "truncated": (form(picture(0)[:3000]), 400, "truncated"),
    "text": (form(b"no picture at all"), 400, "can't read image 'photo.png': cannot identify image file"),
    "huge": (form(huge()), 400, "8100000000 pixels"),
    "empty": (form(b""), 400, "cannot identify image file"),
    "wrong field": (form(picture(0), field="file"), 422, "form field image"),
    "no form": (b"no form", 400, ""),
    "nothing": (b"", 422, "form field image"),
    "too many bytes": (form(bytes(100_000)), 413, "more than the limit of 100000"),
}


def test_200_requests(predictor):
    """From 8 clients, every fourth of them bad: good ones get the detections of the predictor."""
    sizes = [(48, 64), (64, 48), (48, 96), (120, 160)]
    pictures = [picture(seed, *sizes[seed % 4]) for seed in range(12)]
    expected = [predictor(Image.open(io.BytesIO(content))) for content in pictures]
    assert sum(map(len, expected)) > 50
    bad = list(BAD.values())
    with running(predictor) as (port, _), ThreadPoolExecutor(8) as clients:
        bodies = [bad[n // 4 % len(bad)][0] if n % 4 == 3 else form(pictures[n % 12]) for n in range(200)]
        replies = list(clients.map(lambda body: send(port, body), bodies))
    for n, reply in enumerate(replies):
        if n % 4 == 3:
            assert reply[0] == bad[n // 4 % len(bad)][1]
        else:
            assert_found(reply, expected[n % 12])


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_get_one_line(predictor, name):
    body, status, message = BAD[name]
    with running(predictor) as (port, _):
        found, content, _ = send(port, body)
        assert found == status
        assert message in content["detail"]
        assert "\n" not in content["detail"]
        assert "/tmp" not in content["detail"]
        assert "dino check" not in content["detail"]
        assert post(port, picture(1))[0] == 200


def test_pictures_that_wait_run_together(gated):
    contents = [picture(seed) for seed in range(6)]
    expected = [gated.predictor(Image.open(io.BytesIO(content))) for content in contents]
    with running(gated) as (port, _), ThreadPoolExecutor(6) as clients:
        gated.gate.clear()
        first = clients.submit(post, port, contents[0])
        wait_until(lambda: gated.batches)
        others = [clients.submit(post, port, content) for content in contents[1:]]
        wait_until(lambda: send(port, path="/health")[1]["waiting"] == 5)
        gated.gate.set()
        for reply, detections in zip([first, *others], expected, strict=True):
            assert_found(reply.result(), detections)
    assert gated.batches == [1, 4, 1]


def test_a_full_queue(gated):
    """The third of two is refused, health is not, and those who came first get their answers."""
    with running(gated, queue=2) as (port, _), ThreadPoolExecutor(2) as clients:
        gated.gate.clear()
        first = clients.submit(post, port, picture(0))
        wait_until(lambda: gated.batches)
        accepted = [first, clients.submit(post, port, picture(1))]
        wait_until(lambda: send(port, path="/health")[1]["waiting"] == 1)
        status, content, headers = post(port, picture(2))
        assert (status, headers["Retry-After"]) == (503, "1")
        assert "queue is full" in content["detail"]
        assert send(port, path="/health")[:2] == (200, {"status": "ok", "waiting": 1, "names": NAMES})
        gated.gate.set()
        assert [reply.result()[0] for reply in accepted] == [200, 200]
        assert post(port, picture(2))[0] == 200


def test_an_error_of_one_picture_leaves_its_neighbours(gated):
    black = io.BytesIO()
    Image.new("RGB", (64, 48)).save(black, "png")
    with running(gated) as (port, _), ThreadPoolExecutor(4) as clients:
        gated.gate.clear()
        first = clients.submit(post, port, picture(0))
        wait_until(lambda: gated.batches)
        contents = [picture(1), black.getvalue(), picture(2)]
        others = [clients.submit(statuses, port, content) for content in contents]
        wait_until(lambda: send(port, path="/health")[1]["waiting"] == 3)
        gated.gate.set()
        assert first.result()[0] == 200
        assert [reply.result() for reply in others] == [200, 500, 200]
        assert post(port, picture(3))[0] == 200


def statuses(port, content):
    """The status alone: the body of a 500 is no JSON."""
    try:
        return post(port, content)[0]
    except json.JSONDecodeError:
        return 500


def test_a_body_of_unknown_length_is_refused(predictor):
    with running(predictor) as (port, _):
        status, content, _ = send(port, iter([form(picture(0))]))  # sent in chunks
        assert (status, content["detail"]) == (411, "a request needs the header Content-Length")
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.putrequest("POST", "/predict")
        connection.putheader("Content-Length", "10")  # which Transfer-Encoding overrides
        connection.putheader("Transfer-Encoding", "chunked")
        connection.endheaders(b"0\r\n\r\n")
        assert connection.getresponse().status in (400, 411)
        connection.close()
        connection.request("HEAD", "/health")
        assert connection.getresponse().status == 405  # and not that its length is missing


def test_accepted_requests_end_before_the_server(gated):
    with running(gated) as (port, server), ThreadPoolExecutor(1) as clients:
        gated.gate.clear()
        reply = clients.submit(post, port, picture(0))
        wait_until(lambda: gated.batches)
        server.should_exit = True
        wait_until(lambda: not is_open(port))
        gated.gate.set()
        assert reply.result()[0] == 200


def is_open(port):
    try:
        return send(port, path="/health")[0] == 200
    except OSError:
        return False


def test_the_command(checkpoint):
    """On a free port, until SIGTERM."""
    words = [sys.executable, ROOT / FOLDER / "serve.py", checkpoint, "--port", "0"]
    process = subprocess.Popen(words, env=environment(), stderr=subprocess.PIPE, text=True)
    try:
        line = next(line for line in process.stderr if "running on" in line)
        port = int(re.search(r"http://127\.0\.0\.1:(\d+)", line)[1])
        assert send(port, path="/health")[1]["status"] == "ok"
        assert post(port, picture(0))[0] == 200
        process.send_signal(signal.SIGTERM)
        _, rest = process.communicate(timeout=120)
        assert process.returncode == 128 + signal.SIGTERM
        assert "Traceback" not in rest
    finally:
        process.kill()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [(["absent.pth"], 2, "absent.pth"), (["model.pth", "--queue", "0"], 2, "--queue, --max-bytes")],
)
def test_mistakes_are_one_error(words, code, message, capsys):
    try:
        found = report_errors(lambda: serve.main(words))
    except SystemExit as end:
        found = end.code
    assert found == code
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error

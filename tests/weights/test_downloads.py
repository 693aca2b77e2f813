import errno
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from dino.utils.files import UserError
from dino.weights import downloads, http_requests
from dino.weights.downloads import cache_folder, cached_path, fetch

from ..file_server import Reply, drip
from ..tools.programs import ROOT

pytestmark = pytest.mark.usefixtures("server")
BODY = bytes(range(256)) * 4000  # about 1 MB
SHA256 = hashlib.sha256(BODY).hexdigest()
ETAG = {"ETag": '"one"'}
QUICK = {"timeout": 0.3, "pause": 0.001}


def files_below(folder):
    """Names of all files, but for locks."""
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")


def test_a_file_is_fetched_once(server, tmp_path, capsys):
    server.files["/a/net-1.pth"] = Reply(BODY)
    path = fetch(f"{server.url}/a/net-1.pth", sha256=SHA256, size=len(BODY))
    assert path == tmp_path / f"cache/127.0.0.1_{server.server_port}/a/net-1.pth"
    assert path.read_bytes() == BODY
    assert fetch(f"{server.url}/a/net-1.pth") == path
    assert len(server.requests) == 1
    assert files_below(tmp_path) == ["net-1.pth"]
    assert capsys.readouterr() == ("", f"downloading net-1.pth (1.0 MB) to {path}\n")


@pytest.mark.parametrize("digits", [SHA256, SHA256[:8], SHA256.upper(), ""])
def test_hashes(server, digits):
    server.files["/net.pth"] = Reply(BODY)
    assert fetch(f"{server.url}/net.pth", sha256=digits).read_bytes() == BODY


def test_a_wrong_hash(server, tmp_path):
    server.files["/net.pth"] = Reply(BODY, headers=ETAG)
    with pytest.raises(
        UserError, match=rf"net\.pth .* SHA-256 is {SHA256[:8]}, 0{{8}} was expected\. Nothing was kept"
    ):
        fetch(f"{server.url}/net.pth", sha256="00000000")
    assert files_below(tmp_path) == []
    assert fetch(f"{server.url}/net.pth", sha256=SHA256).is_file()
    assert server.ranges() == [None, None]


def test_the_hash_that_the_server_states(server, tmp_path):
    server.files["/net.pth"] = Reply(BODY, headers={"X-Linked-Etag": f'"{"0" * 64}"'})
    with pytest.raises(UserError, match=f"SHA-256 is {SHA256}, {'0' * 64} was expected"):
        fetch(f"{server.url}/net.pth")
    server.files["/net.pth"] = Reply(status=302, headers={"Location": "/there", "X-Linked-Etag": f'"{SHA256}"'})
    server.files["/there"] = Reply(BODY)
    assert fetch(f"{server.url}/net.pth").read_bytes() == BODY


def test_what_lies_in_the_cache_is_checked(server):
    path = cached_path(f"{server.url}/net.pth")
    path.parent.mkdir(parents=True)
    path.write_bytes(BODY)
    assert fetch(f"{server.url}/net.pth", sha256=SHA256[:8], size=len(BODY)) == path
    with pytest.raises(UserError, match=rf"{path} is damaged, or another file: its SHA.* Remove it"):
        fetch(f"{server.url}/net.pth", sha256="00000000")
    with pytest.raises(UserError, match=r"it has 1,024,000 bytes, 5 were expected\. Remove it"):
        fetch(f"{server.url}/net.pth", size=5)
    assert path.read_bytes() == BODY
    assert server.requests == []


def test_the_rest_after_a_break(server, tmp_path):
    """In one call, and in the next one."""
    half = len(BODY) // 2
    server.files["/net.pth"] = [Reply(BODY, headers=ETAG, sent=half), Reply(BODY, headers=ETAG)]
    assert fetch(f"{server.url}/net.pth", **QUICK).read_bytes() == BODY
    assert server.ranges() == [None, f"bytes={half}-"]
    server.requests.clear()
    server.files["/two.pth"] = [Reply(BODY, headers=ETAG, sent=half), Reply(status=404), Reply(BODY, headers=ETAG)]
    with pytest.raises(UserError, match="404"):
        fetch(f"{server.url}/two.pth", **QUICK)
    assert files_below(tmp_path / "cache") == ["net.pth", "two.pth.part", "two.pth.part.json"]
    assert fetch(f"{server.url}/two.pth", **QUICK).read_bytes() == BODY
    assert server.ranges() == [None, f"bytes={half}-", f"bytes={half}-"]


def test_the_rest_after_a_kill(server):
    path, half = cached_path(f"{server.url}/net.pth"), len(BODY) // 2

    def first_half(file):
        file.write(BODY[:half])
        server.stop.wait(20)

    server.files["/net.pth"] = [Reply(BODY, headers=ETAG, write=first_half), Reply(BODY, headers=ETAG)]
    process = subprocess.Popen(
        [sys.executable, "-c", FETCH, f"{server.url}/net.pth"], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    end = time.monotonic() + 30
    while not (path.parent / "net.pth.part").exists() or (path.parent / "net.pth.part").stat().st_size < half:
        assert time.monotonic() < end
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not path.exists()
    assert fetch(f"{server.url}/net.pth").read_bytes() == BODY
    assert server.ranges() == [None, f"bytes={half}-"]


@pytest.mark.parametrize(
    "second",
    [
        Reply(BODY, headers=ETAG, ranges=False),
        Reply(BODY, headers={"ETag": '"two"'}),
        Reply(BODY),
    ],
    ids=["ignores ranges", "another version", "no version"],
)
def test_a_new_start_where_the_rest_does_not_fit(server, second):
    old = bytes(len(BODY))
    server.files["/net.pth"] = [Reply(old, headers=ETAG, sent=5000), second]
    assert fetch(f"{server.url}/net.pth", **QUICK).read_bytes() == BODY
    assert server.ranges() == [None, "bytes=5000-"]


@pytest.mark.parametrize(
    "second",
    [
        Reply(BODY[5000:], 206, {"Content-Range": f"bytes 4000-{len(BODY)}/{len(BODY)}"}, ranges=False),
        Reply(BODY[5000:], 206, {"Content-Range": "nonsense"}, ranges=False),
        Reply(BODY[5000:], 206, {"Content-Range": f"bytes 5000-1/{len(BODY)}", "ETag": '"two"'}, ranges=False),
        Reply(b"", 416),
    ],
    ids=["another part", "no range", "part of another version", "416"],
)
def test_parts_that_were_not_asked_for(server, second):
    server.files["/net.pth"] = [Reply(bytes(len(BODY)), headers=ETAG, sent=5000), second, Reply(BODY, headers=ETAG)]
    assert fetch(f"{server.url}/net.pth", **QUICK).read_bytes() == BODY
    assert server.ranges() == [None, "bytes=5000-", None]


def test_without_a_version_nothing_is_resumed(server):
    server.files["/net.pth"] = [Reply(BODY, headers={"ETag": 'W/"weak"'}, sent=5000), Reply(BODY)]
    assert fetch(f"{server.url}/net.pth", **QUICK).read_bytes() == BODY
    assert server.ranges() == [None, None]


@pytest.mark.parametrize(
    "note", ["", "[]", '{"url": 1, "etag": 2}', '{"url": "http://other/", "etag": "\\"one\\""}', "ü"]
)
def test_a_part_without_a_sound_note_is_replaced(server, note):
    path = cached_path(f"{server.url}/net.pth")
    path.parent.mkdir(parents=True)
    Path(f"{path}.part").write_bytes(b"x" * 10)
    Path(f"{path}.part.json").write_bytes(note.encode("latin-1"))
    server.files["/net.pth"] = Reply(BODY, headers=ETAG)
    assert fetch(f"{server.url}/net.pth").read_bytes() == BODY
    assert server.ranges() == [None]


def test_an_end_to_tries(server, tmp_path):
    server.files["/net.pth"] = Reply(BODY, sent=5000)
    with pytest.raises(
        UserError,
        match=r"can't fetch http.*/net\.pth \(the connection broke after 5,000 of 1,024,000 bytes\)\. Fetch it",
    ):
        fetch(f"{server.url}/net.pth", **QUICK)
    assert len(server.requests) == 5
    assert "net.pth" not in files_below(tmp_path)


def test_tries_with_progress_do_not_count(server, monkeypatch):
    monkeypatch.setattr(downloads, "_PROGRESS", 100_000)
    server.files["/net.pth"] = Reply(BODY, headers=ETAG, sent=120_000)
    assert fetch(f"{server.url}/net.pth", **QUICK).read_bytes() == BODY
    assert len(server.requests) == 9


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_a_busy_server_is_asked_again(server, status):
    server.files["/net.pth"] = [Reply(status=status, headers={"Retry-After": "0"}), Reply(status=status), Reply(BODY)]
    assert fetch(f"{server.url}/net.pth", **QUICK).read_bytes() == BODY


@pytest.mark.parametrize(
    ("status", "message", "requests"),
    [
        (404, r"answers 404 \(Not Found\)\. There is no such file: check the address$", 1),
        (410, r"answers 410 \(Gone\)\. There is no such file", 1),
        (401, r"answers 401 \(Unauthorized\)\. The file needs a permission, .*set HF_TOKEN", 1),
        (403, r"answers 403 \(Forbidden\)\. The file needs a permission", 1),
        (418, r"answers 418 \(I'm a Teapot\)$", 1),
        (799, r"answers 799 \(unknown\)$", 1),
        (206, r"answers 206 with another part of the file", 5),
        (500, r"\(127\.0\.0\.1 answers 500 \(Internal Server Error\)\)\. Fetch it on another machine", 5),
    ],
)
def test_refusals(server, tmp_path, status, message, requests):
    server.files["/net.pth"] = Reply(b"a page", status)
    with pytest.raises(UserError, match=message) as error:
        fetch(f"{server.url}/net.pth", **QUICK)
    assert "\n" not in str(error.value)
    assert len(server.requests) == requests
    assert files_below(tmp_path) == []


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (Reply(BODY, headers={"Content-Type": "text/html; charset=utf-8"}), "sends a web page.* asks for a login"),
        (Reply(BODY, headers={"Content-Encoding": "gzip"}), r"compressed \(gzip\), which was not asked for"),
        (Reply(b""), "sends an empty file"),
        (Reply(BODY + b"x"), "has a file of 1,024,001 bytes, 1,024,000 were expected"),
        (Reply(BODY[:-1]), "has a file of 1,023,999 bytes, 1,024,000 were expected"),
        (Reply(BODY + b"x", headers={"Content-Length": None}), "larger than the limit of 1,024,000 bytes"),
        (Reply(BODY[:-1], headers={"Content-Length": None}), "1,023,999 bytes, 1,024,000 were expected. Nothing was"),
    ],
)
def test_what_is_not_the_file(server, tmp_path, reply, message):
    server.files["/net.pth"] = reply
    with pytest.raises(UserError, match=message):
        fetch(f"{server.url}/net.pth", size=len(BODY), **QUICK)
    assert files_below(tmp_path) == []


def test_the_limit_of_size(server, tmp_path):
    server.files |= {"/net.pth": Reply(BODY), "/huge.pth": Reply(BODY, headers={"Content-Length": str(10**18)})}
    with pytest.raises(UserError, match="larger than the limit of 1,000 bytes"):
        fetch(f"{server.url}/net.pth", limit=1000)
    with pytest.raises(UserError, match="larger than the limit of 8,589,934,592 bytes"):
        fetch(f"{server.url}/huge.pth")
    assert files_below(tmp_path) == []


def test_an_endless_body(server, tmp_path):
    """It has no length; one in pieces has none, either."""

    def endless(file):
        while True:
            file.write(b"x" * 100_000)

    def endless_pieces(file):
        while True:
            file.write(b"186a0\r\n" + b"x" * 100_000 + b"\r\n")

    length, pieces = {"Content-Length": None}, {"Content-Length": None, "Transfer-Encoding": "chunked"}
    server.files |= {"/a": Reply(headers=length, write=endless), "/b": Reply(headers=pieces, write=endless_pieces)}
    for name in "ab":
        with pytest.raises(UserError, match="larger than the limit of 3,000,000 bytes"):
            fetch(f"{server.url}/{name}", limit=3_000_000)
    assert files_below(tmp_path) == []


def test_a_body_in_pieces(server, monkeypatch):
    """A break in it is found, though its length is unknown."""
    monkeypatch.setattr("tests.file_server.Handler.protocol_version", "HTTP/1.1")
    headers = {"Content-Length": None, "Transfer-Encoding": "chunked"}
    part = b"3e8\r\n" + BODY[:1000] + b"\r\n"
    broken, whole = (Reply(headers=headers, write=lambda f, e=e: f.write(part + e)) for e in (b"", b"0\r\n\r\n"))
    server.files["/net.pth"] = [broken, whole]
    assert fetch(f"{server.url}/net.pth", **QUICK).read_bytes() == BODY[:1000]
    assert len(server.requests) == 2


def test_a_silent_server(server):
    server.files["/net.pth"] = [Reply(BODY, stall=20), Reply(BODY)]
    assert fetch(f"{server.url}/net.pth", **QUICK).read_bytes() == BODY


def test_a_slow_server(server):
    """It sends something all the time, in the body or before."""
    slow = Reply(headers={"Content-Length": "1000000"}, write=drip(20))
    server.files["/net.pth"] = slow
    with pytest.raises(UserError, match=r"only \d+ bytes in 0 seconds"):
        fetch(f"{server.url}/net.pth", timeout=0.1, pause=0.001)
    server.requests.clear()
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer():
            for _ in range(5):
                connection, _ = listening.accept()
                threading.Thread(target=send, args=[connection], daemon=True).start()

        def send(connection):
            with connection:
                connection.sendall(b"HTTP/1.0 200 OK\r\nX-Long: ")
                drip(3)(connection.makefile("wb", 0))

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(UserError, match=r"\(no answer for 0\.1 seconds\)"):
            fetch(f"http://127.0.0.1:{listening.getsockname()[1]}/x.pth", timeout=0.1, pause=0.001)


def test_redirects(server):
    server.files |= {
        "/a": Reply(status=302, headers={"Location": "/b?c=d#e"}),
        "/b?c=d": Reply(status=308, headers={"Location": f"{server.url}/my%20net ü.pth"}),
        "/my%20net%20%C3%BC.pth": Reply(BODY),
    }
    assert fetch(f"{server.url}/a").read_bytes() == BODY


@pytest.mark.parametrize(
    "target", ["file:///etc/passwd", "ftp://127.0.0.1/x", "http://example.com/x", "data:,x", "", "https://a:b@c.com/x"]
)
def test_forbidden_redirects(server, tmp_path, target):
    server.files["/a"] = Reply(status=302, headers={"Location": target})
    with pytest.raises(UserError, match=r"/a: it redirects to .*, and only https:// is allowed"):
        fetch(f"{server.url}/a")
    assert files_below(tmp_path) == []


def test_redirects_in_a_circle(server):
    server.files |= {
        "/a": Reply(status=301, headers={"Location": "/b"}),
        "/b": Reply(status=307, headers={"Location": "/a"}),
    }
    with pytest.raises(UserError, match="more than 10 redirects"):
        fetch(f"{server.url}/a")
    assert len(server.requests) == 11


def test_no_redirect_leaves_https():
    with pytest.raises(UserError, match="redirects to http://127"):
        http_requests._redirected("https://example.com/a", "http://127.0.0.1:80/b")
    assert http_requests._redirected("https://example.com/a/b?c", "../d") == "https://example.com/d"


def test_a_token_stays_with_its_host(server, monkeypatch):
    """Another port is another host, and so is a mirror."""
    server.files |= {"/a": Reply(status=302, headers={"Location": "/b"})}
    server.files["/b"] = Reply(status=302, headers={"Location": f"http://localhost:{server.server_port}/c"})
    server.files |= {"/c": Reply(BODY), "/m/example.com/d": Reply(BODY)}
    fetch(f"{server.url}/a", token="secret")
    monkeypatch.setenv("DINO_MIRROR", f"{server.url}/m/")
    fetch("https://example.com/d", token="secret")
    found = {path: headers.get("Authorization") for path, headers in server.requests}
    assert found == {"/a": "Bearer secret", "/b": "Bearer secret", "/c": None, "/m/example.com/d": None}
    assert "secret" not in json.dumps([str(headers) for path, headers in server.requests if path not in "/a/b"])


def test_a_mirror_takes_every_address(server, tmp_path, monkeypatch):
    monkeypatch.setenv("DINO_MIRROR", server.url)
    server.files["/github.com/a/b.pth?x=1"] = Reply(BODY)
    path = fetch("https://github.com/a/b.pth?x=1")
    assert path.parent == tmp_path / "cache/github.com/a"


@pytest.mark.parametrize(
    "mirror", ["mirror.com", "ftp://mirror.com", "https://", "https://a:b@c.com", "http://a.com/?b", "http://[a"]
)
def test_a_mirror_that_is_none(server, monkeypatch, mirror):
    monkeypatch.setenv("DINO_MIRROR", mirror)
    with pytest.raises(UserError, match=r"DINO_MIRROR must be http\(s\)://HOST\[/path\], not"):
        fetch("https://github.com/a/b.pth")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://example.com/a", "only https:// is allowed"),
        ("http://127.0.0.1.example.com/a", "only https:// is allowed"),
        ("ftp://example.com/a", "only https:// is allowed"),
        ("file:///etc/passwd", "https://HOST/PATH was expected"),
        ("file://localhost/etc/passwd", "only https:// is allowed"),
        ("https://user:secret@example.com/a", "a user name or a password in it, of the host example.com"),
        (r"https://example.com\@evil.com/a", "HOST/PATH was expected"),
        (r"https://example.com\a", "HOST/PATH was expected"),
        ("https:///a", "HOST/PATH was expected"),
        ("https://", "HOST/PATH was expected"),
        ("https://[::1/a", "Invalid IPv6"),
        ("https://example.com:99999/a", "[Pp]ort"),
        ("https://exam ple.com/a", "HOST/PATH was expected"),
        ("https://example.com/a\r\nX-Injected: 1", "HOST/PATH was expected"),
        ("https://example.com/a\x1b[31m", "HOST/PATH was expected"),
    ],
)
def test_forbidden_addresses(url, message):
    with pytest.raises(UserError, match=message) as error:
        fetch(url)
    assert "secret" not in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("https://github.com/A/b/v0.1/net-1.pth", "github.com/A/b/v0.1/net-1.pth"),
        ("https://GitHub.com:443/net.pth", "github.com_443/net.pth"),
        ("https://github.com_443/net.pth", r"github.com_443/net-\w{10}.pth"),
        ("https://käse.com/net.pth", r"k_se.com/net-\w{10}.pth"),
        ("https://a.com/\udcff.pth", r"a.com/_ED_B3_BF-\w{10}.pth"),
        ("https://a.com/net.pth?x=../../y", r"a.com/net-\w{10}.pth"),
        ("https://a.com/net.pth?x=1#sha256=00", r"a.com/net-\w{10}.pth"),
        ("https://a.com/../../net.pth", r"a.com/_/_/net-\w{10}.pth"),
        ("https://a.com/%2e%2e/%2e%2e%2fnet.pth", r"a.com/_2e_2e/_2e_2e_2fnet-\w{10}.pth"),
        (r"https://a.com/..\..\net.pth", r"a.com/_5C.._5Cnet-\w{10}.pth"),
        ("https://a.com/C:/net.pth", r"a.com/C_/net-\w{10}.pth"),
        ("https://a.com/~/.ssh/config", r"a.com/_/ssh/config-\w{10}"),
        ("https://a.com/con.pth", r"a.com/_con-\w{10}.pth"),
        ("https://a.com/net.pth.part", r"a.com/net.pth-\w{10}.part_"),
        ("https://a.com/net.pth.lock", r"a.com/net.pth-\w{10}.lock_"),
        ("https://a.com", r"a.com/index-\w{10}"),
        ("https://a.com//net.pth", r"a.com/net-\w{10}.pth"),
        ("https://published/net.pth", "published_/net.pth"),
        ("https://[::1]/net.pth", r"___1__/net-\w{10}.pth"),
        ("https://a.com/" + "x" * 5000 + ".pth", r"a.com/x{76}-\w{10}.pth"),
        ("https://a.com/" + "a/" * 5000 + "net.pth", r"a.com/(a/){7}net-\w{10}.pth"),
        ("https://a.com/n e t ü.pth", r"a.com/n_20e_20t_20_C3_BC-\w{10}.pth"),
    ],
)
def test_places_in_the_cache(tmp_path, url, place):
    found = cached_path(url).relative_to(tmp_path / "cache")
    assert re.fullmatch(place, found.as_posix()), found
    assert ".." not in found.parts


def test_places_differ():
    urls = [
        "n.pth",
        "n.pth?1",
        "n.pth?2",
        "/n.pth",
        "../n.pth",
        "%2e%2e/n.pth",
        "n",
        "n/",
        "a/n.pth",
        "a//n.pth",
        "N.pth",
    ]
    assert set(Counter(cached_path(f"https://a.com/{url}") for url in urls).values()) == {1}


def test_the_cache_of_the_platform(monkeypatch, tmp_path):
    monkeypatch.delenv("DINO_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    for platform, folder in {"linux": "xdg", "darwin": "Library/Caches", "win32": "local"}.items():
        monkeypatch.setattr(sys, "platform", platform)
        assert cache_folder() == tmp_path / folder / "dino-detectron2"
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == tmp_path / ".cache/dino-detectron2"
    monkeypatch.setenv("DINO_CACHE", "~/mine")
    assert cache_folder() == tmp_path / "mine"


FETCH = """
import sys, types
package = sys.modules["dino.weights"] = types.ModuleType("dino.weights")
package.__path__ = ["dino/weights"]  # without its __init__, which imports PyTorch
from dino.weights.downloads import fetch
print(len(fetch(sys.argv[1]).read_bytes()))
"""


def test_two_processes_fetch_once(server):
    server.files["/net.pth"] = Reply(BODY, stall=0.5)
    words = [sys.executable, "-c", FETCH, f"{server.url}/net.pth"]
    running = [
        subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in "ab"
    ]
    results = [process.communicate(timeout=60) for process in running]
    assert [out for out, _ in results] == [f"{len(BODY)}\n"] * 2, results
    assert len(server.requests) == 1


def test_many_threads_fetch_once(server, capsys):
    server.files["/net.pth"] = Reply(BODY, stall=0.3)
    threads = [threading.Thread(target=fetch, args=[f"{server.url}/net.pth"]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(server.requests) == 1
    assert "waiting for another process that fetches net.pth" in capsys.readouterr().err


LIMITED = f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000)){FETCH}"


@pytest.mark.skipif(sys.platform == "win32", reason="limits of Unix")
def test_a_full_disk(server, tmp_path, monkeypatch):
    server.files |= {"/net.pth": Reply(BODY), "/endless.pth": Reply(BODY, headers={"Content-Length": None})}
    words = [sys.executable, "-c", LIMITED, f"{server.url}/net.pth"]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "UserError: can't write " in result.stderr
    assert "net.pth: File too large. Set DINO_CACHE" in result.stderr
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 0, 10))
    with pytest.raises(
        UserError, match=r"the disk has 0\.0 kB free, 1\.0 MB are needed\. Free some, or set DINO_CACHE"
    ):
        fetch(f"{server.url}/net.pth")
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(UserError, match=r"can't write .*endless\.pth: No space left on device\. Set DINO_CACHE"):
        fetch(f"{server.url}/endless.pth")
    assert files_below(tmp_path) == []


def no_space(_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_cache_that_is_none(server, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("DINO_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"can't make the folder .*/file/127"):
        fetch(f"{server.url}/net.pth")


def offline(*_, **__):
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


def test_without_a_network(monkeypatch, tmp_path):
    """One try, and one sentence on what to do."""
    monkeypatch.setattr(socket, "getaddrinfo", offline)
    with pytest.raises(UserError) as error:
        fetch("https://a.com/b/net.pth")
    place = tmp_path / "cache/a.com/b/net.pth"
    assert str(error.value) == (
        f"can't fetch https://a.com/b/net.pth (Name or service not known). Fetch it on another machine and put it into "
        f"{place}, or anywhere and give the path of the file (for a recipe, write train.init_checkpoint=FILE)"
    )
    place.write_bytes(b"by hand")
    assert fetch("https://a.com/b/net.pth") == place


def test_nobody_listens():
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(
        UserError, match=rf"can't fetch http://127\.0\.0\.1:{port}/a\.pth \(Connection refused\)\. Fetch"
    ):
        fetch(f"http://127.0.0.1:{port}/a.pth", pause=100)


def test_what_is_no_http():
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer():
            for _ in range(5):
                connection, _ = listening.accept()
                with connection:
                    connection.recv(1000)
                    connection.sendall(b"SSH-2.0-OpenSSH\r\n")

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(UserError, match=r"\(SSH-2\.0-OpenSSH\)\. Fetch it"):
            fetch(f"http://127.0.0.1:{listening.getsockname()[1]}/a.pth", **QUICK)


def test_a_proxy_is_not_asked_for_this_machine(server, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    server.files["/net.pth"] = Reply(BODY)
    assert fetch(f"{server.url}/net.pth").is_file()

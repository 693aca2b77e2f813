import gc
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dino import cli
from dino.data.images import read_image
from dino.inference import predict_files, remote_images
from dino.inference.remote_images import fetch_images, is_remote
from dino.utils.files import DataError, UserError

from ..file_server import Reply
from .test_predict_files import huge_png, read_json
from .test_predictor import picture, tiny, write_checkpoint

pytestmark = pytest.mark.usefixtures("server")


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """The folder of temporary files."""
    monkeypatch.setattr(remote_images.tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    return tmp_path / "temporary"


@pytest.fixture(scope="module")
def predictor():
    return tiny(score_thresh=0)


def encoded(seed=0, form="PNG"):
    file = io.BytesIO()
    Image.fromarray(picture(seed=seed)).save(file, form)
    return file.getvalue()


def test_a_picture_lives_as_long_as_its_prediction(server, predictor, temporary):
    server.files["/a/photo.png?size=1"] = Reply(encoded(), headers={"Content-Type": "image/png"})
    found = predictor(f"{server.url}/a/photo.png?size=1")
    assert found.source.name == "photo.png"
    assert found.boxes.equal(predictor(picture()).boxes)
    assert np.asarray(found.draw()).shape == (72, 100, 3)
    assert len(list(temporary.iterdir())) == 1
    del found
    gc.collect()
    assert list(temporary.iterdir()) == []


def test_addresses_that_pathlib_broke_and_lists_of_them(server, predictor):
    server.files |= {f"/{n}": Reply(encoded(n)) for n in range(2)}
    found = predictor([Path(f"{server.url}/0"), f"{server.url}/1", picture(seed=1)])
    assert [len(f) for f in found] == [10] * 3
    assert found[1].boxes.equal(found[2].boxes)
    assert not found[0].boxes.equal(found[1].boxes)


def test_the_newest_picture_of_an_address(server):
    server.files["/latest.png"] = [Reply(encoded(0)), Reply(encoded(1))]
    one, two = (fetch_images([f"{server.url}/latest.png"])[0] for _ in range(2))
    assert (read_image(one) == picture(seed=0)).all()
    assert (read_image(two) == picture(seed=1)).all()


def test_the_verb(server, tmp_path, monkeypatch, temporary, capsys):
    """Names of results are those of the addresses; equal ones get the host's folder."""
    write_checkpoint(tmp_path / "model.pth")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(predict_files, "keep_freed_memory", lambda: None)  # it would last
    Image.fromarray(picture()).save("b.png")
    names = ["/x/a%20b.jpg?key=secret", "/x/b.png", "/y/b.png", "/..%2f..%2fetc", "/"]
    server.files |= {name: Reply(encoded(i)) for i, name in enumerate(names)}
    inputs = ["b.png", *(server.url + name for name in names), server.url + names[0]]
    assert cli.main(["predict", "model.pth", *inputs, "--output", "out", "--device", "cpu"]) == 0
    host = f"127.0.0.1_{server.server_port}"
    expected = ["b.png", "a_b.jpg", f"{host}/b.png", f"{host}/y/b.png", "_.._etc", "index"]
    assert [image["file_name"] for image in read_json(tmp_path / "out/predictions.json")["images"]] == expected
    drawn = {p.relative_to("out").as_posix() for p in Path("out").rglob("*.*g")}
    assert drawn == {*expected[:4], "_.._etc.png", "index.png"}
    assert len(server.requests) == len(names)
    gc.collect()
    assert list(temporary.iterdir()) == []
    assert not (tmp_path / "cache").exists()
    assert re.search(rf"downloading a_b\.jpg \(\d+\.\d kB\) to {temporary}", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("name", "reply", "message"),
    [
        ("a.jpg", Reply(status=404), r"can't fetch http.*/a\.jpg: 127.0.0.1 answers 404"),
        ("a.jpg", Reply(b"<html>", headers={"Content-Type": "text/html"}), "the server sends a web page"),
        (
            "a.jpg",
            Reply(b"{}", headers={"Content-Type": "application/json"}),
            r"sends application/json, image/ or .* was",
        ),
        (
            "a.jpg",
            Reply(b"<svg/>", headers={"Content-Type": "image/svg+xml"}),
            r"can't read image http.*/a\.jpg: cannot id",
        ),
        (
            "a.eps",
            Reply(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
            r"can't read image http.*/a\.eps: cannot id",
        ),
        ("a.jpg", Reply(b"x" * 2000), "larger than the limit of 1,000 bytes"),
        ("a.jpg", Reply(b""), "the server sends an empty file"),
        ("a.mp4", Reply(b"x"), r"videos are read from files only: download http.*/a\.mp4 first"),
        ("a.MP4?b", Reply(b"x"), "videos are read from files only"),
    ],
)
def test_what_is_no_picture(server, predictor, monkeypatch, temporary, name, reply, message):
    monkeypatch.setattr(remote_images, "_LIMIT", 1000)
    server.files[f"/{name}"] = reply
    with pytest.raises(DataError, match=message):
        fetch_images([f"{server.url}/{name}"])
    with pytest.raises(DataError, match=message):
        predictor(f"{server.url}/{name}")
    gc.collect()
    assert list(temporary.iterdir()) == []


def test_huge_pictures_and_broken_ones_are_for_the_reader(server, predictor):
    server.files |= {"/huge.png": Reply(huge_png()), "/cut.png": Reply(encoded()[:-500])}
    errors = []
    for name in ("huge", "cut"):
        assert list(predictor.stream(f"{server.url}/{name}.png", on_error=errors.append)) == []
    assert ["pixels" in str(errors[0]), "truncated" in str(errors[1])] == [True, True]


def test_an_offline_picture(monkeypatch):
    monkeypatch.setenv("DINO_MIRROR", "http://127.0.0.1:9")
    with pytest.raises(
        DataError, match=r"can't fetch https://a\.com/b\.jpg \(Connection refused\)\. Give a file instead$"
    ):
        fetch_images(["https://a.com/b.jpg"])


@pytest.mark.parametrize("address", ["ftp://a.com/b.jpg", "file:///b.jpg", "http://a.com/b.jpg", "s3://a/b.jpg"])
def test_other_addresses_are_refused(predictor, address):
    assert is_remote(address)
    with pytest.raises(UserError, match=r"only https:// is allowed|HOST/PATH was expected"):
        predictor(address)


def test_paths_are_not_remote(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("https:/a.com").mkdir(parents=True)
    Path("https:/a.com/b.jpg").write_bytes(encoded())
    for path in ("https://a.com/b.jpg", r"C:\b.jpg", "C:/b.jpg", "b.jpg", "", "*.jpg", "photos", "a:b/c.jpg"):
        assert not is_remote(path)


def test_the_checkpoint_of_an_address(server, tmp_path):
    write_checkpoint(tmp_path / "model.pth")
    server.files["/model.pth"] = Reply((tmp_path / "model.pth").read_bytes())
    predictor = predict_files.make_predictor(f"{server.url}/model.pth", device="cpu")
    assert predictor.names == ["red", "green", "blue"]
    with pytest.raises(UserError, match="answers 404"):
        predict_files.make_predictor(f"{server.url}/absent.pth", device="cpu")

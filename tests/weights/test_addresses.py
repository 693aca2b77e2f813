import hashlib
import os
import socket
from pathlib import Path

import pytest
import torch

from dino.utils.files import DataError, UsageError, UserError
from dino.weights import addresses, locate, published
from dino.weights.addresses import published_path, repair

from ..file_server import Reply

pytestmark = pytest.mark.usefixtures("server")
BODY = b"weights"
SHA256 = hashlib.sha256(BODY).hexdigest()


@pytest.fixture
def mirror(server, monkeypatch):
    """The server stands for all hosts."""
    monkeypatch.setenv("DINO_MIRROR", server.url)
    return server


def test_a_path_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.pth", "dino_r50_4scale_12ep", "data:x"):
        Path(name).write_bytes(BODY)
        assert locate(name) == name
    assert locate(str(tmp_path / "a.pth")) == str(tmp_path / "a.pth")


@pytest.mark.parametrize(
    "address", ["ftp://a.com/b", "file:///b", "file:b", "s3://a/b", "data:,x", "javascript://a", "x1://"]
)
def test_unknown_schemes(address):
    schemes = "https://, hf://, timm://, torchvision://, detectron2://, package://"
    with pytest.raises(UserError, match=rf"can't use the address {address}: give a file, .*begins with {schemes}$"):
        locate(address)


@pytest.mark.parametrize(
    "path", [r"C:\weights\a.pth", "C:/weights/a.pth", "c://a.pth", "run:1/a.pth", "", "a\0b", "x" * 9999]
)
def test_what_is_no_address_is_a_path(path):
    with pytest.raises(DataError, match="weights not found: "):
        locate(path)


def test_addresses_that_pathlib_broke(mirror):
    for address in ("https://a.com/b/net.pth", "hf://a/b/net.pth", "timm://net", "package://some-weights"):
        assert repair(str(Path(address))) == address
        assert repair(address.replace("://", ":\\")) == address
        assert repair(address) == address
    assert repair("a/https:/b") == "a/https:/b"
    mirror.files["/a.com/b/net.pth"] = Reply(BODY)
    assert Path(locate(str(Path("https://a.com/b/net.pth")))).read_bytes() == BODY


def test_https(mirror, tmp_path):
    mirror.files["/a.com/b/net-00000000.pth"] = Reply(BODY)
    path = locate("HTTPS://a.com/b/net-00000000.pth")
    assert path == str(tmp_path / "cache/a.com/b/net-00000000.pth")
    assert locate(f"https://a.com/b/net-00000000.pth#sha256={SHA256[:10]}") == path
    with pytest.raises(UserError, match="is damaged, or another file"):
        locate("https://a.com/b/net-00000000.pth#sha256=00000000")
    for fragment in ("x", "sha256=", "sha256=xyz", "sha256=123", "md5=00000000"):
        with pytest.raises(UserError, match=r"#sha256=DIGITS, 8 to 64 of them, was expected in the address"):
            locate(f"https://a.com/b/net-00000000.pth#{fragment}")


@pytest.mark.parametrize("host", ["download.pytorch.org", "download.openmmlab.com"])
def test_hashes_in_names(mirror, host):
    mirror.files |= {f"/{host}/n-{digits}.pth": Reply(BODY) for digits in (SHA256[:8], "00000000")}
    assert locate(f"https://{host}/n-{SHA256[:8]}.pth")
    with pytest.raises(UserError, match="00000000 was expected"):
        locate(f"https://{host}/n-00000000.pth")


def test_http_is_for_this_machine(server):
    server.files["/net.pth"] = Reply(BODY)
    assert Path(locate(f"{server.url}/net.pth")).read_bytes() == BODY
    with pytest.raises(UserError, match="only https:// is allowed"):
        locate("http://a.com/net.pth")


@pytest.mark.parametrize(
    ("address", "path"),
    [
        ("hf://org/my.repo/net.pth", "/org/my.repo/resolve/main/net.pth"),
        ("hf://org/repo/a b/c/net.pth@v1.0", "/org/repo/resolve/v1.0/a%20b/c/net.pth"),
        ("hf://org/repo@refs/net.pth", "/org/repo/resolve/refs/net.pth"),
        ("hf://org/repo/net.pth@refs/pr/1", "/org/repo/resolve/refs%2Fpr%2F1/net.pth"),
    ],
)
def test_the_hub(mirror, tmp_path, address, path):
    mirror.files[f"/huggingface.co{path}"] = Reply(BODY)
    found = Path(locate(address))
    assert found.read_bytes() == BODY
    assert found.is_relative_to(tmp_path / "cache/huggingface.co")


@pytest.mark.parametrize(
    "address",
    [
        *("hf://", "hf://a", "hf://a/..", "hf://a/b/", "hf:///b/c", "hf://../b/c", "hf://a/../c", "hf://a/b/../c"),
        *(
            "hf://a/b/c@../d",
            "hf://a/b//c",
            "hf://a b/c/d",
            "hf://a/b@/c",
            "hf://a/b/c@",
            "hf://a/b/c@d@e",
            "hf://a/b@c/d@e",
        ),
    ],
)
def test_what_is_no_file_of_the_hub(address):
    with pytest.raises(UserError, match=r"hf://ORG/REPO/FILE\[@REVISION\] was expected, not hf://"):
        locate(address)


def test_the_token_of_the_hub(server, tmp_path, monkeypatch):
    """It goes to the hub, not to the host where the hub keeps its files."""
    other = f"http://localhost:{server.server_port}/lfs"
    linked = {"Location": other, "X-Linked-Etag": f'"{SHA256}"'}
    server.files |= {f"/a/b/resolve/main/{n}": Reply(status=302, headers=linked) for n in "cde"}
    server.files["/lfs"] = Reply(BODY)
    monkeypatch.setenv("HF_ENDPOINT", f"{server.url}/")
    locate("hf://a/b/c")
    (tmp_path / "huggingface").mkdir()
    (tmp_path / "huggingface/token").write_text("of_the_file\n")
    locate("hf://a/b/d")
    monkeypatch.setenv("HF_TOKEN", "of_the_variable")
    locate("hf://a/b/e")
    assert [headers.get("Authorization") for _, headers in server.requests] == [
        *(None, None, "Bearer of_the_file", None, "Bearer of_the_variable", None)
    ]
    monkeypatch.setenv("HF_TOKEN", "a\nb")
    with pytest.raises(UserError, match=r"HF_TOKEN, or the file .*, is no token") as error:
        locate("hf://a/b/f")
    assert "a\nb" not in str(error.value)
    server.files |= {"/lfs": Reply(b"others"), "/a/b/resolve/main/g": Reply(status=302, headers=linked)}
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match=f"SHA-256 is .*, {SHA256} was expected"):
        locate("hf://a/b/g")


@pytest.mark.parametrize("revision", ["main", "1" * 40])
def test_the_hubs_own_cache(server, tmp_path, monkeypatch, revision):
    folder = tmp_path / "huggingface/hub/models--a--b"
    file = folder / f"snapshots/{'1' * 40}/c/net.pth"
    file.parent.mkdir(parents=True)
    file.write_bytes(BODY)
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text("1" * 40)
    assert locate(f"hf://a/b/c/net.pth@{revision}") == str(file)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"can't fetch https://huggingface.co/a/b/resolve/.* \(HF_HUB_OFFLINE is set\)"):
        locate(f"hf://a/b/c/other.pth@{revision}")
    (folder / "refs/main").write_text("../../../../..")
    assert addresses._commit(folder, "main") == "none"
    assert server.requests == []


def test_detectron2_without_detectron2(mirror, tmp_path):
    mirror.files["/dl.fbaipublicfiles.com/detectron2/a/R-50.pkl"] = Reply(BODY)
    assert Path(locate("detectron2://a/R-50.pkl")).read_bytes() == BODY
    old = tmp_path / "fvcore/detectron2/a/R-101.pkl"
    old.parent.mkdir(parents=True)
    old.write_bytes(BODY)
    assert locate("detectron2://a/R-101.pkl") == str(old)
    (tmp_path / "secret").write_bytes(BODY)
    for path in ("../../secret", "%2e%2e/%2e%2e/secret", "/../../../secret"):
        with pytest.raises(UserError, match="404"):
            locate(f"detectron2://{path}")


def test_timms_names(mirror, tmp_path, monkeypatch):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    mirror.files["/huggingface.co/timm/convnext_tiny.fb_in1k/resolve/main/model.safetensors"] = Reply(BODY)
    assert Path(locate("timm://convnext_tiny.fb_in1k")).name == "model.safetensors"
    config = timm.get_pretrained_cfg("convnext_tiny.fb_in1k")
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda _: type(config)(url="https://a.com/net.pth"))
    mirror.files["/a.com/net.pth"] = Reply(BODY)
    assert Path(locate("timm://convnext_tiny.fb_in1k")) == tmp_path / "cache/a.com/net.pth"


ENTRY = published.Published(
    **dict.fromkeys(published.Published._fields, ""),
)._replace(
    name="dino_x", address="https://a.com/x.pth", file="x.pth", page="https://a.com/page", size=len(BODY), sha256=SHA256
)


@pytest.fixture
def table(monkeypatch):
    """A table of two names, in place of the real one."""
    entries = {
        "dino_x": ENTRY,
        "dino_y": ENTRY._replace(name="dino_y", address="", file="y.pth", size=None, sha256=SHA256[:8]),
    }
    monkeypatch.setattr(published, "PUBLISHED", entries)
    monkeypatch.setattr(published, "find", entries.get)


def test_published_names(mirror, table, tmp_path, monkeypatch):
    mirror.files["/a.com/x.pth"] = Reply(BODY)
    assert locate("dino_x") == str(tmp_path / "cache/a.com/x.pth")
    monkeypatch.chdir(tmp_path)
    Path("dino_x").write_bytes(b"mine")
    assert locate("dino_x") == "dino_x"


def test_a_published_file_that_is_not_the_published_one(mirror, table, tmp_path):
    mirror.files["/a.com/x.pth"] = Reply(b"WEIGHTS")
    with pytest.raises(UserError, match=rf"x\.pth was damaged on its way, .*{SHA256} was expected\. Nothing was kept"):
        locate("dino_x")


def test_published_files_without_a_plain_address(table, tmp_path):
    place = tmp_path / "cache/published/y.pth"
    with pytest.raises(
        UserError,
        match=rf"dino_y can't be downloaded .* Get y\.pth from https://a\.com/page and put it into {place}, or",
    ):
        locate("dino_y")
    assert place == published_path(published.PUBLISHED["dino_y"])
    place.parent.mkdir(parents=True)
    place.write_bytes(BODY)
    assert locate("dino_y") == str(place)
    place.write_bytes(b"other")
    with pytest.raises(UserError, match=rf"{place} is damaged, or another file: .*Remove it"):
        locate("dino_y")


def test_a_published_file_put_there_by_hand(server, table):
    published_path(ENTRY).parent.mkdir(parents=True)
    published_path(ENTRY).write_bytes(BODY)
    assert locate("dino_x") == str(published_path(ENTRY))
    assert server.requests == []


def test_near_names(table):
    with pytest.raises(
        DataError, match=r"weights not found: dino_z\. Did you mean dino_[xy] or dino_[xy]\? See `dino weights`"
    ):
        locate("dino_z")
    with pytest.raises(DataError, match=r"not found: absent\.pth\. For names of published weights, see `dino weights`"):
        locate("absent.pth")


def test_without_a_network_the_published_file_is_named(table, tmp_path, monkeypatch):
    def offline(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", offline)
    with pytest.raises(
        UserError, match=rf"can't fetch https://a\.com/x\.pth .* put it into {tmp_path}/cache/a\.com/x\.pth"
    ):
        locate("dino_x")


def test_torch_hubs_cache_has_no_way_out(mirror, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    (tmp_path / "hub/secret").write_bytes(BODY)
    with pytest.raises(UserError, match="404"):
        locate("https://download.pytorch.org/%2e%2e%2fsecret")
    (tmp_path / "hub/checkpoints/secret").write_bytes(BODY)
    assert os.path.samefile(locate("https://download.pytorch.org/models/secret"), tmp_path / "hub/checkpoints/secret")


def write_run(folder, *names):
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(BODY)
    return folder


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["model_best.pth", "model_final.pth", "model_0000009.pth"], "model_best.pth"),
        (["model_final.pth", "model_0000009.pth"], "model_final.pth"),
        (["model_0000009.pth", "model_0000019.pth", "model_0000100.pth.part"], "model_0000019.pth"),
    ],
)
def test_the_folder_of_a_run(tmp_path, capsys, names, chosen):
    run = write_run(tmp_path / "a run", *names)
    assert locate(str(run)) == locate(run) == str(run / chosen)
    assert capsys.readouterr().err == f"{run}: taking {chosen}\n"  # once


def test_the_last_checkpoint_of_a_run_stays_in_its_folder(tmp_path):
    run = write_run(tmp_path / "run", "model_0000009.pth", "model_0000019.pth")
    (run / "last_checkpoint").write_text("model_0000009.pth")
    assert locate(str(run)) == str(run / "model_0000009.pth")
    (tmp_path / "model.pth").write_bytes(BODY)
    for name in ("../model.pth", str(tmp_path / "model.pth"), "model_0000029.pth", "\0"):
        (run / "last_checkpoint").write_text(name)
        assert locate(str(run)) == str(run / "model_0000019.pth")


def test_folders_without_a_checkpoint_and_other_files(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="this folder holds no checkpoint"):
        locate(str(write_run(tmp_path / "empty", "model.txt")))
    for name in ("photo.JPG", "val.json", "recipe.py", "config.yaml", "net.onnx"):
        (tmp_path / name).write_bytes(BODY)
        with pytest.raises(UsageError, match="not a checkpoint"):
            locate(str(tmp_path / name))
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "own.pth").write_bytes(BODY)
    assert locate("~/own.pth") == str(tmp_path / "own.pth")


def test_published_weights_that_have_moved(mirror):
    entry = published.PUBLISHED["dino_r50_4scale_12ep"]
    with pytest.raises(UserError) as caught:
        locate(entry.name)
    for words in ("answers 404", f"its page is {entry.page}", "DINO_MIRROR names another server"):
        assert words in str(caught.value)

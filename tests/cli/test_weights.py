"""`dino weights`: the list, one entry, and its download from a server on this machine."""

import pytest

from dino import cli
from dino.weights.addresses import published_path
from dino.weights.downloads import cached_path
from dino.weights.published import NOT_READ, PUBLISHED

from ..file_server import Reply


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DINO_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("DINO_MIRROR", raising=False)
    return tmp_path / "cache"


def run(capsys, *arguments):
    code = cli.main(["weights", *arguments])
    captured = capsys.readouterr()
    return code, captured.out.splitlines(), captured.err


def write(path, size):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(size))


def rows_of(lines):
    return {line.split()[0]: line for line in lines if line.startswith("dino_")}


def test_the_list(capsys, cache):
    code, lines, _ = run(capsys)
    rows = rows_of(lines)
    assert code == 0
    assert list(rows) == [*PUBLISHED, *NOT_READ]
    assert rows["dino_r50_4scale_12ep"].split()[1:] == ["49.2", "191", "detrex", "download"]
    assert rows["dino_r50_4scale_12ep_official"].split()[1:] == ["49.0", "188", "official", "by", "hand"]
    assert f"0 files with 0 MB in the cache: {cache}" in lines
    assert max(len(line) for line in lines if str(cache) not in line) <= 82


def test_files_that_are_here_have_their_own_size(capsys):
    write(cached_path(PUBLISHED["dino_r50_4scale_12ep"].address), 3_000_000)
    write(published_path(PUBLISHED["dino_r50_5scale_12ep_official"]), 1_000_000)
    _, lines, _ = run(capsys, "r50")
    rows = rows_of(lines)
    assert list(rows) == [name for name in PUBLISHED if "r50" in name]
    assert rows["dino_r50_4scale_12ep"].split()[2:] == ["3", "detrex", "in", "cache"]
    assert rows["dino_r50_5scale_12ep_official"].split()[2:] == ["1", "official", "in", "cache"]
    assert any(line.startswith("2 files with 4 MB in the cache") for line in lines)


def test_one_entry(capsys):
    _, lines, _ = run(capsys, "dino_r50_4scale_12ep_tuned_300dn")
    text = "\n".join(lines)
    entry = PUBLISHED["dino_r50_4scale_12ep_tuned_300dn"]
    assert lines[0] == entry.name
    for fact in ("50.0 on COCO", "detrex, Apache-2.0", "temperature 10000, offset -0.5", entry.address, entry.page):
        assert fact in text
    assert " ".join(text.split()).count(entry.note) == 1
    assert max(len(line) for line in lines if "https://" not in line) <= 80


def test_an_entry_to_fetch_by_hand(capsys):
    place = published_path(PUBLISHED["dino_r50_4scale_36ep_official"])
    _, lines, _ = run(capsys, "dino_r50_4scale_36ep")  # the only file of this recipe
    text = " ".join(" ".join(lines).split())
    assert f"get checkpoint0033_4scale.pth from the page and put it into {place}" in text
    assert "91 (COCO's raw ids)" in text
    write(place, 5_000_000)
    text = " ".join(" ".join(run(capsys, "dino_r50_4scale_36ep")[1]).split())
    assert "size 5 MB" in text
    assert text.endswith(f"file {place}")


def test_download(capsys, monkeypatch, server):
    entry = PUBLISHED["dino_swin_t_224_4scale_12ep"]
    monkeypatch.setenv("DINO_MIRROR", server.url)
    server.files["/" + entry.address.removeprefix("https://")] = Reply(b"weights")
    code, lines, _ = run(capsys, entry.name, "--download")
    assert (code, lines) == (0, [str(cached_path(entry.address))])
    assert cached_path(entry.address).read_bytes() == b"weights"


def test_files_that_are_not_read(capsys):
    code, lines, _ = run(capsys, "internimage")
    assert (code, len(rows_of(lines)), lines[-1]) == (0, 4, "`dino weights NAME` says more.")
    assert rows_of(lines)["dino_internimage_s_4scale_12ep"].split()[1:] == ["53.6", "-", "detrex", "not", "read"]
    _, lines, _ = run(capsys, "dino_eva_01_4scale_12ep")
    text = " ".join(" ".join(lines).split())
    for fact in ("59.1 on COCO", NOT_READ[lines[0]].address, "this project has no EVA-01 backbone; detrex has"):
        assert fact in text


@pytest.mark.parametrize(
    ("arguments", "expected", "message"),
    [
        (["dino_internimage_t_4scale_12ep", "--download"], 1, "this project has no InternImage-Tiny backbone; detrex"),
        (
            ["dino_r50_4scale_36ep", "--download"],
            1,
            "can't be downloaded by a program. Get checkpoint0033_4scale.pth from",
        ),
        (["dino_r50_4scale12ep"], 2, "weights not found: dino_r50_4scale12ep. Did you mean dino_r50_4scale_12ep"),
        (["yolo"], 2, "weights not found: yolo"),
        (["swin", "--download"], 2, "weights not found: swin"),
    ],
)
def test_errors(capsys, arguments, expected, message):
    code, lines, error = run(capsys, *arguments)
    assert (code, lines) == (expected, [])
    assert message in error


def test_a_download_needs_a_name(capsys):
    with pytest.raises(SystemExit):
        cli.main(["weights", "--download"])
    assert "--download needs a name" in capsys.readouterr().err
